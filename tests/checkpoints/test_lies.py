"""Files that are not what they seem: each is refused with an error that names it, and nothing in it is run."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save, save_file
from vaes import build_vae

from sdvae.checkpoints.keys import to_ldm
from sdvae.checkpoints.read import read_checkpoint
from sdvae.checkpoints.store import load_autoencoder, save_autoencoder
from sdvae.cli.main import cli
from sdvae.errors import CheckpointError

WEIGHTS = "diffusion_pytorch_model.safetensors"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that loads, and whose weights load alone too."""
    vae = build_vae(32, 32, norm_num_groups=32)
    folder = save_autoencoder(vae, tmp_path_factory.mktemp("honest") / "vae")
    load_autoencoder(folder)
    load_autoencoder(shutil.copy(folder / WEIGHTS, folder.parent / "alone.safetensors"))
    return folder


def header_of(raw: bytes) -> dict[str, Any]:
    return json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])  # type: ignore[no-any-return]


def with_header(raw: bytes, header: dict[str, Any]) -> bytes:
    """The same data behind another header."""
    data = raw[8 + struct.unpack("<Q", raw[:8])[0] :]
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def overlapping(raw: bytes) -> bytes:
    header = header_of(raw)
    names = [name for name in header if name.endswith("norm1.weight")][:2]
    header[names[0]]["data_offsets"] = header[names[1]]["data_offsets"]
    return with_header(raw, header)


def another_shape(raw: bytes) -> bytes:
    """The header gives a tensor more values than its bytes hold."""
    header = header_of(raw)
    header["encoder.conv_in.bias"]["shape"] = [1 << 40]
    return with_header(raw, header)


def unknown_type(raw: bytes) -> bytes:
    header = header_of(raw)
    header["encoder.conv_in.bias"]["dtype"] = "F99"
    return with_header(raw, header)


def edited(**changes: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[bytes], bytes]:
    def edit(raw: bytes) -> bytes:
        from safetensors.torch import load

        tensors = load(raw)
        for name, change in changes.items():
            tensors[name] = change(tensors[name].clone())
        return save(tensors, {"format": "pt"})

    return edit


def rearranged(change: Callable[[Tensors], Tensors]) -> Callable[[bytes], bytes]:
    def edit(raw: bytes) -> bytes:
        from safetensors.torch import load

        return save({name: tensor.clone() for name, tensor in change(load(raw)).items()}, {"format": "pt"})

    return edit


def unet(tensors: Tensors) -> Tensors:
    names = ("conv_in.weight", "down_blocks.0.resnets.0.norm1.weight", "mid_block.attentions.0.proj_in.weight")
    return {name: torch.zeros(4) for name in names}


def fill(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: torch.where(torch.arange(tensor.numel()).view_as(tensor) == 1, value, tensor)


CONV = "decoder.conv_out.bias"
LIES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    # bytes
    "empty": (lambda raw: b"", "not a safetensors file"),
    "seven bytes": (lambda raw: raw[:7], "not a safetensors file"),
    "cut in its header": (lambda raw: raw[:100], "cut off in its header"),
    "cut in its data": (lambda raw: raw[:-1], "damaged: the file has"),
    "longer than promised": (lambda raw: raw + b"\0", "damaged: the file has"),
    "a header larger than the file": (
        lambda raw: struct.pack("<Q", len(raw)) + raw[8:],
        "not a safetensors file, or cut off in its header",
    ),
    "a header of 2^63 bytes": (lambda raw: struct.pack("<Q", 1 << 63) + raw[8:], "not a safetensors file"),
    "a header that is a list": (lambda raw: struct.pack("<Q", 2) + b"[]", "not a safetensors file"),
    "overlapping offsets": (overlapping, "cannot be read: .*"),
    "a shape that its bytes do not hold": (another_shape, "cannot be read: .*"),
    "a number format that nobody knows": (unknown_type, "cannot be read: .*"),
    "a Git LFS pointer": (lambda raw: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "git lfs"),
    "a web page": (lambda raw: b"<!DOCTYPE html><html>Sign in</html>", "not a safetensors file"),
    "a pickle with the wrong suffix": (lambda raw: b"PK\x03\x04" + bytes(64), r"give it the suffix \.bin or \.pt"),
    # values
    "NaN": (edited(**{CONV: fill(torch.nan)}), f"`{CONV}` has values that are not finite"),
    "infinity": (edited(**{CONV: fill(-torch.inf)}), f"`{CONV}` has values that are not finite"),
    "whole numbers": (edited(**{CONV: torch.Tensor.int}), rf"1 not floating point \({CONV} torch.int32\)"),
    "a wrong shape": (
        edited(**{CONV: lambda t: t.repeat(2)}),
        rf"1 wrongly shaped \({CONV}, file \(6,\), model \(3,\)",
    ),
    "a scalar": (edited(**{"encoder.conv_in.weight": lambda t: t[0, 0, 0, 0]}), "in_channels cannot be read|wrongly"),
    # contents
    "no tensors": (rearranged(lambda t: {}), "this is a file that holds no VAE known here"),
    "a UNet": (rearranged(unet), "this is a file that holds no VAE known here"),
    "a tiny autoencoder": (
        rearranged(lambda t: {"encoder.layers.1.conv.0.weight": torch.zeros(2)}),
        r"this is a tiny autoencoder \(TAESD\)",
    ),
    "only a decoder": (
        rearranged(lambda t: {name: tensor for name, tensor in t.items() if name.startswith("decoder.")}),
        "it has no encoder, only the decoder|missing",
    ),
    "only an encoder": (
        rearranged(lambda t: {n: tensor for n, tensor in to_ldm(t).items() if n.startswith("encoder.")}),
        "it has no decoder, only the encoder|missing",
    ),
    "two autoencoders in two layouts": (rearranged(lambda t: t | to_ldm(t)), "holds 2 autoencoders"),
    "two autoencoders behind prefixes": (
        rearranged(lambda t: {p + n: x for p in ("vae.", "first_stage_model.") for n, x in to_ldm(t).items()}),
        "holds 2 autoencoders, .* LDM keys behind `first_stage_model.`",
    ),
    "LDM keys of another model": (
        rearranged(lambda t: to_ldm(t) | {"encoder.down.0.attn.0.q.weight": torch.zeros(2)}),
        "no autoencoder with LDM keys has these: encoder.down.0.attn.0.q.weight",
    ),
    "running statistics of FLUX.2": (
        rearranged(lambda t: to_ldm(t) | {"bn.running_mean": torch.zeros(8)}),
        "bn.running_mean",
    ),
    "running statistics among diffusers keys": (
        rearranged(lambda t: t | {"bn.running_mean": torch.zeros(8)}),
        r"1 unexpected \(bn.running_mean",
    ),
}


@pytest.mark.parametrize("place", ["alone", "in a folder"])
@pytest.mark.parametrize("lie", LIES)
def test_a_lying_file_is_refused_by_name(tmp_path: Path, honest: Path, lie: str, place: str) -> None:
    change, message = LIES[lie]
    path = tmp_path / (WEIGHTS if place == "in a folder" else "x.safetensors")
    path.write_bytes(change((honest / WEIGHTS).read_bytes()))
    if place == "in a folder":
        shutil.copy(honest / "config.json", tmp_path)
    for read in (read_checkpoint, load_autoencoder):
        with pytest.raises(CheckpointError, match=message) as caught:
            read(path if place == "alone" else tmp_path)
        assert str(path) in str(caught.value)


# A few of each sort; that each is refused is tested above.
WRITING_LIES = [
    "empty",
    "cut in its header",
    "cut in its data",
    "overlapping offsets",
    "a number format that nobody knows",
    "a Git LFS pointer",
    "NaN",
    "whole numbers",
    "a wrong shape",
    "a UNet",
    "only a decoder",
    "two autoencoders behind prefixes",
]
WRITERS: dict[str, Callable[[Path, Path, Path], list[object]]] = {
    "diffusers": lambda lie, out, pipeline: ["convert", lie, out / "x"],
    "ldm": lambda lie, out, pipeline: ["convert", lie, out / "x.safetensors", "--to", "ldm"],
    "into": lambda lie, out, pipeline: ["convert", lie, out / "x", "--into", pipeline],
    "fix-fp16": lambda lie, out, pipeline: ["fix-fp16", lie, out / "x"],
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("lie", WRITING_LIES)
def test_of_a_lying_file_nothing_is_written(tmp_path: Path, honest: Path, lie: str, writer: str) -> None:
    path, pipeline, out = tmp_path / "lie.safetensors", tmp_path / "pipeline", tmp_path / "out"
    path.write_bytes(LIES[lie][0]((honest / WEIGHTS).read_bytes()))
    shutil.copytree(honest, pipeline / "vae")
    (pipeline / "model_index.json").write_text(json.dumps({"vae": ["diffusers", "AutoencoderKL"]}))
    out.mkdir()
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    result = CliRunner().invoke(cli, [str(argument) for argument in WRITERS[writer](path, out, pipeline)])
    assert result.exit_code == 1, result.output
    assert str(path) in result.stderr and result.stdout == ""
    assert list(out.iterdir()) == []
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize("writer", WRITERS)
def test_of_an_honest_file_the_same_commands_write(tmp_path: Path, honest: Path, writer: str) -> None:
    (tmp_path / "out").mkdir()
    shutil.copytree(honest, tmp_path / "pipeline" / "vae")
    (tmp_path / "pipeline" / "model_index.json").write_text(json.dumps({"vae": ["diffusers", "AutoencoderKL"]}))
    path = shutil.copy(honest / WEIGHTS, tmp_path / "x.safetensors")
    command = WRITERS[writer](path, tmp_path / "out", tmp_path / "pipeline")
    command += ["--force", "--size", 64, "--limit", 1, "--probe-size", 64] if writer == "fix-fp16" else []
    result = CliRunner().invoke(cli, [str(argument) for argument in command])
    assert result.exit_code == 0, result.output
    assert len(list((tmp_path / "out").iterdir())) == 1


def test_a_folder_with_the_name_of_a_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.mkdir()
    with pytest.raises(CheckpointError, match=f"{path}: no VAE in this folder"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "UNet2DConditionModel"}, "describes the class UNet2DConditionModel; expected AutoencoderKL"),
        ({"_class_name": "AutoencoderKL", "scale": 1.0}, "unknown field `scale`"),
        ({"architectures": ["CLIPTextModel"]}, "unknown field `architectures`"),
        ({"_sdvae": 3}, "_sdvae"),
        ([], "expected a JSON object"),
        ({"block_out_channels": [1 << 40]}, "no autoencoder can be built from it"),
        ({"layers_per_block": -1}, "do not fit|no autoencoder can be built"),
    ],
)
def test_a_config_of_something_else_is_refused_by_name(tmp_path: Path, honest: Path, config: Any, message: str) -> None:
    shutil.copy(honest / WEIGHTS, tmp_path)
    whole = json.loads((honest / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(whole | config if isinstance(config, dict) else config))
    with pytest.raises(CheckpointError, match=message) as caught:
        read_checkpoint(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)


class Payload:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.mark),))


def plain_pickle(path: Path, mark: Path) -> None:
    path.write_bytes(pickle.dumps({"state_dict": {}, "x": Payload(mark)}))


def zipped_pickle(path: Path, mark: Path) -> None:
    torch.save({"state_dict": {"encoder.conv_in.weight": torch.zeros(2)}, "x": Payload(mark)}, path)


def legacy_pickle(path: Path, mark: Path) -> None:
    torch.save({"state_dict": {}, "x": Payload(mark)}, path, _use_new_zipfile_serialization=False)


def key_that_runs(path: Path, mark: Path) -> None:
    torch.save({"state_dict": {"a": torch.zeros(1)}, "hooks": [{"deep": (Payload(mark),)}]}, path)


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".bin", ".pth"])
@pytest.mark.parametrize("make", [plain_pickle, zipped_pickle, legacy_pickle, key_that_runs])
def test_no_code_in_a_pickle_runs(tmp_path: Path, make: Callable[[Path, Path], None], suffix: str) -> None:
    path, mark = tmp_path / f"x{suffix}", tmp_path / "was-run"
    make(path, mark)
    with pytest.raises(CheckpointError, match=f"{path}: refused, for it is damaged or holds more than tensors"):
        read_checkpoint(path)
    assert not mark.exists()
    pickle.loads(path.read_bytes()) if make is plain_pickle else torch.load(path, weights_only=False)
    assert mark.exists()  # so the file does what this test says


@pytest.mark.parametrize(
    "content",
    [b"", b"\x80", b"not a pickle", b"PK\x03\x04" + bytes(100), b"version https://git-lfs.github.com/spec/v1\n"],
    ids=["empty", "one byte", "text", "a broken archive", "a Git LFS pointer"],
)
def test_what_is_no_pickle_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.ckpt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{path}: refused, for it is damaged"):
        read_checkpoint(path)


def test_an_archive_that_is_no_file_of_torch_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("../../evil.txt", "x" * 100)
    with pytest.raises(CheckpointError, match=f"{path}: refused"):
        read_checkpoint(path)
    assert not (tmp_path.parent.parent / "evil.txt").exists()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_in_a_pickle_are_checked_too(tmp_path: Path, honest: Path, value: float) -> None:
    tensors = load_file(honest / WEIGHTS)
    tensors["quant_conv.bias"][0] = value
    torch.save(to_ldm(tensors), tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match=r"x\.ckpt: `quant_conv\.bias` has values that are not finite"):
        read_checkpoint(tmp_path / "x.ckpt")


def test_a_damaged_header_of_our_own_is_refused_by_name(tmp_path: Path, honest: Path) -> None:
    path = tmp_path / "x.safetensors"
    for text, message in (("{", "cannot be read as JSON"), ('{"config": {"scale": 1}}', "unknown field `scale`")):
        save_file(load_file(honest / WEIGHTS), path, metadata={"format": "pt", "sdvae": text})
        with pytest.raises(CheckpointError, match=message) as caught:
            read_checkpoint(path)
        assert str(path) in str(caught.value)
