"""Which programs take a file: diffusers is asked itself, the rules of the others were taken from them (loaders.py)."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from vaes import build_vae, vae_fields

from sdvae.checkpoints.compat.facts import WeightFacts, weight_facts
from sdvae.checkpoints.compat.loaders import LoaderVerdict, loader_verdicts
from sdvae.checkpoints.keys import to_ldm
from sdvae.cli.main import cli
from sdvae.model.autoencoder import AutoencoderKL

from diffusers import AutoencoderKL as StockAutoencoderKL  # isort: skip  # after the repair of torchvision

SD: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
}
FLUX = SD | {
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
}
SD3_SCALE = {"scaling_factor": 1.5305, "shift_factor": 0.0609}
APPS = ("ComfyUI", "A1111", "SD.Next", "Forge", "kohya sd-scripts")
ALL = ("diffusers from_pretrained", "diffusers from_single_file", *APPS, "flux load_ae", "CompVis / sgm")


def weights(fields: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        return dict(StockAutoencoderKL(**fields).state_dict())


def with_levels(*widths: int, **fields: Any) -> dict[str, Any]:
    return SD | vae_fields(*widths, norm_num_groups=32) | fields


def facts(
    fields: Mapping[str, Any],
    layout: str = "ldm",
    change: Callable[[dict[str, torch.Tensor]], Mapping[str, torch.Tensor]] = lambda tensors: tensors,
    **others: Any,
) -> WeightFacts:
    tensors = weights(fields)
    named = change(to_ldm(tensors) if layout == "ldm" else tensors)
    shapes = {name: tuple(tensor.shape) for name, tensor in named.items()}
    known = {"scaling_factor": 0.18215} | dict(fields)
    given: dict[str, Any] = {"path": "vae.safetensors", "is_folder": False, "suffix": ".safetensors", "fields": known}
    if layout == "folder":
        given |= {"path": "my-vae", "is_folder": True, "has_config": True}
    return weight_facts(shapes, **(given | others))


def verdicts(found: WeightFacts) -> dict[str, LoaderVerdict]:
    return {verdict.loader: verdict for verdict in loader_verdicts(found)}


def takers(found: WeightFacts) -> set[str]:
    return {name for name, verdict in verdicts(found).items() if verdict.takes}


def behind(prefix: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()}


def reshaped(*shape: int) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """The attention's weights with other dimensions."""
    pattern = re.compile(r".*(attn_1|attentions\.0)\.(q|k|v|proj_out|to_q|to_k|to_v|to_out\.0)\.weight")
    return lambda tensors: {
        name: tensor.reshape(*tensor.shape[:2], *shape) if pattern.fullmatch(name) else tensor
        for name, tensor in tensors.items()
    }


def legacy(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    return {
        re.sub(r"to_(q|k|v|out\.0)(?=\.)", lambda match: names[match[0]], name): tensor
        for name, tensor in tensors.items()
    }


def with_extra(name: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda tensors: tensors | {name: torch.zeros(1)}


def without(*stems: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if not name.startswith(stems)}


def in_checkpoint(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return behind("first_stage_model.")(tensors) | {"model.diffusion_model.out.2.bias": torch.zeros(4)}


NO_FLUX = set(ALL) - {"flux load_ae", "diffusers from_pretrained"}


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        pytest.param(facts(SD), NO_FLUX, id="Stable Diffusion's own file"),
        pytest.param(
            facts(SD, "folder"),
            {"diffusers from_pretrained", "ComfyUI", "SD.Next", "Forge", "kohya sd-scripts"},
            id="a diffusers folder",
        ),
        pytest.param(
            facts(SD, "diffusers"),
            {"diffusers from_single_file", "ComfyUI", "SD.Next", "Forge"},
            id="a file with names of diffusers",
        ),
        pytest.param(
            facts(SD, "diffusers", suffix=".bin", path="vae.bin"),
            {"diffusers from_single_file", "ComfyUI", "Forge", "kohya sd-scripts"},
            id="the same as .bin",
        ),
        pytest.param(
            facts(SD, "diffusers", legacy), {"ComfyUI", "Forge"}, id="a file with the attention's names before 0.17"
        ),
        pytest.param(
            facts(SD, "folder", legacy),
            {"diffusers from_pretrained", "ComfyUI", "SD.Next", "Forge", "kohya sd-scripts"},
            id="a folder with the attention's names before 0.17",
        ),
        pytest.param(facts(SD, "folder", reshaped(1, 1)), set(), id="a folder with the attention as convolutions"),
        pytest.param(
            facts(SD, "folder", suffix=".json"),
            {"diffusers from_pretrained", "SD.Next", "kohya sd-scripts"},
            id="a folder with several weights files",
        ),
        pytest.param(facts(SD, "folder", has_config=False), {"ComfyUI", "Forge"}, id="a folder without config.json"),
        pytest.param(
            facts(SD, "ldm", behind("first_stage_model.")),
            {"diffusers from_single_file", "SD.Next", "Forge", "kohya sd-scripts"},
            id="a prefix as in a checkpoint",
        ),
        pytest.param(
            facts(SD, "ldm", behind("vae.")), {"diffusers from_single_file", "SD.Next"}, id="the other prefix"
        ),
        pytest.param(facts(SD, "ldm", behind("autoencoder.")), set(), id="a prefix that nobody knows"),
        pytest.param(
            facts(SD, "ldm", in_checkpoint),
            {"diffusers from_single_file", "SD.Next", "kohya sd-scripts"},
            id="a whole checkpoint",
        ),
        pytest.param(
            facts(SD, "ldm", reshaped()),
            {"diffusers from_single_file", "SD.Next", "kohya sd-scripts"},
            id="LDM names with a linear attention",
        ),
        pytest.param(facts(SD, "ldm", with_extra("loss.logvar")), NO_FLUX, id="what training left behind"),
        pytest.param(facts(SD, "ldm", with_extra("model_ema.decay")), NO_FLUX, id="a counter of an average"),
        pytest.param(facts(SD, "ldm", with_extra("discriminator.x")), NO_FLUX - {"A1111"}, id="a weight A1111 refuses"),
        pytest.param(
            facts(SD, "ldm", suffix=".bin", path="vae.bin"), NO_FLUX - {"A1111", "SD.Next"}, id="LDM names in a .bin"
        ),
        pytest.param(
            facts(SD, "ldm", without("quant_conv", "post_quant_conv")),
            {"diffusers from_single_file", "ComfyUI", "SD.Next"},
            id="four channels without quant convs",
        ),
        pytest.param(facts(SD, "ldm", without("quant_conv")), {"diffusers from_single_file"}, id="one quant conv"),
        pytest.param(facts(SD, "ldm", without("encoder")), set(), id="a decoder alone"),
        pytest.param(
            facts(FLUX),
            {"diffusers from_single_file", "ComfyUI", "SD.Next", "Forge", "flux load_ae"},
            id="FLUX",
        ),
        pytest.param(
            facts(FLUX | {"use_quant_conv": True, "use_post_quant_conv": True}),
            {"diffusers from_single_file", "ComfyUI", "SD.Next", "CompVis / sgm"},
            id="sixteen channels with quant convs",
        ),
        pytest.param(
            facts(SD | {"latent_channels": 32}),
            {"diffusers from_single_file", "SD.Next", "CompVis / sgm"},
            id="32 latent channels",
        ),
        pytest.param(
            facts(with_levels(64, 128, 256, 256)),
            {"diffusers from_single_file", "CompVis / sgm"},
            id="other widths",
        ),
        pytest.param(
            facts(with_levels(64, 128, 256, 256), "folder"),
            {"diffusers from_pretrained", "SD.Next", "kohya sd-scripts"},
            id="other widths in a folder",
        ),
        pytest.param(
            facts(with_levels(128, 256, 512)),
            {"diffusers from_single_file", "ComfyUI", "CompVis / sgm"},
            id="three levels under LDM names",
        ),
        pytest.param(
            facts(with_levels(128, 256, 512), "diffusers"),
            {"diffusers from_single_file"},
            id="three levels of diffusers",
        ),
        pytest.param(
            facts(with_levels(96, 192, 288, 384, norm_num_groups=16)),
            {"diffusers from_single_file"},
            id="sixteen groups",
        ),
        pytest.param(
            facts(with_levels(128, 192, 256)), {"diffusers from_single_file"}, id="widths that are no multiples"
        ),
        pytest.param(
            facts(SD | {"layers_per_block": 1}), {"diffusers from_single_file", "CompVis / sgm"}, id="one block a level"
        ),
        pytest.param(facts(SD | {"mid_block_add_attention": False}), {"diffusers from_single_file"}, id="no attention"),
        pytest.param(
            facts(SD | {"in_channels": 4}), {"diffusers from_single_file", "CompVis / sgm"}, id="four image channels"
        ),
    ],
)
def test_each_program_takes_what_it_was_seen_to_take(found: WeightFacts, expected: set[str]) -> None:
    judged = verdicts(found)
    assert tuple(judged) == ALL
    assert takers(found) == expected
    assert all(verdict.reasons for verdict in judged.values() if not verdict.takes)


@pytest.mark.parametrize(
    ("found", "loader", "reason"),
    [
        (facts(SD, "ldm", behind("vae.")), "ComfyUI", "the VAE is invalid"),
        (facts(SD | {"latent_channels": 64}), "ComfyUI", "64 latent channels are taken for an autoencoder of Hunyuan"),
        (facts(with_levels(8, 16, 16, 16, norm_num_groups=4)), "ComfyUI", "this VAE has channels 8, 16, 16, 16 (not"),
        (facts(SD, "ldm", reshaped()), "Forge", "(C, C, 1, 1)"),
        (facts(SD, "diffusers"), "kohya sd-scripts", "KeyError"),
        (facts(SD, "ldm", with_extra("discriminator.x")), "A1111", "`discriminator.x`"),
        (facts(SD), "flux load_ae", "quant_conv and post_quant_conv are left out"),
        (facts(SD, "folder", variant="fp16"), "kohya sd-scripts", "only the variant fp16"),
    ],
)
def test_a_refusal_says_what_stands_in_the_way(found: WeightFacts, loader: str, reason: str) -> None:
    verdict = verdicts(found)[loader]
    assert not verdict.takes and any(reason in each for each in verdict.reasons), verdict


def test_a_fix_is_offered_where_another_layout_would_do_and_only_there() -> None:
    prefixed = verdicts(facts(SD, "ldm", behind("vae.")))
    assert prefixed["A1111"].fix == "sdvae convert vae.safetensors vae-ldm.safetensors --to ldm"
    assert verdicts(facts(SD, "diffusers"))["kohya sd-scripts"].fix == (
        "sdvae convert vae.safetensors vae-diffusers --to diffusers"
    )
    assert verdicts(facts(with_levels(8, 16, 16, 16, norm_num_groups=4), "ldm", behind("vae.")))["ComfyUI"].fix is None
    assert verdicts(facts(SD))["ComfyUI"].fix is None  # nothing is wrong
    spaced = verdicts(facts(SD, "folder", path="my vae"))["A1111"].fix
    assert spaced == "sdvae convert 'my vae' 'my vae-ldm.safetensors' --to ldm"


@pytest.mark.parametrize(
    ("fields", "loader", "options"),
    [
        (SD | {"scaling_factor": 0.18215}, "ComfyUI", None),
        (SD | {"scaling_factor": 0.13025}, "ComfyUI", None),
        (SD | {"scaling_factor": 0.31}, "ComfyUI", "--fold-scale 0.18215"),
        (SD | {"scaling_factor": 0.18215, "shift_factor": 0.1}, "A1111", "--fold-scale 0.18215"),
        (SD | {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}, "A1111", "--fold-scale 0.18215"),
        (FLUX, "flux load_ae", None),
        (FLUX | SD3_SCALE, "ComfyUI", None),
        # no offset is left: 0.7222 * 0.05795 = 0.3611 * 0.1159
        (
            FLUX | {"scaling_factor": 0.7222, "shift_factor": 0.05795},
            "flux load_ae",
            "--fold-scale 0.3611 --fold-shift 0.1159",
        ),
        (
            FLUX | {"scaling_factor": 0.5, "shift_factor": 0.0},
            "ComfyUI",
            "--fold-scale 0.3611 --fold-shift 0.1159 --add-quant-convs",
        ),
        (SD | {"scaling_factor": 0.31}, "CompVis / sgm", None),  # its yaml has a scale
        (SD | {"scaling_factor": 0.31, "shift_factor": 0.1}, "CompVis / sgm", "--fold-scale 0.31"),  # but no shift
        (SD | {"scaling_factor": 0.31}, "diffusers from_single_file", None),  # it reads config.json
    ],
)
def test_a_scale_that_the_program_does_not_know_is_folded(
    fields: dict[str, Any], loader: str, options: str | None
) -> None:
    verdict = verdicts(facts(fields))[loader]
    assert verdict.takes
    if options is None:
        assert verdict.fix is None
    else:
        assert verdict.fix == f"sdvae convert vae.safetensors vae-ldm.safetensors --to ldm {options}"
        assert f"scaling_factor {fields.get('scaling_factor', 0.18215):g}" in " ".join(verdict.reasons)


def test_a_shift_without_quant_convs_is_said_not_to_fold() -> None:
    judged = verdicts(facts(FLUX | SD3_SCALE))
    assert judged["flux load_ae"].takes and judged["flux load_ae"].fix is None
    assert "cannot be folded into weights without quant_conv" in " ".join(judged["flux load_ae"].reasons)
    prefixed = verdicts(facts(FLUX | SD3_SCALE, "ldm", behind("vae.")))["flux load_ae"]
    assert not prefixed.takes and prefixed.fix is None and "cannot be folded" in " ".join(prefixed.reasons)


def test_other_weights_are_not_judged() -> None:
    for shapes in ({}, {"1.conv.0.weight": (64, 3, 3, 3)}, {"down_blocks.0.resnets.0.norm1.weight": (8,)}):
        assert loader_verdicts(weight_facts(shapes, path="x", is_folder=False, suffix=".safetensors")) == ()


# ------------------------------------------------------------------------------------ diffusers itself, on real files


TINY = with_levels(8, 16, 16, norm_num_groups=4, scaling_factor=0.31)


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> tuple[StockAutoencoderKL, Path]:
    vae = build_vae(8, 16, 16, kind=StockAutoencoderKL, **TINY)
    folder = tmp_path_factory.mktemp("stock") / "vae"
    vae.save_pretrained(folder)
    return vae, folder


CHANGES: dict[str, tuple[str, Callable[[dict[str, torch.Tensor]], Mapping[str, torch.Tensor]]]] = {
    "ldm": ("ldm", lambda t: t),
    "ldm linear attention": ("ldm", reshaped()),
    "ldm prefix": ("ldm", behind("first_stage_model.")),
    "ldm vae prefix": ("ldm", behind("vae.")),
    "ldm extra": ("ldm", with_extra("loss.logvar")),
    "ldm decoder": ("ldm", without("encoder.", "quant_conv")),
    "diffusers": ("diffusers", lambda t: t),
    "diffusers conv attention": ("diffusers", reshaped(1, 1)),
    "diffusers legacy": ("diffusers", legacy),
    "diffusers prefix": ("diffusers", behind("vae.")),
    "diffusers extra": ("diffusers", with_extra("loss.logvar")),
}


@pytest.mark.parametrize("case", CHANGES)
def test_diffusers_itself_agrees(
    stock: tuple[StockAutoencoderKL, Path], tmp_path: Path, case: str, capfd: pytest.CaptureFixture[str]
) -> None:
    vae, folder = stock
    layout, change = CHANGES[case]
    tensors = dict(vae.state_dict())
    named = {
        name: t.contiguous().clone() for name, t in change(to_ldm(tensors) if layout == "ldm" else tensors).items()
    }
    file = tmp_path / "vae.safetensors"
    save_file(named, file, metadata={"format": "pt"})
    mine = tmp_path / "folder"
    mine.mkdir()
    (mine / "config.json").write_bytes((folder / "config.json").read_bytes())
    (mine / "diffusion_pytorch_model.safetensors").write_bytes(file.read_bytes())

    def gives_the_vae(load: Callable[[], AutoencoderKL]) -> bool:
        try:
            loaded = load().state_dict()
            return all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
        except (ValueError, RuntimeError, NotImplementedError):  # the last: weights that were never set have no values
            return False

    shapes = {name: tuple(tensor.shape) for name, tensor in named.items()}
    common: dict[str, Any] = {"suffix": ".safetensors", "fields": TINY}
    as_file = verdicts(weight_facts(shapes, path=str(file), is_folder=False, **common))
    as_folder = verdicts(weight_facts(shapes, path=str(mine), is_folder=True, has_config=True, **common))
    single = gives_the_vae(lambda: StockAutoencoderKL.from_single_file(str(file), config=str(folder)))
    whole = gives_the_vae(lambda: StockAutoencoderKL.from_pretrained(str(mine)))
    assert as_file["diffusers from_single_file"].takes is single
    assert as_folder["diffusers from_pretrained"].takes is whole
    assert single or whole or case in {"ldm decoder", "diffusers conv attention", "diffusers prefix"}


def test_the_offered_commands_make_the_file_acceptable(
    stock: tuple[StockAutoencoderKL, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fix of CompVis' classes for a folder, pasted: the file that it writes is taken."""
    from sdvae.checkpoints.formats import read_shapes

    monkeypatch.chdir(tmp_path)
    vae = StockAutoencoderKL(**with_levels(32, 32, scaling_factor=0.31, layers_per_block=1))
    vae.save_pretrained("vae")
    file = Path("vae/diffusion_pytorch_model.safetensors")
    before = weight_facts(
        read_shapes(file), path="vae", is_folder=True, suffix=".safetensors", has_config=True, fields=vae.config
    )
    fix = verdicts(before)["CompVis / sgm"].fix
    assert fix is not None
    result = CliRunner().invoke(cli, shlex.split(fix)[1:])
    assert result.exit_code == 0, result.output
    written = Path(shlex.split(fix)[3])
    after = weight_facts(read_shapes(written), path=str(written), is_folder=False, suffix=".safetensors")
    assert verdicts(after)["CompVis / sgm"].takes
