"""Every layout is read to the same tensors, bit for bit, and what is inferred or assumed is said."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from vaes import build_vae

from sdvae.checkpoints import tensor_files
from sdvae.checkpoints.fit import autoencoder_digest
from sdvae.checkpoints.formats import FAMILIES, Kind, identify
from sdvae.checkpoints.keys import to_ldm
from sdvae.checkpoints.notes import header_metadata
from sdvae.checkpoints.read import read_checkpoint
from sdvae.checkpoints.store import load_any_autoencoder, load_autoencoder, save_autoencoder
from sdvae.errors import CheckpointError, ConfigError
from sdvae.model.autoencoder import AutoencoderKL

WEIGHTS = "diffusion_pytorch_model.safetensors"
Tensors = dict[str, torch.Tensor]

# What stands beside the VAE in whole checkpoints.
AROUND = {
    "Stable Diffusion 1 or 2": [
        "model.diffusion_model.input_blocks.0.0.weight",
        "cond_stage_model.transformer.a.weight",
    ],
    "SDXL": ["model.diffusion_model.input_blocks.0.0.weight", "conditioner.embedders.0.transformer.a.weight"],
    "SD3": ["model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"],
    "FLUX": ["model.diffusion_model.double_blocks.0.img_attn.qkv.weight"],
}


def build(**fields: Any) -> AutoencoderKL:
    widths = fields.pop("block_out_channels", (32, 64))
    return build_vae(*widths, **{"norm_num_groups": 32} | fields)  # type: ignore[no-any-return]


def stored(vae: AutoencoderKL, dtype: torch.dtype = torch.float32) -> Tensors:
    return {name: tensor.to(dtype).contiguous() for name, tensor in vae.state_dict().items()}


def prefixed(prefix: str, tensors: Tensors) -> Tensors:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def write(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> Path:
    if path.suffix == ".safetensors":
        save_file(tensors, path, metadata=metadata)
    else:
        torch.save({"state_dict": tensors, "global_step": 3}, path)
    return path


def same(one: Tensors, other: Tensors) -> bool:
    """Names, shapes, types and bits."""
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


def error_of(ref: Path, **arguments: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(ref, **arguments)
    assert str(ref) in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    return build(layers_per_block=2)


@pytest.fixture(scope="module")
def flux() -> AutoencoderKL:
    return build(latent_channels=16, use_quant_conv=False, use_post_quant_conv=False)


LAYOUTS: dict[str, tuple[Kind, str, Callable[[Tensors], Tensors]]] = {
    "diffusers": (Kind.FILE, "", dict),
    "prefixed": (Kind.PREFIXED, "vae.", lambda t: prefixed("vae.", t)),
    "distributed": (Kind.PREFIXED, "module.", lambda t: prefixed("module.", t)),
    "legacy names": (Kind.FILE, "", lambda t: {_legacy(name): tensor for name, tensor in t.items()}),
    "matrices as convolutions": (Kind.FILE, "", lambda t: {n: _convolved(n, tensor) for n, tensor in t.items()}),
    "ldm": (Kind.LDM, "", to_ldm),
    "ldm prefixed": (Kind.LDM, "first_stage_model.", lambda t: prefixed("first_stage_model.", to_ldm(t))),
    "ldm of comfy": (Kind.LDM, "vae.", lambda t: prefixed("vae.", to_ldm(t))),
    "ldm with matrices": (Kind.LDM, "", lambda t: {n: _linear(n, tensor) for n, tensor in to_ldm(t).items()}),
}


def _legacy(name: str) -> str:
    for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        name = name.replace(f".{new}.", f".{old}.")
    return name


def _convolved(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor[..., None, None].contiguous() if ".to_" in name and tensor.ndim == 2 else tensor


def _linear(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.flatten(1) if ".attn_1." in name and tensor.ndim == 4 else tensor


# One autoencoder, many files


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_bits_in_the_type_of_the_file(
    tmp_path: Path, vae: AutoencoderKL, layout: str, dtype: torch.dtype, suffix: str
) -> None:
    kind, prefix, arrange = LAYOUTS[layout]
    expected = stored(vae, dtype)
    path = write(tmp_path / f"x{suffix}", arrange(expected))
    checkpoint = read_checkpoint(path)
    assert same(checkpoint.tensors, expected)
    assert (checkpoint.found.kind, checkpoint.found.prefix) == (kind, prefix)
    assert checkpoint.notes == {}
    loaded = load_autoencoder(path)
    assert same(dict(loaded.state_dict()), {name: tensor.float() for name, tensor in expected.items()})
    config = {name: value for name, value in vae.config.items() if name[0] != "_"} | {"sample_size": 512}
    assert {k: tuple(v) if isinstance(v, list) else v for k, v in loaded.config.items() if k[0] != "_"} == config


@pytest.mark.parametrize("prefix", ["first_stage_model.", "vae."])
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
@pytest.mark.parametrize("family", AROUND)
def test_the_vae_of_a_whole_checkpoint_has_the_scale_of_its_model(
    tmp_path: Path, vae: AutoencoderKL, flux: AutoencoderKL, family: str, suffix: str, prefix: str
) -> None:
    known = FAMILIES[family]
    model = vae if known.latent_channels == 4 else flux
    tensors = prefixed(prefix, to_ldm(stored(model))) | {name: torch.zeros(3) for name in AROUND[family]}
    path = write(tmp_path / f"x{suffix}", tensors)
    checkpoint = read_checkpoint(path)
    assert checkpoint.found.kind is Kind.LDM_CHECKPOINT
    assert same(checkpoint.tensors, stored(model))
    assert checkpoint.fields["scaling_factor"] == known.scaling_factor
    assert checkpoint.fields["shift_factor"] == known.shift_factor
    assert any(f"this is a whole checkpoint of {family}" in remark for remark in checkpoint.remarks)
    assert any(f"{len(AROUND[family])} tensors that do not begin with" in remark for remark in checkpoint.remarks)


def test_the_constants_are_those_that_the_programs_publish() -> None:
    assert {name: (f.scaling_factor, f.shift_factor) for name, f in FAMILIES.items()} == {
        "Stable Diffusion 1 or 2": (0.18215, None),
        "SDXL": (0.13025, None),
        "SD3": (1.5305, 0.0609),
        "FLUX": (0.3611, 0.1159),
    }


def sparse_checkpoint(path: Path, tensors: Tensors, rest_bytes: int) -> None:
    """A safetensors file with a large tensor before the VAE's, of which the disk holds nothing."""
    name = AROUND["Stable Diffusion 1 or 2"][0]
    header: dict[str, Any] = {name: {"dtype": "F32", "shape": [rest_bytes // 4], "data_offsets": [0, rest_bytes]}}
    header |= {AROUND["Stable Diffusion 1 or 2"][1]: {"dtype": "F32", "shape": [0], "data_offsets": [rest_bytes] * 2}}
    at = rest_bytes
    for name, tensor in tensors.items():
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [at, at + tensor.nbytes]}
        at += tensor.nbytes
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.seek(rest_bytes, 1)
        for tensor in tensors.values():
            file.write(tensor.numpy().tobytes())


@pytest.fixture
def peak_growth_mb() -> Callable[[], float]:
    """Tells by how much memory in use has risen at its peak since the test began."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is in use
        before = peak_kb()
    except OSError:
        pytest.skip("this system does not let a process reset its peak of memory")
    return lambda: (peak_kb() - before) / 1024


def peak_kb() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def test_of_a_whole_checkpoint_only_the_vae_is_read_from_disk(
    tmp_path: Path, vae: AutoencoderKL, monkeypatch: pytest.MonkeyPatch, peak_growth_mb: Callable[[], float]
) -> None:
    path = tmp_path / "x.safetensors"
    tensors = prefixed("first_stage_model.", to_ldm(stored(vae)))
    sparse_checkpoint(path, tensors, 6 << 30)
    fetched = []
    get = tensor_files._get
    monkeypatch.setattr(tensor_files, "_get", lambda file, name, path: fetched.append(name) or get(file, name, path))
    checkpoint = read_checkpoint(path)
    assert peak_growth_mb() < 100
    assert same(checkpoint.tensors, stored(vae))
    assert sorted(fetched) == sorted(tensors)


def test_a_pickle_of_a_whole_checkpoint_is_mapped(
    tmp_path: Path, vae: AutoencoderKL, peak_growth_mb: Callable[[], float]
) -> None:
    path = tmp_path / "x.ckpt"
    other = {AROUND["Stable Diffusion 1 or 2"][0]: torch.zeros(300 << 18)}  # 300 MiB
    write(path, prefixed("first_stage_model.", to_ldm(stored(vae))) | other)
    del other
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_growth_mb()
    checkpoint = read_checkpoint(path)
    assert peak_growth_mb() - before < 100
    assert same(checkpoint.tensors, stored(vae))


def test_old_pickles_and_shards_with_ldm_keys_are_read(tmp_path: Path, vae: AutoencoderKL) -> None:
    torch.save(to_ldm(stored(vae)), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert same(read_checkpoint(tmp_path / "old.pt").tensors, stored(vae))
    folder = tmp_path / "sharded"
    folder.mkdir()
    tensors = list(to_ldm(stored(vae)).items())
    shards = {f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors": dict(tensors[i::2]) for i in range(2)}
    for name, part in shards.items():
        save_file(part, folder / name)
    index = {"weight_map": {key: name for name, part in shards.items() for key in part}}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    checkpoint = read_checkpoint(folder)
    assert same(checkpoint.tensors, stored(vae))
    assert checkpoint.found.kind is Kind.FOLDER


def test_what_training_left_in_a_file_is_dropped_with_a_remark(tmp_path: Path, vae: AutoencoderKL) -> None:
    leftovers = {
        name: torch.zeros(2) for name in ("loss.logvar", "loss.discriminator.main.0.weight", "model_ema.decay")
    }
    checkpoint = read_checkpoint(write(tmp_path / "x.ckpt", to_ldm(stored(vae)) | leftovers))
    assert same(checkpoint.tensors, stored(vae))
    assert "dropped 3 tensors that training left in the file: loss.logvar, ..." in checkpoint.remarks


def test_quant_convs_inside_encoder_and_decoder_are_renamed_with_a_remark(tmp_path: Path, vae: AutoencoderKL) -> None:
    def inside(name: str) -> str:
        return name.replace("post_quant_conv", "decoder.post_quant_conv") if "post" in name else f"encoder.{name}"

    tensors = {inside(n) if "quant_conv" in n else n: tensor for n, tensor in to_ldm(stored(vae)).items()}
    checkpoint = read_checkpoint(write(tmp_path / "x.safetensors", tensors))
    assert same(checkpoint.tensors, stored(vae))
    assert sum("renamed" in remark for remark in checkpoint.remarks) == 4


def test_evaluation_takes_ldm_files_too(tmp_path: Path, vae: AutoencoderKL) -> None:
    path = write(tmp_path / "x.safetensors", to_ldm(stored(vae)))
    assert autoencoder_digest(load_any_autoencoder(path)) == autoencoder_digest(vae)


# Which of several


def test_a_variant_is_chosen_by_name_and_never_guessed(tmp_path: Path, vae: AutoencoderKL) -> None:
    dtypes = {"fp16": torch.float16, "bf16": torch.bfloat16}
    for variant, dtype in dtypes.items():
        vae.to(dtype).save_pretrained(tmp_path / "vae", variant=variant, max_shard_size="100KB")
        vae.float()
    assert "several variants of the weights (bf16, fp16), and none that is plain" in error_of(tmp_path)
    for variant, dtype in dtypes.items():
        for ref in (tmp_path, tmp_path / "vae"):
            assert {t.dtype for t in read_checkpoint(ref, variant=variant).tensors.values()} == {dtype}
        assert identify(tmp_path, variant=variant).weights.name.endswith(f"{variant}.json")
    message = error_of(tmp_path, variant="ema")
    assert "no variant 'ema' of the weights; there is bf16, fp16" in message
    save_autoencoder(vae, tmp_path / "plain")
    assert "no variant 'fp16' of the weights; there is the plain one" in error_of(tmp_path / "plain", variant="fp16")
    with pytest.raises(ConfigError, match="variant does not apply"):
        read_checkpoint(tmp_path / "plain" / WEIGHTS, variant="fp16")


# Which configuration


def test_what_is_inferred_and_assumed_is_said(tmp_path: Path, vae: AutoencoderKL) -> None:
    remarks = read_checkpoint(write(tmp_path / "x.safetensors", to_ldm(stored(vae)))).remarks
    assert remarks[0].startswith("no config.json: in_channels, out_channels, latent_channels, block_out_channels, ")
    assert any("norm_num_groups assumed to be 32" in remark for remark in remarks)
    assert any("sample_size set to 512" in remark for remark in remarks)
    assert any("assumed to be 0.18215" in r and "SDXL's is 0.13025" in r for r in remarks)


def test_a_scale_that_nothing_shows_is_assumed_and_one_that_something_shows_is_not(
    tmp_path: Path, vae: AutoencoderKL
) -> None:
    tensors = to_ldm(stored(vae))
    bare = write(tmp_path / "bare.safetensors", tensors)
    assert read_checkpoint(bare).assumed == ("scaling_factor",)
    assert read_checkpoint(bare, fields={"shift_factor": 0.1}).assumed == ("scaling_factor",)
    assert read_checkpoint(bare, fields={"scaling_factor": 0.18215}).assumed == ()
    assert read_checkpoint(bare, config=save_autoencoder(vae, tmp_path / "vae")).assumed == ()
    around = {name: torch.zeros(3) for name in AROUND["SDXL"]}
    whole = write(tmp_path / "whole.safetensors", prefixed("first_stage_model.", tensors) | around)
    assert read_checkpoint(whole).assumed == ()
    statistics = {"edm_mean": torch.zeros(1, 4, 1, 1), "edm_std": torch.ones(1, 4, 1, 1)}
    assert read_checkpoint(write(tmp_path / "edm.safetensors", tensors | statistics)).assumed == ()


@pytest.mark.parametrize("place", ["header", "config.json"])
def test_an_assumption_that_was_written_down_stays_one_until_somebody_says_the_scale(
    tmp_path: Path, vae: AutoencoderKL, place: str
) -> None:
    fields = {name: value for name, value in vae.config.items() if name[0] != "_"}
    assert fields["scaling_factor"] == 0.18215

    def written(**changes: Any) -> Path:
        notes, name = {"assumed": ["scaling_factor"]}, WEIGHTS if place == "config.json" else "x.safetensors"
        if place == "config.json":
            (tmp_path / "config.json").write_text(json.dumps(fields | changes | {"_sdvae": notes}))
        return write(tmp_path / name, stored(vae), header_metadata(fields | changes, notes))

    checkpoint = read_checkpoint(written())
    assert checkpoint.assumed == ("scaling_factor",)
    (remark,) = checkpoint.remarks
    assert "scaling_factor 0.18215" in remark and "was assumed" in remark and "SDXL's is 0.13025" in remark
    said = read_checkpoint(written(), fields={"scaling_factor": 0.18215})
    assert (said.assumed, said.remarks) == ((), ())
    edited = read_checkpoint(written(scaling_factor=0.13025))  # somebody knew better
    assert (edited.assumed, edited.remarks) == ((), ())


def test_a_config_beside_the_file_or_passed_counts_before_the_tensors(tmp_path: Path, vae: AutoencoderKL) -> None:
    folder = save_autoencoder(build(layers_per_block=2, scaling_factor=0.5, sample_size=64), tmp_path / "vae")
    path = write(tmp_path / "x.safetensors", to_ldm(stored(vae)))
    for arguments in ({"config": folder}, {"config": folder / "config.json"}):
        checkpoint = read_checkpoint(path, **arguments)  # type: ignore[arg-type]
        assert (checkpoint.fields["scaling_factor"], checkpoint.fields["sample_size"]) == (0.5, 64)
        assert checkpoint.remarks == ()
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_checkpoint(path).fields["scaling_factor"] == 0.5
    (tmp_path / "config.json").write_text(json.dumps(config | {"layers_per_block": 1}))
    message = error_of(path)
    assert f"do not fit {tmp_path / 'config.json'}" in message
    assert "layers_per_block is 1, the weights were made with 2" in message


def test_the_header_of_our_own_files_stands_in_for_a_config(tmp_path: Path) -> None:
    model = build(block_out_channels=(6, 12), norm_num_groups=3, scaling_factor=0.7, shift_factor=0.2)
    fields = {name: value for name, value in model.config.items() if name[0] != "_"}
    path = write(
        tmp_path / "x.safetensors", to_ldm(stored(model)), header_metadata(fields, {"license": "mit", "source": "x"})
    )
    checkpoint = read_checkpoint(path)
    assert checkpoint.remarks == ()
    assert checkpoint.notes == {"license": "mit", "source": "x"}
    assert (checkpoint.fields["norm_num_groups"], checkpoint.fields["shift_factor"]) == (3, 0.2)
    assert autoencoder_digest(load_autoencoder(path)) == autoencoder_digest(model)


def test_fields_take_the_place_of_what_files_say(tmp_path: Path, vae: AutoencoderKL, flux: AutoencoderKL) -> None:
    folder = save_autoencoder(vae, tmp_path / "vae")
    assert read_checkpoint(folder, fields={"scaling_factor": 0.9}).fields["scaling_factor"] == 0.9
    path = write(tmp_path / "x.safetensors", to_ldm(stored(flux)))
    checkpoint = read_checkpoint(path, fields={"scaling_factor": 0.3611, "shift_factor": 0.1159})
    assert (checkpoint.fields["scaling_factor"], checkpoint.fields["shift_factor"]) == (0.3611, 0.1159)
    small = write(tmp_path / "small.safetensors", to_ldm(stored(build(block_out_channels=(8, 8), norm_num_groups=4))))
    assert "norm_num_groups cannot be seen in the tensors, and the usual 32 does not divide" in error_of(small)
    assert read_checkpoint(small, fields={"norm_num_groups": 4}).fields["norm_num_groups"] == 4
    with pytest.raises(CheckpointError, match="fields: unknown field `scale_factor`: did you mean `scaling_factor`"):
        read_checkpoint(folder, fields={"scale_factor": 1.0})


def test_sixteen_channels_may_be_of_either_model_so_both_are_shown(tmp_path: Path, flux: AutoencoderKL) -> None:
    message = error_of(write(tmp_path / "x.safetensors", to_ldm(stored(flux))))
    assert (
        "SD3 has scaling_factor 1.5305, shift_factor 0.0609; FLUX has scaling_factor 0.3611, shift_factor 0.1159"
        in (message)
    )
    for way in ("config.json beside the file", "config=", 'fields={"scaling_factor"', "--scaling-factor"):
        assert way in message
    other = write(tmp_path / "y.safetensors", to_ldm(stored(build(latent_channels=7))))
    assert "no known diffusion model has latents of 7 channels" in error_of(other)


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
def test_statistics_of_the_latents_in_a_file_are_taken_over(tmp_path: Path, vae: AutoencoderKL, prefix: str) -> None:
    means, stds = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([1.0, 2.0, 3.0, 4.0])
    statistics = {"edm_mean": means.view(1, 4, 1, 1), "edm_std": stds.view(1, 4, 1, 1)}
    path = write(tmp_path / "x.safetensors", prefixed(prefix, to_ldm(stored(vae))) | statistics)
    checkpoint = read_checkpoint(path)
    assert checkpoint.fields["latents_mean"] == means.tolist()
    assert checkpoint.fields["latents_std"] == stds.tolist()
    assert checkpoint.fields["scaling_factor"] == 0.5
    assert not any("not read" in remark for remark in checkpoint.remarks)
    assert same(checkpoint.tensors, stored(vae))
    assert load_autoencoder(path).config.latents_std == stds.tolist()
