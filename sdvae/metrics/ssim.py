"""SSIM and multi-scale SSIM of batches of RGB images, per image.

Left out: the padded variants. Only positions where the whole window lies inside the image count, as in the paper's own
code and in scikit-image.

Source: Wang et al. 2004, "Image quality assessment: from error visibility to structural similarity"; Wang et al. 2003,
"Multi-scale structural similarity for image quality assessment".
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["MS_SSIM_MIN_PX", "UNIFORM_PX", "WINDOW_PX", "ms_ssim", "ssim", "ssim_uniform"]

WINDOW_PX = 11
UNIFORM_PX = 7
_SIGMA_PX = 1.5
_C1 = 0.01**2  # (K1 * data range)^2
_C2 = 0.03**2
_SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # Wang et al. 2003, section 3.2: from fine to coarse
# Rounded up, four halvings of 161 leave 11, which is one window.
MS_SSIM_MIN_PX = (WINDOW_PX - 1) * 2 ** (len(_SCALE_WEIGHTS) - 1) + 1
# Images and pixels of one pass: 12 planes per image, which with all that is made of them stay in the cache. Whole
# images take up to twice the time.
_PASS_IMAGES = 4
_PASS_PX = 64 * 1024
_PLANE_BLOCK = 16  # oneDNN's depthwise convolution halves its speed where the number of planes is no multiple of this


def ssim(recon: Tensor, image: Tensor) -> Tensor:
    """SSIM with a Gaussian window of 11 px and sigma 1.5, population covariance, data range 1.

    recon, image: (B, 3, H, W) in [0, 1], sides of at least 11 px.
    Returns: (B,), float64, on the CPU; mean over positions and channels; 1 for equal images.
    Source: Wang et al. 2004, section III.B: K1 = 0.01, K2 = 0.03.
    """
    return _similarity(recon, image, _gaussian(recon), 1.0)[0].mean(dim=1)


def ssim_uniform(recon: Tensor, image: Tensor) -> Tensor:
    """SSIM with a uniform window of 7 x 7 px and sample covariance, divided by 48: scikit-image's default.

    Shapes, ranges and constants as `ssim`; sides of at least 7 px.
    """
    num_px = UNIFORM_PX**2
    window = recon.new_full((UNIFORM_PX,), 1 / UNIFORM_PX)
    return _similarity(recon, image, window, num_px / (num_px - 1))[0].mean(dim=1)


def ms_ssim(recon: Tensor, image: Tensor) -> Tensor:
    """Multi-scale SSIM: contrast terms of five scales and the last one's luminance, multiplied with their exponents.

    Per channel, the means over positions of the contrast term (at the coarsest scale: of SSIM) are clamped to at least
    0, raised to the exponents and multiplied; then the mean over channels. Between scales 2 x 2 average pooling. A side
    of odd length gets a line of zeros before its first; this, and the order of the means, as in pytorch-msssim 1.0.

    Shapes and ranges as `ssim`; sides of at least MS_SSIM_MIN_PX.
    """
    window = _gaussian(recon)
    product = torch.ones(recon.shape[:2], dtype=torch.float64)  # (B, 3)
    for scale, weight in enumerate(_SCALE_WEIGHTS):
        if scale > 0:
            recon, image = _halved(recon), _halved(image)
        full, contrast = _similarity(recon, image, window, 1.0)
        last = scale == len(_SCALE_WEIGHTS) - 1
        product *= (full if last else contrast).clamp(min=0) ** weight
    return product.mean(dim=1)


def _gaussian(like: Tensor) -> Tensor:
    offset = torch.arange(WINDOW_PX, dtype=torch.float64) - WINDOW_PX // 2
    window = torch.exp(-offset.square() / (2 * _SIGMA_PX**2))
    return (window / window.sum()).to(like)


def _halved(image: Tensor) -> Tensor:
    padding = [side % 2 for side in image.shape[2:]]  # torch pads both ends; the last line then fills no window
    return F.avg_pool2d(image, 2, padding=padding)


def _similarity(recon: Tensor, image: Tensor, window: Tensor, correction: float) -> tuple[Tensor, Tensor]:
    """Means over positions of SSIM and of its contrast-structure term.

    window: (k,), one side of a separable window, sums to 1; correction: factor on variances and covariance.
    Returns: (B, 3) each, float64, on the CPU.
    """
    pairs = zip(torch.split(recon, _PASS_IMAGES), torch.split(image, _PASS_IMAGES), strict=True)
    parts = [_sums(*pair, window, correction) for pair in pairs]
    height, width = (side - len(window) + 1 for side in image.shape[2:])
    full, contrast = torch.cat(parts, dim=1).cpu().double() / (height * width)
    return full, contrast


def _sums(recon: Tensor, image: Tensor, window: Tensor, correction: float) -> Tensor:
    """Sums over positions of both maps, strip by strip: (2, B, 3)."""
    num, _, height, width = image.shape
    halo = len(window) - 1
    rows = max(32, _PASS_PX // (num * width))
    total = recon.new_zeros(2, num, 3)
    for top in range(0, height - halo, rows):
        strip = slice(top, top + rows + halo)
        maps = _maps(recon[:, :, strip], image[:, :, strip], window, correction)
        total += torch.stack([each.sum(dim=(2, 3)) for each in maps])
    return total


def _maps(recon: Tensor, image: Tensor, window: Tensor, correction: float) -> tuple[Tensor, Tensor]:
    """SSIM and its contrast-structure term at each position: (B, 3, h, w) each.

    From the sum s of both images and their difference d: four planes to filter instead of five, and equal images give
    exactly 1, for then all of d is zero. From s its mean is taken, so that E[s^2] - E[s]^2 loses less to rounding.
    """
    s, d = recon + image, recon - image
    centre = s.mean(dim=(2, 3), keepdim=True)
    s -= centre
    mean_s, mean_d, square_s, square_d = _filtered((s, d, s * s, d * d), window)
    var_s = square_s.addcmul_(mean_s, mean_s, value=-1).mul_(correction / 2)  # half the variance of s
    var_d = square_d.addcmul_(mean_d, mean_d, value=-1).mul_(correction / 2)
    contrast = (var_s - var_d + _C2).div_(var_s.add_(var_d).add_(_C2))  # 2 cov = (Var s - Var d) / 2, and so on
    square_mean_s, square_mean_d = mean_s.add_(centre).square_().div_(2), mean_d.square_().div_(2)
    luminance = (square_mean_s - square_mean_d + _C1).div_(square_mean_s.add_(square_mean_d).add_(_C1))
    return luminance.mul_(contrast), contrast


def _filtered(maps: Sequence[Tensor], window: Tensor) -> Tensor:
    """Window means. maps: M of (B, 3, H, W). Returns: (M, B, 3, H - k + 1, W - k + 1)."""
    num, side = len(maps) * maps[0].shape[0] * 3, len(window)
    planes = [each.flatten(0, 1) for each in maps]
    filling = planes[0].new_zeros(-num % _PLANE_BLOCK, *planes[0].shape[1:])
    flat = torch.cat((*planes, filling))[None]  # (1, P, H, W): a plane is a group
    groups = flat.shape[1]
    down, across = window.view(1, 1, side, 1), window.view(1, 1, 1, side)
    for kernel in (down, across):
        flat = F.conv2d(flat, kernel.expand(groups, -1, -1, -1), groups=groups)
    return flat[0, :num].view(len(maps), -1, 3, *flat.shape[2:])
