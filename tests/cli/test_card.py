"""sdvae card and sdvae push as a user calls them, after sdvae train and sdvae evaluate."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from sdvae.cli.main import cli
from sdvae.report.result import load_result

MakeImages = Callable[[Path, Mapping[str, tuple[int, int]]], Path]
MakeVae = Callable[..., Path]


def sdvae(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def json_of(result: Result) -> dict[str, Any]:
    data = json.loads(result.stdout)
    assert isinstance(data, dict)
    return data


def test_a_trained_and_evaluated_vae_gets_its_card_and_can_be_pushed(tmp_path: Path, make_images: MakeImages) -> None:
    photos = make_images(tmp_path / "photos", {f"{index}.png": (64, 48) for index in range(5)})
    run, report = tmp_path / "run", tmp_path / "report"
    settings = {
        "run_dir": str(run),
        "data": {"path": str(photos), "num_val_images": 1, "crop_px": 32},
        "model": {"block_out_channels": [4, 8], "norm_num_groups": 2, "layers_per_block": 1},
        "training": {"steps": 2, "batch_size": 2, "num_calibration_images": 2, "cpu": True, "trackers": []},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    assert sdvae("train", tmp_path / "config.yaml").exit_code == 0
    vae = run / "vae"
    evaluated = sdvae("evaluate", photos, "--vae", vae, "--out", report, "--metrics", "psnr,ssim", "--device", "cpu")
    assert evaluated.exit_code == 0, evaluated.output

    arguments = ("card", vae, "--run", run, "--evaluation", report, "--license", "mit", "--repo", "me/fine")
    preview = sdvae(*arguments, "--dry-run")
    assert preview.exit_code == 0, preview.output
    assert not (vae / "README.md").exists() and "(new). Nothing was written." in preview.stderr
    written = sdvae(*arguments)
    assert (written.exit_code, written.stdout) == (0, f"{vae}/README.md: new\n")
    text = (vae / "README.md").read_text(encoding="utf-8")
    assert text == preview.stdout
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    psnr = next(row["val/psnr"] for row in logged if "val/psnr" in row and row["step"] == 2)
    measured = load_result(report / "result.json").vaes[0]["summary"]["psnr"]
    assert "These weights are the run's `vae`" in text and "| steps | 2 of 2 planned |" in text
    assert f"| PSNR (dB) ↑ | {psnr:.4g} |" in text
    assert f"| PSNR (dB) ↑ | {measured['mean']:.2f} [{measured['low']:.2f}, {measured['high']:.2f}] |" in text
    assert "from draws of z of 2 training crops" in text and str(tmp_path) not in text

    pushed = sdvae("push", vae, "me/fine", "--dry-run")
    assert pushed.exit_code == 0, pushed.output
    assert pushed.stdout.endswith("Would push 3 files to me/fine. Nothing was uploaded.\n")


def test_an_audit_of_this_vae_fills_the_section_on_half_precision(tmp_path: Path, make_vae: MakeVae) -> None:
    half = tmp_path / "half"  # a digest is that of the stored weights, not of those that the audit computes with
    assert sdvae("convert", make_vae(), half, "--dtype", "float16").exit_code == 0
    audit = tmp_path / "audit"
    checked = sdvae("check", half, "--out", audit, "--limit", 3, "--size", 40, "--probe-size", 16, "--device", "cpu")
    assert checked.exit_code == 0, checked.output
    text = sdvae("card", half, "--audit", audit, "--dry-run").stdout
    assert text == sdvae("card", half, "--audit", audit / "audit.json", "--dry-run").stdout
    assert "peaks of all layers on 3 images, central squares of 40 px, on cpu; formats tried on 2 images of 16" in text
    said = [verdict["sentence"] for verdict in json.loads((audit / "audit.json").read_text())["verdicts"]]
    assert f"of 16 px:\n\n- {said[2]}\n- {said[1]}\n" in text
    assert said[2].startswith("fp16: safe") and said[1].startswith("bf16: safe")
    refused = sdvae("card", make_vae("other"), "--audit", audit)
    assert refused.exit_code == 2 and "the audit measured another VAE" in refused.stderr


def test_json_names_what_is_missing(make_vae: MakeVae) -> None:
    vae = make_vae()
    data = json_of(sdvae("card", vae, "--json", "--dry-run"))
    assert data.keys() == {"command", "dry_run", "path", "status", "missing", "text"}
    assert (data["status"], data["path"]) == ("new", str(vae / "README.md"))
    assert "quality: not measured" in data["missing"]
    result = sdvae("card", vae)
    assert "Missing: quality: not measured\n" in result.stderr
    assert "not measured; `sdvae check VAE --out DIR` does that" in result.stderr
    assert json_of(sdvae("card", vae, "--json"))["status"] == "up to date"
    nameless = sdvae("push", vae, "me/fine", "--dry-run")
    assert nameless.exit_code == 2 and f"sdvae card {vae} --repo me/fine" in nameless.stderr
    assert sdvae("card", vae, "--repo", "me/fine").exit_code == 0
    pushed = json_of(sdvae("push", vae, "me/fine", "--dry-run", "--json"))
    assert pushed.keys() == {
        "command", "dry_run", "folder", "repo", "vae_digest", "files", "not_uploaded", "url",
    }  # fmt: skip
    assert [file["name"] for file in pushed["files"]] == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "README.md",
    ]


@pytest.mark.parametrize(
    ("arguments", "exit_code", "message"),
    [
        (("card", "{vae}", "--evaluation", "{vae}"), 2, "result.json: cannot be read"),
        (("card", "{vae}", "--audit", "{vae}"), 2, "audit.json: cannot be read"),
        (("card", "{vae}", "--audit", "{vae}/config.json"), 2, "config.json: no audit; expected the audit.json"),
        (("card", "{vae}", "--run", "{vae}"), 2, "config.yaml: cannot be read"),
        (("card", "nowhere"), 2, "nowhere is no folder of a VAE"),
        (("push", "{vae}", "me/fine"), 2, "write the model card first: sdvae card"),
        (("push", "nowhere", "me/fine"), 2, "nowhere is no folder on this machine"),
    ],
)
def test_what_cannot_work_is_explained(
    make_vae: MakeVae, arguments: tuple[str, ...], exit_code: int, message: str
) -> None:
    vae = make_vae()
    result = sdvae(*(argument.format(vae=vae) for argument in arguments))
    assert (result.exit_code, result.stdout) == (exit_code, "")
    assert message in result.stderr


def test_a_readme_of_other_hands_is_kept_unless_told_otherwise(make_vae: MakeVae) -> None:
    vae = make_vae()
    (vae / "README.md").write_text("# Mine")
    refused = sdvae("card", vae)
    assert refused.exit_code == 2 and "was not written by sdvae card" in refused.stderr
    assert sdvae("card", vae, "--overwrite").exit_code == 0
    assert (vae / "README.md").read_text(encoding="utf-8").startswith("---\nlibrary_name: diffusers")
