from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sdvae.checkpoints.formats import Kind, find_vae_files, identify, layout_of, read_shapes, shard_names
from sdvae.errors import CheckpointError


def write(path: Path, *names: str) -> Path:
    save_file({name: torch.zeros(2, 3) for name in names}, path, metadata={"format": "pt"})
    return path


DIFFUSERS = "decoder.up_blocks.0.resnets.0.norm1.weight"
LDM = "encoder.down.0.block.0.norm1.weight"


@pytest.mark.parametrize(
    ("names", "kind", "prefix"),
    [
        ([DIFFUSERS], Kind.FILE, ""),
        ([f"vae.{DIFFUSERS}", "unet.conv_in.weight"], Kind.PREFIXED, "vae."),
        ([LDM], Kind.LDM, ""),
        ([f"first_stage_model.{LDM}"], Kind.LDM, "first_stage_model."),
        ([f"first_stage_model.{LDM}", "model.diffusion_model.out.2.weight"], Kind.LDM_CHECKPOINT, "first_stage_model."),
        (["1.conv.0.weight"], Kind.TINY, ""),
        (["encoder.layers.1.conv.0.weight"], Kind.TINY, ""),
        (["down_blocks.0.resnets.0.norm1.weight"], Kind.OTHER, ""),  # a UNet
        (["cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight"], Kind.OTHER, ""),
        ([], Kind.OTHER, ""),
    ],
)
def test_a_weights_file_is_recognised_by_its_keys(tmp_path: Path, names: list[str], kind: Kind, prefix: str) -> None:
    found = identify(write(tmp_path / "x.safetensors", *names))
    assert (found.kind, found.prefix, found.config) == (kind, prefix, None)
    assert names[:1] == [] or names[0] in found.evidence


@pytest.mark.parametrize(
    "names",
    [
        [DIFFUSERS, LDM],
        [f"first_stage_model.{LDM}", f"vae.{LDM}"],
        [LDM, f"first_stage_model.{DIFFUSERS}"],
        [DIFFUSERS, f"ema.{DIFFUSERS}"],
    ],
)
def test_of_two_autoencoders_in_one_file_none_is_chosen(tmp_path: Path, names: list[str]) -> None:
    path = write(tmp_path / "x.safetensors", *names)
    with pytest.raises(CheckpointError, match=f"{path}: holds 2 autoencoders, and nothing says which") as caught:
        identify(path)
    assert all(f"(`{name}`)" in str(caught.value) for name in names)


def test_real_taesd_weights_are_recognised(assets: Path) -> None:
    assert identify(assets / "weights" / "taesd_decoder.safetensors").kind is Kind.TINY


def test_evidence_names_few_keys_of_many() -> None:
    layout = layout_of([f"k{i:02}" for i in range(100)], Path("x"))
    assert layout.evidence == "100 keys: k00, k01, k02, k03, k04, k05 and 94 more"


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["config.json", "diffusion_pytorch_model.safetensors"], "diffusion_pytorch_model.safetensors"),
        (["diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors"], "diffusion_pytorch_model.safetensors"),
        (["diffusion_pytorch_model.bin", "diffusion_pytorch_model.fp16.safetensors"], "diffusion_pytorch_model.bin"),
        (["diffusion_pytorch_model.fp16.bin"], "diffusion_pytorch_model.fp16.bin"),
        (
            ["diffusion_pytorch_model.fp16.bin", "diffusion_pytorch_model.fp16.safetensors"],
            "diffusion_pytorch_model.fp16.safetensors",
        ),
        (
            ["diffusion_pytorch_model.safetensors.index.json", "diffusion_pytorch_model-00001-of-00002.safetensors"],
            "diffusion_pytorch_model.safetensors.index.json",
        ),
        (
            [
                "diffusion_pytorch_model.safetensors.index.fp16.json",
                "diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
                "diffusion_pytorch_model-00001-of-00002.fp16.safetensors",
            ],
            "diffusion_pytorch_model.safetensors.index.fp16.json",
        ),
    ],
)
def test_weights_are_chosen_plain_before_variant_and_safetensors_before_bin(names: list[str], expected: str) -> None:
    for folder in ("", "vae/"):
        files = find_vae_files([f"{folder}{name}" for name in names])
        assert files is not None
        assert files.path_of(files.weights) == f"{folder}{expected}"
        assert files.has_config == ("config.json" in names)


def test_the_top_of_a_folder_comes_before_vae_and_a_subfolder_before_both() -> None:
    names = [f"{folder}diffusion_pytorch_model.safetensors" for folder in ("", "vae/", "ema/")]
    for subfolder, folder in ((None, ""), ("vae", "vae"), ("ema/", "ema")):
        files = find_vae_files(names, subfolder)
        assert files is not None
        assert files.folder == folder
    assert find_vae_files(names[2:]) is None


def test_several_variants_without_a_plain_one_are_not_guessed_between(tmp_path: Path) -> None:
    for variant in ("ema", "fp16"):
        write(tmp_path / f"diffusion_pytorch_model.{variant}.safetensors", DIFFUSERS)
    with pytest.raises(CheckpointError, match=r"several variants of the weights \(ema, fp16\)") as caught:
        identify(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_folders_are_told_apart_from_pipelines(tmp_path: Path) -> None:
    vae = tmp_path / "vae"
    vae.mkdir()
    weights = write(vae / "diffusion_pytorch_model.safetensors", DIFFUSERS)
    (vae / "config.json").write_text("{}")
    assert identify(vae).kind is Kind.FOLDER
    found = identify(tmp_path)
    assert (found.kind, found.weights, found.config) == (Kind.PIPELINE, weights, vae / "config.json")
    assert found.evidence == "file vae/diffusion_pytorch_model.safetensors"
    assert identify(weights).config == vae / "config.json"


def test_a_folder_without_a_vae_is_described(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"looked in it and in its folder vae/ .* it holds model\.safetensors"):
        identify(tmp_path)
    with pytest.raises(CheckpointError, match="looked in nowhere/ "):
        identify(tmp_path, "nowhere")


def test_shapes_are_read_from_the_header(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(4, 3, dtype=torch.bfloat16), "b": torch.zeros(()), "c": torch.zeros(0, 2)}, path)
    assert read_shapes(path) == {"a": (4, 3), "b": (), "c": (0, 2)}


def test_a_file_cut_at_any_place_is_called_damaged(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.safetensors", DIFFUSERS).read_bytes()
    cut = tmp_path / "cut.safetensors"
    for length in range(len(whole)):
        cut.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"cut\.safetensors: (damaged|not a safetensors file)"):
            identify(cut)


@pytest.mark.parametrize(
    ("content", "hint"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"PK\x03\x04" + bytes(60), r"suffix \.bin"),
        (b"<!DOCTYPE html><html></html>", "download it again"),
        ((10).to_bytes(8, "little") + b"[1, 2, 3] ", "download it again"),
        ((13).to_bytes(8, "little") + b'{"a": {"b":1}', "download it again"),
        (b"\xff" * 8 + b"{}", "download it again"),
    ],
)
def test_what_is_no_safetensors_file_gets_a_hint(tmp_path: Path, content: bytes, hint: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"x.safetensors: not a safetensors file.*{hint}"):
        identify(path)


def test_an_export_to_onnx_and_a_folder_of_folders_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    with pytest.raises(CheckpointError, match="it holds unet/$"):
        identify(tmp_path)
    (tmp_path / "vae_encoder").mkdir()
    (tmp_path / "vae_encoder/model.onnx").touch()
    with pytest.raises(CheckpointError, match="an ONNX export"):
        identify(tmp_path)


def test_other_suffixes_are_refused_and_pickles_not_opened(tmp_path: Path) -> None:
    (tmp_path / "x.ckpt").write_bytes(b"anything")
    assert identify(tmp_path / "x.ckpt").kind is Kind.PICKLE
    (tmp_path / "x.onnx").touch()
    with pytest.raises(CheckpointError, match=r"x\.onnx: not a weights file; expected the suffix \.bin, "):
        identify(tmp_path / "x.onnx")


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "x.py", 3])
def test_an_index_may_only_name_weights_files_beside_it(tmp_path: Path, name: object) -> None:
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {DIFFUSERS: name}}))
    with pytest.raises(CheckpointError, match="is not the name of a weights file beside the index"):
        shard_names(index)
    index.write_text("{}")
    with pytest.raises(CheckpointError, match="needs a `weight_map`"):
        shard_names(index)
