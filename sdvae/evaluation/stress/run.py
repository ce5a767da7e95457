"""Stress tests of an autoencoder: what one pass over one set at one size does not show.

Repeated passes, sizes, tiles, dtypes and draws of z. Each test has a file of its name, and returns the part of
result.json of its name, see docs/evaluation-result.md. Nothing is drawn at random but z, from a stream per image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sdvae.checkpoints.opened import OpenedVae
from sdvae.errors import ConfigError, SdvaeError
from sdvae.evaluation.stress.cycles import cycles
from sdvae.evaluation.stress.passes import Images, Metrics, Note
from sdvae.evaluation.stress.precision import precision
from sdvae.evaluation.stress.resolution import resolution
from sdvae.evaluation.stress.sampling import sampling
from sdvae.evaluation.stress.seams import seams

__all__ = ["STRESS_TESTS", "run_stress"]

# Name -> (subject, images, metrics, seed, note) -> the value in the result
STRESS_TESTS: dict[str, Callable[[OpenedVae, Images, Metrics, int, Note], Any]] = {
    "cycles": lambda subject, images, metrics, seed, note: cycles(subject, images, metrics),
    "resolution": lambda subject, images, metrics, seed, note: resolution(subject, images, metrics, note=note),
    "seams": lambda subject, images, metrics, seed, note: seams(subject, images, note=note),
    "precision": lambda subject, images, metrics, seed, note: precision(subject, images, note=note),
    "sampling": lambda subject, images, metrics, seed, note: sampling(subject, images, metrics, seed=seed, note=note),
}

_OF_SIZE = ("resolution", "seams")


def run_stress(
    names: Sequence[str],
    subject: OpenedVae,
    images: Images,
    whole: Images,
    metrics: Metrics,
    seed: int = 0,
) -> dict[str, Any]:
    """The stress tests of these names.

    images: as measured; whole: the same at the size that they have on disk, for the tests that are about size.
    metrics: those that are to be measured; where an image is too small for one, that one is left out of its mean.
    Returns: name -> what the test found (None where it failed, with a note), and `notes`, sentences; empty without
    names. Raises: ConfigError for an unknown name.
    """
    if unknown := [name for name in names if name not in STRESS_TESTS]:
        raise ConfigError(f"'{unknown[0]}' is no stress test; expected {', '.join(STRESS_TESTS)}")
    if not names:
        return {}
    notes: list[str] = []
    found: dict[str, Any] = {}
    for name in names:
        try:
            found[name] = STRESS_TESTS[name](
                subject, whole if name in _OF_SIZE else images, metrics, seed, notes.append
            )
        except SdvaeError as error:  # the measurements that are done are worth more than this test
            found[name] = None
            notes.append(f"{name.capitalize()}: failed; {error}.")
    return found | {"notes": notes}
