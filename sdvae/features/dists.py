"""DISTS, a distance between images that forgives texture which is only resampled.

The network is written here; VGG16's weights come from `weights.py`, and what was learned, the weight of each feature's
mean and of its structure, from the package dists-pytorch, of which nothing is run or imported.

Source: Ding et al. 2020, "Image Quality Assessment: Unifying Structure and Texture Similarity".
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdvae.errors import ConfigError
from sdvae.features.weights import find_weights, load_weights

__all__ = ["DISTS", "DISTS_MIN_PX", "build_dists", "find_dists_weights"]

DISTS_MIN_PX = 16  # four halvings leave the last stage a position
_INSTALL = "pip install 'sdvae[eval]'"
_IMAGENET_MEAN = (0.485, 0.456, 0.406)  # what torchvision's VGG16 was trained with
_IMAGENET_STD = (0.229, 0.224, 0.225)
# Convolutions of each stage: number in torchvision's `features`, channels out. Numbers left out are ReLUs and poolings.
_STAGES = (
    ((0, 64), (2, 64)),
    ((5, 128), (7, 128)),
    ((10, 256), (12, 256), (14, 256)),
    ((17, 512), (19, 512), (21, 512)),
    ((24, 512), (26, 512), (28, 512)),
)
_CHANNELS = (3, *(stage[-1][1] for stage in _STAGES))  # of the image, and of the last ReLU of each stage
_EPS = 1e-6  # c1 and c2 of equations 3 and 4, as published with the weights


class _Feature(NamedTuple):
    """One map of features (B, C, h, w), split into its mean over positions and what is left; with the variance."""

    centred: Tensor  # (B, C, h, w)
    mean: Tensor  # (B, C)
    variance: Tensor  # (B, C), population


class _L2Pool(nn.Module):
    """Halves height and width: root of the mean square under a 3 x 3 Hann window, zeros beyond the border."""

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        side = torch.tensor([0.25, 0.5, 0.25])  # Hann of 5, without its zeros, sum 1
        window = (side[:, None] * side).expand(num_channels, 1, 3, 3)
        self.register_buffer("window", window.contiguous(), persistent=False)

    def forward(self, h: Tensor) -> Tensor:
        window = self.get_buffer("window")
        return (F.conv2d(h * h, window, stride=2, padding=1, groups=h.shape[1]) + 1e-12).sqrt()


class DISTS(nn.Module):
    """Frozen: no parameter takes a gradient. Made by `build_dists`."""

    def __init__(self, stages: Sequence[nn.Module], alpha: Tensor, beta: Tensor) -> None:
        """stages: VGG16 in five parts, poolings included. alpha, beta: (1475,), weights of means and of structure."""
        super().__init__()
        self.stages = nn.ModuleList(stages).requires_grad_(False)
        self.stages.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        total = alpha.sum() + beta.sum()
        self.register_buffer("alpha", alpha / total)
        self.register_buffer("beta", beta / total)
        self.register_buffer("mean", torch.tensor(_IMAGENET_MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(_IMAGENET_STD).view(1, 3, 1, 1))

    @torch.no_grad()
    def features(self, x: Tensor) -> list[_Feature]:
        """What `distance` needs of a target.

        x: (B, 3, H, W) in [-1, 1], sides of at least DISTS_MIN_PX.
        Returns: one per layer, the image itself first; float32.
        Raises: ConfigError for smaller images.
        """
        if min(x.shape[2:]) < DISTS_MIN_PX:
            raise ConfigError(f"DISTS needs images of at least {DISTS_MIN_PX} px; got {x.shape[3]} x {x.shape[2]}")
        image = (x + 1) / 2
        layers = [_feature(image)]
        h = (image - self.get_buffer("mean")) / self.get_buffer("std")
        h = h.contiguous(memory_format=torch.channels_last)  # a quarter faster on a CPU
        for stage in self.stages:
            h = stage(h)
            layers.append(_feature(h))
        return layers

    @torch.no_grad()
    def distance(self, recon: Tensor, target_features: Sequence[_Feature]) -> Tensor:
        """Distance of each image to the one that `target_features` was computed from; no gradient.

        recon: (B, 3, H, W) in [-1, 1], of the target's shape.
        Returns: (B,), float32, no unit, 0 for equal images; lower is better.
        Raises: ConfigError for images smaller than DISTS_MIN_PX; ValueError for targets of another shape.
        """
        features = self.features(recon)
        shapes, expected = ([tuple(layer.centred.shape) for layer in each] for each in (target_features, features))
        if shapes != expected:  # one image would silently be compared with many
            raise ValueError(f"target features have the shapes {shapes}; these images need {expected}")
        pairs = list(zip(features, target_features, strict=True))
        texture = torch.cat([_unlike_means(*pair) for pair in pairs], dim=1)  # (B, 1475)
        structure = torch.cat([_unlike_structure(*pair) for pair in pairs], dim=1)
        return texture @ self.get_buffer("alpha") + structure @ self.get_buffer("beta")

    def forward(self, recon: Tensor, x: Tensor) -> Tensor:
        """Distance between images; see `distance`."""
        return self.distance(recon, self.features(x))


def _feature(h: Tensor) -> _Feature:
    mean = h.mean(dim=(2, 3), keepdim=True)
    centred = h - mean
    return _Feature(centred, mean[:, :, 0, 0], centred.square().mean(dim=(2, 3)))


def _unlike_means(a: _Feature, b: _Feature) -> Tensor:
    """1 - l of equation 3, per channel: (B, C), exactly 0 for equal means."""
    return (a.mean - b.mean).square() / (a.mean.square() + b.mean.square() + _EPS)


def _unlike_structure(a: _Feature, b: _Feature) -> Tensor:
    """1 - s of equation 4, per channel: (B, C), exactly 0 for equal features."""
    covariance = (a.centred * b.centred).mean(dim=(2, 3))
    total = a.variance + b.variance
    return (total - 2 * covariance) / (total + _EPS)


def find_dists_weights(
    weights_path: str | Path | None = None, *, option: str = "weights_path", without: str = ""
) -> Path:
    """VGG16's file that `build_dists` would read, where it is on this machine; for checks that must not download.

    Raises: ConfigError, MissingWeightsError as `build_dists`.
    """
    _learned_file()
    return find_weights("vgg16", weights_path, option=option, without=without, allow_download=False)


def build_dists(weights_path: str | Path | None = None, *, option: str = "weights_path", without: str = "") -> DISTS:
    """DISTS on the CPU, in float32.

    weights_path: VGG16's weights, a file or a folder that holds it; None: the usual places, see `find_weights`.
    option: what the user calls `weights_path`; without: how the user does without DISTS. Both for the message.
    Raises: ConfigError without the package dists-pytorch; MissingWeightsError, CheckpointError for the weights.
    """
    learned = load_weights(_learned_file(), dict.fromkeys(("alpha", "beta"), torch.Size((1, sum(_CHANNELS), 1, 1))))
    shapes = {}
    for stage, before in zip(_STAGES, _CHANNELS, strict=False):
        for number, after in stage:
            shapes[f"features.{number}.weight"] = torch.Size((after, before, 3, 3))
            shapes[f"features.{number}.bias"] = torch.Size((after,))
            before = after
    weights = load_weights(find_weights("vgg16", weights_path, option=option, without=without), shapes)
    stages = [_build_stage(index, weights) for index in range(len(_STAGES))]
    return DISTS(stages, learned["alpha"].flatten(), learned["beta"].flatten())


def _build_stage(index: int, weights: dict[str, Tensor]) -> nn.Sequential:
    stage = nn.Sequential(_L2Pool(_CHANNELS[index])) if index > 0 else nn.Sequential()
    for number, _ in _STAGES[index]:
        weight, bias = (weights[f"features.{number}.{name}"] for name in ("weight", "bias"))
        with torch.device("meta"):  # random weights, drawn to be replaced, are time lost
            convolution = nn.Conv2d(weight.shape[1], weight.shape[0], 3, padding=1)
        convolution.load_state_dict({"weight": weight, "bias": bias}, assign=True)
        stage.extend((convolution, nn.ReLU(inplace=True)))
    return stage


def _learned_file() -> Path:
    spec = find_spec("DISTS_pytorch")  # finds without importing, which would need torchvision
    if spec is None or spec.origin is None:
        raise ConfigError(f"DISTS needs the package dists-pytorch: {_INSTALL}")
    return Path(spec.origin).parent / "weights.pt"
