"""A model card says what the files say, names what they do not say, and is about one VAE.

The stored card is rewritten by `SDVAE_UPDATE_GOLDEN=1 python -m pytest tests/evaluation/test_card.py`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from sdvae._version import __version__
from sdvae.card.build import build_card, write_card
from sdvae.card.push import card_digest
from sdvae.card.result import load_audit
from sdvae.checkpoints.fit import autoencoder_digest
from sdvae.checkpoints.notes import update_config
from sdvae.checkpoints.store import load_autoencoder, save_autoencoder
from sdvae.errors import CheckpointError, ConfigError, OutputExistsError
from sdvae.model.autoencoder import AutoencoderKL
from sdvae.report.result import EvaluationResult, load_result

DATA = Path(__file__).parent / "data"
MakeVae = Callable[..., Path]


def fill(vae: AutoencoderKL) -> None:
    for parameter in vae.parameters():
        parameter.fill_(1 / 64)  # the same bits on every machine


@pytest.fixture
def vae(make_vae: MakeVae) -> Path:
    return make_vae("vae", damage=fill, shift_factor=0.25)


def digest_of(folder: Path) -> str:
    return autoencoder_digest(load_autoencoder(folder))


def result_for(folder: Path) -> EvaluationResult:
    """The stored result, as if it had measured this VAE."""
    result = load_result(Path(__file__).parents[1] / "report" / "data" / "result.json")
    result.vaes[0]["digest"] = digest_of(folder)
    result.dataset["source"] = "/home/someone/private/photos"
    return result


def audit_for(folder: Path, **changed: Any) -> Path:
    """audit.json, as if sdvae check had measured this VAE; fields that are changed to None are left out."""
    verdicts = {
        "float32": "fp32: safe, 121.7 bits of headroom at decoder.conv_in (peak 79.2)",
        "bfloat16": "bf16: safe, 121.7 bits of headroom at decoder.conv_in (peak 79.2); not tried: no kernel",
        "float16": "fp16: at risk, 0.2 bits of headroom at decoder.conv_in (peak 5.8e+04): another image may overflow",
    }
    data = {
        "command": "check", "vae": "somewhere", "digest": digest_of(folder), "device": "cuda", "num_images": 1234,
        "size_px": 192, "verdicts": [{"dtype": name, "sentence": said} for name, said in verdicts.items()],
        "hazards": ["encoder.mid_block: attention logits reach 7e+04 | <b>"],
        "probes": [
            {"dtype": "bfloat16", "error": "no kernel"}, {"dtype": "float16", "size_px": 48, "num_images": 2},
        ],
    }  # fmt: skip
    path = folder.parent / "audit.json"
    path.write_text(json.dumps({name: value for name, value in (data | changed).items() if value is not None}))
    return path


@pytest.fixture
def run(tmp_path: Path, vae: Path) -> Path:
    """The folder of a run whose last step is the VAE, and whose best step is another."""
    folder = tmp_path / "runs" / "mine"
    best = load_autoencoder(vae)
    with torch.no_grad():
        best.encoder.conv_in.bias.add_(1)
    save_autoencoder(load_autoencoder(vae), folder / "vae")
    save_autoencoder(best, folder / "vae-best")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "best.json").write_text('{"step": 500, "metric": "psnr", "value": 27.125}')
    config = {
        "run_dir": "/home/someone/runs/mine",
        "data": {"path": "/home/someone/private/train", "crop_px": 128},
        "training": {
            "steps": 1000, "batch_size": 4, "accumulation": 2, "init": "default", "trained": "all", "precision": "no",
            "num_calibration_images": 48, "lr": 0.0003,
        },
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    environment = {
        "sdvae": "1.2.3", "torch": "2.9.0", "python": "3.11.9", "device": "cuda", "num_processes": 8,
        "num_trained_parameters": 4321, "num_train_images": 56789, "num_val_images": 32,
    }  # fmt: skip
    (folder / "environment.json").write_text(json.dumps(environment))
    rows: list[dict[str, Any]] = [
        {"step": 500, "train/loss": 0.5},
        {"step": 500, "val/psnr": 27.125, "val/kl": 900.5},
        {"step": 1000, "train/loss": 0.4},
        {"step": 1000, "val/psnr": 26.0625, "val/lpips": 0.15625},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_the_card_is_the_stored_one(vae: Path, run: Path) -> None:
    update_config(vae, {}, {"license": "apache-2.0", "source": "older", "rewrites": ["fix-fp16: decoder 2^-3"]})
    text = build_card(vae, run=run, result=result_for(vae), audit=load_audit(audit_for(vae)), repo="me/fine").text
    # which programs take it is the subject of another module
    text = re.sub(r"\n## Programs.*?(?=\n## )", "", text, flags=re.DOTALL)
    text = re.sub(r"sdvae card, .*? -->", "sdvae card -->", text)
    path = DATA / "card.md"
    if os.environ.get("SDVAE_UPDATE_GOLDEN"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


def test_the_hub_reads_the_front_matter(vae: Path) -> None:
    card = ModelCard(build_card(vae, result=result_for(vae), license="mit", repo="me/fine").text)
    assert (card.data.license, card.data.library_name, card.data.model_name) == ("mit", "diffusers", "fine")
    assert {"autoencoder", "vae"} <= set(card.data.tags)
    results = {each.metric_type: each.metric_value for each in card.data.eval_results}
    assert results == {"psnr": 26.17, "ssim": 0.8944, "fid": 4.21}
    assert card.data.get("pipeline_tag") is None


def test_a_card_of_the_vae_alone_has_no_number_that_its_files_do_not_have(vae: Path) -> None:
    card = build_card(vae)
    config, text = load_autoencoder(vae).config, card.text.split("\n## Programs")[0]
    for phrase in (
        "## Training\n\nNot recorded here.",
        "## Evaluation\n\nNot measured.",
        "## Half precision\n\nNot measured.",
    ):
        assert phrase in card.text
    assert set(card.missing) == {
        "license: not stated",
        "training: not recorded",
        "scale: where scaling_factor comes from is not recorded",
        "quality: not measured",
        "float16 and bfloat16: not measured; `sdvae check VAE --out DIR` does that, `--audit DIR` adds it",
    }
    assert all(f"- {line}\n" in card.text for line in card.missing)
    assert "license" not in ModelCard(card.text).data.to_dict()
    weights = vae / "diffusion_pytorch_model.safetensors"
    num_parameters = sum(parameter.numel() for parameter in load_autoencoder(vae).parameters())
    given = [8, *config.block_out_channels, config.latent_channels, config.layers_per_block, config.norm_num_groups,
             config.in_channels, num_parameters]  # fmt: skip
    allowed = {f"{value:,}" for value in given} | {"0.18215", "0.25", "-1", "1"}
    allowed.add(f"{weights.stat().st_size / 1e6:.1f}")
    text = re.sub(r"sha256:\w+|f8c4|float32|shape\w*|\d+x lower", "", text)
    assert set(re.findall(r"(?<![\w.])-?\d[\d.,]*\d|(?<![\w.])-?\d", text)) <= allowed


def test_an_evaluation_or_run_of_another_vae_is_refused(vae: Path, run: Path, make_vae: MakeVae) -> None:
    other = make_vae("other")
    with pytest.raises(ConfigError, match=f"(?s)measured other VAEs than the one of the card, {digest_of(other)}"):
        build_card(other, result=result_for(vae))
    with pytest.raises(ConfigError, match=f"made another VAE than .*the folder {digest_of(other)}"):
        build_card(other, run=run)
    update_config(vae, {"scaling_factor": 0.5}, {})  # the latents are others now, and so are measurements of them
    with pytest.raises(ConfigError, match="another scale makes another VAE"):
        build_card(vae, result=result_for(make_vae("again", damage=fill, shift_factor=0.25)))


def test_an_audit_alone_says_what_is_known_of_half_precision(vae: Path) -> None:
    card = build_card(vae, audit=load_audit(audit_for(vae, num_images=1, hazards=[], probes=[])))
    section = card.text.split("## Half precision\n\n")[1].split("\n## ")[0]
    assert section.splitlines() == [
        "`sdvae check`, peaks of all layers on 1 image, central squares of 192 px, on cuda:",
        "",
        "- fp16: at risk, 0.2 bits of headroom at decoder.conv_in (peak 5.8e+04): another image may overflow",
        "- bf16: safe, 121.7 bits of headroom at decoder.conv_in (peak 79.2); not tried: no kernel",
    ]
    assert not any("float16" in line for line in card.missing) and "quality: not measured" in card.missing


def test_an_evaluation_without_a_precision_test_says_nothing_of_half_precision(vae: Path) -> None:
    result = result_for(vae)
    del result.vaes[0]["stress"]
    card = build_card(vae, result=result)
    assert "## Half precision\n\nNot measured.\n" in card.text and "float16" in card.missing[-1]


def test_an_audit_of_another_vae_is_refused(vae: Path, make_vae: MakeVae) -> None:
    audit, other = load_audit(audit_for(vae)), make_vae("other")
    with pytest.raises(ConfigError, match=f"another VAE than the one of the card, {digest_of(other)}: somewhere sha"):
        build_card(other, audit=audit)
    update_config(vae, {"scaling_factor": 0.5}, {})
    with pytest.raises(ConfigError, match="another scale makes another VAE; audit this one: sdvae check VAE --out DIR"):
        build_card(vae, audit=audit)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"command": "evaluate"}, "no audit"),
        ({"digest": None}, "its `digest` is missing or damaged"),
        ({"num_images": "four"}, "its `num_images` is missing or damaged"),
        ({"size_px": None}, "its `size_px` is missing or damaged"),
        ({"verdicts": None}, "its `verdicts` is missing or damaged"),
        ({"verdicts": ["fp16"]}, "its `dtype` is missing or damaged"),
        ({"verdicts": [{"dtype": "float16", "sentence": "fp16: safe"}]}, "its `bfloat16` is missing or damaged"),
        ({"probes": [{"dtype": "float16"}]}, "its `num_images` is missing or damaged"),
    ],
)
def test_a_damaged_audit_is_explained(vae: Path, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"audit.json: {message}; expected the audit.json of sdvae check VAE --out"):
        load_audit(audit_for(vae, **changed))


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[" * 100_000, b"", b'"text"'])
def test_a_file_that_is_no_audit_is_explained(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "audit.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"audit.json: (not JSON \(|no audit).*; expected the audit.json"):
        load_audit(tmp_path / "audit.json")


def test_numbers_of_training_are_those_of_the_step_that_made_the_weights(vae: Path, run: Path) -> None:
    last, best = build_card(vae, run=run).text, build_card(run / "vae-best", run=run).text
    assert "at step 1,000, on 32 held-out images" in last and "| PSNR (dB) ↑ | 26.06 |" in last
    assert "| LPIPS ↓ | 0.1562 |" in last and "27.12" not in last
    assert "at step 500" in best and "| PSNR (dB) ↑ | 27.12 |" in best and "26.06" not in best
    assert "draws of z of 48 training crops" in last


def test_a_scale_set_after_training_and_a_conversion_keep_the_run(vae: Path, run: Path, make_vae: MakeVae) -> None:
    update_config(vae, {"scaling_factor": 0.4}, {})
    assert "Where these numbers come from is not recorded." in build_card(vae, run=run).text
    note = {"num_images": 77, "standard_errors": {"scaling_factor": 0.0021}}
    update_config(vae, {"scaling_factor": 0.5}, {"calibration": note})
    text = build_card(vae, run=run).text
    assert "the scale was set anew afterwards" in text
    assert (
        "Measured by `sdvae calibrate`: `scaling_factor`, over 77 images; standard errors: scaling_factor 0.0021."
        in text
    )
    assert "48 training crops" not in text
    other = make_vae("other")
    update_config(other, {}, {"source_digest": digest_of(run / "vae"), "source": "vae"})
    text = build_card(other, run=run).text
    assert "made from the run's `vae`, see the history" in text and "26.06" not in text


def test_no_folder_of_this_machine_is_published(vae: Path, run: Path, tmp_path: Path) -> None:
    text = build_card(vae, run=run, result=result_for(vae)).text
    assert "someone" not in text and "private" not in text and str(tmp_path) not in text
    assert "6 images of photos" in text and "| images | train |" in text and "path: train" in text


def test_text_of_a_result_does_not_act_as_markup(vae: Path) -> None:
    result = result_for(vae)
    result.warnings = ["a | b\n<script>alert(1)</script>"]
    result.dataset["source"] = "pictures | <b>"
    text = build_card(vae, result=result).text
    assert r"a \| b &lt;script&gt;" in text and "<script>" not in text and r"of pictures \| &lt;b&gt;" in text


def test_a_metric_without_a_number_is_left_out(vae: Path) -> None:
    result = result_for(vae)
    result.metrics.append(result.metrics[0] | {"name": "ms_ssim", "title": "MS-SSIM"})
    assert "MS-SSIM" not in build_card(vae, result=result).text


def test_a_card_is_written_once_and_one_of_other_hands_is_kept(vae: Path, make_vae: MakeVae) -> None:
    card = build_card(vae)
    assert card_digest(card.text) == digest_of(vae)
    path, status = write_card(vae, card, dry_run=True)
    assert status == "new" and not path.exists()
    assert [write_card(vae, card)[1] for _ in range(2)] == ["new", "up to date"]
    licensed = build_card(vae, license="mit")
    assert write_card(vae, licensed)[1] == "replaced"
    path.write_text(licensed.text.replace("## Limits", "My own words.\n\n## Limits"), encoding="utf-8")
    with pytest.raises(OutputExistsError, match="was changed since sdvae card wrote it; replace it with --overwrite"):
        write_card(vae, card)
    path.write_text("# Mine", encoding="utf-8")
    with pytest.raises(OutputExistsError, match="was not written by sdvae card"):
        write_card(vae, card)
    assert path.read_text(encoding="utf-8") == "# Mine"
    assert write_card(vae, card, overwrite=True)[1] == "replaced"
    assert path.read_text(encoding="utf-8") == card.text and __version__ in card.text


def test_what_is_no_vae_folder_gets_no_card(vae: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no folder of a VAE"):
        build_card(tmp_path)
    with pytest.raises(ConfigError, match="sdvae convert .* DIR"):
        build_card(vae / "diffusion_pytorch_model.safetensors")
    (vae / "diffusion_pytorch_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="does not load"):
        build_card(vae)


@pytest.mark.parametrize("content", ["- a list", "a: [", None])
def test_a_folder_that_is_no_run_is_refused(vae: Path, run: Path, content: str | None) -> None:
    if content is None:
        (run / "config.yaml").unlink()
    else:
        (run / "config.yaml").write_text(content)
    with pytest.raises(ConfigError, match="config.yaml"):
        build_card(vae, run=run)


def test_a_run_without_environment_and_log_says_less(vae: Path, run: Path) -> None:
    for name in ("environment.json", "metrics.jsonl"):
        (run / name).unlink()
    text = build_card(vae, run=run).text
    assert "These weights are the run's `vae`" in text and "Validation" not in text and "software" not in text


def test_a_result_is_not_changed_by_its_card(vae: Path) -> None:
    result = result_for(vae)
    before = json.dumps(dataclasses.asdict(result))
    build_card(vae, result=result)
    assert json.dumps(dataclasses.asdict(result)) == before
