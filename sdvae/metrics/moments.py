"""Means, variances and covariances of what comes in parts, and of z over a set of images with their standard errors.

Streaming: memory grows with the width of the vectors, not with their number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["Channel", "Estimate", "LatentMoments", "Moments"]

Array = NDArray[np.float64]

_LEAST_STD = 2 * math.exp(-15)  # what logvar at its lower clamp, -30, leaves of a channel that is constant, twice


@dataclass(eq=False)
class Moments:
    """Count, mean and sums of products about the mean, of vectors that come in parts; or of many kinds at once.

    About the running mean, not about zero, so that neither many vectors nor a mean far from zero cost digits. Parts are
    joined by the law of total variance.
    Source: Chan, Golub & LeVeque 1983, Algorithms for computing the sample variance.
    """

    count: Array  # (...,)
    mean: Array  # (..., D)
    products: Array  # (..., D, D), sums of outer products about the mean

    @classmethod
    def zeros(cls, width: int, *kinds: int) -> Moments:
        return cls(np.zeros(kinds), np.zeros((*kinds, width)), np.zeros((*kinds, width, width)))

    @classmethod
    def of(cls, vectors: Array) -> Moments:
        """vectors: (..., D, N)."""
        num = vectors.shape[-1]
        mean = vectors.sum(axis=-1) / max(1, num)
        centred = vectors - mean[..., None]
        return cls(np.full(vectors.shape[:-2], float(num)), mean, centred @ centred.swapaxes(-1, -2))

    def __add__(self, other: Moments) -> Moments:
        count = self.count + other.count
        share = np.divide(other.count, count, out=np.zeros_like(count), where=count > 0)
        step = other.mean - self.mean
        between = (self.count * share)[..., None, None] * step[..., :, None] * step[..., None, :]
        mean = self.mean + share[..., None] * step
        return Moments(count, mean, self.products + other.products + between)

    def update(self, vectors: Array) -> None:
        """Take in more vectors, in place: what `of` and a sum give, without another matrix of products.

        vectors: (D, N). Raises: ValueError for another shape.
        """
        if vectors.ndim != 2 or 0 in vectors.shape or vectors.shape[:1] != self.mean.shape:
            raise ValueError(f"expected vectors ({len(self.mean)}, N), got {vectors.shape}")
        mean, added = vectors.mean(axis=1), vectors.shape[1]
        step, count = mean - self.mean, self.count + added
        between = step * np.sqrt(self.count * added / count)
        columns = torch.from_numpy(np.column_stack([vectors - mean[:, None], between]))
        torch.from_numpy(self.products).addmm_(columns, columns.T)  # 2048 x 2048 of FID: half the time of numpy
        self.mean = self.mean + step * (added / count)
        self.count = np.asarray(count)

    @property
    def variance(self) -> Array:
        """Population formula. 0 where rounding alone varies a constant: z has the resolution of float32.

        Returns: (..., D); NaN without vectors.
        """
        squares = self.products.diagonal(axis1=-2, axis2=-1)
        variance = ratio(squares, self.count[..., None])
        return np.where(variance <= (np.finfo(np.float32).eps * self.mean) ** 2, 0.0, variance)

    @property
    def covariance(self) -> Array:
        """(..., D, D), normalised by count - 1. Raises: ValueError for fewer than 2 vectors."""
        if not (self.count >= 2).all():
            raise ValueError(f"a covariance needs at least 2 vectors; got {int(self.count.min())}")
        covariance: Array = self.products / (self.count - 1)[..., None, None]
        return covariance

    @property
    def correlation(self) -> Array:
        """Pearson's. Returns: (..., D, D); NaN where one of the two does not vary."""
        variance = self.variance
        spread = np.sqrt(variance[..., :, None] * variance[..., None, :])
        return ratio(self.products, spread * self.count[..., None, None])

    def state(self, prefix: str = "") -> dict[str, NDArray[Any]]:
        return {f"{prefix}count": self.count, f"{prefix}mean": self.mean, f"{prefix}products": self.products}

    @classmethod
    def from_state(cls, state: Mapping[str, NDArray[Any]], prefix: str = "") -> Moments:
        return cls(*(np.asarray(state[prefix + name], np.float64) for name in ("count", "mean", "products")))


def ratio(numerator: Any, denominator: Any) -> Array:
    """NaN where the denominator is zero."""
    numerator, denominator = np.broadcast_arrays(numerator, denominator)
    out: Array = np.full(numerator.shape, math.nan)
    np.divide(numerator, denominator, out=out, where=denominator != 0)
    return out


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number and how uncertain it is."""

    value: float
    standard_error: float | None  # None: a single image says nothing about it

    @property
    def relative_error(self) -> float | None:
        return None if self.standard_error is None or not self.value else self.standard_error / abs(self.value)


@dataclass(frozen=True, kw_only=True)
class Channel:
    """One latent channel."""

    mean: Estimate  # of z
    std: Estimate  # of draws of z
    relative_std: Estimate  # std * scaling_factor: what latents_std is in a config.json with that scaling_factor
    varies: bool  # False: constant but for rounding


class LatentMoments:
    """Mean and variance of z per channel, and how they vary from image to image.

    Images are what was drawn independently; positions within one image are alike, so each image counts once for a
    standard error, with the weight of its positions. Draws of z are counted in expectation: their second moment is
    mean^2 + var of the posterior, without drawing. Population formulas: sums are divided by the number of positions.

    Standard errors: all numbers here are functions of ratios of sums over images (sum of z, of z^2, of positions). Such
    a ratio R = sum y / sum n has, image by image, the influence (y - R n) / sum n, and functions of ratios are linear
    for small changes (delta method). Source: Cochran 1977, Sampling Techniques, section 6.4. What n / (n - 1) does for
    images of one size, n_eff / (n_eff - 1) does for all, with the effective number below.
    """

    def __init__(self, latent_channels: int) -> None:
        self.latent_channels = latent_channels
        self._origin: Array | None = None  # (C,), about the mean: squares of a mean that is far from 0 lose no digits
        # Of images: an image's positions, and its sums of z, squares of draws, squares of modes.
        self._images = Moments.zeros(1 + 3 * latent_channels)
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
        self._covariance = None
        self._images.update(rows.T)

    @property
    def num_images(self) -> int:
        return int(self._images.count)

    @property
    def num_positions(self) -> int:
        return round(self._num_positions)

    @property
    def _num_positions(self) -> float:
        return float(self._images.count * self._images.mean[0])

    @property
    def num_effective(self) -> float:
        """As many images of one size would say as much: (sum n)^2 / sum n^2, n positions each (Kish 1965)."""
        mean = self._images.mean[0]
        return float(self._num_positions**2 / (self._images.products[0, 0] + self._images.count * mean**2))

    @property
    def mean(self) -> Array:
        """Mean of z per channel. Returns: (C,)."""
        assert self._origin is not None
        found: Array = self._origin + self._centre
        return found

    @property
    def _centre(self) -> Array:
        found: Array = self._images.mean[1 : 1 + self.latent_channels] / self._images.mean[0]
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
        second = self._images.mean[1 + self.latent_channels :].reshape(2, -1) / self._images.mean[0]
        found: Array = np.maximum(second - self._centre**2, 0.0)
        return found

    def covariance(self) -> Array | None:
        """Of (mean, variance of draws, variance of modes) as estimates. Returns: (3C, 3C); None with fewer than two."""
        if self.num_images < 2 or self._covariance is not None:
            return self._covariance
        c = self.latent_channels
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
        linear /= self._num_positions
        # About the mean or about zero is the same: the influences of all images sum to zero.
        self._covariance = linear @ self._images.products @ linear.T / (1 - 1 / self.num_effective)
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
