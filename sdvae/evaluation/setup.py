"""Everything that an evaluation needs, loaded and checked before the first image is measured."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from sdvae._version import __version__
from sdvae.checkpoints.opened import OpenedVae, open_any_vae
from sdvae.errors import ConfigError, MissingWeightsError, SdvaeError
from sdvae.evaluation.images import evenly_spaced, stand_digest
from sdvae.evaluation.options import EvaluateOptions
from sdvae.evaluation.plan import EvaluationPlan
from sdvae.evaluation.protocol import SET_METRICS, Protocol
from sdvae.evaluation.swap import swap_obstacle
from sdvae.features.inception import build_inception
from sdvae.metrics.fid import FeatureStatistics, load_statistics
from sdvae.metrics.table import IMAGE_METRICS
from sdvae.model.device import choose_device
from sdvae.processes import Processes

__all__ = ["Networks", "Setup", "build_networks", "set_up"]

_WITHOUT = "choose --metrics without {name} (the group 'plain' needs no network), or add --skip-unavailable"


@dataclass(kw_only=True, eq=False)
class Networks:
    """Callables of all metrics that can be computed."""

    metrics: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = field(default_factory=dict)
    inception: Callable[[Tensor], Tensor] | None = None
    set_metrics: tuple[str, ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()  # name, reason


@dataclass(frozen=True, kw_only=True, eq=False)
class Setup:
    """A plan with its networks in memory."""

    plan: EvaluationPlan  # its protocol names the metrics that could be had
    processes: Processes
    device: torch.device
    subjects: dict[str, OpenedVae]
    swap_pairs: dict[str, tuple[OpenedVae, OpenedVae]]  # candidate -> it and the reference, of one kind of latents
    swap_images: frozenset[int]  # indices of the images of swap tests, each of which costs four more decodings
    networks: Networks
    fid_reference: FeatureStatistics | None  # what stands for the originals
    keeps_originals: bool  # whether blocks hold the originals' features
    inputs: dict[str, Any]  # what identifies this evaluation: equal inputs, equal numbers


def set_up(plan: EvaluationPlan, processes: Processes) -> Setup:
    """Raises: SdvaeError where a device, a VAE, a network or a file is not there or does not fit."""
    options = plan.options
    device, dtype = choose_device(options.device), getattr(torch, plan.protocol.dtype)
    networks = build_networks(plan.protocol, options, device)
    subjects = {entrant.id: open_any_vae(entrant.ref, device, dtype) for entrant in plan.entrants}
    left = {name for name, _ in networks.skipped}
    statistics, digest = None, None
    if options.fid_statistics is not None and networks.inception is not None:
        statistics = load_statistics(options.fid_statistics)
        digest = "sha256:" + hashlib.sha256(options.fid_statistics.read_bytes()).hexdigest()
    metrics = tuple(name for name in plan.protocol.metrics if name not in left)
    plan = replace(plan, protocol=replace(plan.protocol, metrics=metrics, fid_statistics=digest))
    theirs = None if plan.reference is None else subjects[plan.reference.id]
    keeps_originals = statistics is None or options.save_fid_statistics is not None
    return Setup(
        plan=plan,
        processes=processes,
        device=device,
        subjects=subjects,
        swap_pairs={
            entrant.id: (subjects[entrant.id], theirs)
            for entrant in plan.entrants
            if theirs is not None
            and entrant.role == "candidate"
            and swap_obstacle(subjects[entrant.id], theirs) is None
        },
        swap_images=frozenset(evenly_spaced(len(plan.files), options.swap_images)),
        networks=networks,
        fid_reference=statistics,
        keeps_originals=keeps_originals,
        inputs={
            "sdvae": __version__,
            "images": stand_digest(plan.files),
            "protocol": plan.protocol.to_json()["digest"],
            "vaes": {entrant.id: [entrant.role, subjects[entrant.id].digest] for entrant in plan.entrants},
            "stress": [*options.stress, options.stress_images],
            "swap": options.swap_images,
            "originals": keeps_originals,
            "gallery": options.gallery_images,
        },
    )


def build_networks(protocol: Protocol, options: EvaluateOptions, device: torch.device) -> Networks:
    """Build every metric of the protocol; weights are downloaded where they must be.

    Raises: ConfigError for a package that is missing, MissingWeightsError, CheckpointError for weights; the first two
    leave the metric out with options.skip_unavailable.
    """
    metrics: dict[str, Callable[[Tensor, Tensor], Tensor]] = {}
    skipped: list[tuple[str, str]] = []
    for name in (name for name in protocol.metrics if name not in SET_METRICS):
        without = _WITHOUT.format(name=name)
        try:
            metrics[name] = IMAGE_METRICS[name].build(
                options.weights_path, device=device, option="--weights", without=without
            )
        except (ConfigError, MissingWeightsError) as error:
            skipped.append((name, _reason(error, options, without)))
    set_metrics = tuple(name for name in protocol.metrics if name in SET_METRICS)
    inception = None
    if set_metrics:
        without = _WITHOUT.format(name=" and ".join(set_metrics))
        try:
            inception = build_inception(options.weights_path, option="--weights", without=without).to(device)
        except (ConfigError, MissingWeightsError) as error:
            reason = _reason(error, options, without)
            skipped += [(name, reason) for name in set_metrics]
            set_metrics = ()
    return Networks(metrics=metrics, inception=inception, set_metrics=set_metrics, skipped=tuple(skipped))


def _reason(error: SdvaeError, options: EvaluateOptions, without: str) -> str:
    """Why a metric is left out, in one line; raises instead where that was not asked for."""
    if options.skip_unavailable:
        return str(error).splitlines()[0].removesuffix(". Looked for")
    if isinstance(error, MissingWeightsError):  # which says already how to do without
        raise error
    raise ConfigError(f"{error}\nOr do without: {without}") from error
