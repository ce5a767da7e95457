"""scaling_factor, shift_factor, latents_mean and latents_std of a VAE over a set of images, with standard errors.

Streaming: memory grows with the latent channels, not with the images. Images are what was drawn independently;
positions within one image are alike, so each image counts once for a standard error, with the weight of its positions.
Left out: anything that changes the weights; `checkpoints/rewrite.py` folds a scale into them.
"""

from __future__ import annotations

import hashlib
import inspect
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sdvae._version import __version__
from sdvae.checkpoints.formats import read_json
from sdvae.checkpoints.notes import config_to_update, notes_of, update_config
from sdvae.checkpoints.store import BUNDLED_NAME, bundled_path
from sdvae.data.images import DEFAULT_MAX_PIXELS, PREPROCESSING_VERSION, image_to_x, read_image_bytes
from sdvae.data.pipeline import group_by_shape, read_ahead
from sdvae.data.sources import ImageFile, find_images, os_reason
from sdvae.data.transforms import resize_and_crop
from sdvae.errors import CheckpointError, ConfigError, ImageError, SdvaeError
from sdvae.evaluation.images import choose_images
from sdvae.evaluation.subject import Encoding, Subject, open_subject
from sdvae.model.autoencoder import AutoencoderKL
from sdvae.model.device import batch_pixels, choose_device, exact_float32

__all__ = [
    "CalibrateOptions",
    "Calibration",
    "Channel",
    "Estimate",
    "Failure",
    "LatentMoments",
    "Present",
    "Verdict",
    "Written",
    "calibrate",
    "check_writable",
    "write_calibration",
]

Array = NDArray[np.float64]
OnProgress = Callable[[int, int], None]  # images done or failed so far, images to do
Verdict = Literal["equal", "small", "matters", "unclear"]

# 5 % of standard deviation is 0.4 dB of signal-to-noise ratio at every step of a noise schedule. Going from 256 to 512
# px, for which schedules are shifted, is 6 dB (Hoogeboom et al. 2023, simple diffusion, section 3.1: 20 log10 of 2).
SCALE_MATTERS = 0.05
# A mean of 0.2 standard deviations holds 4 % of the second moment of the latents, about as much as SCALE_MATTERS.
CENTRE_MATTERS = 0.2
SIGNIFICANT = 2.0  # standard errors; about 95 % of chance differences are smaller
TARGET = 0.01  # relative standard error of scaling_factor that is enough: a fifth of what matters
FEW_IMAGES = 30  # effective ones; with fewer, standard errors are uncertain by 13 % and more: 1 / sqrt(2 (n - 1))

_SCALE_FIELDS = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
# A float32 pass in other batches or on another device moves the values by some 1e-7; a run that repeats a calibration
# is to find the same numbers. No standard error is small enough to see the sixth digit.
_DIGITS = 6
_LEAST_STD = 2 * math.exp(-15)  # what logvar at its lower clamp, -30, leaves of a channel that is constant, twice


@dataclass(frozen=True, kw_only=True)
class CalibrateOptions:
    """How images become z, and where."""

    size: int | None = None  # length of the short side in px after resizing; None: as it is
    crop: str = "none"  # center: cut the resized image to size x size
    background: str = "white"  # colour under transparent pixels
    max_pixels: int | None = None  # larger images are refused; None: the limit of `read_image`
    max_images: int | None = None  # evenly spaced over the sorted names; None: all
    device: str = "auto"
    dtype: str = "float32"  # of the computation
    batch_size: int | None = None  # images of one size that go through the VAE together; None: what suits the device
    workers: int | None = None  # threads that read; None: one per core, at most 8

    def __post_init__(self) -> None:
        for name in ("size", "max_pixels", "max_images", "batch_size", "workers"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"{name} is {value}; expected 1 or more")
        for name, known in (("crop", ("none", "center")), ("dtype", ("float32", "bfloat16", "float16"))):
            if (choice := getattr(self, name)) not in known:
                raise ConfigError(f"{name} is '{choice}'; expected one of {', '.join(known)}")
        if self.crop != "none" and self.size is None:
            raise ConfigError(f"crop is '{self.crop}', but no size is given; give both, for example size 512")

    @property
    def num_workers(self) -> int:
        return min(8, os.cpu_count() or 1) if self.workers is None else self.workers

    def protocol(self) -> dict[str, Any]:
        """Every choice that changes a number beyond rounding, besides the images."""
        return {
            "size": self.size,
            "crop": self.crop,
            "background": self.background,
            "dtype": self.dtype,
            "preprocessing_version": PREPROCESSING_VERSION,
            "padding": "edges repeated to the VAE's multiple",
        }


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number and how uncertain it is."""

    value: float
    standard_error: float | None  # None: a single image says nothing about it

    @property
    def relative_error(self) -> float | None:
        return None if self.standard_error is None or not self.value else self.standard_error / abs(self.value)


class LatentMoments:
    """Mean and variance of z per channel, and how they vary from image to image.

    Draws of z are counted in expectation: their second moment is mean^2 + var of the posterior, without drawing.
    Population formulas: sums are divided by the number of positions.

    Standard errors: all numbers here are functions of ratios of sums over images (sum of z, of z^2, of positions). Such
    a ratio R = sum y / sum n has, image by image, the influence (y - R n) / sum n, and functions of ratios are linear
    for small changes (delta method). Source: Cochran 1977, Sampling Techniques, section 6.4. What n / (n - 1) does for
    images of one size, n_eff / (n_eff - 1) does for all, with the effective number below.
    """

    def __init__(self, latent_channels: int) -> None:
        self.num_images = 0
        self.latent_channels = latent_channels
        size = 1 + 3 * latent_channels  # an image's positions, and its sums of z, squares of draws, squares of modes
        self._origin: Array | None = None  # (C,), about the mean: squares of a mean that is far from 0 lose no digits
        self._sums = np.zeros(size)
        self._products = np.zeros((size, size))  # sum over images of the outer products
        self._covariance: Array | None = None  # of the estimates, kept until the next update

    def update(self, mean: Array, var: Array | None) -> None:
        """Take in images of one size. mean, var: of the posterior, (B, C, h, w); None: there is no posterior."""
        batch, channels = mean.shape[:2]
        z = mean.reshape(batch, channels, -1)
        if self._origin is None:
            self._origin = z[0].mean(axis=1)
        z = z - self._origin[:, None]
        modes = np.square(z).sum(axis=2)  # (B, C)
        draws = modes if var is None else modes + var.reshape(batch, channels, -1).sum(axis=2)
        rows = np.concatenate([np.full((batch, 1), float(z.shape[2])), z.sum(axis=2), draws, modes], axis=1)
        self.num_images += batch
        self._covariance = None
        self._sums += rows.sum(axis=0)
        self._products += rows.T @ rows

    @property
    def num_positions(self) -> int:
        return int(self._sums[0])

    @property
    def num_effective(self) -> float:
        """As many images of one size would say as much: (sum n)^2 / sum n^2, n positions each (Kish 1965)."""
        return float(self._sums[0] ** 2 / self._products[0, 0])

    @property
    def mean(self) -> Array:
        """Mean of z per channel. Returns: (C,)."""
        assert self._origin is not None
        found: Array = self._origin + self._centre
        return found

    @property
    def _centre(self) -> Array:
        found: Array = self._sums[1 : 1 + self.latent_channels] / self._sums[0]
        return found

    @property
    def variance(self) -> Array:
        """Variance of draws of z per channel. Returns: (C,)."""
        found: Array = self._variances()[0]
        return found

    @property
    def varies(self) -> NDArray[np.bool_]:
        """Whether draws of a channel vary by more than rounding and the narrowest posterior do. Returns: (C,)."""
        least = np.maximum(np.finfo(np.float32).eps * np.abs(self.mean), _LEAST_STD)
        found: NDArray[np.bool_] = np.sqrt(self.variance) > least
        return found

    def _variances(self) -> Array:
        """Of draws and of modes. Returns: (2, C)."""
        second = self._sums[1 + self.latent_channels :].reshape(2, -1) / self._sums[0]
        found: Array = np.maximum(second - self._centre**2, 0.0)
        return found

    def covariance(self) -> Array | None:
        """Of (mean, variance of draws, variance of modes) as estimates. Returns: (3C, 3C); None with fewer than two."""
        if self.num_images < 2 or self._covariance is not None:
            return self._covariance
        c, n = self.latent_channels, self._sums[0]
        # Influence of an image, linear in its sums: of a mean (S - n m) / N; of a variance, with squares about m,
        # (D - 2 m S + n m^2 - n v) / N.
        linear = np.zeros((3 * c, 1 + 3 * c))
        m, variances = self._centre, self._variances()
        linear[:c, 0], linear[:c, 1 : 1 + c] = -m, np.eye(c)
        for block in (1, 2):
            rows = slice(block * c, (block + 1) * c)
            linear[rows, 0] = m**2 - variances[block - 1]
            linear[rows, 1 : 1 + c] = np.diag(-2 * m)
            linear[rows, 1 + block * c : 1 + (block + 1) * c] = np.eye(c)
        linear /= n
        self._covariance = linear @ self._products @ linear.T / (1 - 1 / self.num_effective)
        return self._covariance

    def estimate(self, value: float, gradient: Array) -> Estimate:
        """gradient: of the value with respect to (mean, variance of draws, variance of modes), (3C,).

        One that is not finite, as that of a std of 0, gives no standard error.
        """
        covariance = self.covariance()
        if covariance is None or not np.isfinite(gradient).all():
            return Estimate(value=float(value), standard_error=None)
        return Estimate(value=float(value), standard_error=math.sqrt(max(float(gradient @ covariance @ gradient), 0.0)))

    def spread(
        self, scale: Array | float = 1.0, shift: Array | float = 0.0, *, of_modes: bool = False
    ) -> tuple[float, Array]:
        """Variance of all elements of (z - shift) * scale about their common mean, and its gradient.

        scale, shift: per channel (C,), or one for all.
        """
        c = self.latent_channels
        scale, offset = np.broadcast_to(scale, c), scale * (self.mean - shift)
        offset = offset - offset.mean()
        gradient = np.zeros(3 * c)
        gradient[:c] = 2 * offset * scale / c
        gradient[(2 if of_modes else 1) * c :][:c] = scale**2 / c
        total = (scale**2 * self._variances()[int(of_modes)]).mean() + (offset**2).mean()  # law of total variance
        return float(total), gradient

    def std(self, scale: Array | float = 1.0, shift: Array | float = 0.0) -> Estimate:
        """Standard deviation of all elements of (z - shift) * scale about their common mean."""
        total, gradient = self.spread(scale, shift)
        std = math.sqrt(total)
        return self.estimate(std, gradient / (2 * std) if std else gradient * math.nan)

    def common_mean(self, scale: Array | float = 1.0, shift: Array | float = 0.0) -> Estimate:
        """Mean of all elements of (z - shift) * scale."""
        c = self.latent_channels
        gradient = np.zeros(3 * c)
        gradient[:c] = np.broadcast_to(scale, c) / c
        return self.estimate(float(np.mean(scale * (self.mean - shift))), gradient)

    def scaling_factor(self, *, of_modes: bool = False) -> Estimate:
        """1 / std of all elements of z about their common mean (Rombach et al. 2022, section 4.3.2)."""
        total, gradient = self.spread(of_modes=of_modes)
        return self.estimate(total**-0.5, -0.5 * total**-1.5 * gradient)

    def channel(self, index: int) -> Channel:
        """Mean and std of one channel, in units of z; std relative to that of all."""
        c, total, gradient = self.latent_channels, *self.spread()
        of_mean, of_std = np.zeros((2, 3 * c))
        of_mean[index] = 1.0
        std = math.sqrt(self.variance[index])
        of_std[c + index] = 0.5 / std if std else math.nan
        scale = total**-0.5
        return Channel(
            mean=self.estimate(self.mean[index], of_mean),
            std=self.estimate(std, of_std),
            relative_std=self.estimate(std * scale, of_std * scale - 0.5 * std * total**-1.5 * gradient),
            varies=bool(self.varies[index]),
        )


@dataclass(frozen=True, kw_only=True)
class Channel:
    """One latent channel."""

    mean: Estimate  # of z
    std: Estimate  # of draws of z
    relative_std: Estimate  # std * scaling_factor: what latents_std is in a config.json with that scaling_factor
    varies: bool  # False: constant but for rounding


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
class Failure:
    """An image that is not in the numbers."""

    key: str
    source: str
    reason: str


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
    failures: tuple[Failure, ...] = ()
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
    errors = c.difference_in_errors
    amount = f"{c.difference:+.2%}" + ("" if errors is None else f", {abs(errors):.1f} standard errors")
    yield (
        f"with the present configuration the latents have a standard deviation of {c.present.std.value:.4g} "
        f"instead of 1 ({amount})"
    )
    yield {
        "equal": "no difference to 1 shows on these images: keep the present value",
        "small": f"the difference is real, but below {SCALE_MATTERS:.0%} (0.4 dB of signal-to-noise ratio), too small "
        f"to matter: keep the present value",
        "matters": f"the difference is real and above {SCALE_MATTERS:.0%} (0.4 dB of signal-to-noise ratio): it "
        f"matters for a diffusion model that is trained from scratch, so use the new value there",
        "unclear": f"the difference is above {SCALE_MATTERS:.0%}, but these images cannot tell it from chance: take "
        f"more images",
    }[c.verdict]
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
            f"{c.num_images} images give scaling_factor to {error:.2g} of its value (standard error); about {needed:,} "
            f"like them would give {TARGET:.0%}"
        )
    if c.num_images > 1 and c.num_effective < FEW_IMAGES:
        unequal = c.num_effective < 0.9 * c.num_images
        these = f"{c.num_images} images" + f", as good as {c.num_effective:.1f} of one size," * unequal
        yield f"the standard errors are rough themselves: {these} are fewer than {FEW_IMAGES}"


# ----------------------------------------------------------------------------------------------------------- measuring


@dataclass(frozen=True, eq=False)
class _Loaded:
    file: ImageFile
    x: Tensor  # (3, H, W)
    digest: str


@dataclass
class _Tally:
    """What happened so far."""

    on_progress: OnProgress
    total: int
    done: int = 0
    digest: Any = field(default_factory=hashlib.sha256)
    failures: list[Failure] = field(default_factory=list)

    def succeed(self, count: int) -> None:
        self.done += count
        self.on_progress(self.done + len(self.failures), self.total)

    def fail(self, file: ImageFile, error: Exception | str) -> None:
        reason = os_reason(error) if isinstance(error, OSError) else str(error)
        reason = reason.removeprefix(f"{file.path}: ")
        self.failures.append(Failure(key=file.key, source=str(file.path), reason=reason))
        self.on_progress(self.done + len(self.failures), self.total)

    def readable(self, loaded: Iterable[tuple[ImageFile, _Loaded | Exception]]) -> Iterator[_Loaded]:
        for file, result in loaded:
            if isinstance(result, Exception):
                self.fail(file, result)
            else:
                # as `folder_digest` has it for a folder without failures
                self.digest.update(f"{file.key}\0sha256:{result.digest}\n".encode(errors="surrogateescape"))
                yield result


def calibrate(
    vae: str | Path | nn.Module | None,
    images: str | Path | Sequence[ImageFile],
    *,
    size: int | None = CalibrateOptions.size,
    crop: str = CalibrateOptions.crop,
    background: str = CalibrateOptions.background,
    max_pixels: int | None = CalibrateOptions.max_pixels,
    max_images: int | None = CalibrateOptions.max_images,
    device: str = CalibrateOptions.device,
    dtype: str = CalibrateOptions.dtype,
    batch_size: int | None = CalibrateOptions.batch_size,
    workers: int | None = CalibrateOptions.workers,
    on_progress: OnProgress | None = None,
) -> Calibration:
    """Measure the scale of a VAE's latents over images. Nothing is written: `write_calibration` does that.

    vae: a folder, a file or a hub id of any diffusers autoencoder of images; None for the bundled one; or a model.
    images: a folder, a file, a glob or a .txt list, or what `find_images` returned; of any sizes, padded as encoding
        does it. The options are those of `CalibrateOptions`. Images that fail are recorded, and the rest goes on.
    Raises: ConfigError for images or options that cannot be; CheckpointError for the VAE, also where its latents do
        not vary; ImageError where not one image could be used.
    """
    options = CalibrateOptions(
        size=size,
        crop=crop,
        background=background,
        max_pixels=max_pixels,
        max_images=max_images,
        device=device,
        dtype=dtype,
        batch_size=batch_size,
        workers=workers,
    )
    found = find_images(images) if isinstance(images, (str, Path)) else list(images)
    files = choose_images(found, options.max_images)
    subject = open_subject(vae, choose_device(options.device), getattr(torch, options.dtype))
    started = time.perf_counter()
    tally = _Tally(on_progress or (lambda finished, total: None), len(files))
    moments, has_posterior, warnings = _measure(subject, files, options, tally)
    if not moments.num_images:
        first = f": {tally.failures[0].key}: {tally.failures[0].reason}" if tally.failures else ""
        raise ImageError(f"{images}: none of {len(files)} images could be used{first}")
    if not moments.varies.any():
        raise CheckpointError(f"{subject.ref}: its latents are the same everywhere, so no scale makes their std 1")
    return Calibration(
        vae=subject.ref,
        vae_digest=subject.digest,
        class_name=subject.class_name,
        source=str(images) if isinstance(images, (str, Path)) else f"{len(found)} files",
        num_found=len(found),
        num_images=moments.num_images,
        num_effective=moments.num_effective,
        num_positions=moments.num_positions,
        images_digest=f"sha256:{tally.digest.hexdigest()}",
        protocol=options.protocol(),
        device=str(subject.device),
        scaling_factor=moments.scaling_factor(),
        shift_factor=moments.common_mean(),
        scaling_factor_of_modes=moments.scaling_factor(of_modes=True) if has_posterior else None,
        channels=tuple(moments.channel(index) for index in range(moments.latent_channels)),
        present=_present(subject, moments),
        warnings=tuple(warnings),
        failures=tuple(sorted(tally.failures, key=lambda failure: failure.key)),
        seconds=time.perf_counter() - started,
    )


def _present(subject: Subject, moments: LatentMoments) -> Present:
    scale: Array | float = subject.scaling_factor
    shift: Array | float = subject.shift_factor or 0.0
    if subject.latents_mean is not None and subject.latents_std is not None:
        scale, shift = scale / np.asarray(subject.latents_std), np.asarray(subject.latents_mean)
    return Present(
        scaling_factor=subject.scaling_factor,
        shift_factor=subject.shift_factor,
        latents_mean=subject.latents_mean,
        latents_std=subject.latents_std,
        std=moments.std(scale, shift),
        mean=moments.common_mean(scale, shift),
    )


def _measure(
    subject: Subject, files: Sequence[ImageFile], options: CalibrateOptions, tally: _Tally
) -> tuple[LatentMoments, bool, list[str]]:
    """Returns: the moments, whether there were posteriors, and warnings about the run."""
    moments = LatentMoments(subject.latent_channels)
    has_posterior = False
    encode = _Encoder(subject)
    loaded = read_ahead(files, lambda file: _read(file, options), _pixels, options.num_workers)
    with closing(loaded), exact_float32(), torch.inference_mode():
        for batch in group_by_shape(
            tally.readable(loaded), lambda each: each.x.shape, _pixels, options.batch_size, batch_pixels(subject.device)
        ):
            for members, result in encode(batch):
                if isinstance(result, Exception):
                    tally.fail(members[0].file, result)
                    continue
                finite = _finite(result)
                for member, is_finite in zip(members, finite.tolist(), strict=True):
                    if not is_finite:
                        tally.fail(member.file, f"its latents are not finite in {options.dtype}")
                has_posterior = result.posterior is not None
                if finite.any():
                    moments.update(*_mean_and_var(result, finite))
                tally.succeed(int(finite.sum()))
    return moments, has_posterior, encode.warnings


def _read(file: ImageFile, options: CalibrateOptions) -> _Loaded:
    data = file.path.read_bytes()
    limit = options.max_pixels or DEFAULT_MAX_PIXELS
    pixels = read_image_bytes(data, str(file.path), background=options.background, max_pixels=limit).pixels
    if options.size is not None:
        pixels = resize_and_crop(pixels, options.size, options.crop)  # type: ignore[arg-type]
    return _Loaded(file, image_to_x(pixels), hashlib.sha256(data).hexdigest())


def _pixels(loaded: _Loaded) -> int:
    return loaded.x.shape[1] * loaded.x.shape[2]


class _Encoder:
    """Encodes batches; one that fails is tried again image by image, so that only the bad ones are lost."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._singly = False  # once memory ran out, the next large batch would only fail again
        self.warnings: list[str] = []

    def __call__(self, batch: Sequence[_Loaded]) -> Iterator[tuple[Sequence[_Loaded], Encoding | Exception]]:
        if len(batch) > 1 and not self._singly:
            try:
                yield batch, self._encode(batch)
                return
            except RuntimeError as error:  # torch.OutOfMemoryError is one
                self._singly = True
                self.warnings.append(f"a batch of {len(batch)} failed, so went on image by image: {_first_line(error)}")
            if torch.cuda.is_available():  # here the exception is gone, whose frames hold the tensors of the batch
                torch.cuda.empty_cache()
        for member in batch:
            try:
                result: Encoding | Exception = self._encode([member])
            except RuntimeError as error:
                height, width = member.x.shape[1:]
                result = SdvaeError(f"the VAE failed at {width} x {height} px: {_first_line(error)}")
            yield [member], result

    def _encode(self, batch: Sequence[_Loaded]) -> Encoding:
        return self._subject.encode(torch.stack([member.x for member in batch]))


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _finite(encoding: Encoding) -> Tensor:
    """Whether all of an image's latents are finite. Returns: (B,), bool."""
    finite = encoding.z.isfinite().flatten(1).all(dim=1)
    if encoding.posterior is not None:
        finite &= encoding.posterior.logvar.isfinite().flatten(1).all(dim=1)
    return finite.cpu()


def _mean_and_var(encoding: Encoding, rows: Tensor) -> tuple[Array, Array | None]:
    mean = encoding.z.cpu().double()[rows].numpy()  # (B, C, h, w)
    if encoding.posterior is None:
        return mean, None
    return mean, encoding.posterior.logvar.cpu().double()[rows].exp().numpy()


# ------------------------------------------------------------------------------------------------------------- writing


@dataclass(frozen=True, kw_only=True)
class Written:
    """What became of config.json."""

    config_path: str
    changed: bool
    before: Mapping[str, Any]  # of the fields that are set
    after: Mapping[str, Any]


def check_writable(vae: str | Path | None, *, per_channel: bool = False) -> Path:
    """The config.json that a calibration of this VAE would be written to. Reads no weights.

    Raises: ConfigError where it must not be written, with what to do instead.
    """
    if vae is None or str(vae) == BUNDLED_NAME or _is_bundled(Path(vae)):
        raise ConfigError(
            f"{BUNDLED_NAME} is part of the package, and not to be changed: save a copy to calibrate, "
            f"sdvae convert {BUNDLED_NAME} DIR"
        )
    path = config_to_update(vae)
    config = read_json(path)
    if (name := config.get("_class_name", AutoencoderKL.__name__)) != AutoencoderKL.__name__:
        raise ConfigError(f"{path} is of the class {name}; calibrations are written for {AutoencoderKL.__name__} only")
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

    scaling_factor is set; with `shift` shift_factor as well; with `per_channel` latents_mean and latents_std. What was
    there before is appended to the list `previous` in the notes (`_sdvae`), with the calibration it came from. Where
    the same is there already, nothing is written.
    latents_std is written relative to 1 / scaling_factor: readers compute (z - latents_mean) * scaling_factor /
    latents_std, and those that know scaling_factor alone get latents of variance 1 over all channels too.
    Raises: ConfigError as `check_writable`, and for a calibration that is none of this VAE or of one image alone;
        CheckpointError where writing fails.
    """
    path = check_writable(folder, per_channel=per_channel)
    config = read_json(path)
    notes = notes_of(config, path)
    if (channels := config.get("latent_channels", len(calibration.channels))) != len(calibration.channels):
        raise ConfigError(f"{path} has {channels} latent channels, the calibration {len(calibration.channels)}")
    if calibration.num_images < 2:
        raise ConfigError("a calibration on one image is not written: it may be far off, and cannot say how far")
    after, note = (each(per_channel=per_channel, shift=shift) for each in (calibration.fields, calibration.note))
    defaults = inspect.signature(AutoencoderKL.__init__).parameters
    before = {name: config.get(name, defaults[name].default) for name in _SCALE_FIELDS}
    changed_fields = any(before[name] != value for name, value in after.items())
    written = Written(
        config_path=str(path),
        changed=changed_fields or _same_but_version(notes.get("calibration")) != _same_but_version(note),
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


def _same_but_version(note: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """A calibration without what another version of sdvae writes differently although it found the same."""
    return None if note is None else {name: value for name, value in note.items() if name != "sdvae"}
