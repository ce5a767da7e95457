"""What a calibration found, what it means in words, and what of it belongs into a config.json. Plain numbers only."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from sdvae._version import __version__
from sdvae.data.sources.files import FileReason
from sdvae.errors import ConfigError
from sdvae.metrics.latent_health import CENTRE_MATTERS, SCALE_MATTERS
from sdvae.metrics.moments import Channel, Estimate

__all__ = ["Calibration", "Present", "Verdict"]

Verdict = Literal["equal", "small", "matters", "unclear"]

SIGNIFICANT = 2.0  # standard errors; about 95 % of chance differences are smaller
TARGET = 0.01  # relative standard error of scaling_factor that is enough: a fifth of what matters
FEW_IMAGES = 30  # effective ones; with fewer, standard errors are uncertain by 13 % and more: 1 / sqrt(2 (n - 1))

# A float32 pass in other batches or on another device moves the values by some 1e-7; a run that repeats a calibration
# is to find the same numbers. No standard error is small enough to see the sixth digit.
_DIGITS = 6


@dataclass(frozen=True, kw_only=True)
class Present:
    """What the configuration says now, and what it makes of these images' latents."""

    scaling_factor: float
    shift_factor: float | None
    latents_mean: tuple[float, ...] | None
    latents_std: tuple[float, ...] | None
    std: Estimate  # of the latents over all channels; 1 is the aim
    mean: Estimate  # of the latents over all channels; 0 is the aim


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What `calibrate` found."""

    vae: str
    vae_digest: str
    class_name: str
    source: str
    num_found: int
    num_images: int
    num_effective: float  # images of one size that would say as much
    num_positions: int
    images_digest: str
    protocol: Mapping[str, Any]
    device: str
    scaling_factor: Estimate
    shift_factor: Estimate
    scaling_factor_of_modes: Estimate | None  # None: the encoder knows no posterior, so its z are modes
    channels: tuple[Channel, ...]
    present: Present
    warnings: tuple[str, ...] = ()
    failures: tuple[FileReason, ...] = ()
    seconds: float = 0.0

    @property
    def difference(self) -> float:
        """Standard deviation of the latents under the present configuration, minus 1."""
        return self.present.std.value - 1.0

    @property
    def difference_in_errors(self) -> float | None:
        """The difference in standard errors of it; None where there is none."""
        error = self.present.std.standard_error
        return self.difference / error if error else None

    @property
    def verdict(self) -> Verdict:
        """Whether the present scale is off.

        equal: the difference is below SIGNIFICANT standard errors and below SCALE_MATTERS; small: it is real, but below
        SCALE_MATTERS; matters: it is real, and above; unclear: above, but these images do not show that it is real.
        """
        errors = self.difference_in_errors
        real = errors is not None and abs(errors) > SIGNIFICANT
        if abs(self.difference) > SCALE_MATTERS:
            return "matters" if real else "unclear"
        return "small" if real else "equal"

    @property
    def num_images_needed(self) -> int | None:
        """Images like these that would give scaling_factor with a relative standard error of TARGET."""
        error = self.scaling_factor.relative_error
        return None if error is None else math.ceil(self.num_images * (error / TARGET) ** 2)

    @property
    def judgement(self) -> tuple[str, ...]:
        """What follows from the numbers, in sentences."""
        return tuple(_judgement(self))

    @property
    def exit_code(self) -> int:
        """0, or 3 where some images failed."""
        return 3 if self.failures else 0

    def fields(self, *, per_channel: bool = False, shift: bool = False) -> dict[str, Any]:
        """The fields of config.json that `write_calibration` sets, rounded to six digits.

        Raises: ConfigError for latents_std of a channel that does not vary.
        """
        scale = _rounded(self.scaling_factor.value, self.scaling_factor.value)
        fields: dict[str, Any] = {"scaling_factor": scale}
        if shift:
            fields["shift_factor"] = _rounded(self.shift_factor.value, 1 / self.scaling_factor.value)
        if per_channel:
            for index, each in enumerate(self.channels):
                if not each.varies:
                    raise ConfigError(f"channel {index} is the same everywhere, so no latents_std makes its std 1")
            # readers compute (z - latents_mean) * scaling_factor / latents_std
            fields["latents_mean"] = [_rounded(each.mean.value, each.std.value) for each in self.channels]
            fields["latents_std"] = [
                _rounded(each.relative_std.value, each.relative_std.value) for each in self.channels
            ]
            fields["shift_factor"] = None  # a second centre beside latents_mean: no pipeline reads both
        return fields

    def note(self, *, per_channel: bool = False, shift: bool = False) -> dict[str, Any]:
        """The record that `write_calibration` leaves: enough to repeat it. No date, so that it repeats to the bit."""
        errors: dict[str, Any] = {"scaling_factor": _brief_error(self.scaling_factor)}
        if shift:
            errors["shift_factor"] = _brief_error(self.shift_factor)
        if per_channel:
            errors["latents_mean"] = [_brief_error(each.mean) for each in self.channels]
            errors["latents_std"] = [_brief_error(each.relative_std) for each in self.channels]
        return {
            "num_images": self.num_images,
            "images_digest": self.images_digest,
            "protocol": dict(self.protocol),
            "standard_errors": errors,
            "sdvae": __version__,
        }

    def to_json(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "difference": self.difference,
            "difference_in_errors": self.difference_in_errors,
            "verdict": self.verdict,
            "num_images_needed": self.num_images_needed,
            "judgement": list(self.judgement),
            "exit_code": self.exit_code,
        }


def _rounded(value: float, unit: float) -> float:
    """Six significant digits of the unit, so that a mean near 0 does not keep digits of mere rounding."""
    if not unit:
        return float(value)
    return round(float(value), _DIGITS - 1 - math.floor(math.log10(abs(unit)))) + 0.0  # no -0.0


def _brief_error(estimate: Estimate) -> float | None:
    return None if estimate.standard_error is None else float(f"{estimate.standard_error:.3g}")


def _judgement(calibration: Calibration) -> Iterator[str]:
    c = calibration
    yield from _of_scale(c)
    offset = c.present.mean
    if abs(offset.value) > CENTRE_MATTERS and abs(offset.value) > SIGNIFICANT * (offset.standard_error or math.inf):
        yield (
            f"the latents are off centre by {offset.value:+.2f}, more than {CENTRE_MATTERS:g}: shift_factor or "
            f"latents_mean would centre them, in pipelines that read them"
        )
    if c.verdict in ("matters", "unclear"):
        yield (
            "where a diffusion model has been trained with the present values, keep them whatever these images say: it "
            "expects the latents that they give"
        )
    needed, error = c.num_images_needed, c.scaling_factor.relative_error
    if error is None or needed is None:
        yield "one image says nothing about the uncertainty: take more"
    elif needed > c.num_images:
        yield (
            f"{c.num_images} images give scaling_factor to {error:.2%} of its value (standard error); about {needed:,} "
            f"like them would give {TARGET:.0%}"
        )
    if c.num_images > 1 and c.num_effective < FEW_IMAGES:
        unequal = c.num_effective < 0.9 * c.num_images
        these = f"{c.num_images} images" + f", as good as {c.num_effective:.1f} of one size," * unequal
        yield f"the standard errors are rough themselves: {these} are fewer than {FEW_IMAGES}"


def _of_scale(c: Calibration) -> Iterator[str]:
    have = "with the present configuration the latents have a standard deviation of"
    if (std := f"{c.present.std.value:.4g}") == "1":
        yield f"{have} 1, as it should be: keep the present value"
        return
    errors = c.difference_in_errors
    amount = f"{c.difference:+.2%}" + ("" if errors is None else f", {abs(errors):.1f} standard errors")
    yield f"{have} {std} instead of 1 ({amount})"
    yield {
        "equal": "no difference to 1 shows on these images: keep the present value",
        "small": f"the difference is real, but below {SCALE_MATTERS:.0%} (0.4 dB of signal-to-noise ratio), too small "
        f"to matter: keep the present value",
        "matters": f"the difference is real and above {SCALE_MATTERS:.0%} (0.4 dB of signal-to-noise ratio): it "
        f"matters for a diffusion model that is trained from scratch, so use the new value there",
        "unclear": f"the difference is above {SCALE_MATTERS:.0%}, but these images cannot tell it from chance: take "
        f"more images",
    }[c.verdict]
