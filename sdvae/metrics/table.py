"""Metrics of single images: what each means, its unit, which direction is better, and the function that computes it.

`IMAGE_METRICS` is the one table; reports and gates read it. Images are compared as 8-bit sRGB. Left out: metrics of
sets of images, and statistics of latents.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sdvae.errors import ConfigError
from sdvae.features.dists import DISTS, DISTS_MIN_PX, build_dists, find_dists_weights
from sdvae.features.lpips import LPIPS, MIN_PX, build_lpips, find_lpips_weights
from sdvae.metrics.colour import mean_ciede2000
from sdvae.metrics.ssim import MS_SSIM_MIN_PX, UNIFORM_PX, WINDOW_PX, ms_ssim, ssim, ssim_uniform

__all__ = [
    "IMAGE_METRICS",
    "MAX_PSNR",
    "Compute",
    "Metric",
    "compute_metrics",
    "large_enough",
    "psnr",
]

# (recon, image), both (B, 3, H, W), float32 in [0, 1], multiples of 1/255 -> (B,), float64, on the CPU
Compute = Callable[[Tensor, Tensor], Tensor]

MAX_PSNR = 100.0  # dB, of equal images
_LUMA = (0.299, 0.587, 0.114)  # Rec. ITU-R BT.601
_SHARP_FREQUENCY = 0.25  # cycles per px, half of what the pixel grid can hold
# Root mean square, in 8-bit levels, below which an image counts as without high frequencies. Rounding to 8 bits alone
# gives a smooth grey gradient 0.26: sqrt(1/12) times the root of the share of frequencies, 0.80, that lie above.
_MIN_SHARP_RMS = 0.5
_SHARP_MIN_PX = 16  # the window leaves fewer px no frequency resolution


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One metric of one image and its reconstruction."""

    name: str  # as in results and gates
    title: str  # as in reports
    unit: str  # "dB"; "" for none
    better: Literal["higher", "lower", "target"]
    target: float | None = None  # of better="target": the value of a perfect reconstruction
    decimals: int  # for display
    definition: str  # all that a reader needs to compute the same
    source: str  # paper or standard
    min_px: int = 1  # smallest side of an image
    network: Literal["alex", "vgg", "dists"] | None = None  # the frozen network that it needs
    # NaN where undefined; ConfigError for images below min_px. None with a network: `build` makes it.
    compute: Compute | None = field(default=None, repr=False, compare=False)

    def goodness(self, value: Any) -> Any:
        """A number or array as one of which more is always better: value, -value or -|value - target|."""
        if self.better == "higher":
            return value
        return -value if self.better == "lower" else -abs(value - self.target)

    def build(
        self,
        weights_path: str | Path | None = None,
        *,
        device: str | torch.device = "cpu",
        option: str = "weights_path",
        without: str = "",
    ) -> Compute:
        """The function of the metric: (recon, image), both (B, 3, H, W) in [0, 1] -> (B,), float64, on the CPU.

        Of a metric with a network, it keeps the features of the last `image` for the next call with the same tensor.
        weights_path: a file or folder with the backbone's weights; None: the usual places.
        device: of the network; metrics without one compute where the images are.
        option: what the user calls `weights_path`; without: how the user does without the metric. Both for the message.
        Raises: ConfigError for a missing package; MissingWeightsError, CheckpointError for the weights.
        """
        if self.compute is not None:
            return self.compute
        network: LPIPS | DISTS
        if self.network in ("alex", "vgg"):
            network = build_lpips(self.network, weights_path, option=option, without=without)
        else:
            network = build_dists(weights_path, option=option, without=without)
        return _checked(self, _OnNetwork(network, device))

    def find_weights(self, weights_path: str | Path | None = None, *, option: str = "weights_path") -> Path | None:
        """The weights that `build` would read, where they are on this machine; None for a metric without a network.

        For checks before the work starts: nothing is downloaded or loaded. Arguments and errors as `build`.
        """
        if self.network in ("alex", "vgg"):
            return find_lpips_weights(self.network, weights_path, option=option)
        return None if self.network is None else find_dists_weights(weights_path, option=option)


def psnr(image: NDArray[np.uint8], reconstruction: NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio of 8-bit pixels: 10 * log10(255^2 / MSE) over all pixels and channels.

    image, reconstruction: of one shape, uint8. Returns: dB, higher is better; infinity for equal images.
    """
    if image.dtype != np.uint8 or reconstruction.dtype != np.uint8 or image.shape != reconstruction.shape:
        raise ValueError(
            f"expected two uint8 arrays of one shape, got {image.dtype} {image.shape} and "
            f"{reconstruction.dtype} {reconstruction.shape}"
        )
    difference = image.astype(np.int16) - reconstruction  # int16: uint8 would wrap around
    mse = float(np.square(difference, dtype=np.int32).mean(dtype=np.float64))
    return 10.0 * math.log10(255.0**2 / mse) if mse > 0 else math.inf


def _difference(recon: Tensor, image: Tensor) -> Tensor:
    """recon - image in 8-bit levels, as integers, whose sums are exact on every device."""
    return ((recon - image) * 255).round().int()


def _mean(levels: Tensor) -> Tensor:
    """Mean of integers over all but the batch: (B,), float64, on the CPU."""
    total = levels.flatten(1).sum(dim=1)  # torch sums int32 in int64
    return total.cpu().double() / levels[0].numel()


def _psnr(recon: Tensor, image: Tensor) -> Tensor:
    difference = _difference(recon, image)
    decibels: Tensor = 10 * torch.log10(255.0**2 / _mean(difference * difference))
    return decibels.clamp(max=MAX_PSNR)


def _l1(recon: Tensor, image: Tensor) -> Tensor:
    return _mean(_difference(recon, image).abs())


def _bias(recon: Tensor, image: Tensor, *, channel: int) -> Tensor:
    return _mean(_difference(recon[:, channel], image[:, channel]))


def _sharpness(recon: Tensor, image: Tensor) -> Tensor:
    energy = _sharp_energy(image)
    return torch.where(energy >= _MIN_SHARP_RMS**2, _sharp_energy(recon) / energy, math.nan)


def _sharp_energy(image: Tensor) -> Tensor:
    """Mean square of the luma's part above the frequency, in squared 8-bit levels: (B,), float64, on the CPU."""
    height, width = image.shape[2:]
    luma = 255 * torch.einsum("c,bchw->bhw", image.new_tensor(_LUMA), image)
    window = torch.hann_window(height).outer(torch.hann_window(width)).to(image)
    spectrum = torch.fft.rfft2((luma - luma.mean(dim=(1, 2), keepdim=True)) * window)  # (B, H, W // 2 + 1)
    radius = torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width))
    twice = torch.full((width // 2 + 1,), 2.0)  # rfft leaves out the mirror image of each column but these
    twice[0] = 1
    if width % 2 == 0:
        twice[-1] = 1
    weight = ((radius > _SHARP_FREQUENCY) * twice).to(image)
    energy = ((spectrum.real.square() + spectrum.imag.square()) * weight).sum(dim=(1, 2)).cpu().double()
    mean_square: Tensor = energy / (height * width * float(window.square().sum()))  # Parseval
    return mean_square


class _OnNetwork:
    """Distance in the features of a frozen network, on the network's device.

    The features of the last `image` are kept, and serve as long as the same tensor object comes again, which must not
    be written to meanwhile: several reconstructions of one batch cost one pass for the batch and one for each.
    """

    def __init__(self, network: LPIPS | DISTS, device: str | torch.device) -> None:
        self._network = network.to(device)
        self._device = device
        self._image: Tensor | None = None
        self._features: Any = None

    @torch.no_grad()
    def __call__(self, recon: Tensor, image: Tensor) -> Tensor:
        if image is not self._image:
            self._image = self._features = None  # frees what the new features take
            self._features = self._network.features(self._x(image))
            self._image = image
        return self._network.distance(self._x(recon), self._features).cpu().double()

    def _x(self, image: Tensor) -> Tensor:
        return image.to(self._device) * 2 - 1


def _checked(metric: Metric, compute: Compute) -> Compute:
    """`compute` behind a look at the shapes."""

    def checked(recon: Tensor, image: Tensor) -> Tensor:
        if recon.shape != image.shape or image.ndim != 4 or image.shape[1] != 3:
            raise ValueError(
                f"expected two tensors (B, 3, H, W) of one shape, got {tuple(recon.shape)} and {tuple(image.shape)}"
            )
        height, width = image.shape[2:]
        if min(height, width) < metric.min_px:
            raise ConfigError(
                f"{metric.name} needs images of at least {metric.min_px} px on each side; got {width} x {height}"
            )
        return compute(recon, image)

    return checked


_SSIM_COMMON = (
    "K1 = 0.01, K2 = 0.03, data range 1 (8-bit values / 255), on R, G and B of sRGB, only positions where the whole "
    "window lies inside the image"
)
_SHARMA = "Sharma, Wu & Dalal 2005, The CIEDE2000 color-difference formula"
_WANG = (
    "Wang, Bovik, Sheikh & Simoncelli 2004, Image quality assessment: from error visibility to structural similarity"
)
_ZHANG = "Zhang et al. 2018, The Unreasonable Effectiveness of Deep Features as a Perceptual Metric"


def _lpips_row(net: Literal["alex", "vgg"], backbone: str) -> Metric:
    return Metric(
        name=f"lpips_{net}",
        title=f"LPIPS ({net})",
        unit="",
        better="lower",
        decimals=4,
        definition=(
            f"LPIPS version 0.1 with {backbone} of torchvision (IMAGENET1K_V1) and the linear heads of the package "
            "lpips, 8-bit sRGB scaled to [-1, 1], at the image's own size; mean over positions, sum over layers."
        ),
        source=_ZHANG,
        min_px=MIN_PX[net],
        network=net,
    )


def _bias_row(channel: int, letter: str, colour: str) -> Metric:
    return Metric(
        name=f"bias_{letter.lower()}",
        title=f"Bias {letter}",
        unit="levels",
        better="target",
        target=0.0,
        decimals=3,
        definition=(
            f"Mean of reconstruction - image over the pixels of the {colour} channel, in 8-bit levels of sRGB; above 0 "
            f"the reconstruction has too much {colour}."
        ),
        source="signed mean error",
        compute=functools.partial(_bias, channel=channel),
    )


_ROWS = (
    Metric(
        name="psnr",
        title="PSNR",
        unit="dB",
        better="higher",
        decimals=2,
        definition=(
            "10 log10(255^2 / MSE), MSE over all pixels and the channels R, G, B of 8-bit sRGB, per image; at most "
            f"{MAX_PSNR:g} dB, also for equal images, so that means over images exist."
        ),
        source="Huynh-Thu & Ghanbari 2008, Scope of validity of PSNR in image/video quality assessment",
        compute=_psnr,
    ),
    Metric(
        name="ssim",
        title="SSIM",
        unit="",
        better="higher",
        decimals=4,
        definition=(
            f"SSIM with a Gaussian window of {WINDOW_PX} x {WINDOW_PX} px, sigma 1.5 px, population covariance; "
            f"{_SSIM_COMMON}; mean over positions and channels."
        ),
        source=_WANG,
        min_px=WINDOW_PX,
        compute=ssim,
    ),
    Metric(
        name="ms_ssim",
        title="MS-SSIM",
        unit="",
        better="higher",
        decimals=4,
        definition=(
            "Five scales with the exponents 0.0448, 0.2856, 0.3001, 0.2363, 0.1333, between them 2 x 2 average pooling "
            "(a side of odd length gets a line of zeros before its first, as in pytorch-msssim); window as ssim: "
            f"{_SSIM_COMMON}. Per channel the mean contrast-structure term of each scale, at the last one the mean "
            "SSIM, clamped to at least 0, raised to the exponent and multiplied; then the mean over channels."
        ),
        source="Wang, Simoncelli & Bovik 2003, Multi-scale structural similarity for image quality assessment",
        min_px=MS_SSIM_MIN_PX,
        compute=ms_ssim,
    ),
    Metric(
        name="ssim_uniform7",
        title="SSIM (uniform 7)",
        unit="",
        better="higher",
        decimals=4,
        definition=(
            f"SSIM with a uniform window of {UNIFORM_PX} x {UNIFORM_PX} px and sample covariance (divided by "
            f"{UNIFORM_PX**2 - 1}), the defaults of scikit-image; {_SSIM_COMMON}; mean over positions and channels."
        ),
        source=_WANG,
        min_px=UNIFORM_PX,
        compute=ssim_uniform,
    ),
    _lpips_row("alex", "AlexNet"),
    _lpips_row("vgg", "VGG16"),
    Metric(
        name="dists",
        title="DISTS",
        unit="",
        better="lower",
        decimals=4,
        definition=(
            "DISTS with VGG16 of torchvision (IMAGENET1K_V1), max pooling replaced by L2 pooling under a Hann window, "
            "and the weights of the package dists-pytorch; 8-bit sRGB / 255, at the image's own size (the authors "
            "shrink larger ones to 256 px first)."
        ),
        source="Ding, Ma, Wang & Simoncelli 2020, Image Quality Assessment: Unifying Structure and Texture Similarity",
        min_px=DISTS_MIN_PX,
        network="dists",
    ),
    Metric(
        name="l1",
        title="L1",
        unit="levels",
        better="lower",
        decimals=3,
        definition="Mean absolute difference over all pixels and the channels R, G, B, in 8-bit levels of sRGB.",
        source="mean absolute error",
        compute=_l1,
    ),
    _bias_row(0, "R", "red"),
    _bias_row(1, "G", "green"),
    _bias_row(2, "B", "blue"),
    Metric(
        name="ciede2000",
        title="CIEDE2000",
        unit="",
        better="lower",
        decimals=3,
        definition=(
            "Mean over pixels of Delta E 2000 with kL = kC = kH = 1; from 8-bit sRGB through the matrix of "
            "IEC 61966-2-1 to L*a*b* under D65, 2 degrees, with the white that this matrix gives."
        ),
        source=_SHARMA,
        compute=mean_ciede2000,
    ),
    Metric(
        name="sharpness",
        title="Sharpness",
        unit="",
        better="target",
        target=1.0,
        decimals=3,
        definition=(
            "Energy at radial frequencies above 0.25 cycles/px, reconstruction / image: 2-D Fourier transform of the "
            "luma (Rec. 601, of 8-bit sRGB) with its mean taken off and a periodic Hann window over each side. Below 1 "
            "is blur, above 1 added grain or ringing. Undefined (NaN) where that part of the image has a root mean "
            f"square below {_MIN_SHARP_RMS:g} levels, about what rounding to 8 bits makes."
        ),
        source="defined here",
        min_px=_SHARP_MIN_PX,
        compute=_sharpness,
    ),
)
# In the order of display.
IMAGE_METRICS: dict[str, Metric] = {
    row.name: replace(row, compute=_checked(row, row.compute)) if row.compute else row for row in _ROWS
}


def large_enough(metrics: Mapping[str, Compute], image: Tensor) -> dict[str, Compute]:
    """Those of the metrics that can be computed on images (..., H, W) of this size."""
    return {name: compute for name, compute in metrics.items() if min(image.shape[-2:]) >= IMAGE_METRICS[name].min_px}


def compute_metrics(metrics: Mapping[str, Compute], recon: Tensor, image: Tensor) -> dict[str, Tensor]:
    """All metrics that the images are large enough for. recon, image: as for `Compute`."""
    return {name: compute(recon, image) for name, compute in large_enough(metrics, image).items()}
