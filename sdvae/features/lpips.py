"""LPIPS, the distance between images in the features of a frozen network, as a loss and as a metric.

Architecture and learned heads are those of the package lpips; the backbone's weights come from `weights.py`. The
computation differs from the package's in cost, not in value: target features are kept apart, so that they are computed
once and without a graph, and the gradient is computed together with the distance, a few images at a time.

Source: Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric".
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sdvae._torchvision import ensure_torchvision_importable
from sdvae.errors import ConfigError
from sdvae.features.weights import find_weights, load_weights

__all__ = ["LPIPS", "MIN_PX", "build_lpips", "find_lpips_weights"]

_INSTALL = "pip install 'sdvae[train]' or 'sdvae[eval]'"
_EPS = 1e-10  # lpips.normalize_tensor
# Images of one pass with gradient, in px: 4 of 256 x 256. The features and masks of VGG are 86 MB for one such image,
# and that much, times 4, is all the memory that a batch of any size takes.
_PASS_PX = 4 * 256 * 256


@dataclass(frozen=True, kw_only=True)
class _Net:
    backbone: str  # class in lpips.pretrained_networks
    weights: str  # row of KNOWN_WEIGHTS
    min_px: int  # smallest side that leaves each pooling at least one position; found by trying


_NETS = {
    "vgg": _Net(backbone="vgg16", weights="vgg16", min_px=16),
    "alex": _Net(backbone="alexnet", weights="alexnet", min_px=31),
    "squeeze": _Net(backbone="squeezenet", weights="squeezenet1_1", min_px=17),
}
MIN_PX = {name: net.min_px for name, net in _NETS.items()}


class _GradientAtHand(torch.autograd.Function):
    """`distance` as a function of `recon`, whose gradient is known already."""

    @staticmethod
    def forward(ctx: Any, recon: Tensor, distance: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return distance.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_distance: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return grad_distance[:, None, None, None] * gradient, None, None


def _unit(feature: Tensor) -> tuple[Tensor, Tensor]:
    """Feature vectors (B, C, h, w) at unit length, and (B, 1, h, w) what they were divided by, in float32."""
    feature = feature.float()
    length = torch.linalg.vector_norm(feature, dim=1, keepdim=True) + _EPS
    return feature / length, length


def _layer_distance(feature: Tensor, target: Tensor, head: Tensor) -> Tensor:
    """Squared differences of unit features, weighted by the head over channels, mean over positions: (B,)."""
    difference = _unit(feature)[0] - target
    return (difference.square_() * head).sum(dim=1).mean(dim=(1, 2))


def _layer_distance_and_gradient(feature: Tensor, target: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
    """`_layer_distance`, and the gradient to `feature` of its sum over positions (not mean), per image.

    With u = f / |f| and q = head * (u - target), the gradient is 2 (q - u <q, u>) / |f|.
    """
    unit, length = _unit(feature)
    difference = unit - target
    weighted = difference * head
    distance = difference.mul_(weighted).sum(dim=1).mean(dim=(1, 2))
    along = torch.mul(unit, weighted, out=difference).sum(dim=1, keepdim=True)
    gradient = weighted.addcmul_(unit, along, value=-1).mul_(2 / length)
    return distance, gradient


class LPIPS(nn.Module):
    """Frozen: no parameter takes a gradient, and the module stays in eval mode. Made by `build_lpips`.

    It works in channels_last, to which images in another layout are copied. Under autocast the backbone runs in the
    lower precision, the distance in float32.
    """

    def __init__(self, backbone: nn.Module, scaling: nn.Module, heads: Sequence[Tensor], min_px: int) -> None:
        super().__init__()
        backbone.requires_grad_(False).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.backbone = backbone
        self.scaling = scaling  # from [-1, 1] to the backbone's mean and standard deviation
        self.num_layers = len(heads)
        for index, head in enumerate(heads):
            self.register_buffer(f"head{index}", head)  # (1, C, 1, 1)
        self.min_px = min_px
        self.eval()

    def train(self, mode: bool = True) -> LPIPS:
        """Stays in eval mode."""
        super().train(False)
        return self

    def features(self, x: Tensor) -> list[Tensor]:
        """Unit-length feature vectors of each layer, without a graph.

        x: (B, 3, H, W) in [-1, 1], sides of at least `min_px`.
        Returns: (B, C, h, w) per layer, float32.
        Raises: ConfigError for smaller images.
        """
        with torch.no_grad():
            return [_unit(feature)[0] for feature in self._layers(x)]

    def distance(self, recon: Tensor, target_features: Sequence[Tensor]) -> Tensor:
        """Distance of each image to the one that `target_features` was computed from.

        recon: (B, 3, H, W), range [-1, 1] expected, not clamped. It gets a gradient, of first order; the network none.
        Returns: (B,), float32, no unit; mean over positions, sum over layers and weighted channels; lower is better.
        Raises: ConfigError for images smaller than `min_px`; ValueError for targets of another shape.
        """
        if not (torch.is_grad_enabled() and recon.requires_grad):
            return self._distance(recon, target_features)
        # Computed here instead of in the backward pass, the gradient needs the memory of a few images at a time. And
        # passes that each ask for it, as the adaptive weight and the loss do, go through the network once.
        num_images = max(1, _PASS_PX // (recon.shape[2] * recon.shape[3]))
        splits = zip(*(torch.split(tensor, num_images) for tensor in (recon.detach(), *target_features)), strict=True)
        parts = [self._distance_and_gradient(images, targets) for images, *targets in splits]
        distance, gradient = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        result: Tensor = _GradientAtHand.apply(recon, distance, gradient)  # type: ignore[no-untyped-call]
        return result

    def forward(self, recon: Tensor, x: Tensor) -> Tensor:
        """Distance between images, with gradient to `recon` alone; see `distance`."""
        return self.distance(recon, self.features(x))

    def _layers(self, x: Tensor) -> Sequence[Tensor]:
        if min(x.shape[2:]) < self.min_px:
            raise ConfigError(
                f"LPIPS with this network needs images of at least {self.min_px} px; got {x.shape[3]} x {x.shape[2]}"
            )
        layers: Sequence[Tensor] = self.backbone(self.scaling(x.contiguous(memory_format=torch.channels_last)))
        return layers

    def _matched(self, layers: Sequence[Tensor], targets: Sequence[Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
        shapes, expected = ([tuple(tensor.shape) for tensor in tensors] for tensors in (targets, layers))
        if shapes != expected:  # one image would silently be compared with many
            raise ValueError(f"target features have the shapes {shapes}; these images need {expected}")
        heads = [self.get_buffer(f"head{index}") for index in range(self.num_layers)]
        return list(zip(layers, targets, heads, strict=True))

    def _distance(self, recon: Tensor, targets: Sequence[Tensor]) -> Tensor:
        with torch.no_grad():
            layers = self._matched(self._layers(recon), targets)
            return torch.stack([_layer_distance(*layer) for layer in layers]).sum(dim=0)

    def _distance_and_gradient(self, recon: Tensor, targets: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf = recon.float().requires_grad_()
            layers = self._layers(leaf)
        num_px = recon.shape[2] * recon.shape[3]
        # The gradient runs through the network as that of a sum over pixels; that of a mean is too small for fp16.
        with torch.no_grad(), torch.autocast(recon.device.type, enabled=False):
            parts = [_layer_distance_and_gradient(*layer) for layer in self._matched(layers, targets)]
            gradients = [
                gradient.mul_(num_px / gradient[0, 0].numel()).to(layer.dtype)
                for layer, (_, gradient) in zip(layers, parts, strict=True)
            ]
            (gradient,) = torch.autograd.grad(layers, leaf, gradients)
            return torch.stack([distance for distance, _ in parts]).sum(dim=0), gradient / num_px


def find_lpips_weights(
    net: Literal["vgg", "alex", "squeeze"],
    weights_path: str | Path | None = None,
    *,
    option: str = "weights_path",
    without: str = "",
) -> Path:
    """The file that `build_lpips` would read, where it is on this machine; for checks that must not download.

    Raises: ConfigError, MissingWeightsError as `build_lpips`.
    """
    if find_spec("lpips") is None:
        raise ConfigError(f"LPIPS needs the package lpips: {_INSTALL}")
    return find_weights(_NETS[net].weights, weights_path, option=option, without=without, allow_download=False)


def build_lpips(
    net: Literal["vgg", "alex", "squeeze"],
    weights_path: str | Path | None = None,
    *,
    option: str = "weights_path",
    without: str = "",
) -> LPIPS:
    """LPIPS version 0.1 on the CPU, in float32.

    weights_path: the backbone's weights, a file or a folder that holds it; None: the usual places, see `find_weights`.
    option: what the user calls `weights_path`; without: how the user does without LPIPS. Both for the message.
    Raises: ConfigError where the package lpips is missing; MissingWeightsError, CheckpointError for the weights.
    """
    known = _NETS[net]
    package = _import_lpips()
    with warnings.catch_warnings(), torch.device("meta"):  # meta: random weights, drawn to be replaced, are time lost
        warnings.simplefilter("ignore")  # torchvision's on the argument `pretrained`
        backbone: nn.Module = getattr(package.pretrained_networks, known.backbone)(pretrained=False)
    sources = {name: "features." + name.partition(".")[2] for name in backbone.state_dict()}  # without the slice
    shapes = {sources[name]: tensor.shape for name, tensor in backbone.state_dict().items()}
    weights = load_weights(find_weights(known.weights, weights_path, option=option, without=without), shapes)
    backbone.load_state_dict({name: weights[source] for name, source in sources.items()}, strict=True, assign=True)
    file = Path(str(package.__file__)).parent / "weights" / "v0.1" / f"{net}.pth"
    heads = torch.load(file, map_location="cpu", weights_only=True)  # lin0.model.1.weight, lin1..., each (1, C, 1, 1)
    return LPIPS(backbone, package.ScalingLayer(), list(heads.values()), known.min_px)


def _import_lpips() -> ModuleType:
    ensure_torchvision_importable()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torchvision's, where its image library does not load
            import lpips
    except ImportError as error:
        raise ConfigError(f"LPIPS needs the package lpips ({error}): {_INSTALL}") from error
    module: ModuleType = lpips
    return module
