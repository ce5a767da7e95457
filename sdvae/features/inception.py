"""The features of FID and KID: pool features of the Inception network of 2015-12-05, as torch-fidelity computes them.

The network is written here, for it dominates the cost of an evaluation: each batch norm is folded into its
convolution, images and features stay in channels_last, ReLU writes branches straight into the block's output, average
pooling comes after the 1 x 1 convolution that it commutes with, and the resize gathers rows instead of pixels. Weights
come from `weights.py`. Left out: the classifier, so there is no Inception score.

Source: Szegedy et al. 2016, "Rethinking the Inception Architecture for Computer Vision". Layers and resize are those
of torch-fidelity 0.4.0, feature_extractor_inceptionv3.py, which differ from torchvision's network: average pooling
leaves padding out of its mean, the last block has max pooling, and the resize is TensorFlow 1's, without antialias.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sdvae.features.weights import find_weights, load_weights

__all__ = ["NUM_FEATURES", "InceptionFeatures", "build_inception", "find_inception_weights"]

NUM_FEATURES = 2048
_INPUT_PX = 299
_BN_EPS = 0.001  # torch-fidelity's BasicConv2d
# Images of one pass on a CPU, so that a batch of any size takes the memory of 4. It costs no time: 101 ms an image one
# by one, 87 ms in fours, 89 ms in sixteens (256 px, one core).
_CPU_PASS_IMAGES = 4


def _resize(images: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) to float32 (B, 3, 299, 299) in [0, 255], bilinear as in TensorFlow 1 (corners not aligned).

    Output pixel i lies at i * H / 299, not at the centre-aligned place that torch's own resize takes.
    """
    x = images
    for _ in range(2):  # height, then width as the height of the transposed image: rows are gathered fastest
        size = x.shape[2]
        position = torch.arange(_INPUT_PX, dtype=torch.float32, device=x.device) * (size / _INPUT_PX)
        low = position.long()
        high = (low + 1).clamp_max(size - 1)
        before, after = x.index_select(2, low).float(), x.index_select(2, high).float()
        x = torch.lerp(before, after, (position - low)[:, None]).transpose(2, 3).contiguous()
    return x


def _chain(x: Tensor, *convs: nn.Module) -> Tensor:
    """Convolutions with a ReLU after each but the last, which `_join` or a pooling follows."""
    *first, last = convs
    for conv in first:
        x = conv(x).relu_()
    y: Tensor = last(x)
    return y


def _join(*branches: Tensor) -> Tensor:
    """ReLU and concatenation over channels in one pass over memory."""
    num, _, height, width = branches[0].shape
    widths = [branch.shape[1] for branch in branches]
    out = torch.empty(
        (num, sum(widths), height, width),
        dtype=branches[0].dtype,
        device=branches[0].device,
        memory_format=torch.channels_last,
    )
    for branch, part in zip(branches, torch.split(out, widths, dim=1), strict=True):
        torch.clamp_min(branch, 0, out=part)
    return out


def _avg_pool(x: Tensor) -> Tensor:
    """Mean of the 3 x 3 neighbours that lie in the image.

    It follows the 1 x 1 convolution that it precedes in the network's description: the two commute, bias included,
    because the weights of the mean sum to one; and there are up to 8 times fewer channels here.
    """
    return F.avg_pool2d(x, kernel_size=3, stride=1, padding=1, count_include_pad=False)


class _Conv(nn.Conv2d):
    """Padding keeps the size; with a stride of 2 there is none."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int | tuple[int, int], stride: int = 1) -> None:
        rows, columns = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (rows // 2, columns // 2) if stride == 1 else (0, 0)
        super().__init__(in_channels, out_channels, (rows, columns), stride, padding)


class _BlockA(nn.Module):
    def __init__(self, in_channels: int, pool_features: int) -> None:
        super().__init__()
        self.branch1x1 = _Conv(in_channels, 64, 1)
        self.branch5x5_1 = _Conv(in_channels, 48, 1)
        self.branch5x5_2 = _Conv(48, 64, 5)
        self.branch3x3dbl_1 = _Conv(in_channels, 64, 1)
        self.branch3x3dbl_2 = _Conv(64, 96, 3)
        self.branch3x3dbl_3 = _Conv(96, 96, 3)
        self.branch_pool = _Conv(in_channels, pool_features, 1)

    def forward(self, x: Tensor) -> Tensor:
        return _join(
            self.branch1x1(x),
            _chain(x, self.branch5x5_1, self.branch5x5_2),
            _chain(x, self.branch3x3dbl_1, self.branch3x3dbl_2, self.branch3x3dbl_3),
            _avg_pool(self.branch_pool(x)),
        )


class _BlockB(nn.Module):
    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.branch3x3 = _Conv(in_channels, 384, 3, stride=2)
        self.branch3x3dbl_1 = _Conv(in_channels, 64, 1)
        self.branch3x3dbl_2 = _Conv(64, 96, 3)
        self.branch3x3dbl_3 = _Conv(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return _join(
            self.branch3x3(x),
            _chain(x, self.branch3x3dbl_1, self.branch3x3dbl_2, self.branch3x3dbl_3),
            F.max_pool2d(x, kernel_size=3, stride=2),
        )


class _BlockC(nn.Module):
    def __init__(self, in_channels: int, inner: int) -> None:
        super().__init__()
        self.branch1x1 = _Conv(in_channels, 192, 1)
        self.branch7x7_1 = _Conv(in_channels, inner, 1)
        self.branch7x7_2 = _Conv(inner, inner, (1, 7))
        self.branch7x7_3 = _Conv(inner, 192, (7, 1))
        self.branch7x7dbl_1 = _Conv(in_channels, inner, 1)
        self.branch7x7dbl_2 = _Conv(inner, inner, (7, 1))
        self.branch7x7dbl_3 = _Conv(inner, inner, (1, 7))
        self.branch7x7dbl_4 = _Conv(inner, inner, (7, 1))
        self.branch7x7dbl_5 = _Conv(inner, 192, (1, 7))
        self.branch_pool = _Conv(in_channels, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        double = (self.branch7x7dbl_1, self.branch7x7dbl_2, self.branch7x7dbl_3, self.branch7x7dbl_4)
        return _join(
            self.branch1x1(x),
            _chain(x, self.branch7x7_1, self.branch7x7_2, self.branch7x7_3),
            _chain(x, *double, self.branch7x7dbl_5),
            _avg_pool(self.branch_pool(x)),
        )


class _BlockD(nn.Module):
    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.branch3x3_1 = _Conv(in_channels, 192, 1)
        self.branch3x3_2 = _Conv(192, 320, 3, stride=2)
        self.branch7x7x3_1 = _Conv(in_channels, 192, 1)
        self.branch7x7x3_2 = _Conv(192, 192, (1, 7))
        self.branch7x7x3_3 = _Conv(192, 192, (7, 1))
        self.branch7x7x3_4 = _Conv(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return _join(
            _chain(x, self.branch3x3_1, self.branch3x3_2),
            _chain(x, self.branch7x7x3_1, self.branch7x7x3_2, self.branch7x7x3_3, self.branch7x7x3_4),
            F.max_pool2d(x, kernel_size=3, stride=2),
        )


class _BlockE(nn.Module):
    def __init__(self, in_channels: int, *, max_pool: bool) -> None:
        super().__init__()
        self.branch1x1 = _Conv(in_channels, 320, 1)
        self.branch3x3_1 = _Conv(in_channels, 384, 1)
        self.branch3x3_2a = _Conv(384, 384, (1, 3))
        self.branch3x3_2b = _Conv(384, 384, (3, 1))
        self.branch3x3dbl_1 = _Conv(in_channels, 448, 1)
        self.branch3x3dbl_2 = _Conv(448, 384, 3)
        self.branch3x3dbl_3a = _Conv(384, 384, (1, 3))
        self.branch3x3dbl_3b = _Conv(384, 384, (3, 1))
        self.branch_pool = _Conv(in_channels, 192, 1)
        self.max_pool = max_pool

    def forward(self, x: Tensor) -> Tensor:
        single = self.branch3x3_1(x).relu_()
        double = _chain(x, self.branch3x3dbl_1, self.branch3x3dbl_2).relu_()
        if self.max_pool:  # does not commute with the convolution
            pooled = self.branch_pool(F.max_pool2d(x, kernel_size=3, stride=1, padding=1))
        else:
            pooled = _avg_pool(self.branch_pool(x))
        return _join(
            self.branch1x1(x),
            self.branch3x3_2a(single),
            self.branch3x3_2b(single),
            self.branch3x3dbl_3a(double),
            self.branch3x3dbl_3b(double),
            pooled,
        )


class InceptionFeatures(nn.Module):
    """Frozen: no parameter takes a gradient, and no layer differs between training and evaluation.

    Made by `build_inception`. Equal to torch-fidelity's "inception-v3-compat", layer 2048, but for rounding.
    """

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = nn.Conv2d(3, 32, 3, stride=2)  # names of this and all below as in the weights file
        self.Conv2d_2a_3x3 = nn.Conv2d(32, 32, 3)
        self.Conv2d_2b_3x3 = nn.Conv2d(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = nn.Conv2d(64, 80, 1)
        self.Conv2d_4a_3x3 = nn.Conv2d(80, 192, 3)
        self.Mixed_5b = _BlockA(192, pool_features=32)
        self.Mixed_5c = _BlockA(256, pool_features=64)
        self.Mixed_5d = _BlockA(288, pool_features=64)
        self.Mixed_6a = _BlockB(288)
        self.Mixed_6b = _BlockC(768, inner=128)
        self.Mixed_6c = _BlockC(768, inner=160)
        self.Mixed_6d = _BlockC(768, inner=160)
        self.Mixed_6e = _BlockC(768, inner=192)
        self.Mixed_7a = _BlockD(768)
        self.Mixed_7b = _BlockE(1280, max_pool=False)
        self.Mixed_7c = _BlockE(2048, max_pool=True)
        self.eval()

    @torch.inference_mode()
    def forward(self, images: Tensor) -> Tensor:
        """Features of each image, which depend on no other image.

        images: (B, 3, H, W), uint8, RGB, of any size; resized to 299 x 299 here.
        Returns: (B, 2048), float32, not negative; also under autocast.
        Raises: ValueError for images of another type or shape.
        """
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != 3 or 0 in images.shape:
            raise ValueError(f"expected uint8 images (B, 3, H, W), got {images.dtype} {tuple(images.shape)}")
        per_pass = _CPU_PASS_IMAGES if images.device.type == "cpu" else len(images)
        with torch.autocast(images.device.type, enabled=False):
            return torch.cat([self._features(part) for part in torch.split(images, per_pass)])

    def _features(self, images: Tensor) -> Tensor:
        x = _resize(images).sub_(128).div_(128).contiguous(memory_format=torch.channels_last)
        x = self.Conv2d_1a_3x3(x).relu_()  # (B, 32, 149, 149)
        x = self.Conv2d_2a_3x3(x).relu_()  # (B, 32, 147, 147)
        # ReLU after the maximum, which it does not change, has fewer values to do
        x = F.max_pool2d(self.Conv2d_2b_3x3(x), kernel_size=3, stride=2).relu_()  # (B, 64, 73, 73)
        x = self.Conv2d_3b_1x1(x).relu_()  # (B, 80, 73, 73)
        x = F.max_pool2d(self.Conv2d_4a_3x3(x), kernel_size=3, stride=2).relu_()  # (B, 192, 35, 35)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))  # (B, 288, 35, 35)
        x = self.Mixed_6a(x)  # (B, 768, 17, 17)
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(x))))  # (B, 768, 17, 17)
        x = self.Mixed_7a(x)  # (B, 1280, 8, 8)
        x = self.Mixed_7c(self.Mixed_7b(x))  # (B, 2048, 8, 8)
        features: Tensor = x.mean(dim=(2, 3))
        return features


def _folded(weights: Mapping[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution that does its batch norm as well; computed in float64."""
    norm = {part: weights[f"{name}.bn.{part}"].double() for part in ("bias", "running_mean", "running_var")}
    scale = torch.rsqrt(norm["running_var"] + _BN_EPS)
    if f"{name}.bn.weight" in weights:  # TensorFlow's network has none; the published file holds ones
        scale = scale * weights[f"{name}.bn.weight"].double()
    weight = weights[f"{name}.conv.weight"].double() * scale[:, None, None, None]
    bias = norm["bias"] - norm["running_mean"] * scale
    return weight.float(), bias.float()


def find_inception_weights(
    weights_path: str | Path | None = None, *, option: str = "weights_path", without: str = ""
) -> Path:
    """The file that `build_inception` would read, where it is on this machine; for checks that must not download.

    Raises: MissingWeightsError as `build_inception`.
    """
    return find_weights("inception", weights_path, option=option, without=without, allow_download=False)


def build_inception(
    weights_path: str | Path | None = None, *, option: str = "weights_path", without: str = ""
) -> InceptionFeatures:
    """Inception of 2015-12-05 on the CPU, in float32.

    weights_path: a file or a folder that holds it; None: the usual places, see `find_weights`.
    option: what the user calls `weights_path`; without: how the user does without it. Both for the message.
    Raises: MissingWeightsError, CheckpointError for the weights.
    """
    with torch.device("meta"):  # random weights, drawn to be replaced, are time lost
        network = InceptionFeatures()
    convs = {name: module for name, module in network.named_modules() if isinstance(module, nn.Conv2d)}
    shapes, scales = {}, {}
    for name, conv in convs.items():
        shapes[f"{name}.conv.weight"] = conv.weight.shape
        vector = torch.Size([conv.out_channels])
        shapes |= {f"{name}.bn.{part}": vector for part in ("bias", "running_mean", "running_var")}
        scales[f"{name}.bn.weight"] = vector
    path = find_weights("inception", weights_path, option=option, without=without)
    weights = load_weights(path, shapes, optional=scales)
    state: dict[str, Tensor] = {}
    for name in convs:
        state[f"{name}.weight"], state[f"{name}.bias"] = _folded(weights, name)
    network.load_state_dict(state, strict=True, assign=True)
    network.requires_grad_(False).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network
