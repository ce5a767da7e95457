"""What the layers of an autoencoder give: peaks, percentiles, what norms divide by, and the logits of attention.

Every output of a layer that goes to memory is seen. Sums inside a convolution or a matrix product are left out: CPUs
and GPUs form them in float32. So are activation functions written as plain calls: SiLU, ReLU, GELU and Mish never give
more than their input, which the norm before them has shown.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sdvae.precision.number_formats import LIMITS, SHORT, headroom_bits

__all__ = ["LayerPeak", "Look", "NormInput", "Recorder", "watch"]

PERCENTILE = 99.99

_MANTISSA_BITS = 5  # of a magnitude's histogram: bins of 1/32 of an octave's lower end, 3.1 % at most
_DROPPED_BITS = 23 - _MANTISSA_BITS
_BINS = 2 ** (8 + _MANTISSA_BITS)
_LOGITS_AT_ONCE = 2**24  # values


@dataclass(frozen=True, kw_only=True)
class LayerPeak:
    """Magnitudes of a layer's output over all images, in float32."""

    name: str
    kind: str  # conv, linear, norm, activation, sum (of a residual block), other
    peak: float  # largest |value|
    percentile: float  # 99.99 % of the values are at most so large; at most 3.1 % above the exact number

    def to_json(self) -> dict[str, Any]:
        bits = {SHORT[name]: headroom_bits(self.peak, name) for name in LIMITS}
        record = {"name": self.name, "kind": self.kind, "peak": self.peak, "p99_99": self.percentile}
        return record | {"headroom_bits": bits}


@dataclass(frozen=True, kw_only=True)
class NormInput:
    """What a group norm divides by, before its epsilon is added."""

    name: str
    eps: float
    min_variance: float  # smallest variance of a group of an image


Look = Callable[[str, nn.Module, Tensor, Tensor], None]  # name, module, its first input, its output


@contextmanager
def watch(model: nn.Module, look: Look) -> Iterator[None]:
    """Within the context, `look` is called for every output of a module that goes to memory, in order of execution.

    A module whose output is that of the last module inside it, as a sequence of blocks is, does not count again.
    """
    last: list[Tensor] = []

    def hook_of(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], out: Any) -> None:
            if not isinstance(out, Tensor) or not out.is_floating_point() or (last and last[0] is out):
                return
            last[:] = [out]
            x = inputs[0] if inputs and isinstance(inputs[0], Tensor) else out
            look(name, module, x, out)

        return hook

    modules = [(name, module) for name, module in model.named_modules() if name and not _passes_on(module)]
    handles = [module.register_forward_hook(hook_of(name)) for name, module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _passes_on(module: nn.Module) -> bool:
    return isinstance(module, (nn.Identity, nn.Dropout))


class Recorder:
    """Peaks, histograms, variances and logits of all layers; a `Look`."""

    def __init__(self) -> None:
        self.kinds: dict[str, str] = {}
        self.peaks: dict[str, float] = {}
        self.counts: dict[str, Tensor] = {}
        self.norms: dict[str, NormInput] = {}
        self.logits: dict[str, float] = {}
        self.not_finite = ""
        self._queries: dict[str, Tensor] = {}

    def __call__(self, name: str, module: nn.Module, x: Tensor, out: Tensor) -> None:
        counts = _histogram(out)
        peak = float(out.abs().max())
        if not math.isfinite(peak) and not self.not_finite:
            self.not_finite = name
        if name in self.peaks:
            self.peaks[name] = max(self.peaks[name], peak)
            self.counts[name] += counts
        else:
            self.kinds[name], self.peaks[name], self.counts[name] = _kind(module), peak, counts
        if isinstance(module, nn.GroupNorm):
            before = self.norms[name].min_variance if name in self.norms else math.inf
            groups = x.reshape(x.shape[0], module.num_groups, -1)
            smallest = float(groups.var(dim=2, correction=0).min())
            self.norms[name] = NormInput(name=name, eps=module.eps, min_variance=min(before, smallest))
        if isinstance(module, nn.Linear):
            self._look_at_attention(name, out)

    def _look_at_attention(self, name: str, out: Tensor) -> None:
        owner, _, leaf = name.rpartition(".")
        if leaf == "to_q":
            self._queries[owner] = out
        elif leaf == "to_k" and owner in self._queries:
            self.logits[owner] = max(self.logits.get(owner, 0.0), _largest_logit(self._queries.pop(owner), out))

    def layers(self) -> Iterator[LayerPeak]:
        for name, peak in self.peaks.items():
            percentile = min(_percentile(self.counts[name]), peak)
            yield LayerPeak(name=name, kind=self.kinds[name], peak=peak, percentile=percentile)


def _kind(module: nn.Module) -> str:
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, nn.modules.conv._ConvNd):
        return "conv"
    if "Norm" in type(module).__name__:
        return "norm"
    if type(module).__module__ == nn.SiLU.__module__:
        return "activation"
    return "sum" if next(module.children(), None) is not None else "other"


def _histogram(out: Tensor) -> Tensor:
    """Counts of magnitudes by exponent and first bits of the mantissa, which are the first bits of a float32.

    Returns: (_BINS,), int64; linear bins, 32 in every octave.
    """
    bits = out.float().abs().flatten().view(torch.int32) >> _DROPPED_BITS
    return torch.bincount(bits, minlength=_BINS)


def _percentile(counts: Tensor) -> float:
    """The upper edge of the bin in which PERCENTILE % of all values are reached."""
    reached = counts.cumsum(0)
    wanted = math.ceil(float(reached[-1]) * PERCENTILE / 100)
    place = int(torch.searchsorted(reached, torch.tensor(wanted, device=reached.device)))
    edge = torch.tensor([(place + 1) << _DROPPED_BITS], dtype=torch.int32).view(torch.float32)
    return float(edge)


def _largest_logit(q: Tensor, k: Tensor) -> float:
    """Largest |q k| / sqrt(d) of one head, which is what autoencoders of images have. q, k: (B, N, d)."""
    rows = max(1, _LOGITS_AT_ONCE // k.shape[1])
    keys = k.float().transpose(1, 2)
    starts = range(0, q.shape[1], rows)
    largest = max(float((q[:, start : start + rows].float() @ keys).abs().max()) for start in starts)
    return largest / math.sqrt(q.shape[-1])
