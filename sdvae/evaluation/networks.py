"""The metrics of a protocol, ready to be called; what cannot be had ends the run before it starts, or is left out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sdvae.errors import ConfigError, MissingWeightsError, SdvaeError
from sdvae.evaluation.options import EvaluateOptions
from sdvae.evaluation.protocol import SET_METRICS, Protocol
from sdvae.features.inception import build_inception
from sdvae.metrics.table import build_metric

__all__ = ["Networks", "build_networks"]

_WITHOUT = "choose --metrics without {name} (the group 'plain' needs no network), or add --skip-unavailable"


@dataclass(kw_only=True, eq=False)
class Networks:
    """Callables of all metrics that can be computed."""

    metrics: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = field(default_factory=dict)
    inception: Callable[[Tensor], Tensor] | None = None
    set_metrics: tuple[str, ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()  # name, reason


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
            metrics[name] = build_metric(name, options.weights_path, device=device, option="--weights", without=without)
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
