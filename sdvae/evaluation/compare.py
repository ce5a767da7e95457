"""From numbers per image to paired differences, and several results side by side. No torch.

Metrics are described here by the entries of result.json's `metrics` (name, better, target, kind), so that results can
be compared again from their files alone. What does not exist is None in all that is returned.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sdvae.evaluation.protocol import METRIC_NAMES
from sdvae.metrics.bootstrap import Floats, Values, mean_intervals, numbers, table
from sdvae.report.result import EvaluationResult

__all__ = ["MIN_PAIRS", "merge_results", "paired_differences", "set_differences"]

Row = Mapping[str, Any]

TIE = 1e-9  # numbers of two VAEs this close are one number: rounding of sums, no difference that an eye or a team meets
MIN_PAIRS = (
    6  # below it all images may fall on one side by chance alone: 2 * 0.5^5 = 6 %, more than the 5 % of a verdict
)

# Fields of the protocol that change no number that two results share: a name, a list, the fineness of intervals.
_HARMLESS = ("preset", "digest", "metrics", "resamples")


# Against a reference


def paired_differences(
    candidate: Values, reference: Values, metrics: Sequence[Row], *, resamples: int = 9999, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Image metric -> the mean difference candidate - reference over the same images, and what follows from it.

    Of metrics with a target the distances from it are subtracted. Images that lack one of the two numbers are left out.
    Returns: delta, its 95 % paired bootstrap interval (low, high), shares of images won, lost and tied, count, and the
    verdict: better or worse where the interval excludes 0 and MIN_PAIRS images or more were compared, else undecided.
    """
    shared = [
        metric
        for metric in metrics
        if metric["kind"] == "image" and metric["name"] in candidate and metric["name"] in reference
    ]
    names = [metric["name"] for metric in shared]
    ours, theirs = table(candidate, names), table(reference, names)
    for i, metric in enumerate(shared):
        if metric["better"] == "target":
            ours[:, i], theirs[:, i] = (np.abs(each[:, i] - metric["target"]) for each in (ours, theirs))
    differences = ours - theirs
    low, high = map(numbers, mean_intervals(differences, resamples=resamples, seed=seed))
    return {
        metric["name"]: _difference(differences[:, i], low[i], high[i], larger_is_better=metric["better"] == "higher")
        for i, metric in enumerate(shared)
    }


def set_differences(candidate: Row, reference: Row, metrics: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Set metric -> delta of two `summary` fields. One number per set has no interval here, so nothing is decided."""
    found = {}
    for metric in metrics:
        name = metric["name"]
        if metric["kind"] == "set" and name in candidate and name in reference:
            ours, theirs = candidate[name]["value"], reference[name]["value"]
            found[name] = {
                "delta": None if ours is None or theirs is None else ours - theirs,
                "verdict": "undecided",
            }
    return found


def _difference(
    differences: Floats, low: float | None, high: float | None, *, larger_is_better: bool
) -> dict[str, Any]:
    known = differences[~np.isnan(differences)]
    if not len(known):
        nothing = dict.fromkeys(("delta", "low", "high", "won", "lost", "tied"))
        return nothing | {"verdict": "undecided", "count": 0}
    gains = known if larger_is_better else -known
    verdict = "undecided"
    if len(known) >= MIN_PAIRS and low is not None and high is not None and (low > TIE or high < -TIE):
        verdict = "better" if (low > 0) == larger_is_better else "worse"  # a target's distance is better smaller
    return {
        "delta": float(known.mean()),
        "low": low,
        "high": high,
        "won": float(np.mean(gains > TIE)),
        "lost": float(np.mean(gains < -TIE)),
        "tied": float(np.mean(np.abs(gains) <= TIE)),
        "verdict": verdict,
        "count": len(known),
    }


# Several results in one


@dataclass(frozen=True)
class _Part:
    """One of the results, and what its VAEs are called in the merged one."""

    result: EvaluationResult
    ids: dict[str, str]  # in the result -> in the merged one

    @property
    def names(self) -> str:
        return ", ".join(self.ids.values())


@dataclass(frozen=True)
class _Member:
    """A VAE of one of the results."""

    part: _Part
    vae: Row

    @property
    def name(self) -> str:
        return self.part.ids[self.vae["id"]]

    def values(self, keys: Sequence[str]) -> dict[str, list[float | None]]:
        """Metric -> numbers of the images of these keys, in their order; empty where the result has none."""
        table = self.part.result.per_image
        places = {key: place for place, key in enumerate(table.get("keys", ()))}
        columns = table.get("values", {}).get(self.vae["id"], {})
        return {
            name: [column[places[key]] if key in places else None for key in keys] for name, column in columns.items()
        }


def merge_results(results: Sequence[EvaluationResult]) -> EvaluationResult:
    """Several results as one, for one report: the VAEs of all side by side.

    Protocol, environment and dataset are the first's. The first reference found is the reference of all; other VAEs
    are compared with it where images and protocol were the same, and when it was evaluated again it is shown once.
    What was measured on other images, or in another way, is shown without differences, and a warning says why. Numbers
    per image and pictures are joined where the images are the first's.
    """
    if not results:
        raise ValueError("expected one result or more")
    if len(results) == 1:
        return results[0]
    parts, reference = _named(results)
    metrics = _union_of_metrics(results)
    return replace(
        results[0],
        created=max(result.created for result in results),
        dataset=results[0].dataset | {"unreadable": _distinct(result.dataset["unreadable"] for result in results)},
        metrics=metrics,
        skipped_metrics=_distinct(result.skipped_metrics for result in results),
        vaes=_merged_vaes(parts, reference),
        comparisons=_merged_comparisons(parts, reference, metrics),
        published=_distinct(result.published for result in results),
        gates=[gate for result in results for gate in result.gates],
        warnings=_distinct(
            [
                *(result.warnings for result in results),
                _merge_warnings(parts, reference.part if reference else parts[0]),
            ]
        ),
        per_image=_merged_per_image(parts),
        gallery=_merged_gallery(parts),
    )


def _named(results: Sequence[EvaluationResult]) -> tuple[list[_Part], _Member | None]:
    """Ids that are unique over all, and the first reference."""
    parts: list[_Part] = []
    taken: set[str] = set()
    reference: _Member | None = None
    for result in results:
        part = _Part(result, {})
        parts.append(part)
        for vae in result.vaes:
            if reference and _is_again(vae, result, reference):
                part.ids[vae["id"]] = reference.name
                continue
            name, number = vae["id"], 2
            while name in taken:
                name, number = f"{vae['id']}-{number}", number + 1
            taken.add(name)
            part.ids[vae["id"]] = name
            if vae["role"] == "reference" and reference is None:
                reference = _Member(part, vae)
    return parts, reference


def _is_again(vae: Row, result: EvaluationResult, reference: _Member) -> bool:
    """Whether a reference is the first one, evaluated again in the same way."""
    network = ("role", "digest", "class_name", "dtype", "scaling_factor", "shift_factor")
    return all(vae[name] == reference.vae[name] for name in network) and _comparable(result, reference.part.result)


def _same_images(a: EvaluationResult, b: EvaluationResult) -> bool:
    return bool(a.dataset["digest"] == b.dataset["digest"])


def _comparable(a: EvaluationResult, b: EvaluationResult) -> bool:
    return _same_images(a, b) and not _protocol_differences(a, b)


def _protocol_differences(a: EvaluationResult, b: EvaluationResult) -> list[tuple[str, Any, Any]]:
    """Fields that change numbers, with the values of a and b; parts of a field as `fid.reference`."""
    ours, theirs = _flat(a.protocol), _flat(b.protocol)
    return [
        (name, ours.get(name), theirs.get(name))
        for name in dict.fromkeys((*ours, *theirs))
        if name not in _HARMLESS and ours.get(name) != theirs.get(name)
    ]


def _flat(protocol: Row) -> dict[str, Any]:
    flat = {}
    for name, value in protocol.items():
        parts = value if isinstance(value, dict) else {"": value}
        flat.update({f"{name}.{inner}".rstrip("."): item for inner, item in parts.items()})
    return flat


def _union_of_metrics(results: Sequence[EvaluationResult]) -> list[dict[str, Any]]:
    """Of all, in the order of display; names that this version does not know last."""
    described: dict[str, dict[str, Any]] = {}
    for metric in (metric for result in results for metric in result.metrics):
        described.setdefault(metric["name"], metric)
    order = {name: place for place, name in enumerate(METRIC_NAMES)}
    return sorted(described.values(), key=lambda metric: order.get(metric["name"], len(order)))


def _distinct(lists: Iterable[Sequence[Any]]) -> list[Any]:
    found: list[Any] = []
    for each in lists:
        found.extend(item for item in each if item not in found)
    return found


def _merged_vaes(parts: Sequence[_Part], reference: _Member | None) -> list[dict[str, Any]]:
    merged: dict[str, dict[str, Any]] = {}
    for member in _members(parts):
        name = member.name
        if name in merged:  # the reference again, perhaps with more metrics
            merged[name]["summary"] = member.vae["summary"] | merged[name]["summary"]
        else:
            role = "reference" if reference and name == reference.name else "candidate"
            merged[name] = {**member.vae, "id": name, "role": role}
    return list(merged.values())


def _members(parts: Sequence[_Part]) -> list[_Member]:
    return [_Member(part, vae) for part in parts for vae in part.result.vaes]


def _merged_comparisons(
    parts: Sequence[_Part], reference: _Member | None, metrics: Sequence[Row]
) -> list[dict[str, Any]]:
    """Those of the results themselves; then the first reference against the VAEs that were not compared with it."""
    found = [_renamed(comparison, part.ids) for part in parts for comparison in part.result.comparisons]
    if reference is None:
        return found
    done = {entry["vae"] for entry in found if entry["reference"] == reference.name} | {reference.name}
    for member in _members(parts):
        if member.name not in done and _comparable(member.part.result, reference.part.result):
            found.append(_compared(member, reference, metrics))
    return found


def _renamed(comparison: Row, ids: Mapping[str, str]) -> dict[str, Any]:
    """With the new ids, also where they are keys: of drift's mean and std, and of the cross-decode matrix."""
    swap = dict(comparison["swap"])
    if drift := swap.get("drift"):
        swap["drift"] = drift | {name: _with_keys(drift[name], ids) for name in ("mean", "std")}
    if crossed := swap.get("cross_decode"):
        swap["cross_decode"] = _with_keys({encoder: _with_keys(row, ids) for encoder, row in crossed.items()}, ids)
    return {
        **comparison,
        "vae": ids[comparison["vae"]],
        "reference": ids[comparison["reference"]],
        "swap": swap,
    }


def _with_keys(table: Row, ids: Mapping[str, str]) -> dict[str, Any]:
    return {ids[key]: value for key, value in table.items()}


def _compared(member: _Member, reference: _Member, metrics: Sequence[Row]) -> dict[str, Any]:
    """A comparison of two VAEs that were evaluated apart, on the same images and in the same way."""
    keys = reference.part.result.per_image.get("keys", [])
    protocol = reference.part.result.protocol
    differences = paired_differences(
        member.values(keys),
        reference.values(keys),
        metrics,
        resamples=protocol["resamples"],
        seed=protocol["seed"],
    )
    return {
        "vae": member.name,
        "reference": reference.name,
        "metrics": differences | set_differences(member.vae["summary"], reference.vae["summary"], metrics),
        "swap": {"skipped": "they were evaluated apart; a swap test needs both in one run of sdvae evaluate"},
    }


def _merge_warnings(parts: Sequence[_Part], base: _Part) -> list[str]:
    """What of each result is called otherwise, or is not to be compared with `base`, and why."""
    found = []
    for number, part in enumerate(parts, start=1):
        for old, new in part.ids.items():
            if old != new:
                found.append(f"{old} of result {number} (of {part.result.created}) is called {new} here.")
        if not _same_images(part.result, base.result):
            found.append(
                f"{part.names}: measured on other images ({_images(part.result)}) than {base.names} "
                f"({_images(base.result)}). Shown side by side; no differences between them are taken."
            )
        if differing := _protocol_differences(part.result, base.result):
            fields = "; ".join(f"{name}: {_plain(ours)}, not {_plain(theirs)}" for name, ours, theirs in differing)
            found.append(
                f"{part.names}: measured by another protocol than {base.names} ({fields}). Shown side by side; no "
                "differences between them are taken."
            )
        ours, theirs = ({metric["name"] for metric in each.result.metrics} for each in (part, base))
        if ours != theirs:
            found.append(
                f"{part.names}: other metrics were measured than for {base.names}; only one of them has "
                f"{', '.join(sorted(ours ^ theirs))}."
            )
    return found


def _images(result: EvaluationResult) -> str:
    return f"{result.dataset['source']}, {result.dataset['num_images']} images"


def _plain(value: Any) -> str:
    return "none" if value is None else str(value)


def _merged_per_image(parts: Sequence[_Part]) -> dict[str, Any]:
    """Keys, sizes and slices of the first result that has numbers of the first's images; values of all that have."""
    joined = [part for part in parts if part.result.per_image and _same_images(part.result, parts[0].result)]
    if not joined:
        return {}
    table = dict(joined[0].result.per_image)
    values: dict[str, dict[str, list[float | None]]] = {}
    for member in _members(joined):
        values[member.name] = member.values(table["keys"]) | values.get(member.name, {})
    return table | {"values": values}


def _merged_gallery(parts: Sequence[_Part]) -> list[dict[str, Any]]:
    """Pictures of the first's images; those of another size or crop of one image do not lie on each other."""
    cards: dict[str, dict[str, Any]] = {}
    for part in parts:
        for card in part.result.gallery if _same_images(part.result, parts[0].result) else ():
            pictures = {part.ids[vae]: picture for vae, picture in card["reconstructions"].items()}
            shown = cards.setdefault(card["key"], card | {"reconstructions": {}})
            if all(shown[name] == card[name] for name in ("width", "height", "crop")):
                shown["reconstructions"] = pictures | shown["reconstructions"]
    return list(cards.values())
