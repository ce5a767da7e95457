from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from vaes import vae_fields

from sdvae.checkpoints import fit, keys, tensor_files
from sdvae.checkpoints.convert import plan, verify, write
from sdvae.checkpoints.convert.options import ConvertOptions
from sdvae.checkpoints.convert.run import convert
from sdvae.checkpoints.convert.verify import compare, ldm_shapes
from sdvae.checkpoints.describe import describe_vae
from sdvae.checkpoints.fit import autoencoder_digest, full_config, load_weights
from sdvae.checkpoints.keys import to_ldm
from sdvae.checkpoints.notes import NOTES_FIELD, from_metadata, update_config
from sdvae.checkpoints.read import bundled_path, read_checkpoint
from sdvae.checkpoints.store import load_autoencoder
from sdvae.checkpoints.tensor_files import differing
from sdvae.errors import CheckpointError, ConfigError, OutputExistsError
from sdvae.model.network import Autoencoder

from diffusers import AutoencoderKL as StockAutoencoderKL  # isort: skip  # after the repair of torchvision

WEIGHTS = "diffusion_pytorch_model.safetensors"


def fields(*widths: int, **others: Any) -> dict[str, Any]:
    return vae_fields(*widths, **{"sample_size": 32} | others)


SD = fields(8, 16, layers_per_block=2, scaling_factor=0.31)
FLUX = fields(
    8, 8, latent_channels=16, use_quant_conv=False, use_post_quant_conv=False, scaling_factor=0.36, shift_factor=0.12
)


def random_fields(seed: int) -> dict[str, Any]:
    pick = random.Random(seed)
    widths = [pick.choice((4, 8, 12)) for _ in range(pick.randint(1, 4))]
    channels = pick.choice((2, 4, 16))
    others: dict[str, Any] = {
        "layers_per_block": pick.randint(1, 2),
        "latent_channels": channels,
        "scaling_factor": round(pick.uniform(0.1, 1.5), 4),
        "use_quant_conv": pick.random() < 0.7,
        "use_post_quant_conv": pick.random() < 0.7,
        "mid_block_add_attention": pick.random() < 0.7,
        "norm_num_groups": pick.choice((1, 2, 4)),
        "force_upcast": pick.random() < 0.5,
    }
    if pick.random() < 0.5:
        others["shift_factor"] = round(pick.uniform(-0.5, 0.5), 4)
    else:
        others["latents_mean"] = [round(pick.uniform(-1, 1), 4) for _ in range(channels)]
        others["latents_std"] = [round(pick.uniform(0.5, 2), 4) for _ in range(channels)]
    return fields(*widths, **others)


def make(config: Mapping[str, Any] = SD, seed: int = 0) -> StockAutoencoderKL:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = StockAutoencoderKL(**config).eval()
        for parameter in vae.parameters():  # biases and norms begin as constants, which would hide mistakes
            torch.nn.init.normal_(parameter, std=0.2)
    return vae


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A VAE folder as diffusers writes it."""
    make().save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def same_bits(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return not differing(one, other)


def build(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Autoencoder:
    return load_weights(fit.build(config, "a test"), tensors)


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata())


def picture(side: int = 32) -> Tensor:
    return torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(5)) * 2 - 1


# There and back


@pytest.mark.parametrize("seed", range(6))
def test_a_chain_of_conversions_keeps_every_bit_and_every_field(tmp_path: Path, seed: int) -> None:
    config = random_fields(seed)
    vae = make(config, seed)
    for index, parameter in enumerate(vae.parameters()):  # as files in mixed precision are
        kinds = ([torch.float32], [torch.float16], [torch.bfloat16], [torch.float32, torch.bfloat16])[seed % 4]
        parameter.data = parameter.data.to(kinds[index % len(kinds)])
    start = tmp_path / "0"
    vae.save_pretrained(start)
    steps: list[tuple[str, dict[str, Any]]] = [
        ("1.safetensors", {"to": "ldm"}),
        ("2", {}),
        ("3.safetensors", {"to": "ldm", "prefix": "first_stage_model."}),
        ("4", {"max_shard_size": "2KB"}),
        ("5.safetensors", {"to": "ldm", "prefix": "vae."}),
        ("6", {"variant": "fp16"}),
    ]
    before = start
    for name, options in steps:
        report = convert(before, tmp_path / name, options=ConvertOptions(**options))
        assert report.verification and report.verification.identical
        assert [comparison.max_abs_error for comparison in report.verification.comparisons] == [0] * 4
        before = tmp_path / name
    assert same_bits(vae.state_dict(), load_file(before / "diffusion_pytorch_model.fp16.safetensors"))
    assert full_config(read_checkpoint(before).fields) == full_config(config)
    assert len(list((tmp_path / "4").glob("*-of-*"))) > 1


def test_an_ldm_file_has_each_weight_under_the_name_of_the_original_program(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "a.safetensors", options=ConvertOptions(to="ldm"))
    before, after = load_file(source / WEIGHTS), load_file(tmp_path / "a.safetensors")
    assert len(before) == len(after)
    for new, old in (  # read off the two classes by hand
        ("encoder.down.1.block.0.nin_shortcut.weight", "encoder.down_blocks.1.resnets.0.conv_shortcut.weight"),
        ("encoder.down.0.downsample.conv.bias", "encoder.down_blocks.0.downsamplers.0.conv.bias"),
        ("decoder.up.1.block.2.conv1.weight", "decoder.up_blocks.0.resnets.2.conv1.weight"),
        ("decoder.up.1.upsample.conv.weight", "decoder.up_blocks.0.upsamplers.0.conv.weight"),
        ("decoder.up.0.block.0.norm1.weight", "decoder.up_blocks.1.resnets.0.norm1.weight"),
        ("decoder.mid.attn_1.k.bias", "decoder.mid_block.attentions.0.to_k.bias"),
        ("encoder.mid.block_2.conv2.weight", "encoder.mid_block.resnets.1.conv2.weight"),
        ("decoder.norm_out.weight", "decoder.conv_norm_out.weight"),
        ("quant_conv.weight", "quant_conv.weight"),
    ):
        assert torch.equal(after[new], before[old])
    assert torch.equal(
        after["encoder.mid.attn_1.proj_out.weight"],
        before["encoder.mid_block.attentions.0.to_out.0.weight"][..., None, None],
    )


def test_the_plan_of_the_original_class_is_that_of_the_released_file() -> None:
    sd1 = fields(128, 256, 512, 512, layers_per_block=2, norm_num_groups=32)
    shapes = ldm_shapes(sd1)
    assert len(shapes) == 248
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 83_653_863
    assert shapes["decoder.up.0.block.0.nin_shortcut.weight"] == (128, 256, 1, 1)


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
def test_diffusers_own_converter_reads_the_ldm_file_as_the_source(source: Path, tmp_path: Path, prefix: str) -> None:
    convert(source, tmp_path / "a.safetensors", options=ConvertOptions(to="ldm", prefix=prefix))
    loaded = StockAutoencoderKL.from_single_file(str(tmp_path / "a.safetensors"), config=str(source))
    assert same_bits(loaded.state_dict(), load_file(source / WEIGHTS))


@pytest.mark.parametrize(
    "options", [{}, {"variant": "fp16", "dtype": "float16"}, {"max_shard_size": "20KB"}, {"dtype": "bfloat16"}]
)
def test_diffusers_loads_the_folder_with_nothing_missing_or_left_over(
    source: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    convert(source, tmp_path / "out", options=ConvertOptions(**options))
    dtype = getattr(torch, options.get("dtype", "float32"))
    loaded, info = StockAutoencoderKL.from_pretrained(
        tmp_path / "out", variant=options.get("variant"), torch_dtype=dtype, output_loading_info=True
    )
    assert not any(info.values())
    expected = {name: tensor.to(dtype) for name, tensor in load_file(source / WEIGHTS).items()}
    assert same_bits(loaded.state_dict(), expected)
    assert loaded.config.scaling_factor == 0.31


def test_shards_and_their_index_are_those_that_diffusers_writes(source: Path, tmp_path: Path) -> None:
    for variant in (None, "fp16"):
        make().save_pretrained(tmp_path / f"theirs{variant}", max_shard_size="20KB", variant=variant)
        convert(source, tmp_path / f"ours{variant}", options=ConvertOptions(max_shard_size="20KB", variant=variant))
        theirs, ours = tmp_path / f"theirs{variant}", tmp_path / f"ours{variant}"
        assert left_in(ours) == left_in(theirs)
        (index,) = (path.name for path in theirs.glob("*.index*.json"))
        assert json.loads((ours / index).read_text())["weight_map"].keys() == load_file(source / WEIGHTS).keys()


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "20KB"}, {"max_shard_size": "20GB"}, {"variant": "fp16"}])
def test_the_report_judges_the_folder_as_inspect_does(source: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    takers = {
        verdict.loader
        for verdict in convert(source, tmp_path / "out", options=ConvertOptions(**options)).loaders
        if verdict.takes
    }
    assert takers == {each["loader"] for each in describe_vae(tmp_path / "out")["loaders"] if each["takes"]}


def test_a_checkpoint_of_a_whole_model_gives_its_vae(source: Path, tmp_path: Path) -> None:
    inside = {f"first_stage_model.{name}": tensor for name, tensor in to_ldm(load_file(source / WEIGHTS)).items()}
    inside["model.diffusion_model.input_blocks.0.0.weight"] = torch.zeros(4, 4)
    inside["cond_stage_model.a"] = torch.zeros(1)
    torch.save({"state_dict": inside}, tmp_path / "model.ckpt")
    report = convert(tmp_path / "model.ckpt", tmp_path / "out", options=ConvertOptions(config=source))
    assert report.verification and report.verification.identical
    assert same_bits(load_file(tmp_path / "out" / WEIGHTS), load_file(source / WEIGHTS))


@pytest.mark.parametrize("options", [{"to": "ldm"}, {}, {"max_shard_size": "20KB"}])
def test_weights_that_share_memory_in_a_pickle_are_written_apart(
    source: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    tensors = load_file(source / WEIGHTS)
    buffer = torch.cat([tensor.flatten() for tensor in tensors.values()])
    parts = buffer.split([tensor.numel() for tensor in tensors.values()])
    shared = {name: part.view(tensors[name].shape) for name, part in zip(tensors, parts, strict=True)}
    one, other = (f"encoder.mid_block.resnets.{index}.norm1.weight" for index in (0, 1))
    shared[one], tensors[one] = shared[other], tensors[other]  # one tensor under two names
    torch.save(shared, tmp_path / "a.pt")
    target = tmp_path / ("b.safetensors" if "to" in options else "b")
    report = convert(tmp_path / "a.pt", target, options=ConvertOptions(config=source, **options))
    assert report.verification and same_bits(read_checkpoint(target).tensors, tensors)
    if "max_shard_size" in options:
        assert len(list(target.glob("*-of-*"))) > 1


def test_what_the_files_do_not_say_of_the_scale_can_be_said(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out", options=ConvertOptions(scaling_factor=0.5, shift_factor=0.1))
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["scaling_factor"], config["shift_factor"]) == (0.5, 0.1)


# What is said beside the weights


@pytest.mark.parametrize(("name", "options"), [("a.safetensors", {"to": "ldm"}), ("a", {})])
def test_metadata_says_where_the_weights_are_from_and_nothing_of_this_machine(
    source: Path, tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    convert(source, tmp_path / name, options=ConvertOptions(license="mit", **options))
    weights = tmp_path / name if options else tmp_path / name / WEIGHTS
    config, notes = from_metadata(metadata_of(weights))
    assert full_config(config) == full_config(SD)
    assert notes["source"] == "source"
    assert notes["source_digest"] == autoencoder_digest(load_autoencoder(source))
    assert notes["license"] == "mit"
    if not options:
        assert json.loads((tmp_path / name / "config.json").read_text())[NOTES_FIELD] == notes
    for path in [tmp_path / name, *(tmp_path / name).rglob("*")]:
        assert not path.is_file() or str(tmp_path).encode() not in path.read_bytes()

    convert(tmp_path / name, tmp_path / "next")
    assert read_checkpoint(tmp_path / "next").notes["license"] == "mit"
    assert (
        convert(tmp_path / name, tmp_path / "next", options=ConvertOptions(license="cc0-1.0", overwrite=True)).status
        == "written"
    )
    assert read_checkpoint(tmp_path / "next").notes["license"] == "cc0-1.0"


def test_files_can_be_read_by_those_who_may_read_the_folder(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "a.safetensors", options=ConvertOptions(to="ldm"))
    (tmp_path / "plain").write_text("")
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


# Types


def test_a_cast_that_overflows_names_the_weight_and_leaves_nothing(source: Path, tmp_path: Path) -> None:
    tensors = load_file(source / WEIGHTS)
    tensors["encoder.conv_in.bias"][0] = 70000.0
    save_file(tensors, source / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"`encoder.conv_in.bias` reaches 7e\+04, and float16 ends at 6.55e\+04"):
        convert(source, tmp_path / "out", options=ConvertOptions(dtype="float16"))
    assert left_in(tmp_path) == ["source"]
    assert convert(source, tmp_path / "out", options=ConvertOptions(dtype="bfloat16")).status == "written"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_cast_is_measured_against_the_source(source: Path, tmp_path: Path, dtype: str) -> None:
    report = convert(source, tmp_path / "out", options=ConvertOptions(dtype=dtype))
    assert report.dtypes == (dtype,) and report.source_dtypes == ("float32",)
    assert report.verification and not report.verification.identical
    errors = {comparison.name: comparison.max_abs_error for comparison in report.verification.comparisons}
    old, new = (load_autoencoder(path) for path in (source, tmp_path / "out"))
    with torch.no_grad():
        difference = (
            old.encode(picture()).latent_dist.mean - new.encode(picture()).latent_dist.mean
        ).abs().max() * 0.31
    assert 0.1 * difference < errors["latents"] < 10 * difference


# The scale


def latents_of(path: Path) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
    """What a diffusion model sees of a picture with diffusers' class: mean, std, and the way back."""
    vae = StockAutoencoderKL.from_pretrained(path)
    scale, shift = vae.config.scaling_factor, vae.config.shift_factor or 0.0
    with torch.no_grad():
        posterior = vae.encode(picture()).latent_dist

    def decode(latents: Tensor) -> Tensor:
        with torch.no_grad():
            return vae.decode(latents / scale + shift).sample

    return (posterior.mean - shift) * scale, posterior.std * scale, decode


@pytest.mark.parametrize("config", [SD, SD | {"shift_factor": 0.2}], ids=["scale", "scale and shift"])
def test_a_folded_vae_gives_the_latents_of_the_old_one_under_the_new_scale(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    source = tmp_path / "source"
    make(config).save_pretrained(source)
    report = convert(source, tmp_path / "a.safetensors", options=ConvertOptions(to="ldm", fold_scale=0.18215))
    assert report.config["scaling_factor"] == 0.18215 and report.config["shift_factor"] is None
    assert report.fold and max(report.fold.latents_error, report.fold.std_error, report.fold.recon_error) < 1e-4
    assert len(report.rewrites) == 1 and "0.31" in report.rewrites[0] and "0.18215" in report.rewrites[0]
    assert not report.warnings
    convert(tmp_path / "a.safetensors", tmp_path / "new")
    (latents, std, decode), (new_latents, new_std, new_decode) = latents_of(source), latents_of(tmp_path / "new")
    torch.testing.assert_close(new_latents, latents, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(new_std, std, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(new_decode(latents), decode(latents), rtol=1e-4, atol=1e-5)
    changed = {
        name
        for name, t in load_file(tmp_path / "new" / WEIGHTS).items()
        if not torch.equal(t, load_file(source / WEIGHTS)[name])
    }
    assert changed <= {f"{conv}.{part}" for conv in ("quant_conv", "post_quant_conv") for part in ("weight", "bias")}

    back = convert(
        tmp_path / "new",
        tmp_path / "back",
        options=ConvertOptions(fold_scale=0.31, fold_shift=config.get("shift_factor")),
    )
    assert back.config == full_config(config) and len(back.rewrites) == 2
    after = load_file(tmp_path / "back" / WEIGHTS)
    for name, tensor in load_file(source / WEIGHTS).items():
        torch.testing.assert_close(after[name], tensor, rtol=1e-6, atol=1e-6)


def test_a_fold_of_half_precision_weights_is_rounded_once(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "half", options=ConvertOptions(dtype="float16"))
    convert(tmp_path / "half", tmp_path / "folded", options=ConvertOptions(dtype="float32", fold_scale=0.18215))
    (latents, _, _), (new_latents, _, _) = latents_of(tmp_path / "half"), latents_of(tmp_path / "folded")
    torch.testing.assert_close(new_latents, latents, rtol=1e-5, atol=1e-5)
    report = convert(tmp_path / "half", tmp_path / "again", options=ConvertOptions(fold_scale=0.18215))
    assert report.dtypes == ("float16",)
    assert report.fold and report.fold.latents_error < 1e-5  # of the fold itself; the cast comes after


def test_without_quant_convs_a_shift_needs_new_ones(tmp_path: Path) -> None:
    make(FLUX).save_pretrained(tmp_path / "source")
    with pytest.raises(CheckpointError, match="post_quant_conv"):
        convert(tmp_path / "source", tmp_path / "out", options=ConvertOptions(fold_scale=0.18215))
    assert left_in(tmp_path) == ["source"]
    report = convert(
        tmp_path / "source", tmp_path / "out", options=ConvertOptions(fold_scale=0.18215, add_quant_convs=True)
    )
    assert report.config["use_quant_conv"] and report.config["use_post_quant_conv"]
    (latents, _, decode), (new_latents, _, new_decode) = latents_of(tmp_path / "source"), latents_of(tmp_path / "out")
    torch.testing.assert_close(new_latents, latents, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(new_decode(latents), decode(latents), rtol=1e-4, atol=1e-5)


def test_a_fold_is_refused_where_the_log_variance_meets_its_clamp(
    source: Path, tmp_path: Path, make_images: Callable[..., Path]
) -> None:
    tensors = load_file(source / WEIGHTS)
    tensors["quant_conv.bias"][5] -= 60.0  # the second channel's logvar
    save_file(tensors, source / WEIGHTS)
    photos = make_images(tmp_path / "photos", {"a.png": (40, 30)})
    with pytest.raises(
        CheckpointError, match=r"cannot be folded exactly: on a.png, log variance of channel 1 is .*clamp"
    ):
        convert(source, tmp_path / "out", options=ConvertOptions(fold_scale=0.18215, images=photos, verify=False))
    assert left_in(tmp_path) == ["photos", "source"]


def test_a_fold_forgets_what_was_measured_before_it(source: Path, tmp_path: Path) -> None:
    update_config(source, {}, {"calibration": {"images": 3}, "license": "mit"})
    convert(source, tmp_path / "same")
    convert(source, tmp_path / "folded", options=ConvertOptions(fold_scale=0.18215))
    assert read_checkpoint(tmp_path / "same").notes["calibration"] == {"images": 3}
    assert "calibration" not in read_checkpoint(tmp_path / "folded").notes
    assert read_checkpoint(tmp_path / "folded").notes["license"] == "mit"


def test_a_scale_that_ldm_readers_do_not_learn_is_told(source: Path, tmp_path: Path) -> None:
    (warning,) = convert(source, tmp_path / "a.safetensors", options=ConvertOptions(to="ldm")).warnings
    assert "scaling_factor 0.31" in warning and "--fold-scale 0.18215" in warning
    make(SD | {"scaling_factor": 0.18215}).save_pretrained(tmp_path / "usual")
    assert not convert(tmp_path / "usual", tmp_path / "b.safetensors", options=ConvertOptions(to="ldm")).warnings
    assert not convert(source, tmp_path / "c").warnings


def test_a_file_that_we_wrote_knows_its_own_scale_whatever_lies_beside_it(source: Path, tmp_path: Path) -> None:
    make(SD | {"scaling_factor": 0.18215}).save_pretrained(tmp_path / "usual")
    assert not convert(tmp_path / "usual", source / "a.safetensors", options=ConvertOptions(to="ldm")).warnings
    assert load_autoencoder(source / "a.safetensors").config.scaling_factor == 0.18215
    assert load_autoencoder(source).config.scaling_factor == 0.31
    assert load_autoencoder(source / "a.safetensors", config=source).config.scaling_factor == 0.31


# A scale that nothing shows


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """An LDM file of four latent channels that says nothing of its scale."""
    path = tmp_path / "bare.safetensors"
    save_file(to_ldm(make(fields(32, 32, norm_num_groups=32)).state_dict()), path)
    return path


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_guessed_scale_is_never_folded(bare: Path, tmp_path: Path, dry_run: bool) -> None:
    with pytest.raises(CheckpointError, match="nothing in the files shows") as caught:
        convert(bare, tmp_path / "out", options=ConvertOptions(fold_scale=0.13025, dry_run=dry_run))
    for part in (str(bare), "0.18215", "0.13025", "--scaling-factor 0.18215 or --scaling-factor 0.13025"):
        assert part in str(caught.value)
    with pytest.raises(CheckpointError, match="nothing in the files shows"):  # of which this says nothing
        convert(bare, tmp_path / "out", options=ConvertOptions(fold_scale=0.13025, shift_factor=0.1))
    assert left_in(tmp_path) == ["bare.safetensors"]

    report = convert(
        bare, tmp_path / "out", options=ConvertOptions(fold_scale=0.13025, scaling_factor=0.13025, dry_run=dry_run)
    )
    assert report.config["scaling_factor"] == 0.13025 and report.fold and report.warnings == ()
    if not dry_run:
        # SDXL's file stays as it is
        assert same_bits(load_file(tmp_path / "out" / WEIGHTS), read_checkpoint(bare).tensors)
        assert read_checkpoint(tmp_path / "out").assumed == ()


def pipeline_around(vae: StockAutoencoderKL, folder: Path) -> Path:
    """A pipeline folder, of which the conversion reads the index and the VAE's configuration."""
    vae.save_pretrained(folder / "vae")
    index = {"_class_name": "StableDiffusionPipeline", "vae": ["diffusers", "AutoencoderKL"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a", {}),
        ("a", {"max_shard_size": "20KB"}),
        ("a.safetensors", {"to": "ldm", "prefix": "vae."}),
        ("a", {"into": "pipeline"}),
    ],
    ids=["folder", "shards", "ldm", "into"],
)
def test_a_guess_stays_a_guess_through_conversions(
    bare: Path, tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    if "into" in options:
        options = {"into": pipeline_around(make(fields(8, 8)), tmp_path / "pipeline")}
    report = convert(bare, tmp_path / name, options=ConvertOptions(**options))
    assert any("scaling_factor 0.18215 is assumed" in w and "--scaling-factor" in w for w in report.warnings)
    convert(tmp_path / name, tmp_path / "next")
    for path in (tmp_path / name, tmp_path / "next"):
        checkpoint = read_checkpoint(path)
        assert checkpoint.notes["assumed"] == ["scaling_factor"] and checkpoint.assumed == ("scaling_factor",)
        assert any("was assumed" in remark for remark in checkpoint.remarks)
        with pytest.raises(CheckpointError, match="nothing in the files shows"):
            convert(path, tmp_path / "folded", options=ConvertOptions(fold_scale=0.13025))
    assert convert(bare, tmp_path / name, options=ConvertOptions(**options)).status == "up to date"

    said = convert(tmp_path / "next", tmp_path / "said", options=ConvertOptions(scaling_factor=0.18215))
    assert said.warnings == () and said.remarks == ()
    checkpoint = read_checkpoint(tmp_path / "said")
    assert "assumed" not in checkpoint.notes and checkpoint.assumed == ()
    assert (
        convert(tmp_path / "said", tmp_path / "folded", options=ConvertOptions(fold_scale=0.13025)).status == "written"
    )


def test_a_scale_that_is_set_later_is_no_longer_assumed(bare: Path, tmp_path: Path) -> None:
    convert(bare, tmp_path / "a")
    update_config(tmp_path / "a", {}, {"license": "mit"})
    assert read_checkpoint(tmp_path / "a").assumed == ("scaling_factor",)
    update_config(tmp_path / "a", {"scaling_factor": 0.18215}, {"calibration": {"images": 3}})
    shutil.copy(tmp_path / "a" / WEIGHTS, tmp_path / "alone.safetensors")
    for path in (tmp_path / "a", tmp_path / "alone.safetensors"):
        checkpoint = read_checkpoint(path)
        assert checkpoint.assumed == () and "assumed" not in checkpoint.notes


# Proof


def damaged_save(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on, one value goes wrong on its way to the disk."""
    save = tensor_files.safetensors.torch.save_file

    def wrong(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        name = min(tensors)
        other = tensors[name].clone()
        other.view(-1)[0] += 0.5
        save({**tensors, name: other}, path, metadata=metadata)

    monkeypatch.setattr(tensor_files.safetensors.torch, "save_file", wrong)


@pytest.mark.parametrize(
    ("name", "options"), [("a.safetensors", {"to": "ldm"}), ("a", {}), ("b", {"max_shard_size": "20KB"})]
)
def test_what_is_checked_is_what_lies_on_the_disk(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, options: dict[str, Any]
) -> None:
    damaged_save(monkeypatch)
    with pytest.raises(CheckpointError, match="read back with other values than were written: "):
        convert(source, tmp_path / name, options=ConvertOptions(**options))
    assert left_in(tmp_path) == ["source"]
    assert convert(source, tmp_path / name, options=ConvertOptions(verify=False, **options)).verification is None
    assert (tmp_path / name).exists()


def swapped(levels: tuple[int, int], function: Callable[..., dict[str, Tensor]], before: bool) -> Any:
    """A key table with two levels of the decoder in each other's place."""
    marks = {f"decoder.up.{a}.": f"decoder.up.{b}." for a, b in (levels, levels[::-1])}

    def swap(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        def other(name: str) -> str:
            return next((new + name.removeprefix(old) for old, new in marks.items() if name.startswith(old)), name)

        return {other(name): tensor for name, tensor in tensors.items()}

    return (lambda tensors: function(swap(tensors))) if before else (lambda tensors: swap(function(tensors)))


def test_levels_in_the_wrong_order_are_found_in_one_direction_and_in_both(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(fields(8, 8, 8)).save_pretrained(tmp_path / "even")  # the top two levels have equal shapes
    monkeypatch.setattr(plan, "to_ldm", swapped((1, 2), plan.to_ldm, before=False))
    with pytest.raises(CheckpointError, match="read back with other values"):
        convert(tmp_path / "even", tmp_path / "a.safetensors", options=ConvertOptions(to="ldm"))
    monkeypatch.undo()

    monkeypatch.setattr(plan, "to_ldm", swapped((0, 1), plan.to_ldm, before=False))
    monkeypatch.setattr(keys, "from_ldm", swapped((0, 1), keys.from_ldm, before=True))
    with pytest.raises(CheckpointError, match="not what loaders of LDM files expect"):
        convert(source, tmp_path / "a.safetensors", options=ConvertOptions(to="ldm"))
    assert left_in(tmp_path) == ["even", "source"]


def test_a_prefix_that_was_forgotten_is_found(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = write.save_tensors

    def forgetful(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
        save({name.removeprefix("vae."): tensor for name, tensor in tensors.items()}, path, metadata)

    monkeypatch.setattr(write, "save_tensors", forgetful)
    with pytest.raises(CheckpointError, match="names without the prefix `vae.`"):
        convert(source, tmp_path / "a.safetensors", options=ConvertOptions(to="ldm", prefix="vae."))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_comparison_passes_a_cast_and_sees_wrong_weights(dtype: torch.dtype) -> None:
    config = full_config(fields(16, 16))
    tensors = make(config, 3).state_dict()
    source = build(tensors, config)

    def failed(changed: Callable[[str, Tensor], Tensor]) -> set[str]:
        result = {name: changed(name, tensor).to(dtype) for name, tensor in tensors.items()}
        return {
            comparison.name for comparison in compare(source, build(result, config), [dtype]) if not comparison.passed
        }

    assert not failed(lambda name, tensor: tensor)
    assert failed(lambda name, tensor: tensor.flip(1) if name == "encoder.conv_in.weight" else tensor) >= {"latents"}
    assert failed(lambda name, tensor: tensor.flip(0) if name == "decoder.conv_out.weight" else tensor) == {"recon"}
    if dtype == torch.float32:  # the attention of an untrained network adds less than half precision takes away
        assert failed(lambda n, t: t.mT if n.endswith("to_v.weight") else t) >= {"latents", "recon"}


def test_the_comparison_does_not_pass_nan() -> None:
    vae = build(make().state_dict(), SD)
    broken = build(make().state_dict(), SD)
    with torch.no_grad():
        broken.decoder.conv_out.bias[0] = float("nan")
    assert [comparison.name for comparison in compare(vae, broken, [torch.bfloat16]) if not comparison.passed] == [
        "recon"
    ]


def test_a_wrong_configuration_is_found(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    careless = write.write_diffusers_folder
    monkeypatch.setattr(
        write,
        "write_diffusers_folder",
        lambda folder, tensors, config, notes, **others: careless(
            folder, tensors, config | {"scaling_factor": 1.0}, notes, **others
        ),
    )
    with pytest.raises(CheckpointError, match="scaling_factor is 1.0, not 0.31"):
        convert(source, tmp_path / "out")


def test_equal_bits_are_more_than_equal_values() -> None:
    nan = torch.tensor([float("nan"), 1.0])
    assert same_bits({"a": nan}, {"a": nan.clone()})
    assert not same_bits({"a": torch.tensor([0.0])}, {"a": torch.tensor([-0.0])})
    assert not same_bits({"a": torch.ones(2)}, {"a": torch.ones(2).half()})
    assert not same_bits({"a": torch.ones(2)}, {"a": torch.ones(2), "b": torch.ones(2)})
    assert not same_bits({"a": torch.ones(2, 1)}, {"a": torch.ones(1, 2)})


# What is there already


@pytest.mark.parametrize(
    ("name", "options"), [("a.safetensors", {"to": "ldm", "prefix": "vae."}), ("a", {"dtype": "float16"})]
)
def test_the_same_conversion_again_is_up_to_date_and_another_is_refused(
    source: Path, tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    assert convert(source, tmp_path / name, options=ConvertOptions(dry_run=True, **options)).status == "new"
    assert left_in(tmp_path) == ["source"]
    assert convert(source, tmp_path / name, options=ConvertOptions(**options)).status == "written"
    before = (tmp_path / name).stat().st_mtime_ns
    assert convert(source, tmp_path / name, options=ConvertOptions(**options)).status == "up to date"
    assert (
        convert(source, tmp_path / name, options=ConvertOptions(dry_run=True, overwrite=True, **options)).status
        == "up to date"
    )
    assert (tmp_path / name).stat().st_mtime_ns == before
    with pytest.raises(OutputExistsError, match="exists"):
        convert(source, tmp_path / name, options=ConvertOptions(**options | {"dtype": "bfloat16"}))
    make(seed=1).save_pretrained(source)  # the same name, another VAE
    with pytest.raises(OutputExistsError, match="exists"):
        convert(source, tmp_path / name, options=ConvertOptions(**options))
    assert (
        convert(source, tmp_path / name, options=ConvertOptions(dry_run=True, overwrite=True, **options)).status
        == "replace"
    )
    assert convert(source, tmp_path / name, options=ConvertOptions(overwrite=True, **options)).status == "written"
    assert convert(source, tmp_path / name, options=ConvertOptions(**options)).status == "up to date"
    assert left_in(tmp_path) == sorted(["source", name])


@pytest.mark.parametrize(
    ("name", "made", "asked", "said"),
    [
        ("a.safetensors", {"prefix": "vae."}, {"dtype": "float16"}, "with --prefix vae., without --dtype"),
        ("a.safetensors", {"dtype": "float16"}, {"dtype": "bfloat16"}, "with --dtype float16"),
        ("a", {"fold_scale": 0.5, "add_quant_convs": True}, {"fold_scale": 0.5}, "with --add-quant-convs"),
        ("a", {}, {"variant": "fp16"}, "without --variant"),
    ],
)
def test_a_result_of_other_options_is_refused_with_those_that_differ(
    source: Path, tmp_path: Path, name: str, made: dict[str, Any], asked: dict[str, Any], said: str
) -> None:
    to = {"to": "ldm" if name.endswith(".safetensors") else "diffusers"}
    convert(source, tmp_path / name, options=ConvertOptions(**to, **made))
    with pytest.raises(OutputExistsError) as caught:
        convert(source, tmp_path / name, options=ConvertOptions(**to, **asked))
    assert str(caught.value) == (
        f"{tmp_path / name} exists, and was made {said}; choose another path, or give --overwrite (overwrite=True)"
    )
    make(seed=1).save_pretrained(source)
    with pytest.raises(OutputExistsError, match="was made with these options, but from another source"):
        convert(source, tmp_path / name, options=ConvertOptions(**to, **made))


def test_a_result_that_was_changed_since_is_not_up_to_date(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out")
    update_config(tmp_path / "out", {"scaling_factor": 0.9}, {})
    with pytest.raises(OutputExistsError):
        convert(source, tmp_path / "out")
    convert(source, tmp_path / "out", options=ConvertOptions(overwrite=True))
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    tensors["encoder.conv_in.bias"][0] += 1
    save_file(tensors, tmp_path / "out" / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(OutputExistsError):
        convert(source, tmp_path / "out")


def test_nothing_but_a_vae_is_ever_replaced(source: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    save_file(
        {
            "model.diffusion_model.a": torch.zeros(1),
            **{f"first_stage_model.{n}": t for n, t in to_ldm(load_file(source / WEIGHTS)).items()},
        },
        other,
    )
    with pytest.raises(OutputExistsError, match="whole checkpoint"):
        convert(source, other, options=ConvertOptions(to="ldm", overwrite=True))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.txt").write_text("")
    for options in ({}, {"to": "onnx"}):
        with pytest.raises(OutputExistsError, match="holds"):
            convert(source, tmp_path / "folder", options=ConvertOptions(overwrite=True, **options))
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(OutputExistsError, match="is a folder"):
        convert(source, tmp_path / "folder.safetensors", options=ConvertOptions(to="ldm", overwrite=True))


def test_the_source_is_not_replaced_by_its_own_result(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "a.safetensors", options=ConvertOptions(to="ldm"))
    before = (source / WEIGHTS).read_bytes()
    for src, dst, options in (
        (source, source, {}),
        (source / WEIGHTS, source, {"dtype": "float16"}),
        (tmp_path / "a.safetensors", tmp_path / "a.safetensors", {"to": "ldm", "dtype": "float16"}),
        (source, tmp_path, {}),
        (source, tmp_path, {"to": "onnx"}),
    ):
        for overwrite in (True, False):  # advice to overwrite would be wrong
            with pytest.raises(ConfigError, match="holds the source itself"):
                convert(src, dst, options=ConvertOptions(overwrite=overwrite, **options))
    assert (source / WEIGHTS).read_bytes() == before


@pytest.mark.parametrize(("name", "options"), [("a.safetensors", {"to": "ldm"}), ("a", {})])
def test_an_interrupted_conversion_leaves_what_was_there(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, options: dict[str, Any]
) -> None:
    convert(source, tmp_path / name, options=ConvertOptions(**options))
    weights = tmp_path / name if options else tmp_path / name / WEIGHTS
    before = weights.read_bytes()

    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(verify, "compare", interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / name, options=ConvertOptions(dtype="float16", overwrite=True, **options))
    assert weights.read_bytes() == before
    assert left_in(tmp_path) == sorted(["source", name])


def test_options_that_do_not_go_together_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    for name, options, message in (
        ("out", {"to": "ldm"}, "suffix"),
        ("a.safetensors", {}, "--to ldm"),
        ("out", {"prefix": "vae."}, "--prefix is for --to ldm"),
        ("a.safetensors", {"to": "ldm", "variant": "fp16"}, "--variant is for --to diffusers"),
        ("a.safetensors", {"to": "ldm", "into": tmp_path}, "--into is for --to diffusers"),
        ("out", {"variant": "../x"}, "--variant"),
        ("out", {"max_shard_size": "huge"}, "--max-shard-size"),
        ("out", {"fold_scale": 0.0}, "--fold-scale is 0.0"),
        ("out", {"fold_shift": 0.1}, "belongs to --fold-scale"),
        ("out", {"dtype": "int8"}, "--dtype"),
        ("out", {"to": "onnx", "dtype": "bfloat16"}, "bfloat16"),
    ):
        with pytest.raises(ConfigError, match=message):
            convert(tmp_path / "nothing", tmp_path / name, options=ConvertOptions(**options))


# ONNX


@pytest.mark.slow
def test_onnx_is_written_from_the_rewritten_weights_and_says_so(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    source = tmp_path / "source"
    make(fields(8, scaling_factor=0.31, mid_block_add_attention=False)).save_pretrained(source)
    report = convert(source, tmp_path / "onnx", options=ConvertOptions(to="onnx", fold_scale=0.18215))
    assert report.onnx and report.onnx["max_relative_error"] < 1e-4
    assert report.verification and all(comparison.passed for comparison in report.verification.comparisons)
    config = json.loads((tmp_path / "onnx/vae_encoder/config.json").read_text())
    assert config["scaling_factor"] == 0.18215 and config[NOTES_FIELD]["source"] == "source"
    assert (
        convert(source, tmp_path / "onnx", options=ConvertOptions(to="onnx", fold_scale=0.18215)).status == "up to date"
    )
    with pytest.raises(OutputExistsError):
        convert(source, tmp_path / "onnx", options=ConvertOptions(to="onnx"))
    assert left_in(tmp_path) == ["onnx", "source"]


@pytest.mark.slow
def test_a_guess_stays_a_guess_in_onnx(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    vae = make(fields(32, norm_num_groups=32, mid_block_add_attention=False))
    save_file(vae.state_dict(), tmp_path / "bare.safetensors")
    report = convert(tmp_path / "bare.safetensors", tmp_path / "onnx", options=ConvertOptions(to="onnx"))
    assert any("scaling_factor 0.18215 is assumed" in warning for warning in report.warnings)
    for part in ("vae_encoder", "vae_decoder"):
        config = json.loads((tmp_path / "onnx" / part / "config.json").read_text())
        assert config[NOTES_FIELD]["assumed"] == ["scaling_factor"]


def test_the_bundled_vae_converts_as_it_is(tmp_path: Path) -> None:
    report = convert(None, tmp_path / "mini.safetensors", options=ConvertOptions(to="ldm"))
    assert report.source == "sdvae-mini" and report.verification and report.verification.identical
    bundled = load_file(bundled_path() / WEIGHTS)
    assert same_bits(read_checkpoint(tmp_path / "mini.safetensors").tensors, bundled)
