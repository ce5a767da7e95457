"""The precision audit: how large the numbers inside an autoencoder become, and which number formats can hold them.

One pass in float32 measures every output of a layer that goes to memory; a second one on small images really computes
in each format. Sums inside a convolution or a matrix product are left out: CPUs and GPUs form them in float32. So are
activation functions written as plain calls: SiLU, ReLU, GELU and Mish never give more than their input, which the
norm before them has shown.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sdvae.data.images import image_to_x
from sdvae.data.transforms import resize_and_crop
from sdvae.errors import CheckpointError, ConfigError
from sdvae.evaluation.metrics import IMAGE_METRICS
from sdvae.evaluation.stress import Pixels
from sdvae.evaluation.subject import Subject, round_to_8_bits
from sdvae.model.device import exact_float32

__all__ = [
    "AT_RISK_BITS",
    "LIMITS",
    "PRECISE_DB",
    "Audit",
    "LayerPeak",
    "NormInput",
    "Probe",
    "Verdict",
    "audit",
    "headroom_bits",
    "probe",
    "repair_of",
]

LIMITS = {name: torch.finfo(getattr(torch, name)).max for name in ("float32", "bfloat16", "float16")}
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
AT_RISK_BITS = 1.0  # with less than a factor of two to the limit, another image may well overflow
PRECISE_DB = 40.0  # PSNR against float32: above it a rounded pixel is off by 2.6 levels at most, as a root mean square
PERCENTILE = 99.99

_MANTISSA_BITS = 5  # of a magnitude's histogram: bins of 1/32 of an octave's lower end, 3.1 % at most
_DROPPED_BITS = 23 - _MANTISSA_BITS
_BINS = 2 ** (8 + _MANTISSA_BITS)
_LOGITS_AT_ONCE = 2**24  # values

Level = Literal["safe", "at risk", "imprecise", "overflows"]


@dataclass(frozen=True, kw_only=True)
class LayerPeak:
    """Magnitudes of a layer's output over all images, in float32."""

    name: str
    kind: str  # conv, linear, norm, activation, sum (of a residual block), other
    peak: float  # largest |value|
    percentile: float  # 99.99 % of the values are at most so large; at most 3.1 % above the exact number

    def to_json(self) -> dict[str, Any]:
        bits = {SHORT[name]: headroom_bits(self.peak, name) for name in LIMITS}
        return {
            "name": self.name,
            "kind": self.kind,
            "peak": self.peak,
            "p99_99": self.percentile,
            "headroom_bits": bits,
        }


@dataclass(frozen=True, kw_only=True)
class NormInput:
    """What a group norm divides by, before its epsilon is added."""

    name: str
    eps: float
    min_variance: float  # smallest variance of a group of an image

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "eps": self.eps, "min_variance": self.min_variance}


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Small images, really computed in a number format, against float32."""

    dtype: str
    size_px: int
    num_images: int
    error: str = ""  # why this device cannot compute in this format; then the rest says nothing
    not_finite: tuple[str, ...] = ()  # the first layer with infinity or NaN, of the encoder and of the decoder
    z_error: float | None = None  # root mean square of the difference of z, as a share of that of z
    max_difference: float | None = None  # of recon, [-1, 1], the whole way through z
    psnr_against_fp32: float | None = None  # dB, of 8-bit pixels, mean over images, at most 100

    @property
    def finite(self) -> bool:
        return not self.not_finite

    def to_json(self) -> dict[str, Any]:
        if self.error:
            return {"dtype": self.dtype, "error": self.error}
        return {
            "dtype": self.dtype,
            "size_px": self.size_px,
            "num_images": self.num_images,
            "finite": self.finite,
            "first_not_finite": list(self.not_finite),
            "z_error": self.z_error,
            "max_difference": self.max_difference,
            "psnr_against_fp32": self.psnr_against_fp32,
        }


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether an autoencoder can be used in a number format, in words."""

    dtype: str
    level: Level
    headroom_bits: float  # log2(limit / largest magnitude); below 0 it overflows
    layer: str  # the first that overflows, else the one with the least headroom
    sentence: str

    def to_json(self) -> dict[str, Any]:
        return {
            "dtype": self.dtype,
            "level": self.level,
            "headroom_bits": self.headroom_bits,
            "layer": self.layer,
            "sentence": self.sentence,
        }


@dataclass(frozen=True, kw_only=True)
class Audit:
    """Result of `audit`."""

    vae: str
    class_name: str
    digest: str
    device: str
    num_images: int
    layers: tuple[LayerPeak, ...]  # in order of execution
    norms: tuple[NormInput, ...]
    logits: Mapping[str, float]  # attention layer -> largest |q k| / sqrt(d), before the softmax
    probes: tuple[Probe, ...]
    force_upcast: bool | None  # as configured; None: the class has no such field

    def tightest(self, count: int) -> list[LayerPeak]:
        """The layers with the largest magnitudes, the largest first."""
        return sorted(self.layers, key=lambda layer: -layer.peak)[:count]

    def verdict(self, dtype: str) -> Verdict:
        """dtype: float32, bfloat16 or float16."""
        probe = next((each for each in self.probes if each.dtype == dtype), None)
        return _verdict(self, dtype, probe)

    @property
    def verdicts(self) -> list[Verdict]:
        return [self.verdict(dtype) for dtype in LIMITS]

    @property
    def hazards(self) -> list[str]:
        """What the outputs of layers do not show, one sentence each."""
        limit = LIMITS["float16"]
        return [
            f"{name}: attention logits reach {peak:.3g}, beyond fp16's {limit:g}: fused attention keeps them in fp32, "
            "but kernels that store them give NaN"
            for name, peak in self.logits.items()
            if peak > limit
        ]

    @property
    def upcast(self) -> str | None:
        """Whether `force_upcast` of the configuration fits the verdict; None where there is nothing to say."""
        level = self.verdict("float16").level
        if self.force_upcast and level == "safe":
            return (
                "force_upcast is true, though fp16 is safe: pipelines spend time and memory on fp32 without need; "
                "set it to false in config.json"
            )
        if self.force_upcast is False and level in ("overflows", "at risk"):
            return f"force_upcast is false, but fp16 {level}: pipelines in fp16 give black images; set it to true"
        return None

    def to_json(self) -> dict[str, Any]:
        return {
            "vae": self.vae,
            "class_name": self.class_name,
            "digest": self.digest,
            "device": self.device,
            "num_images": self.num_images,
            "limits": {SHORT[name]: limit for name, limit in LIMITS.items()},
            "verdicts": [verdict.to_json() for verdict in self.verdicts],
            "force_upcast": self.force_upcast,
            "upcast": self.upcast,
            "hazards": self.hazards,
            "probes": [each.to_json() for each in self.probes],
            "attention_logits": dict(self.logits),
            "norms": [norm.to_json() for norm in self.norms],
            "layers": [layer.to_json() for layer in self.layers],
        }


def headroom_bits(peak: float, dtype: str) -> float:
    """How often a magnitude may double before `dtype` overflows; below 0 where it does already."""
    return math.log2(LIMITS[dtype]) - math.log2(max(peak, torch.finfo(torch.float32).tiny))


def repair_of(name: str) -> Literal["stream", "block", None]:
    """Which power of two in the weights of an AutoencoderKL makes this layer's output smaller, function unchanged.

    "stream": the one of its whole network; "block": one of its residual block or attention; None: neither, since it is
    normalised already, or is what the network takes or gives.
    """
    part, *path = name.split(".")
    if part not in ("encoder", "decoder") or not path or path[0] in ("conv_out", "conv_norm_out", "conv_act"):
        return None
    if path[-1] in ("conv1", "to_q", "to_k", "to_v"):
        return "block"
    return None if path[-1] in ("norm1", "norm2", "nonlinearity", "group_norm") else "stream"


@torch.inference_mode()
def audit(
    subject: Subject,
    images: Iterable[Pixels],
    *,
    dtypes: Sequence[str] = ("bfloat16", "float16"),
    probe_size_px: int = 64,
    probe_images: int = 2,
) -> Audit:
    """Measure an autoencoder on images, one by one; memory does not depend on their number.

    subject: in float32. images: (H, W, 3), uint8, of any sizes. dtypes: computed in on the first `probe_images` of them
    as central squares of `probe_size_px` px.
    Raises: ConfigError without an image; CheckpointError where float32 itself gives infinity or NaN.
    """
    if subject.dtype != torch.float32:
        raise ConfigError(f"the audit measures in float32; the model computes in {subject.dtype}")
    recorder = _Recorder()
    small: list[Pixels] = []
    count = 0
    with exact_float32(), _watch(subject.model, recorder):
        for count, pixels in enumerate(images, 1):
            _reconstruct(subject, image_to_x(pixels)[None])
            if recorder.not_finite:
                raise CheckpointError(
                    f"{subject.ref}: in float32, {recorder.not_finite} gives values that are not finite (image "
                    f"{count}): the weights are beyond repair, in any number format"
                )
            if len(small) < probe_images:
                small.append(resize_and_crop(pixels, probe_size_px, "center"))
    if not count:
        raise ConfigError("an audit needs an image; there is none")
    config: Mapping[str, Any] = subject.model.config  # type: ignore[assignment]
    upcast = config.get("force_upcast")
    return Audit(
        vae=subject.ref,
        class_name=subject.class_name,
        digest=subject.digest,
        device=str(subject.device),
        num_images=count,
        layers=tuple(recorder.layers()),
        norms=tuple(recorder.norms.values()),
        logits=recorder.logits,
        probes=tuple(probe(subject, small, dtype) for dtype in dtypes),
        force_upcast=None if upcast is None else bool(upcast),
    )


@torch.inference_mode()
def probe(subject: Subject, images: Sequence[Pixels], dtype: str) -> Probe:
    """Encode and decode in a number format, and the same in float32. Holds a second copy of the weights.

    The encoder's z goes into the decoder, unless it is not finite: then float32's does, so that both are tried.
    """
    size, compute = images[0].shape[0], IMAGE_METRICS["psnr"].compute
    assert compute is not None  # it needs no network
    cast = subject.in_dtype(getattr(torch, dtype))
    about: dict[str, Any] = {"dtype": dtype, "size_px": size, "num_images": len(images)}
    bad: dict[str, str] = {}  # encoder and decoder -> first layer
    squares, power, difference, psnr = 0.0, 0.0, 0.0, 0.0
    for pixels in images:
        x = image_to_x(pixels)[None].to(subject.device)
        with exact_float32():
            exact_z = subject.encode(x).z
            exact = subject.decode(exact_z, *x.shape[-2:])
        try:
            z = _tried(cast, bad, "encoder", lambda x=x: cast.encode(x).z)  # type: ignore[misc]
            source = z if z.isfinite().all() else exact_z
            recon = _tried(cast, bad, "decoder", lambda z=source, x=x: cast.decode(z, *x.shape[-2:]))  # type: ignore[misc]
        except RuntimeError as error:  # float32 has just done the same, so it is this format that has no kernel
            return Probe(**about, error=str(error).splitlines()[0])
        squares += float((z - exact_z).double().square().sum())
        power += float(exact_z.double().square().sum())
        difference = max(difference, float((recon - exact).abs().max()))
        psnr += float(compute(round_to_8_bits(recon), round_to_8_bits(exact)))
    return Probe(
        **about,
        not_finite=tuple(bad.values()),
        z_error=None if "encoder" in bad else math.sqrt(squares / power) if power else 0.0,
        max_difference=None if "decoder" in bad else difference,
        psnr_against_fp32=None if "decoder" in bad else psnr / len(images),
    )


def _tried(subject: Subject, bad: dict[str, str], part: str, function: Callable[[], Tensor]) -> Tensor:
    """The function's result; the first layer whose output is not finite is noted under `part`."""

    def look(name: str, module: nn.Module, x: Tensor, out: Tensor) -> None:
        if part not in bad and not out.isfinite().all():
            bad[part] = name

    with _watch(subject.model, look):
        result = function()
    if part not in bad and not result.isfinite().all():
        bad[part] = f"{part}'s output"
    return result


def _reconstruct(subject: Subject, x: Tensor) -> Tensor:
    return subject.decode(subject.encode(x).z, *x.shape[-2:])


Look = Callable[[str, nn.Module, Tensor, Tensor], None]  # name, module, its first input, its output


@contextmanager
def _watch(model: nn.Module, look: Look) -> Iterator[None]:
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


class _Recorder:
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


def _verdict(audit: Audit, dtype: str, probe: Probe | None) -> Verdict:
    tightest = audit.tightest(1)[0]
    bits = headroom_bits(tightest.peak, dtype)
    beyond = [layer for layer in audit.layers if layer.peak > LIMITS[dtype]]
    tried = probe is not None and not probe.error
    psnr = probe.psnr_against_fp32 if probe is not None else None
    shown = beyond[0] if beyond else tightest
    level: Level = "safe"
    if beyond:
        level = "overflows"
        words = f"overflows at {shown.name} (peak {shown.peak:.3g}, limit {LIMITS[dtype]:.5g}): images come out black"
        words += _way_out(audit, dtype, beyond)
    elif probe is not None and probe.not_finite:
        level = "overflows"
        words = f"gives infinity or NaN at {probe.not_finite[0]}, though no layer's float32 output is beyond its limit"
    elif bits < AT_RISK_BITS:
        level = "at risk"
        words = (
            f"at risk, {bits:.1f} bits of headroom at {shown.name} (peak {shown.peak:.3g}): another image may overflow"
        )
        words += _way_out(audit, dtype, [layer for layer in audit.layers if headroom_bits(layer.peak, dtype) < 1])
    elif psnr is not None and psnr < PRECISE_DB:
        level = "imprecise"
        words = f"holds all values, but is imprecise: {psnr:.1f} dB against float32, expected {PRECISE_DB:g} dB or more"
    else:
        words = f"safe, {bits:.1f} bits of headroom at {shown.name} (peak {shown.peak:.3g})"
        words += f"; {psnr:.1f} dB against float32" if psnr is not None else ""
    if dtype != "float32" and not tried:
        words += f"; not tried: {probe.error if probe else 'no probe'}"
    return Verdict(dtype=dtype, level=level, headroom_bits=bits, layer=shown.name, sentence=f"{SHORT[dtype]}: {words}")


def _way_out(audit: Audit, dtype: str, layers: Sequence[LayerPeak]) -> str:
    if dtype != "float16" or audit.class_name != "AutoencoderKL":
        return ""
    if stuck := [layer.name for layer in layers if repair_of(layer.name) is None]:
        return f"; `sdvae fix-fp16` cannot repair {stuck[0]}: compute in bf16 or fp32"
    return "; `sdvae fix-fp16` can repair this"
