"""Makes an autoencoder that overflows in float16 fit into it, by powers of two that its norms cancel: no training.

`choose_exponents` reads them off an audit, `rescale_streams` applies them, and `fix_fp16` proves the result:
the function in float32 stays the same, and float16 is finite and near it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdvae.checkpoints.fit import build, first_not_finite, full_config, load_weights
from sdvae.checkpoints.notes import ASSUMED_NOTE
from sdvae.checkpoints.opened import OpenedVae, open_any_vae
from sdvae.checkpoints.read import Checkpoint, public_name, read_checkpoint
from sdvae.checkpoints.rewrite.fp16 import MAX_EXPONENT, StreamScale, epsilon_effect, fp16_underflow, rescale_streams
from sdvae.checkpoints.store import keep_card, why_no_vae_folder
from sdvae.checkpoints.tensor_files import differing
from sdvae.checkpoints.write import write_diffusers_folder
from sdvae.data.images import Pixels, image_to_x
from sdvae.errors import CheckpointError
from sdvae.files import new_folder
from sdvae.model.device import choose_device, exact_float32
from sdvae.precision.audit import Audit, audit
from sdvae.precision.number_formats import LIMITS, headroom_bits
from sdvae.precision.options import FixOptions
from sdvae.precision.verdict import repair_of

__all__ = ["MAX_CHANGE", "Fix", "choose_exponents", "fix_fp16"]

MAX_CHANGE = 1e-4  # of the function in float32, as a share of the output's range
_FP16 = "float16"


@dataclass(frozen=True, kw_only=True, eq=False)
class Fix:
    """Result of `fix_fp16`: the VAE rewritten, and what was measured before and after."""

    tensors: dict[str, Tensor]  # under diffusers' names, in the type in which they are to be stored
    fields: dict[str, Any]
    notes: dict[str, Any]
    scale: StreamScale
    headroom_bits: float
    before: Audit
    after: Audit
    encoder_change: float  # largest difference of moments in float32, as a share of their range
    decoder_change: float  # of recon, from the same z
    epsilon_norm: str  # the norm whose epsilon the rewrite weighs most; "" where nothing changed
    epsilon_effect: float  # relative change of its output where its input varies least
    underflow_before: float  # share of the weights that float16 holds with fewer bits, or as 0
    underflow_after: float

    @property
    def needed(self) -> bool:
        """Whether there was anything to fix."""
        return bool(self.scale.changes)

    def is_in(self, folder: Path) -> bool:
        """Whether a folder is what `save` writes. Raises: CheckpointError if there is no VAE in it."""
        there = read_checkpoint(folder)
        is_same = there.notes == self.notes and full_config(there.fields) == full_config(self.fields)
        return is_same and not differing(there.tensors, self.tensors)

    def save(self, folder: Path, *, overwrite: bool) -> None:
        """Write the VAE as a diffusers folder, and read it back before it takes its place.

        Raises: OutputExistsError if something is in the way; CheckpointError if writing fails.
        """
        with new_folder(folder, overwrite=overwrite, is_ours=why_no_vae_folder) as fresh:
            write_diffusers_folder(fresh, self.tensors, self.fields, self.notes)
            if not self.is_in(fresh):
                raise CheckpointError(
                    f"{folder}: read back with other values than were written: the disk may be damaged"
                )
            keep_card(folder, fresh)

    def to_json(self) -> dict[str, Any]:
        return {
            "needed": self.needed,
            "headroom_bits": self.headroom_bits,
            "exponents": {
                "encoder": self.scale.encoder,
                "decoder": self.scale.decoder,
                "blocks": dict(self.scale.blocks),
            },
            "before": _summary(self.before),
            "after": _summary(self.after),
            "change": {"encoder": self.encoder_change, "decoder": self.decoder_change, "limit": MAX_CHANGE},
            "epsilon": {"norm": self.epsilon_norm or None, "effect": self.epsilon_effect},
            "underflow": {"before": self.underflow_before, "after": self.underflow_after},
            "force_upcast": self.fields.get("force_upcast"),
        }


def choose_exponents(found: Audit, headroom_bits: float) -> StreamScale:
    """The smallest powers of two that leave every layer so many bits below float16's limit.

    Raises: CheckpointError for values beyond the limit that no power of two can make smaller.
    """
    _refuse_what_stays(found)
    exponents: dict[str, int] = {"encoder": 0, "decoder": 0}
    queries_and_keys: dict[str, dict[str, float]] = {}
    for layer in found.layers:
        owner, _, leaf = layer.name.rpartition(".")
        repair = repair_of(layer.name)
        if leaf in ("to_q", "to_k"):
            queries_and_keys.setdefault(owner, {})[leaf] = layer.peak
        elif repair is not None:
            target = layer.name.partition(".")[0] if repair == "stream" else owner
            exponents[target] = min(exponents.get(target, 0), _exponent(layer.peak, headroom_bits))
    for owner, peaks in queries_and_keys.items():
        exponents[f"{owner}.to_q"] = _query_exponent(owner, peaks["to_q"], peaks["to_k"], headroom_bits)
    blocks = {name: exponent for name, exponent in exponents.items() if "." in name and exponent}
    if too_far := [name for name, exponent in exponents.items() if abs(exponent) > MAX_EXPONENT]:
        raise CheckpointError(
            f"{found.vae}: {too_far[0]} would have to be scaled by 2^{exponents[too_far[0]]}; the weights are damaged"
        )
    return StreamScale(encoder=exponents["encoder"], decoder=exponents["decoder"], blocks=blocks)


def fix_fp16(
    checkpoint: Checkpoint,
    images: Sequence[Pixels],
    options: FixOptions | None = None,
    *,
    name: str,
) -> Fix:
    """Rewrite a VAE so that it fits into float16, and measure what that changed.

    images: (H, W, 3), uint8; what is measured holds for images like these. name: of the VAE, for messages.
    Where nothing is to fix, the weights come back as they are, but for the dtype that is asked for.
    Raises: CheckpointError where float16 cannot be reached, or only by changing the function; it says what is in the
        way. ConfigError for a device that is missing or no image.
    """
    options = options or FixOptions()
    device, headroom_bits, probe_size_px = choose_device(options.device), options.headroom_bits, options.probe_size_px
    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    subject = _subject(checkpoint.tensors, checkpoint.fields, name, device)
    before = audit(subject, images, dtypes=(_FP16,), probe_size_px=probe_size_px)
    scale = choose_exponents(before, headroom_bits)
    if not scale.changes and dtype is None:
        return _fix(checkpoint, dict(checkpoint.tensors), scale, headroom_bits, before, before, (0.0, 0.0))
    # widened first: what is too small for half precision is none of float32's problems
    source = {n: t.float() if dtype == torch.float32 else t for n, t in checkpoint.tensors.items()}
    rewritten = rescale_streams(source, checkpoint.fields, scale)
    changed = _subject(rewritten, checkpoint.fields, name, device)
    changes = _changes(subject, changed, images)
    if max(changes) > MAX_CHANGE:
        part = "encoder" if changes[0] > changes[1] else "decoder"
        norm, effect = _largest_epsilon_effect(before, scale)
        raise CheckpointError(
            f"{name}: the rewrite would change the {part} by {max(changes):.2g} of its output's range, more than "
            f"{MAX_CHANGE:g}: the input of {norm} varies so little that its epsilon changes it by {effect:.2g}. Try "
            "less --headroom, or compute in bf16 or fp32"
        )
    tensors = {n: t if dtype is None else t.to(dtype) for n, t in rewritten.items()}
    if bad := first_not_finite(tensors):
        raise CheckpointError(f"{name}: `{bad}` has values that {dtype} does not hold; store float32 or bfloat16")
    if dtype is not None and dtype != torch.float32:
        changed = _subject(tensors, checkpoint.fields, name, device)
    after = audit(changed, images, dtypes=(_FP16,), probe_size_px=probe_size_px)
    return _fix(checkpoint, tensors, scale, headroom_bits, before, after, changes)


def _fix(
    checkpoint: Checkpoint,
    tensors: dict[str, Tensor],
    scale: StreamScale,
    headroom_bits: float,
    before: Audit,
    after: Audit,
    changes: tuple[float, float],
) -> Fix:
    """The result. Raises: CheckpointError where float16 is still out of reach."""
    verdict = after.verdict(_FP16)
    if verdict.level not in ("safe", "at risk"):
        cause = "not repaired by powers of two" if scale.changes else "no power of two is of use"
        raise CheckpointError(f"{before.vae}: {cause}; {verdict.sentence}")
    norm, effect = _largest_epsilon_effect(before, scale)
    upcast = {"force_upcast": False} if verdict.level == "safe" else {}
    return Fix(
        tensors=tensors,
        fields=dict(checkpoint.fields) | upcast,
        notes=_notes(checkpoint, scale, public_name(before.vae), before.digest),
        scale=scale,
        headroom_bits=headroom_bits,
        before=before,
        after=after,
        encoder_change=changes[0],
        decoder_change=changes[1],
        epsilon_norm=norm,
        epsilon_effect=effect,
        underflow_before=_underflow(checkpoint.tensors),
        underflow_after=_underflow(tensors),
    )


def _refuse_what_stays(found: Audit) -> None:
    limit = LIMITS[_FP16]
    stuck = [layer for layer in found.layers if layer.peak > limit and repair_of(layer.name) is None]
    if stuck:
        raise CheckpointError(
            f"{found.vae}: {stuck[0].name} reaches {stuck[0].peak:.3g}, beyond fp16's {limit:g}, and no norm comes "
            "after it that would cancel a smaller scale; compute in bf16 or fp32"
        )
    for name, peak in found.logits.items():
        if peak > limit:
            raise CheckpointError(
                f"{found.vae}: attention logits of {name} reach {peak:.3g}, beyond fp16's {limit:g}; they decide the "
                "softmax, so nothing cancels a smaller scale; compute in bf16 or fp32"
            )


def _exponent(peak: float, wanted_bits: float) -> int:
    """The largest power of two, at most 0, that leaves so many bits of headroom."""
    return min(0, math.floor(headroom_bits(peak, _FP16) - wanted_bits))


def _query_exponent(owner: str, queries: float, keys: float, wanted_bits: float) -> int:
    """By which to scale queries, and keys the other way round. Raises: CheckpointError where both are too large."""
    down, up = _exponent(queries, wanted_bits), -_exponent(keys, wanted_bits)
    if not down or not up:
        exponent = down or up
        if max(queries * 2.0**exponent, keys * 2.0**-exponent) <= LIMITS[_FP16]:
            return exponent
    raise CheckpointError(
        f"{owner}: queries reach {queries:.3g} and keys {keys:.3g}; made equal they are still too large for fp16. "
        "Compute in bf16 or fp32"
    )


def _subject(tensors: Mapping[str, Tensor], fields: Mapping[str, Any], name: str, device: torch.device) -> OpenedVae:
    """The VAE in float32, with weights of its own."""
    vae = load_weights(build(fields, name), tensors, device=device)
    return replace(open_any_vae(vae, device, torch.float32), name=name)


@torch.inference_mode()
def _changes(first: OpenedVae, second: OpenedVae, images: Sequence[Pixels]) -> tuple[float, float]:
    """Largest differences of moments, and of images decoded from the same z, as shares of their ranges, in float32."""
    moments, recons = _Difference(), _Difference()
    with exact_float32():
        for pixels in images:
            x = image_to_x(pixels)[None]
            theirs, ours = first.encode(x), second.encode(x)
            assert theirs.posterior is not None and ours.posterior is not None  # an AutoencoderKL has one
            moments.add(theirs.posterior.moments, ours.posterior.moments)
            size = x.shape[-2:]
            recons.add(first.decode(theirs.z, *size), second.decode(theirs.z, *size))
    return moments.relative, recons.relative


class _Difference:
    def __init__(self) -> None:
        self.largest, self.low, self.high = 0.0, math.inf, -math.inf

    def add(self, reference: Tensor, other: Tensor) -> None:
        difference = float((other - reference).abs().max())
        self.largest = max(self.largest, difference) if difference == difference else math.inf
        self.low, self.high = min(self.low, float(reference.min())), max(self.high, float(reference.max()))

    @property
    def relative(self) -> float:
        return self.largest / (self.high - self.low) if self.largest else 0.0


def _largest_epsilon_effect(before: Audit, scale: StreamScale) -> tuple[str, float]:
    """The norm whose output changes most through its epsilon, and by how much, for the least varied input seen."""
    streams = {"encoder": scale.encoder, "decoder": scale.decoder}
    worst, largest = "", 0.0
    for norm in before.norms:
        owner, _, leaf = norm.name.rpartition(".")
        exponent = scale.blocks.get(owner, 0) if leaf == "norm2" else streams[norm.name.partition(".")[0]]
        effect = epsilon_effect(norm.min_variance, exponent) if exponent else 0.0
        if effect > largest:
            worst, largest = norm.name, effect
    return worst, largest


def _underflow(tensors: Mapping[str, Tensor]) -> float:
    """Share of all weights that float16 holds as subnormal or as 0."""
    shares = fp16_underflow(tensors)
    count = sum(share * int((tensors[name] != 0).sum()) for name, share in shares.items())
    return count / sum(tensor.numel() for tensor in tensors.values())


def _notes(checkpoint: Checkpoint, scale: StreamScale, name: str, digest: str) -> dict[str, Any]:
    notes = {key: value for key, value in checkpoint.notes.items() if key != "conversion"}
    notes |= {"source": name, "source_digest": digest}
    notes |= {ASSUMED_NOTE: list(checkpoint.assumed)} if checkpoint.assumed else {}
    if not scale.changes:
        return notes
    parts = ", ".join(f"{name} 2^{exponent}" for name, exponent in scale.changes.items())
    return notes | {"rewrites": [*notes.get("rewrites", []), f"fix-fp16: {parts}"]}


def _summary(found: Audit) -> dict[str, Any]:
    return {
        "digest": found.digest,
        "verdict": asdict(found.verdict(_FP16)),
        "peak": found.tightest(1)[0].peak,
        "probe": found.probes[0].to_json(),
    }
