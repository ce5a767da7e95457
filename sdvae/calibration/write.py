"""Puts a calibration into the config.json of the VAE that it was measured on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdvae.calibration.result import Calibration
from sdvae.checkpoints.fit import DEFAULTS, autoencoder_digest
from sdvae.checkpoints.formats import CLASS_NAME, SCALE_FIELDS, read_json
from sdvae.checkpoints.notes import config_to_update, notes_of, update_config
from sdvae.checkpoints.store import BUNDLED_NAME, bundled_path, load_network
from sdvae.errors import ConfigError

__all__ = ["Written", "check_writable", "write_calibration"]

# Another batch size or device moves the values by some 1e-7, and so now and then the last of the six digits that are
# written; no standard error is small enough to see it.
ROUNDING = 1e-5


@dataclass(frozen=True, kw_only=True)
class Written:
    """What became of config.json."""

    config_path: str
    changed: bool
    before: Mapping[str, Any]  # of the fields that are set
    after: Mapping[str, Any]


def check_writable(vae: str | Path | None, *, per_channel: bool = False, shift: bool = False) -> Path:
    """The config.json that a calibration of this VAE would be written to. Reads no weights.

    Raises: ConfigError where it must not be written, with what to do instead.
    """
    if per_channel and shift:
        raise ConfigError(
            "a shift and means per channel are two centres, of which a pipeline reads one: --per-channel (per_channel="
            "True) is for SDXL, --shift (shift=True) for SD 3 and FLUX"
        )
    if vae is None or str(vae) == BUNDLED_NAME or _is_bundled(Path(vae)):
        raise ConfigError(
            f"{BUNDLED_NAME} is part of the package, and not to be changed: save a copy to calibrate, "
            f"sdvae convert {BUNDLED_NAME} DIR"
        )
    path = config_to_update(vae)
    config = read_json(path)
    if (name := config.get("_class_name", CLASS_NAME)) != CLASS_NAME:
        raise ConfigError(f"{path} is of the class {name}; calibrations are written for {CLASS_NAME} only")
    if config.get("latents_std") is not None and not per_channel:
        raise ConfigError(
            f"{path} has latents_std, by which readers divide as well: a new scaling_factor alone would not give "
            f"latents of variance 1. Set both with --per-channel (per_channel=True)"
        )
    return path


def _is_bundled(path: Path) -> bool:
    return path.expanduser().exists() and path.expanduser().resolve().is_relative_to(bundled_path().resolve())


def write_calibration(
    folder: str | Path, calibration: Calibration, *, per_channel: bool = False, shift: bool = False
) -> Written:
    """Put a calibration into the config.json of a VAE folder, or of the VAE in a pipeline folder, in one step.

    scaling_factor is set; with `shift` shift_factor as well; with `per_channel` latents_mean and latents_std, and
    shift_factor goes. What was there before is appended to the list `previous` in the notes (`_sdvae`), with the
    calibration it came from. Where the same is there already, up to rounding, nothing is written.
    latents_std is written relative to 1 / scaling_factor: readers compute (z - latents_mean) * scaling_factor /
    latents_std, and those that know scaling_factor alone get latents of variance 1 over all channels too.
    Raises: ConfigError as `check_writable`, and for a calibration of another VAE or of one image alone; CheckpointError
        where the VAE cannot be loaded or writing fails; MissingWeightsError for a folder without weights.
    """
    path = check_writable(folder, per_channel=per_channel, shift=shift)
    config = read_json(path)
    notes = notes_of(config, path)
    if calibration.num_images < 2:
        raise ConfigError("a calibration on one image is not written: it may be far off, and cannot say how far")
    _check_same_vae(path.parent, calibration)
    after, note = (each(per_channel=per_channel, shift=shift) for each in (calibration.fields, calibration.note))
    before = {name: config.get(name, DEFAULTS[name]) for name in SCALE_FIELDS}
    changed_fields = any(
        not _same_values(before[name], value, after["scaling_factor"]) for name, value in after.items()
    )
    written = Written(
        config_path=str(path),
        changed=changed_fields or not _same_record(notes.get("calibration"), note),
        before={name: before[name] for name in after},
        after=after,
    )
    if written.changed:
        new_notes: dict[str, Any] = {"calibration": note}
        if changed_fields:
            old = {"calibration": notes["calibration"]} if "calibration" in notes else {}
            new_notes["previous"] = [*notes.get("previous", []), {**before, **old}]
        update_config(path.parent, after, new_notes)
    return written


def _check_same_vae(folder: Path, calibration: Calibration) -> None:
    """Raise ConfigError unless the calibration was measured on this VAE, whatever its scale was then.

    The scale is no part of what was measured, but it is part of the digest: what was present then is put in, so that a
    calibration can be written again over itself or over another one.
    """
    vae = load_network(folder)
    then = {name: getattr(calibration.present, name) for name in SCALE_FIELDS}
    scales: tuple[dict[str, Any], ...] = ({}, then)  # as it stands: `present` has 1 where a config says null
    for scale in scales:
        if autoencoder_digest(vae, {**vae.config, **scale}) == calibration.vae_digest:
            return
    raise ConfigError(
        f"{folder} has other weights, or another configuration, than the VAE that was calibrated ({calibration.vae}); "
        f"calibrate the folder itself"
    )


def _same_values(one: Any, other: Any, scaling_factor: float) -> bool:
    """Whether two values of a field are equal but for the rounding of another batch size or device."""
    if one is None or other is None:
        return one is other
    pairs = zip(one, other, strict=True) if isinstance(one, (list, tuple)) else [(one, other)]
    # means near 0 are known to a part of the spread of z, which is about 1 / scaling_factor
    return all(math.isclose(a, b, rel_tol=ROUNDING, abs_tol=ROUNDING / scaling_factor) for a, b in pairs)


def _same_record(one: Mapping[str, Any] | None, other: Mapping[str, Any]) -> bool:
    """Whether two notes of a calibration are of the same images, read in the same way."""
    return one is not None and all(one.get(name) == other[name] for name in ("images_digest", "protocol"))
