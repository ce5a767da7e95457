"""Which programs take the weights of a KL-VAE as they lie on disk, where their scale comes from, and what would help.

Judged by names, shapes and suffix alone; no torch, and none of the programs is run here. Each rule names the program,
the version it was taken from, and whether that version was run on such a file ("run") or its source was read ("read").
Left out: autoencoders of other classes, which these programs tell apart by other rules.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, NamedTuple

from sdvae.checkpoints.compat.facts import SD_GROUPS, WeightFacts
from sdvae.checkpoints.formats import FAMILIES

__all__ = ["LoaderVerdict", "loader_verdicts"]


class _Scale(NamedTuple):
    """What a diffusion model does to z: latents = (z - shift) * scale."""

    model: str
    scale: float
    shift: float


def _of(family: str) -> _Scale:
    known = FAMILIES[family]
    return _Scale(family, known.scaling_factor, known.shift_factor or 0.0)


# ComfyUI a125cd84, comfy/latent_formats.py (read), and kohya-ss/sd-scripts (read) have the same numbers.
_SD1, _SDXL, _SD3, _FLUX = (_of(name) for name in ("Stable Diffusion 1 or 2", "SDXL", "SD3", "FLUX"))
_SCALES_OF_CHANNELS = {4: (_SD1, _SDXL), 16: (_FLUX, _SD3)}

_STAGE, _VAE = "first_stage_model.", "vae."  # the prefixes of keys.PREFIXES
_SD_WIDTHS = (128, 256, 512, 512)  # ddconfig of Stable Diffusion: ch 128, ch_mult 1, 2, 4, 4
_SD_BLOCKS = 2
# AUTOMATIC1111 modules/sd_vae.py, releases from 1.6 (read): these are dropped before loading
_DROPPED_BY_A1111 = re.compile(r"loss.*|model_ema\.decay|model_ema\.num_updates")


@dataclass(frozen=True, kw_only=True)
class LoaderVerdict:
    """Whether one program takes the weights."""

    loader: str
    takes: bool
    reasons: tuple[str, ...]  # where it does not take them: why; else what to know
    scale_from: str  # where the program takes scaling_factor and shift_factor from
    fix: str | None  # a command that makes it take them, with the right scale; None: none is needed, or none can


def loader_verdicts(facts: WeightFacts) -> tuple[LoaderVerdict, ...]:
    """What each program does with these weights; empty where they are not those of a KL-VAE."""
    if facts.prefix is None or (facts.naming is None and not facts.has_both_halves):
        return ()
    judges: tuple[Callable[[WeightFacts], LoaderVerdict], ...] = (
        _from_pretrained,
        _from_single_file,
        _comfyui,
        _a1111,
        _sdnext,
        _forge,
        _kohya,
        _flux,
        _compvis,
    )
    return tuple(judge(facts) for judge in judges)


# ------------------------------------------------------------------------------------------------------------ diffusers


def _from_pretrained(facts: WeightFacts) -> LoaderVerdict:
    """diffusers 0.42.1, AutoencoderKL.from_pretrained (run)."""
    layout = []
    if not facts.is_folder:
        layout.append("takes a folder with config.json, not a file")
    elif not facts.has_config:
        layout.append("the folder has no config.json")
    if facts.naming != "diffusers" or facts.prefix:
        layout.append("takes bare names of diffusers; others leave weights unset, with a warning alone")
    elif 4 in facts.attention_dims:
        layout.append("the attention's weights are 1x1 convolutions (C, C, 1, 1); it takes (C, C)")
    notes = []
    if facts.variant:
        notes.append(f'no plain weights: pass variant="{facts.variant}"')
    if facts.extras:
        notes.append(f"{len(facts.extras)} other weights are ignored with a warning")
    if facts.has_channel_scale:
        notes.append(
            "latents_mean and latents_std are used by pipelines of SDXL and later ones, not by those of SD 1.x"
        )
    scale = "the folder's config.json"
    return _verdict(facts, "diffusers from_pretrained", [], layout, notes, scale, "diffusers")


def _from_single_file(facts: WeightFacts) -> LoaderVerdict:
    """diffusers 0.42.1, AutoencoderKL.from_single_file(FILE, config=DIR) (run)."""
    layout = []
    if facts.is_folder:
        layout.append("takes a file; this folder is for from_pretrained")
    elif facts.naming == "diffusers":
        # Names of diffusers pass only where they equal those of the model one by one; all else goes through the
        # conversion from LDM, which finds nothing.
        if facts.prefix:
            layout.append(f"names of diffusers behind `{facts.prefix}`: it takes them bare")
        if facts.has_legacy_attention:
            layout.append("the attention has names of diffusers before 0.17 (query, key, ...)")
        elif 4 in facts.attention_dims:
            layout.append("the attention's weights are 1x1 convolutions (C, C, 1, 1); it takes (C, C)")
        if facts.extras:
            layout.append(f"{len(facts.extras)} weights are not the VAE's, such as `{facts.extras[0]}`")
    elif facts.prefix not in ("", _STAGE, _VAE):
        layout.append(f"the prefix `{facts.prefix}` is not known: it takes bare names, `{_STAGE}` and `{_VAE}`")
    notes = ["pass config=DIR with this VAE's config.json: without it, that of Stable Diffusion 1.5 is fetched"]
    scale, target = "the config.json in config=DIR", None if facts.is_folder else "ldm"
    return _verdict(facts, "diffusers from_single_file", [], layout, notes, scale, target)


# --------------------------------------------------------------------------------------------------------- applications


def _comfyui(facts: WeightFacts) -> LoaderVerdict:
    """ComfyUI a125cd84: nodes.py VAELoader, comfy/sd.py VAE, comfy/diffusers_convert.py (run)."""
    function = _quant_convs_differ(facts) + _not_of_sd(facts, three_levels=facts.naming == "ldm")
    if facts.latent_channels in (32, 64):
        function.append(
            f"{facts.latent_channels} latent channels are taken for an autoencoder of Hunyuan; later versions (read: "
            "033046cc, 2026) ask for more than that"
        )
    layout = _not_one_file(facts) + _prefixed(facts, "says that the VAE is invalid") + _attention_as_conv(facts)
    notes = []
    if facts.naming == "diffusers":
        notes.append("put the weights file into models/vae; config.json is never read")
    scale = "the diffusion model's latent format"
    return _verdict(
        facts, "ComfyUI", function, layout, notes, scale, "ldm", *_families(facts), may_add_quant_convs=True
    )


def _a1111(facts: WeightFacts) -> LoaderVerdict:
    """AUTOMATIC1111 stable-diffusion-webui, modules/sd_vae.py and sd_models.py, releases from 1.6 (read)."""
    function = _quant_convs_lack(facts) + _not_of_sd(facts)
    if facts.latent_channels != 4:
        function.append(f"{facts.latent_channels} latent channels; its models have 4")
    layout = _not_ldm_file(facts, (".safetensors", ".ckpt", ".pt"))
    layout += _prefixed(facts, "loads strictly")
    if not facts.prefix:
        layout += _attention_as_conv(facts)
    strays = [name for name in facts.extras if not _DROPPED_BY_A1111.fullmatch(name)]
    if strays and not facts.prefix:
        layout.append(f"loads strictly, and {len(strays)} weights are not the VAE's, such as `{strays[0]}`")
    return _verdict(facts, "A1111", function, layout, [], "scale_factor in the model's yaml", "ldm", _SD1, _SDXL)


def _sdnext(facts: WeightFacts) -> LoaderVerdict:
    """SD.Next 338129b7, modules/sd_vae.py (read): from_pretrained for folders, from_single_file for files."""
    function: list[str] = []
    if not facts.is_folder:
        function += _quant_convs_differ(facts) + _not_of_sd(facts)  # a file is read with the config of its own models
    single = _from_pretrained(facts) if facts.is_folder else _from_single_file(facts)
    layout = [] if single.takes or function else list(single.reasons)
    if not facts.is_folder and facts.suffix != ".safetensors":
        layout.append(f"lists .safetensors files, not {facts.suffix}")
    notes = ["fields of config.json are overwritten with those of its own file for the kind of model"]
    if facts.is_folder and facts.variant is None:
        notes.append("where its VAE type is float16, set the variant to fp32: by default it then asks for .fp16 files")
    scale, target = "its own config for the kind of model", "diffusers" if facts.is_folder else "ldm"
    return _verdict(facts, "SD.Next", function, layout, notes, scale, target, *_families(facts))


def _forge(facts: WeightFacts) -> LoaderVerdict:
    """Forge dfdcbab6: backend/loader.py, backend/nn/vae.py (run)."""
    function = _not_of_sd(facts)
    if facts.latent_channels not in _SCALES_OF_CHANNELS:
        function.append(f"{facts.latent_channels} latent channels; its models have 4 or 16")
    elif facts.latent_channels == 4:
        function += _quant_convs_lack(facts)
    elif any(facts.quant_convs):
        function.append("quant_conv and post_quant_conv are left out: its models of 16 channels have none")
    layout = _not_one_file(facts) + _attention_as_conv(facts)
    if facts.prefix not in ("", _STAGE) or (facts.prefix and (facts.naming != "ldm" or facts.is_checkpoint)):
        layout += _prefixed(facts, "does not find the VAE")
    scale = "config.json in Forge's own folder of the model"
    return _verdict(facts, "Forge", function, layout, [], scale, "ldm", *_families(facts))


def _kohya(facts: WeightFacts) -> LoaderVerdict:
    """kohya-ss/sd-scripts 48d368fa: library/model_util.py load_vae (run); train_network.py (read)."""
    function: list[str] = []
    layout: list[str] = []
    if facts.is_folder:
        layout += list(_from_pretrained(facts).reasons) if not _from_pretrained(facts).takes else []
        if facts.variant:
            function.append(f"asks for plain weights; the folder has only the variant {facts.variant}")
    else:
        function += _quant_convs_lack(facts) + _not_of_sd(facts)  # files get the config of SD 1.x
        if facts.latent_channels != 4:
            function.append(f"{facts.latent_channels} latent channels; a file is read with the configuration of SD 1.x")
        if facts.naming == "diffusers" and facts.suffix != ".bin":
            layout.append("names of diffusers in a file: KeyError; it takes them as a folder, or as .bin")
        elif facts.naming == "diffusers":
            layout += _prefixed(facts, "loads strictly")
        elif facts.prefix not in ("", _STAGE):
            layout.append(f"the prefix `{facts.prefix}` is not known: it takes bare names and `{_STAGE}`")
    notes = []
    if facts.is_folder:
        notes.append("trainers use their own scale; scripts that read config.json get this VAE's")
    target = "diffusers" if facts.naming == "diffusers" else "ldm"
    scale = "constants of the trainers"
    return _verdict(facts, "kohya sd-scripts", function, layout, notes, scale, target, _SD1, _SDXL)


# ----------------------------------------------------------------------------------------------------- reference code


def _flux(facts: WeightFacts) -> LoaderVerdict:
    """flux 802fb471, src/flux/util.py load_ae (run)."""
    function = _not_of_sd(facts)
    if facts.latent_channels != 16:
        function.append(f"{facts.latent_channels} latent channels; its autoencoder has 16")
    if any(facts.quant_convs):
        function.append("quant_conv and post_quant_conv are left out: its autoencoder has none")
    layout = _not_ldm_file(facts, (".safetensors",)) + _prefixed(facts, "leaves all weights unset")
    if not facts.prefix:
        layout += _attention_as_conv(facts)
    notes = [f"computes in the type of the file: {', '.join(facts.dtypes)}"] if facts.dtypes else []
    return _verdict(facts, "flux load_ae", function, layout, notes, "AutoEncoderParams in its code", "ldm", _FLUX)


def _compvis(facts: WeightFacts) -> LoaderVerdict:
    """CompVis stable-diffusion 21f890f9, latent-diffusion a506df57, Stability-AI generative-models 0ad7de9a (run)."""
    function = _quant_convs_lack(facts)
    first = facts.widths[0] if facts.widths else 1
    if any(width % first for width in facts.widths):
        function.append(f"widths {_listed(facts.widths)} are no multiples of the first: its ch_mult has integers")
    if any(width % SD_GROUPS for width in facts.widths):
        function.append(f"its norms have {SD_GROUPS} groups, which do not divide the widths {_listed(facts.widths)}")
    elif facts.norm_groups != SD_GROUPS:
        function.append(f"its norms have {SD_GROUPS} groups; those of this VAE have {facts.norm_groups}")
    if not facts.attention_dims:
        function.append("its middle has an attention; this VAE has none")
    layout = _not_ldm_file(facts, (".safetensors", ".ckpt", ".pt", ".pth", ".bin"))
    layout += _prefixed(facts, "leaves all weights unset")
    if not facts.prefix:
        layout += _attention_as_conv(facts)
    notes = [f"its yaml needs {_ddconfig(facts)}"]
    scale = "scale_factor in the model's yaml"
    own = (_Scale("this VAE", facts.scale[0], 0.0),) if facts.scale else ()  # any scale, but no shift
    return _verdict(facts, "CompVis / sgm", function, layout, notes, scale, "ldm", *own)


# ------------------------------------------------------------------------------------------------- rules of several


def _incomplete(facts: WeightFacts) -> str | None:
    if facts.naming is None:
        return "names of diffusers and of LDM are mixed"
    return None if facts.has_both_halves and facts.widths else "encoder or decoder is missing"


def _not_of_sd(facts: WeightFacts, three_levels: bool = False) -> list[str]:
    """Where a program builds Stable Diffusion's network whatever the file holds.

    three_levels: the program has a network of three levels too.
    """
    allowed = [_SD_WIDTHS, _SD_WIDTHS[:3]] if three_levels else [_SD_WIDTHS]
    differences = [
        (facts.widths not in allowed, f"channels {_listed(facts.widths)} (not {_listed(_SD_WIDTHS)})"),
        (facts.blocks != _SD_BLOCKS, f"blocks a level {facts.blocks} (not {_SD_BLOCKS})"),
        (facts.norm_groups != SD_GROUPS, f"norm groups {facts.norm_groups} (not {SD_GROUPS})"),
        (not facts.attention_dims, "no attention in the middle"),
        (facts.image_channels != (3, 3), f"image channels {_listed(facts.image_channels)} (not 3, 3)"),
    ]
    wrong = [difference for differs, difference in differences if differs]
    return [f"its network is fixed; this VAE has {'; '.join(wrong)}"] if wrong else []


def _quant_convs_lack(facts: WeightFacts) -> list[str]:
    return [] if all(facts.quant_convs) else ["needs quant_conv and post_quant_conv"]


def _quant_convs_differ(facts: WeightFacts) -> list[str]:
    return (
        ["has one of quant_conv and post_quant_conv; both or neither are needed"] if sum(facts.quant_convs) == 1 else []
    )


def _not_one_file(facts: WeightFacts) -> list[str]:
    return ["takes one weights file; these are several"] if facts.suffix == ".json" else []


def _not_ldm_file(facts: WeightFacts, suffixes: tuple[str, ...]) -> list[str]:
    if facts.naming != "ldm":
        return ["takes a file with LDM names; these are those of diffusers"]
    return [] if facts.suffix in suffixes else [f"takes {', '.join(suffixes)}; this is {facts.suffix}"]


def _prefixed(facts: WeightFacts, what_happens: str) -> list[str]:
    if facts.is_checkpoint:
        return ["a whole checkpoint: load it as the model, or take the VAE out"]
    return [f"names begin with `{facts.prefix}`: it takes them bare, and {what_happens}"] if facts.prefix else []


def _attention_as_conv(facts: WeightFacts) -> list[str]:
    """Programs with 1x1 convolutions reshape linear weights under names of diffusers, and no others."""
    if facts.naming == "ldm" and 2 in facts.attention_dims:
        return ["the attention's weights are (C, C); under LDM names it takes 1x1 convolutions (C, C, 1, 1)"]
    if facts.naming == "diffusers" and 4 in facts.attention_dims:
        return ["the attention's weights are (C, C, 1, 1); under names of diffusers it takes (C, C)"]
    return []


def _families(facts: WeightFacts) -> tuple[_Scale, ...]:
    return _SCALES_OF_CHANNELS.get(facts.latent_channels, ())


# ------------------------------------------------------------------------------------------------------------- verdict


def _verdict(
    facts: WeightFacts,
    loader: str,
    function: list[str],
    layout: list[str],
    notes: list[str],
    scale_from: str,
    target: str | None,
    *families: _Scale,
    may_add_quant_convs: bool = False,
) -> LoaderVerdict:
    """Put a verdict together.

    function: what no other file of this VAE would change. layout: what a conversion to `target` would.
    target: of `sdvae convert --to`; None where the weights are fine for another way of the same program.
    families: the models whose scale the program applies; none where it takes any.
    may_add_quant_convs: the program takes a VAE with quant convs as well as one without.
    """
    if incomplete := _incomplete(facts):
        return LoaderVerdict(loader=loader, takes=False, reasons=(incomplete,), scale_from=scale_from, fix=None)
    if function:
        return LoaderVerdict(loader=loader, takes=False, reasons=(*function, *layout), scale_from=scale_from, fix=None)
    fold = _fold(facts, families, may_add_quant_convs)
    if families:
        scale_from += ": " + ", ".join(_shown(family) for family in families)
    # Nothing is to be done, or nothing can be: a scale that does not fold keeps the weights from being used rightly.
    fix = _command(facts, target, fold) if target and (layout or fold) and fold is not _IMPOSSIBLE else None
    if fold is not None:
        notes = [*notes, _wrong_scale(facts, fold)]
    if layout:
        wrong = [_wrong_scale(facts, fold)] if fold is _IMPOSSIBLE else []
        return LoaderVerdict(loader=loader, takes=False, reasons=(*layout, *wrong), scale_from=scale_from, fix=fix)
    return LoaderVerdict(loader=loader, takes=True, reasons=tuple(notes), scale_from=scale_from, fix=fix)


_IMPOSSIBLE: tuple[str, ...] = ()


def _fold(facts: WeightFacts, families: tuple[_Scale, ...], may_add_quant_convs: bool) -> tuple[str, ...] | None:
    """Options of `sdvae convert` that fold the scale into the weights. None: the program applies this VAE's own."""
    if not families or facts.scale is None:
        return None
    if facts.scale in {(family.scale, family.shift) for family in families} and not facts.has_channel_scale:
        return None
    target, (scale, shift) = families[0], facts.scale
    options = ["--fold-scale", f"{target.scale:g}"] + (["--fold-shift", f"{target.shift:g}"] if target.shift else [])
    # A constant that is added to z cannot go through the zero padding of the decoder's first convolution, see
    # rewrite.fold_scale: it needs a 1x1 convolution before that.
    constant = facts.has_channel_scale or abs(shift * scale - target.shift * target.scale) > 1e-6
    if constant and not facts.quant_convs[1]:
        return (*options, "--add-quant-convs") if may_add_quant_convs else _IMPOSSIBLE
    return tuple(options)


def _wrong_scale(facts: WeightFacts, fold: tuple[str, ...]) -> str:
    scale, shift = facts.scale or (1.0, 0.0)
    own = f"scaling_factor {scale:g}" + (f" and shift_factor {shift:g}" if shift else "")
    own += ", and a mean and std for each channel" if facts.has_channel_scale else ""
    hint = (
        "that cannot be folded into weights without quant_conv and post_quant_conv, which the program leaves out"
        if fold is _IMPOSSIBLE
        else "fold it into the weights"
    )
    return f"applies the scale of its model, but this VAE has {own}: {hint}"


def _command(facts: WeightFacts, target: str, fold: tuple[str, ...] | None) -> str:
    name = PurePath(facts.path).name
    stem = name if facts.is_folder else PurePath(name).stem
    out = f"{stem}-ldm.safetensors" if target == "ldm" else f"{stem}-diffusers"
    return shlex.join(["sdvae", "convert", facts.path, out, "--to", target, *(fold or ())])


def _shown(scale: _Scale) -> str:
    shift = f" and shift {scale.shift:g}" if scale.shift else ""
    return f"{scale.scale:g}{shift} for {scale.model}"


def _ddconfig(facts: WeightFacts) -> str:
    first = facts.widths[0] if facts.widths else 0
    multiples = _listed(width // first for width in facts.widths) if first else ""
    return (
        f"ch {first}, ch_mult [{multiples}], num_res_blocks {facts.blocks}, z_channels {facts.latent_channels}, "
        f"embed_dim {facts.latent_channels}"
    )


def _listed(values: Any) -> str:
    return ", ".join(map(str, values))
