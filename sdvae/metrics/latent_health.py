"""The health of a latent space: statistics of z over a set of images, as an evaluation reports them.

Streaming: memory does not grow with the set, and what processes measured adds up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sdvae.metrics.moments import Moments, ratio
from sdvae.model.posterior import Encoding

__all__ = ["CENTRE_MATTERS", "SCALE_MATTERS", "LatentHealth"]

Array = NDArray[np.float64]
State = dict[str, NDArray[Any]]

DISTANCES = (1, 2, 4, 8)  # latent positions, of the autocorrelation
WINDOW = 16  # latent positions along a side of what one power spectrum is made of: half of a 256 px image at f8
ACTIVE_SHARE = 0.01  # Burda et al. 2016, section 5.2: variance of the posterior mean, of 1 in total
ACTIVE_SPREAD = (
    0.01  # our choice, where there is no posterior: std of a channel relative to the root mean square of all
)

# From where on a note is worth reading; all our choices.
# 5 % of standard deviation is 0.4 dB of signal-to-noise ratio at every step of a noise schedule. Going from 256 to 512
# px, for which schedules are shifted, is 6 dB (Hoogeboom et al. 2023, simple diffusion, section 3.1: 20 log10 of 2).
SCALE_MATTERS = 0.05
# Of a mean, in standard deviations: 0.2 holds 4 % of the second moment of the latents, about as much as SCALE_MATTERS.
CENTRE_MATTERS = 0.2
_CORRELATED = 0.5
_HEAVY_TAILED = 5.0  # excess kurtosis; 3 is that of a Laplace distribution
_NARROW = 0.01  # posterior std relative to the std of z


class LatentHealth:
    """What z of a set of images is like. Each number is defined at `health`.

    Source of the merging of third and fourth moments: Pébay 2008, Formulas for robust, one-pass parallel computation of
    covariances and arbitrary-order statistical moments (SAND2008-6212).
    """

    def __init__(self, latent_channels: int) -> None:
        c = latent_channels
        self._state: State = {
            "num_images": np.zeros(()),
            "num_not_finite": np.zeros(()),
            "num_below_window": np.zeros(()),
            **Moments.zeros(c).state(),  # of positions
            "cubes": np.zeros(c),
            "fourths": np.zeros(c),
            **Moments.zeros(2, len(DISTANCES), 2, c).state("pairs_"),  # at each distance, across and down
            "num_windows": np.zeros(()),
            "power": np.zeros((c, WINDOW // 2)),
            "num_posteriors": np.zeros(()),
            "posterior_std": np.zeros(c),
            "posterior_var": np.zeros(c),
            "kl": np.zeros(c),
            "bits_per_pixel": np.zeros(()),
        }

    def state(self) -> State:
        """All that was measured, as arrays whose size does not depend on the number of images."""
        return dict(self._state)

    def update(self, encoding: Encoding, num_px: int) -> None:
        """Take in a batch; images whose z is not finite are only counted.

        num_px: pixels of each image, without padding: bits per pixel are those of the picture.
        """
        finite = encoding.z.isfinite().flatten(1).all(dim=1)
        if encoding.posterior is not None:
            finite &= encoding.posterior.logvar.isfinite().flatten(1).all(dim=1)
        z = _float64(encoding.z[finite])  # (B, C, h, w)
        self._state["num_not_finite"] = self._state["num_not_finite"] + float((~finite).sum())
        if not len(z):
            return
        batch = LatentHealth(z.shape[1])
        batch._state |= _moments(z) | _pairs(z) | _spectrum(z) | {"num_images": np.asarray(float(len(z)))}
        if encoding.posterior is not None:
            batch._state |= _posterior(z, _float64(encoding.posterior.logvar[finite]), num_px)
        self.merge(batch._state)

    def merge(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Take in what another one measured. The order of merging changes no more than the last digits."""
        a, b = self._state, state
        merged = {name: a[name] + b[name] for name in a}  # right for all plain sums
        self._state = merged | _merged_moments(a, b) | _merged_pairs(a, b)

    def health(self, scaling_factor: float | None = None, shift_factor: float | None = None) -> dict[str, Any]:
        """All statistics, as plain values; None where a number does not exist.

        scaling_factor, shift_factor: as configured, for the notes; None: not configured as one number for all.
        - channels: `mean`, `std`, `skew` and excess `kurtosis` of the posterior's mean over images and positions, in
          units of z, population formulas. `posterior_std`: mean over the same. `kl`: mean per latent position, nats, to
          the standard normal. `active`: the posterior's mean has more than 1 % of the variance of draws of z, which for
          a total variance of 1 is the rule of Burda et al. 2016, section 5.2 (above 0.01), and independent of the
          unit of z; without a posterior, the channel's std is more than 1 % of the root mean square over channels.
        - kl_nats, bits_per_pixel: mean over images of the KL summed over channels and positions, and of that divided by
          ln 2 and the image's pixels.
        - correlation: Pearson's, between channels, over images and positions.
        - autocorrelation: Pearson's, of all pairs of positions at a distance, across and down, mean of the two and over
          channels that vary. No mean of an image is taken off, so images that differ in brightness alone have 1.
        - power_spectrum: of windows of 16 x 16 positions without their mean, Hann-weighted, averaged over rings of
          equal frequency; the square of z's unit, and white noise has its variance at every frequency. Images that are
          smaller are left out. None if all are.
        - suggested: 1 / standard deviation of draws of z about their common mean, and that mean: latents of mean 0 and
          variance 1 over all channels together (Rombach et al. 2022, section 4.3.2).
        - notes: what of this needs attention.
        """
        s = self._state
        moments = Moments.from_state(s)
        variance = moments.variance
        std = np.sqrt(variance)
        posterior_std, posterior_var, kl = (
            ratio(s[name], s["count"] if s["num_posteriors"] else 0.0)
            for name in ("posterior_std", "posterior_var", "kl")
        )
        active = self._active(variance, posterior_var)
        varies = variance > 0
        columns = {
            "mean": s["mean"] if s["count"] else std,
            "std": std,
            "skew": ratio(s["cubes"] / max(s["count"], 1.0), np.where(varies, std**3, 0.0)),
            "kurtosis": ratio(s["fourths"] / max(s["count"], 1.0), np.where(varies, variance**2, 0.0)) - 3.0,
            "posterior_std": posterior_std,
            "kl": kl,
        }
        health = {
            "num_images": int(s["num_images"]),
            "num_not_finite": int(s["num_not_finite"]),
            "channels": [
                {name: _number(column[c]) for name, column in columns.items()} | {"active": bool(active[c])}
                for c in range(len(variance))
            ],
            "num_active": int(active.sum()),
            "kl_nats": _number(ratio(s["kl"].sum(), s["num_posteriors"])),
            "bits_per_pixel": _number(ratio(s["bits_per_pixel"], s["num_posteriors"])),
            "correlation": _numbers(moments.correlation),
            "autocorrelation": _numbers(self._autocorrelation()),
            "power_spectrum": self._power_spectrum(),
            "suggested": self._suggested(variance, posterior_var),
        }
        return health | {"notes": _notes(health, scaling_factor, shift_factor)}

    def _active(self, variance: Array, posterior_var: Array) -> NDArray[np.bool_]:
        posteriors = self._state["num_posteriors"] > 0
        least = ACTIVE_SHARE * (variance + posterior_var) if posteriors else ACTIVE_SPREAD**2 * variance.mean()
        active: NDArray[np.bool_] = variance > least
        return active

    def _autocorrelation(self) -> Array:
        pairs = Moments.from_state(self._state, "pairs_").correlation[..., 0, 1]  # (distance, 2, C)
        known = np.isfinite(pairs)
        return ratio(np.where(known, pairs, 0.0).sum(axis=(1, 2)), known.sum(axis=(1, 2)))

    def _power_spectrum(self) -> dict[str, Any] | None:
        s = self._state
        if not s["num_windows"]:
            return None
        return {
            "frequency": [ring / WINDOW for ring in range(1, WINDOW // 2 + 1)],
            "power": _numbers(s["power"] / s["num_windows"]),
            "num_images": int(s["num_images"] - s["num_below_window"]),
        }

    def _suggested(self, variance: Array, posterior_var: Array) -> dict[str, float | None]:
        mean = self._state["mean"]
        draws = variance + np.where(np.isfinite(posterior_var), posterior_var, 0.0)
        total = draws.mean() + mean.var()  # law of total variance over channels
        return {
            "scaling_factor": _number(1.0 / math.sqrt(total)) if total > 0 else None,
            "shift_factor": _number(mean.mean()) if self._state["count"] else None,
        }


def _float64(tensor: Tensor) -> Array:
    return tensor.detach().cpu().double().numpy()


def _moments(z: Array) -> State:
    values = z.swapaxes(0, 1).reshape(z.shape[1], -1)  # (C, B * h * w)
    moments = Moments.of(values)
    values = values - moments.mean[:, None]
    squares = values * values
    return moments.state() | {"cubes": (squares * values).sum(axis=1), "fourths": (squares * squares).sum(axis=1)}


def _merged_moments(a: State, b: Mapping[str, NDArray[Any]]) -> State:
    first, second = Moments.from_state(a), Moments.from_state(b)
    total = first + second
    count = total.count
    if not count:
        return {}
    d = second.mean - first.mean
    p, q = first.count / count, second.count / count
    squares_a, squares_b = first.products.diagonal(), second.products.diagonal()
    cubes = d**3 * count * p * q * (p - q) + 3 * d * (p * squares_b - q * squares_a)
    fourths = (
        d**4 * count * p * q * (p * p - p * q + q * q)
        + 6 * d**2 * (p * p * squares_b + q * q * squares_a)
        + 4 * d * (p * b["cubes"] - q * a["cubes"])
    )
    return total.state() | {
        "cubes": a["cubes"] + b["cubes"] + cubes,
        "fourths": a["fourths"] + b["fourths"] + fourths,
    }


def _pairs(z: Array) -> State:
    """Of each position with the one to its right and the one below, at each distance."""
    planes = z.swapaxes(0, 1)  # (C, B, h, w)
    found = [
        Moments.of(np.stack([each.reshape(len(planes), -1) for each in pair], axis=1))  # (C, 2, B * h * w)
        for d in DISTANCES
        for pair in ((planes[..., :-d], planes[..., d:]), (planes[..., :-d, :], planes[..., d:, :]))
    ]
    return {
        name: np.stack(parts).reshape(len(DISTANCES), 2, *parts[0].shape)
        for name in found[0].state("pairs_")
        for parts in [[each.state("pairs_")[name] for each in found]]
    }


def _merged_pairs(a: State, b: Mapping[str, NDArray[Any]]) -> State:
    return (Moments.from_state(a, "pairs_") + Moments.from_state(b, "pairs_")).state("pairs_")


def _spectrum(z: Array) -> State:
    """Sums over windows, laid side by side from the top left corner; what is over at the other edges is not used."""
    batch, channels, height, width = z.shape
    rows, columns = height // WINDOW, width // WINDOW
    if not rows or not columns:
        return {"num_below_window": np.asarray(float(batch))}
    windows = z[..., : rows * WINDOW, : columns * WINDOW].reshape(batch, channels, rows, WINDOW, columns, WINDOW)
    windows = windows.transpose(1, 0, 2, 4, 3, 5).reshape(channels, -1, WINDOW, WINDOW)
    hann = np.sin(np.pi * np.arange(WINDOW) / WINDOW) ** 2
    taper = np.outer(hann, hann)
    spectrum = np.fft.fft2((windows - windows.mean(axis=(2, 3), keepdims=True)) * taper)
    power = (spectrum.real**2 + spectrum.imag**2).sum(axis=1)  # (C, WINDOW, WINDOW)
    # What white noise of variance 1 gives once its mean is taken off.
    unit = (taper**2).sum() - np.abs(np.fft.fft2(taper)) ** 2 / WINDOW**2
    frequency = np.fft.fftfreq(WINDOW) * WINDOW
    ring = np.rint(np.hypot(frequency[:, None], frequency)).astype(int)  # corners beyond WINDOW / 2 are not used
    return {
        "num_windows": np.asarray(float(windows.shape[1])),
        "power": np.stack([(power / unit)[:, ring == r].mean(axis=1) for r in range(1, WINDOW // 2 + 1)], axis=1),
    }


def _posterior(mean: Array, logvar: Array, num_px: int) -> State:
    kl = 0.5 * (mean**2 + np.exp(logvar) - 1.0 - logvar)  # Kingma & Welling 2014, appendix B; (B, C, h, w)
    return {
        "num_posteriors": np.asarray(float(len(mean))),
        "posterior_std": np.exp(0.5 * logvar).sum(axis=(0, 2, 3)),
        "posterior_var": np.exp(logvar).sum(axis=(0, 2, 3)),
        "kl": kl.sum(axis=(0, 2, 3)),
        "bits_per_pixel": kl.sum() / math.log(2.0) / num_px,
    }


def _number(value: Any) -> float | None:
    return float(value) if math.isfinite(value) else None


def _numbers(values: Array) -> list[Any]:
    return [_number(value) if np.ndim(value) == 0 else _numbers(value) for value in values]


def _notes(health: Mapping[str, Any], scaling_factor: float | None, shift_factor: float | None) -> list[str]:
    channels = health["channels"]
    if not health["num_images"]:
        return [f"none of {health['num_not_finite']} images gave finite latents"]
    return [
        *_notes_on_images(health),
        *_notes_on_channels(channels),
        *_notes_on_scale(health["suggested"], scaling_factor, shift_factor),
        *_notes_on_correlation(health["correlation"]),
        *_notes_on_posterior(health, channels),
    ]


def _notes_on_images(health: Mapping[str, Any]) -> list[str]:
    notes = []
    if health["num_not_finite"]:
        notes.append(
            f"{health['num_not_finite']} images gave latents that are not finite, and are left out here; in half "
            f"precision this is overflow: use float32 or bfloat16"
        )
    spectrum = health["power_spectrum"]
    if (left_out := health["num_images"] - (spectrum["num_images"] if spectrum else 0)) > 0:
        notes.append(
            f"{left_out} of {health['num_images']} images are smaller than {WINDOW} x {WINDOW} latent positions, and "
            f"not in the power spectrum"
        )
    return notes


def _notes_on_channels(channels: list[dict[str, Any]]) -> list[str]:
    notes = []
    if dead := [str(c) for c, channel in enumerate(channels) if not channel["active"]]:
        notes.append(
            f"dead channel{'s' * (len(dead) > 1)} {', '.join(dead)} of {len(channels)} (counted from 0): the value "
            f"hardly depends on the image, so a diffusion model learns noise there"
        )
    if heavy := [str(c) for c, channel in enumerate(channels) if (channel["kurtosis"] or 0.0) > _HEAVY_TAILED]:
        notes.append(
            f"heavy tails in channel{'s' * (len(heavy) > 1)} {', '.join(heavy)}: excess kurtosis above "
            f"{_HEAVY_TAILED:g}, so a few positions have values far out"
        )
    return notes


def _notes_on_scale(
    suggested: Mapping[str, float | None], scaling_factor: float | None, shift_factor: float | None
) -> list[str]:
    scale, shift = suggested["scaling_factor"], suggested["shift_factor"]
    if scaling_factor is None or scale is None or shift is None:
        return []
    notes = []
    if abs(scaling_factor / scale - 1.0) > SCALE_MATTERS:
        notes.append(
            f"with the configured scaling_factor {scaling_factor:.6g} the latents have a standard deviation of "
            f"{scaling_factor / scale:.3g} on these images; {scale:.6g} would make it 1. Change it only where no "
            f"diffusion model is trained on the old one"
        )
    offset = (shift - (shift_factor or 0.0)) * scale
    if abs(offset) > CENTRE_MATTERS:
        notes.append(
            f"the latents are off centre by {offset:+.2f} standard deviations; a shift_factor of {shift:.6g} would "
            f"centre them"
        )
    return notes


def _notes_on_correlation(correlation: list[list[float | None]]) -> list[str]:
    pairs = [
        (value, one, other)
        for one, row in enumerate(correlation)
        for other, value in enumerate(row[:one])
        if value is not None and abs(value) > _CORRELATED
    ]
    if not pairs:
        return []
    value, one, other = max(pairs, key=lambda pair: abs(pair[0]))
    return [
        f"{len(pairs)} pair{'s' * (len(pairs) > 1)} of channels correlate by more than {_CORRELATED:g}, most of all "
        f"{other} and {one} ({value:+.2f}): they hold the same thing in part"
    ]


def _notes_on_posterior(health: Mapping[str, Any], channels: list[dict[str, Any]]) -> list[str]:
    if health["kl_nats"] is None:
        return []
    shares = [channel["posterior_std"] / channel["std"] for channel in channels if channel["active"]]
    if not shares or (share := math.fsum(shares) / len(shares)) >= _NARROW:
        return []
    return [
        f"the posterior is nearly a point: its std is {share:.2g} of that of z, hence the KL of "
        f"{health['bits_per_pixel']:.2f} bits per pixel. Its noise does not teach the decoder to tolerate errors of a "
        f"diffusion model"
    ]
