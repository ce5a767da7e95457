"""Everything that an evaluation needs, loaded and checked before the first image is measured."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sdvae._version import __version__
from sdvae.checkpoints.opened import OpenedVae, open_any_vae
from sdvae.evaluation.blocks import Measured
from sdvae.evaluation.images import stand_digest
from sdvae.evaluation.networks import Networks, build_networks
from sdvae.evaluation.plan import ORIGINALS, EvaluationPlan
from sdvae.evaluation.set_metrics import SetFeatures
from sdvae.evaluation.swap import SwapTest, swap_obstacle
from sdvae.features.inception import NUM_FEATURES
from sdvae.metrics.fid import FeatureStatistics, load_statistics
from sdvae.metrics.latent_health import LatentHealth
from sdvae.model.device import choose_device
from sdvae.processes import Processes, join_processes

__all__ = ["Setup", "set_up"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Setup:
    """A plan with its networks in memory."""

    plan: EvaluationPlan  # its protocol names the metrics that could be had
    processes: Processes
    device: torch.device
    subjects: dict[str, OpenedVae]
    networks: Networks
    fid_reference: FeatureStatistics | None  # what stands for the originals
    inputs: dict[str, Any]  # what identifies this evaluation: equal inputs, equal numbers

    @property
    def candidates(self) -> list[str]:
        """Ids of all but the reference."""
        return [entrant.id for entrant in self.plan.entrants if entrant.role == "candidate"]

    def swap_tests(self) -> dict[str, SwapTest]:
        """A fresh swap test for every candidate that has the reference's kind of latents; none without a reference."""
        reference = self.plan.reference
        if reference is None:
            return {}
        theirs = self.subjects[reference.id]
        pairs = {id_: (self.subjects[id_], theirs) for id_ in self.candidates}
        return {id_: SwapTest(*pair) for id_, pair in pairs.items() if swap_obstacle(*pair) is None}

    def measured(self, folder: Path) -> Measured:
        """What has been measured at first: nothing. folder: for files of what does not go into memory."""
        owners = (ORIGINALS, *self.subjects) if self.networks.set_metrics else ()
        keep_rows = "kid" in self.networks.set_metrics
        return Measured(
            values={id_: {name: [] for name in self.networks.metrics} for id_ in self.subjects},
            latents={id_: LatentHealth(subject.latent_channels) for id_, subject in self.subjects.items()},
            swaps=self.swap_tests(),
            features={
                owner: SetFeatures(
                    NUM_FEATURES, len(self.plan.files), folder / f"features-{owner}.npy" if keep_rows else None
                )
                for owner in owners
            },
        )

    @property
    def swap_images(self) -> frozenset[int]:
        """Indices of the images of swap tests: evenly spaced, whatever is measured besides."""
        count, wanted = len(self.plan.files), min(len(self.plan.files), self.plan.options.swap_images)
        return frozenset(place * count // wanted for place in range(wanted))


def set_up(plan: EvaluationPlan) -> Setup:
    """Raises: SdvaeError where a device, a VAE, a network or a file is not there or does not fit."""
    options = plan.options
    processes, device = join_processes(options.device), choose_device(options.device)
    if not processes.is_main:
        processes.wait()  # the main process downloads what must be downloaded
    dtype = getattr(torch, plan.protocol.dtype)
    subjects = {entrant.id: open_any_vae(entrant.ref, device, dtype) for entrant in plan.entrants}
    networks = build_networks(plan.protocol, options, device)
    if processes.is_main:
        processes.wait()
    left = {name for name, _ in networks.skipped}
    statistics, digest = None, None
    if options.fid_statistics is not None and networks.inception is not None:
        statistics = load_statistics(options.fid_statistics)
        digest = "sha256:" + hashlib.sha256(options.fid_statistics.read_bytes()).hexdigest()
    metrics = tuple(name for name in plan.protocol.metrics if name not in left)
    plan = replace(plan, protocol=replace(plan.protocol, metrics=metrics, fid_statistics=digest))
    return Setup(
        plan=plan,
        processes=processes,
        device=device,
        subjects=subjects,
        networks=networks,
        fid_reference=statistics,
        inputs={
            "sdvae": __version__,
            "images": stand_digest(plan.files),
            "protocol": plan.protocol.to_json()["digest"],
            "vaes": {entrant.id: [entrant.role, subjects[entrant.id].digest] for entrant in plan.entrants},
            "stress": [*options.stress, options.stress_images],
            "swap": options.swap_images,
            "originals": statistics is None or options.save_fid_statistics is not None,  # whether blocks hold theirs
            "gallery": options.gallery_images,
        },
    )
