"""The precision audit: how large the numbers inside an autoencoder become, and which number formats can hold them.

One pass in float32 measures the outputs of all layers (`activations.py`), a second one on small images really computes
in each format (`probe.py`), and both together give a verdict (`verdict.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from sdvae.checkpoints.opened import OpenedVae
from sdvae.data.images import Pixels, image_to_x
from sdvae.data.transforms import resize_and_crop
from sdvae.errors import CheckpointError, ConfigError
from sdvae.model.device import exact_float32
from sdvae.precision.activations import LayerPeak, NormInput, Recorder, watch
from sdvae.precision.number_formats import LIMITS, SHORT
from sdvae.precision.probe import Probe, probe
from sdvae.precision.verdict import Verdict, verdict_of

__all__ = ["Audit", "audit"]


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
        return verdict_of(self.layers, dtype, probe, self.class_name)

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
            "verdicts": [asdict(verdict) for verdict in self.verdicts],
            "force_upcast": self.force_upcast,
            "upcast": self.upcast,
            "hazards": self.hazards,
            "probes": [each.to_json() for each in self.probes],
            "attention_logits": dict(self.logits),
            "norms": [asdict(norm) for norm in self.norms],
            "layers": [layer.to_json() for layer in self.layers],
        }


@torch.inference_mode()
def audit(
    subject: OpenedVae,
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
    recorder = Recorder()
    small: list[Pixels] = []
    count = 0
    with exact_float32(), watch(subject.model, recorder):
        for count, pixels in enumerate(images, 1):
            x = image_to_x(pixels)[None]
            subject.decode(subject.encode(x).z, *x.shape[-2:])
            if recorder.not_finite:
                raise CheckpointError(
                    f"{subject.name}: in float32, {recorder.not_finite} gives values that are not finite (image "
                    f"{count}): the weights are beyond repair, in any number format"
                )
            if len(small) < probe_images:
                small.append(resize_and_crop(pixels, probe_size_px, "center"))
    if not count:
        raise ConfigError("an audit needs an image; there is none")
    config: Mapping[str, Any] = subject.model.config
    upcast = config.get("force_upcast")
    return Audit(
        vae=subject.name,
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
