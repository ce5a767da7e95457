"""Perceived colour difference: sRGB to CIE L*a*b*, and CIEDE2000.

Source: IEC 61966-2-1 (sRGB); CIE 15:2004 (L*a*b*); Sharma, Wu & Dalal 2005, "The CIEDE2000 color-difference formula:
implementation notes, supplementary test data, and mathematical observations".
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["ciede2000", "mean_ciede2000", "srgb_to_lab"]

# Linear sRGB to XYZ, D65, 2 degrees: IEC 61966-2-1. White is what it makes of (1, 1, 1), so that greys have no chroma.
_TO_XYZ = ((0.4124, 0.3576, 0.1805), (0.2126, 0.7152, 0.0722), (0.0193, 0.1192, 0.9505))
_FULL_TURN = 2 * math.pi


def srgb_to_lab(image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """L* in [0, 100], a* and b* of sRGB colours.

    image: (3, ...) in [0, 1]. Returns: three tensors (...), of the same type.
    """
    linear = torch.where(image <= 0.04045, image / 12.92, ((image + 0.055) / 1.055) ** 2.4)
    matrix = torch.tensor(_TO_XYZ, dtype=image.dtype, device=image.device)
    relative = (matrix / matrix.sum(dim=1, keepdim=True)) @ linear.reshape(3, -1)  # (3, N): XYZ, white is 1
    x, y, z = torch.where(relative > (6 / 29) ** 3, relative ** (1 / 3), relative * (29 / 6) ** 2 / 3 + 4 / 29)
    shape = image.shape[1:]
    return (116 * y - 16).view(shape), (500 * (x - y)).view(shape), (200 * (y - z)).view(shape)


def ciede2000(lab: tuple[Tensor, Tensor, Tensor], other: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Delta E 2000 between colours in L*a*b*, with kL = kC = kH = 1; symmetric, 0 for equal ones.

    Returns: as the tensors given, no unit; about 1 can just be seen.
    Source: Sharma et al. 2005, equations 2 to 22.
    """
    (l1, a1, b1), (l2, a2, b2) = lab, other
    mean_l = (l1 + l2) / 2
    stretch = 1.5 - _seventh((torch.hypot(a1, b1) + torch.hypot(a2, b2)) / 2) / 2  # 1 + G
    a1, a2 = a1 * stretch, a2 * stretch
    c1, c2 = torch.hypot(a1, b1), torch.hypot(a2, b2)
    h1, h2 = torch.atan2(b1, a1) % _FULL_TURN, torch.atan2(b2, a2) % _FULL_TURN
    mean_c = (c1 + c2) / 2
    delta_h, mean_h = _hues(h1, h2, c1 * c2 == 0)
    weight_t = (
        1
        - 0.17 * torch.cos(mean_h - math.radians(30))
        + 0.24 * torch.cos(2 * mean_h)
        + 0.32 * torch.cos(3 * mean_h + math.radians(6))
        - 0.20 * torch.cos(4 * mean_h - math.radians(63))
    )
    from_50 = (mean_l - 50).square()
    lightness = (l2 - l1) / (1 + 0.015 * from_50 / torch.sqrt(20 + from_50))
    chroma = (c2 - c1) / (1 + 0.045 * mean_c)
    hue = 2 * torch.sqrt(c1 * c2) * torch.sin(delta_h / 2) / (1 + 0.015 * mean_c * weight_t)
    around_blue = torch.exp(-((mean_h - math.radians(275)) / math.radians(25)).square())
    rotation = -2 * _seventh(mean_c) * torch.sin(math.radians(60) * around_blue)
    # at least 0: the rotation term can outweigh squares that rounding has left of equal colours
    return (lightness.square() + chroma.square() + hue.square() + rotation * chroma * hue).clamp(min=0).sqrt()


def mean_ciede2000(recon: Tensor, image: Tensor) -> Tensor:
    """Mean over pixels of Delta E 2000 between sRGB images.

    recon, image: (B, 3, H, W) in [0, 1]. Returns: (B,), float64, on the CPU; lower is better.
    """
    pairs = zip(recon, image, strict=True)  # one by one: a batch of intermediate results would leave the cache
    return torch.stack([ciede2000(srgb_to_lab(a), srgb_to_lab(b)).mean() for a, b in pairs]).cpu().double()


def _seventh(chroma: Tensor) -> Tensor:
    """sqrt(C^7 / (C^7 + 25^7))."""
    power = (chroma / 25) ** 7
    return torch.sqrt(power / (power + 1))


def _hues(h1: Tensor, h2: Tensor, colourless: Tensor) -> tuple[Tensor, Tensor]:
    """Difference and mean of hues in radians, the short way round; of a colourless pair 0 and the other's hue."""
    delta, total = h2 - h1, h1 + h2
    far = delta.abs() > math.pi
    mean = torch.where(far, torch.where(total < _FULL_TURN, total + _FULL_TURN, total - _FULL_TURN), total) / 2
    delta = torch.where(far, delta - _FULL_TURN * delta.sign(), delta)
    return torch.where(colourless, 0.0, delta), torch.where(colourless, total, mean)
