"""ONNX exports give what torch gives, at any size, under the names that optimum's pipelines ask for."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from vaes import vae_fields

from sdvae.checkpoints.convert import onnx as module
from sdvae.checkpoints.convert.onnx import OnnxReport, export_onnx
from sdvae.checkpoints.fit import autoencoder_digest
from sdvae.errors import CheckpointError, ConfigError, OutputExistsError
from sdvae.model.autoencoder import AutoencoderKL

LAYOUTS: dict[str, dict[str, Any]] = {
    "f8": {"block_out_channels": (4, 8, 8, 8), "shift_factor": 0.1},
    "f2": {  # FLUX's and SD3's layout has no quant convs
        "block_out_channels": (4, 8),
        "latent_channels": 3,
        "act_fn": "mish",
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "mid_block_add_attention": False,
    },
}

# what is exported in a quarter of the time, where the network does not matter
SMALL: dict[str, Any] = {"block_out_channels": (4,), "mid_block_add_attention": False}


def build(fields: dict[str, Any], seed: int = 0) -> AutoencoderKL:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        vae = AutoencoderKL(**vae_fields(*fields["block_out_channels"], **{"norm_num_groups": 2} | fields))
        for parameter in vae.parameters():  # norms that differ from one another, and biases that are not 0
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.rand_like(parameter))
    return vae.eval()


Export = tuple[AutoencoderKL, Path, OnnxReport]


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Export]:
    made = {}
    for name, fields in LAYOUTS.items():
        vae, folder = build(fields), tmp_path_factory.mktemp(name)
        made[name] = (vae, folder, export_onnx(vae, folder))
    return made


@pytest.fixture(params=LAYOUTS)
def export(request: pytest.FixtureRequest, exports: dict[str, Export]) -> Export:
    return exports[request.param]


def run(folder: Path, part: str, given: torch.Tensor) -> torch.Tensor:
    session = onnxruntime.InferenceSession(folder / f"vae_{part}" / "model.onnx", providers=["CPUExecutionProvider"])
    found: NDArray[Any] = session.run(None, {session.get_inputs()[0].name: given.numpy()})[0]
    return torch.from_numpy(found)


@pytest.mark.parametrize(
    ("batch", "height", "width"),
    # one latent position; sides that are no multiple of the compression; a map that our GroupNorm treats apart
    [(1, 8, 8), (2, 71, 101), (4, 40, 16), (1, 136, 144)],
)
def test_both_models_give_what_torch_gives_at_any_size(export: Export, batch: int, height: int, width: int) -> None:
    vae, folder, _ = export
    x = torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        moments = vae.encode(x).latent_dist.parameters
        z = moments[:, : vae.config.latent_channels]
        recon = vae.decode(z).sample
    torch.testing.assert_close(run(folder, "encoder", x), moments, rtol=0, atol=2e-5)
    torch.testing.assert_close(run(folder, "decoder", z), recon, rtol=0, atol=5e-5)


def test_names_and_axes_are_those_of_optimum(exports: dict[str, Export]) -> None:
    _, folder, report = exports["f8"]
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.*")) == [
        "vae_decoder/config.json",
        "vae_decoder/model.onnx",
        "vae_encoder/config.json",
        "vae_encoder/model.onnx",
    ]
    assert [(p.path, p.input, p.input_axes, p.output, p.output_axes) for p in report.parts] == [
        (
            "vae_encoder/model.onnx",
            "sample",
            ("batch_size", 3, "sample_height", "sample_width"),
            "latent_parameters",
            ("batch_size", 8, "sample_height / 8", "sample_width / 8"),
        ),
        (
            "vae_decoder/model.onnx",
            "latent_sample",
            ("batch_size", 4, "latent_height", "latent_width"),
            "sample",
            ("batch_size", 3, "latent_height * 8", "latent_width * 8"),
        ),
    ]


def test_the_models_say_what_they_are(export: Export) -> None:
    vae, folder, report = export
    for part in ("encoder", "decoder"):
        model = onnx.load(folder / f"vae_{part}" / "model.onnx")
        assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", report.opset)]
        said = {entry.key: entry.value for entry in model.metadata_props}
        assert said["sdvae.part"] == part
        assert said["sdvae.vae_digest"] == report.vae_digest == autoencoder_digest(vae)
        assert json.loads(said["sdvae.scaling_factor"]) == vae.config.scaling_factor
        assert json.loads(said["sdvae.shift_factor"]) == vae.config.shift_factor
        # the folder of a part describes the VAE well enough to build it
        assert AutoencoderKL.load_config(folder / f"vae_{part}")["latent_channels"] == vae.config.latent_channels


def test_the_models_hold_no_path_of_the_machine_that_made_them(export: Export) -> None:
    _, folder, _ = export
    for path in folder.rglob("model.onnx"):
        data = path.read_bytes()
        assert not any(word in data for word in (b".py", b"site-packages", str(folder).encode(), b"stack_trace"))


def test_exporting_again_gives_the_same_bytes(exports: dict[str, Export], tmp_path: Path) -> None:
    _, _, report = exports["f2"]
    assert export_onnx(build(LAYOUTS["f2"]), tmp_path) == report
    assert report.parts[0].sha256 != report.parts[1].sha256


def test_a_float16_export_has_float16_inputs_and_outputs_and_stays_near(tmp_path: Path) -> None:
    notes = {"license": "apache-2.0", "source": "test"}
    fields = {"block_out_channels": (4,), "mid_block_add_attention": True}
    report = export_onnx(build(fields), tmp_path, dtype=torch.float16, opset=21, notes=notes)
    assert (report.dtype, report.opset) == ("float16", 21)
    assert 0 < report.max_relative_error < 3e-3
    for path in tmp_path.rglob("model.onnx"):
        model = onnx.load(path)
        kinds = {value.type.tensor_type.elem_type for value in (*model.graph.input, *model.graph.output)}
        assert kinds == {onnx.TensorProto.FLOAT16}
        said = {entry.key: entry.value for entry in model.metadata_props}
        assert json.loads(said["sdvae.notes"]) == notes
        assert json.loads(path.with_name("config.json").read_text())["_sdvae"] == notes
    x = torch.rand(1, 3, 32, 32) * 2 - 1
    assert run(tmp_path, "encoder", x.half()).dtype == torch.float16


def test_the_report_is_plain_data_with_the_errors(exports: dict[str, Export]) -> None:
    _, _, report = exports["f8"]
    data = json.loads(json.dumps(report.to_json()))
    checks = [check for part in data["parts"] for check in part["checks"]]
    assert [(c["batch"], c["height_px"], c["width_px"]) for c in checks] == [
        (1, 64, 64),
        (2, 72, 104),
        (3, 160, 48),
    ] * 2
    assert data["max_relative_error"] == max(check["relative_error"] for check in checks) <= data["tolerance"] / 10
    assert all(check["finite"] for check in checks)


def test_a_model_of_other_weights_fails_the_check(exports: dict[str, Export]) -> None:
    vae, folder, _ = exports["f8"]
    other = build(LAYOUTS["f8"])
    with torch.no_grad():
        other.decoder.conv_in.weight[0, 0, 0, 0] += 0.01
    module.check_part(other, folder, "encoder", torch.float32)
    with pytest.raises(CheckpointError, match="vae_decoder/model.onnx: differs from torch by"):
        module.check_part(other, folder, "decoder", torch.float32)


def test_a_model_bound_to_the_size_of_its_trace_is_not_let_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.export, "Dim", lambda name: None)  # every axis becomes a constant
    with pytest.raises(CheckpointError, match="ONNX encoder does not run on 1 x 16 x 16: .* invalid dimensions"):
        export_onnx(build(SMALL | {"block_out_channels": (4, 8)}), tmp_path)


def test_large_models_keep_their_weights_beside_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_EXTERNAL_FROM_BYTES", 1000)
    folder, moved, vae = tmp_path / "made", tmp_path / "moved", build(SMALL)
    folder.mkdir()
    report = export_onnx(vae, folder)
    assert all(part.external_weights and part.size_bytes > 1000 for part in report.parts)
    assert (folder / "vae_encoder" / "model.onnx_data").is_file()
    folder.rename(moved)  # the models name the file beside them, not a path
    x = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(run(moved, "encoder", x), vae.encode(x).latent_dist.parameters, rtol=0, atol=2e-5)


def test_a_second_implementation_of_onnx_gives_the_same(exports: dict[str, Export]) -> None:
    from onnx.reference import ReferenceEvaluator

    vae, folder, _ = exports["f8"]
    x = torch.rand(2, 3, 16, 24) * 2 - 1
    with torch.no_grad():
        moments = vae.encode(x).latent_dist.parameters.numpy()
    (found,) = ReferenceEvaluator(str(folder / "vae_encoder" / "model.onnx")).run(None, {"sample": x.numpy()})
    np.testing.assert_allclose(found, moments, rtol=0, atol=2e-5)


def _spoil(vae: AutoencoderKL, value: float) -> None:
    with torch.no_grad():
        vae.decoder.conv_out.weight[0, 0, 0, 0] = value


@pytest.mark.parametrize(
    ("damage", "options", "error", "message"),
    [
        (lambda vae: None, {"dtype": torch.bfloat16}, ConfigError, "float32 or torch.float16"),
        (lambda vae: None, {"opset": 17}, ConfigError, "opset is 17; expected 18 to 23"),
        (lambda vae: _spoil(vae, float("nan")), {}, CheckpointError, "`decoder.conv_out.weight` has values"),
        (lambda vae: _spoil(vae, 1e5), {"dtype": torch.float16}, CheckpointError, "not finite as torch.float16"),
    ],
)
def test_what_cannot_be_exported_is_refused_before_anything_is_written(
    tmp_path: Path,
    damage: Callable[[AutoencoderKL], None],
    options: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    vae = build(LAYOUTS["f2"])
    damage(vae)
    with pytest.raises(error, match=message):
        export_onnx(vae, tmp_path, **options)
    assert not any(tmp_path.iterdir())


def test_a_folder_with_something_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match="empty folder"):
        export_onnx(build(LAYOUTS["f2"]), tmp_path)


def test_a_missing_package_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ConfigError, match=r"onnxruntime is not installed: pip install 'sdvae\[onnx\]'"):
        export_onnx(build(LAYOUTS["f2"]), tmp_path)
