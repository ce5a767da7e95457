"""The swap test: may one autoencoder take the place of another under a diffusion model that is trained already?

Two questions decide. Decoding: the model makes latents of the reference's kind; does the candidate's decoder show them
well? This is all that text-to-image needs. Encoding: image-to-image, inpainting and further training show the model the
candidate's latents; are they those that it knows? Everything is compared as latents, after each autoencoder's own shift
and scale, since a space that differs in these alone is the same space to a diffusion model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sdvae.checkpoints.opened import OpenedVae
from sdvae.data.images import round_to_8_bits
from sdvae.metrics.moments import Moments
from sdvae.metrics.table import IMAGE_METRICS
from sdvae.model.posterior import DiagonalGaussian, Encoding

__all__ = ["SwapTest", "swap_obstacle"]

State = dict[str, NDArray[Any]]
MetricFunction = Callable[[Tensor, Tensor], Tensor]

# Thresholds of the verdict. None is a law; each is where the difference begins to matter.
SAME_LATENTS = 1e-3  # relative rms: float32 on different devices differs by less, any training of an encoder by more
# Relative rms: 1 % of the latents' power. Stable Diffusion's schedule adds as much noise in its first 12 of 1000 steps.
SMALL_DRIFT = 0.1
# Less than the 0.7 dB between the published ft-EMA and ft-MSE decoders on COCO, which users swap as they like.
MAX_DECODE_LOSS_DB = 0.5
RELATED = 0.7  # pooled correlation: half of the variance is shared, so a model keeps most of what it has learned

_PLACES = ((0, 0), (0, 1), (1, 0), (1, 1))  # (encoder, decoder); 0 is the candidate, 1 the reference
_NO_METRICS: Mapping[str, MetricFunction] = MappingProxyType({})


def swap_obstacle(candidate: OpenedVae, reference: OpenedVae) -> str | None:
    """Why no swap test can be made of these two; None if one can."""
    differences = []
    if (ours := candidate.latent_channels) != (theirs := reference.latent_channels):
        differences.append(f"{ours} latent channels against {theirs}")
    if (ours := candidate.spatial_compression_ratio) != (theirs := reference.spatial_compression_ratio):
        differences.append(f"{ours} pixels per latent position along a side against {theirs}")
    if not differences:
        return None
    return (
        f"the latents have different shapes: {' and '.join(differences)}; a diffusion model of one cannot use the other"
    )


class SwapTest:
    """Candidate against reference over a set of images; memory does not grow with the set."""

    def __init__(self, candidate: OpenedVae, reference: OpenedVae) -> None:
        if obstacle := swap_obstacle(candidate, reference):
            raise ValueError(obstacle)
        self._subjects = (candidate, reference)
        self._state: State = {
            "num_images": np.zeros(()),
            "num_not_finite": np.zeros(()),
            **Moments.zeros(2, reference.latent_channels).state("pairs_"),  # of latents of candidate and reference
            "squared_difference": np.zeros(()),
            "kl": np.zeros(()),
            "num_kl": np.zeros(()),
        }  # and for each metric "sum/NAME" (2, 2), encoder by decoder, and "count/NAME"

    def state(self) -> State:
        """All that was measured, as arrays whose size does not depend on the number of images."""
        return dict(self._state)

    def merge(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Take in what another test of the same two measured. The order changes no more than the last digits."""
        a, b = self._state, state
        pairs = Moments.from_state(a, "pairs_") + Moments.from_state(b, "pairs_")
        merged = {name: a.get(name, 0.0) + b.get(name, 0.0) for name in sorted(a.keys() | b.keys())}
        merged |= pairs.state("pairs_")
        self._state = {name: np.asarray(value, dtype=np.float64) for name, value in merged.items()}

    def update(
        self,
        candidate: Encoding,
        reference: Encoding,
        image: Tensor,
        metrics: Mapping[str, MetricFunction] = _NO_METRICS,
    ) -> None:
        """Take in a batch: what both encoders made of it. Images with latents that are not finite are only counted.

        image: (B, 3, H, W), float32 in [0, 1], multiples of 1/255. metrics: (recon, image) -> (B,), measured on all
        four pairs of encoder and decoder; psnr always is.
        """
        finite = (candidate.z.isfinite() & reference.z.isfinite()).flatten(1).all(dim=1).cpu()
        batch = SwapTest(*self._subjects)
        batch._state["num_not_finite"] = np.asarray(float((~finite).sum()))
        if finite.any():
            latents = [
                subject.scale.to_latents(encoding.z.cpu().double())[finite]
                for subject, encoding in zip(self._subjects, (candidate, reference), strict=True)
            ]
            batch._state |= _drift(*latents)
            batch._state |= self._kl(candidate, reference, finite)
            # Metrics know an image that comes again by the tensor itself, so it is copied only where it has to be.
            seen = image if finite.all() else image[finite.to(image.device)]
            batch._state |= self._cross_decode(latents, seen, metrics)
        self.merge(batch._state)

    def _kl(self, candidate: Encoding, reference: Encoding, finite: Tensor) -> State:
        if candidate.posterior is None or reference.posterior is None:
            return {}
        ours, theirs = (
            subject.scale.to_latents_posterior(DiagonalGaussian(posterior.moments.cpu().double()))
            for subject, posterior in zip(self._subjects, (candidate.posterior, reference.posterior), strict=True)
        )
        kl = ours.kl(theirs)[finite]
        kl = kl[kl.isfinite()]
        return {"kl": np.asarray(float(kl.sum())), "num_kl": np.asarray(float(len(kl)))}

    def _cross_decode(self, latents: Sequence[Tensor], image: Tensor, metrics: Mapping[str, MetricFunction]) -> State:
        functions = {"psnr": IMAGE_METRICS["psnr"].build()} | dict(metrics)
        values: dict[str, list[Tensor]] = {name: [] for name in functions}
        for encoder, decoder in _PLACES:
            subject = self._subjects[decoder]
            z = subject.scale.to_z(latents[encoder]).float()
            recon = round_to_8_bits(subject.decode(z, *image.shape[2:]))
            for name, function in functions.items():
                values[name].append(function(recon, image).cpu().double())
        state: State = {}
        for name, columns in values.items():
            table = np.stack([column.numpy() for column in columns])  # (4, B)
            known = np.isfinite(table).all(axis=0)  # so that all four means are over the same images
            state[f"sum/{name}"] = table[:, known].sum(axis=1).reshape(2, 2)
            state[f"count/{name}"] = np.asarray(float(known.sum()))
        return state

    def result(self, candidate_id: str, reference_id: str) -> dict[str, Any]:
        """Verdict, sentence and numbers, as plain values; None where a number does not exist.

        - drift: of latents at the posterior's mode. `latents_rms` is the root mean square of candidate - reference;
          `relative_rms` that over the root mean square of the reference about its channel means. `mean`, `std` and
          `correlation` (Pearson's, of candidate and reference) are per channel. `kl_nats` is the divergence of the
          candidate's posterior from the reference's, summed over channels and positions, mean per image; None where one
          has no posterior.
        - cross_decode: encoder -> decoder -> metric -> mean over images: the one's latents through the other's decoder.
        - verdict, with `decode_loss_db`, the PSNR of the reference alone less that of its latents through the
          candidate's decoder:
          drop-in: the latents are the same (relative_rms up to 0.001, whatever the decoders), or relative_rms is up to
          0.1 and the decode loss up to 0.5 dB; fine-tune: else, where the correlation over all channels together is at
          least 0.7; different: else.
        - skipped: instead of all these, where no image gave finite latents.
        """
        s = self._state
        if not s["num_images"]:
            return {"skipped": f"none of {int(s['num_not_finite'])} images gave finite latents with both"}
        ids = (candidate_id, reference_id)
        pairs = Moments.from_state(s, "pairs_")
        drift = self._describe_drift(pairs, ids)
        psnr = s["sum/psnr"] / s["count/psnr"]
        decode_loss = float(psnr[1, 1] - psnr[1, 0])
        (aa, ab), (_, bb) = pairs.products.sum(axis=0)
        pooled = float(ab / math.sqrt(aa * bb)) if aa > 0 and bb > 0 else 0.0
        verdict = _verdict(drift["relative_rms"], decode_loss, pooled)
        return {
            "verdict": verdict,
            "sentence": _sentence(verdict, drift["relative_rms"], pooled, psnr),
            "num_images": int(s["num_images"]),
            "decode_loss_db": decode_loss,
            "drift": drift,
            "cross_decode": {
                ids[e]: {ids[d]: {name: self._mean(name, e, d) for name in self._metric_names()} for d in (0, 1)}
                for e in (0, 1)
            },
        }

    def _describe_drift(self, pairs: Moments, ids: tuple[str, str]) -> dict[str, Any]:
        s = self._state
        elements = float(pairs.count.sum())
        squares = pairs.products.diagonal(axis1=1, axis2=2)  # (C, 2)
        rms = math.sqrt(s["squared_difference"] / elements)
        spread = math.sqrt(squares[:, 1].sum() / elements)
        std = np.sqrt(squares / pairs.count[:, None])
        return {
            "latents_rms": rms,
            "relative_rms": rms / spread if spread > 0 else None,
            "mean": {id_: pairs.mean[:, side].tolist() for side, id_ in enumerate(ids)},
            "std": {id_: std[:, side].tolist() for side, id_ in enumerate(ids)},
            "correlation": [float(value) if math.isfinite(value) else None for value in pairs.correlation[:, 0, 1]],
            "kl_nats": float(s["kl"] / s["num_kl"]) if s["num_kl"] else None,
        }

    def _metric_names(self) -> list[str]:
        names = [name.removeprefix("sum/") for name in self._state if name.startswith("sum/")]
        return sorted(names, key=list(IMAGE_METRICS).index)

    def _mean(self, name: str, encoder: int, decoder: int) -> float | None:
        count = self._state[f"count/{name}"]
        return float(self._state[f"sum/{name}"][encoder, decoder] / count) if count else None


def _drift(ours: Tensor, theirs: Tensor) -> State:
    """ours, theirs: latents (B, C, h, w), float64."""
    a, b = (latents.transpose(0, 1).flatten(1).numpy() for latents in (ours, theirs))  # (C, B * h * w)
    return {
        "num_images": np.asarray(float(len(ours))),
        **Moments.of(np.stack([a, b], axis=1)).state("pairs_"),
        "squared_difference": np.asarray(float(((a - b) ** 2).sum())),
    }


def _verdict(relative_rms: float | None, decode_loss: float, pooled: float) -> str:
    if relative_rms is None:  # the reference's latents say nothing about the image
        return "different"
    if relative_rms <= SAME_LATENTS or (relative_rms <= SMALL_DRIFT and decode_loss <= MAX_DECODE_LOSS_DB):
        return "drop-in"
    return "fine-tune" if pooled >= RELATED else "different"


def _sentence(verdict: str, relative_rms: float | None, pooled: float, psnr: NDArray[np.float64]) -> str:
    """What the numbers mean for someone who has a diffusion model of the reference."""
    if relative_rms is None:
        return "Different latent space: the reference's latents are the same for all images."
    own, crossed = psnr[1, 1], psnr[1, 0]
    decoding = (
        f"latents made for the reference decode at {crossed:.2f} dB through the candidate, {own:.2f} dB through the "
        f"reference itself"
    )
    drift = f"{100 * relative_rms:.3g} % of the spread of the reference's"
    if verdict == "drop-in" and relative_rms <= SAME_LATENTS:
        worse = ", a loss that comes from the decoder alone" if own - crossed > MAX_DECODE_LOSS_DB else ""
        return (
            f"Drop-in: the encoder is the same (latents differ by {drift}), so an existing diffusion model works as it "
            f"is, for text-to-image and image-to-image; {decoding}{worse}."
        )
    if verdict == "drop-in":
        return (
            f"Drop-in: {decoding}, and the candidate's own latents differ by only {drift}; an existing diffusion model "
            f"works as it is, for text-to-image and image-to-image."
        )
    if verdict == "fine-tune":
        advice = (
            "text-to-image can use the candidate's decoder at once; image-to-image, inpainting and training need the "
            "reference's encoder, or a diffusion model fine-tuned on the candidate's latents"
            if own - crossed <= MAX_DECODE_LOSS_DB
            else "fine-tune the diffusion model on the candidate's latents before the swap"
        )
        return (
            f"Fine-tune needed: the latent spaces are related (correlation {pooled:.2f}), but the candidate's latents "
            f"differ by {drift}, and {decoding}: {advice}."
        )
    return (
        f"Different latent space: the latents of the two have a correlation of {pooled:.2f}, and {decoding}; an "
        f"existing diffusion model has to be trained anew on the candidate's latents."
    )
