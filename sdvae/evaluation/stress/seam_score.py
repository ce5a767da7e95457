"""The seam meter: are there lines in an image where tiles met, and do neighbouring tiles differ in colour?

Numpy only. It measures; who ran in tiles and where they meet is known elsewhere (sdvae.evaluation.stress.seams).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view

from sdvae.data.images import Pixels
from sdvae.errors import ConfigError

__all__ = ["SEARCH_THRESHOLD", "SEAM_THRESHOLD", "SeamScore", "colour_step", "seam_score"]

# Scores above these count as a seam. Without one, on 50 photographs of nature and towns (BSDS500, 481 x 321 px, and
# crops of them), bare and against reconstructions or JPEGs of them, the largest of 1200 scores of four to six named
# places was 7.8, and the largest of 350 of the worst of all places 29.6: somewhere a scene has a straight line itself.
# What is found of steps planted at a named place: against the pass without tiles 1 grey level in all; against the
# original, through a reconstruction, 4 levels in 49 of the 50 and 2 in 27; in a reconstruction alone 4 in 49, 2 in 41.
SEAM_THRESHOLD = 8.0  # of places that were named
SEARCH_THRESHOLD = 40.0  # of the worst of all places

_SEGMENT_PX = 16  # steps are averaged along so much of a line: less noise, and a line may differ along its length
_REACH_PX = 8  # with a reference: the step between the means of so many pixels on either side, so ramps count as well
_GAP_PX = 2  # what a blurred edge changes on either side
_NEIGHBOURS_PX = 24  # on either side: what a step is compared with. Texture changes over an image
_FLOOR = 0.5  # grey levels: what rounding to 8 bits can do; smaller steps are not enlarged
_CLIP = 3.0  # one segment on a strong natural edge must not outweigh the rest of the line
_PERIOD_PX = 8  # JPEG blocks and upsampling leave marks of this period, so lines are compared within a phase
_MIN_SPREAD = 0.05  # of the statistic, whose values are about 1: below it two lines do not differ
_MIN_LINES = 16  # to know what is usual in this image

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class SeamScore:
    """The most suspicious line of an image."""

    score: float  # distance from the usual line of this image, in robust standard deviations
    position: int  # the line lies between pixel position - 1 and pixel position
    axis: Literal["vertical", "horizontal"]  # of the line: a vertical one lies between two columns
    step: float  # grey levels (of 255): median along the line of the step across it, in the channel where it is largest
    threshold: float

    @property
    def found(self) -> bool:
        """Whether this is a seam."""
        return self.score > self.threshold


def seam_score(
    image: Pixels,
    reference: Pixels | None = None,
    *,
    columns: Sequence[int] | None = None,
    rows: Sequence[int] | None = None,
) -> SeamScore:
    """Look for a line that runs through the whole image, and say how much it stands out.

    The step across each line is measured in segments, each relative to the steps at the 24 lines on either side of it
    in the same segment, cut off at 3 times that; a line's statistic is the mean size of these plus the size of their
    mean (a seam has mostly one sign). Its score is the distance from the median of the lines of its phase (modulo 8
    px) in units of 1.4826 * median absolute deviation.

    image, reference: (H, W, 3), uint8, or float in grey levels, 0..255. With a reference (the pass without tiles, or
        the original) the difference of the two is measured, in which natural edges nearly vanish, and a step is that
        between the means of 8 px on either side. Without, it is the step of two neighbouring pixels beyond what the
        steps beside it continue.
    columns, rows: places where tiles meet; c: between pixels c - 1 and c. An axis that is not named is left alone;
        with neither, all places of both axes are searched, less 8 px at the borders.
    Raises: ConfigError for images too small to know what a usual line is, and for sizes that differ.
    """
    pixels = _difference(image, reference)
    searched = columns is None and rows is None
    axes: tuple[tuple[Literal["vertical", "horizontal"], FloatArray, Sequence[int] | None], ...] = (
        ("vertical", pixels, columns),
        ("horizontal", pixels.transpose(1, 0, 2), rows),
    )
    threshold = SEARCH_THRESHOLD if searched else SEAM_THRESHOLD
    best: SeamScore | None = None
    for axis, plane, places in axes:
        if not searched and not places:
            continue
        found = _worst_line(plane, None if searched else places, residual=reference is not None)
        if found and (best is None or found[0] > best.score):
            score, position, step = found
            best = SeamScore(score=score, position=position, axis=axis, step=step, threshold=threshold)
    if best is None:
        height, width = image.shape[:2]
        raise ConfigError(
            f"an image of {width} x {height} px is too small to tell a seam from a usual line"
            + ("" if searched else f", at columns {list(columns or ())} and rows {list(rows or ())}")
        )
    return best


def colour_step(image: Pixels, reference: Pixels, *, columns: Sequence[int] = (), rows: Sequence[int] = ()) -> float:
    """The largest difference in colour shift between neighbouring tiles: what is seen as patches, without any line.

    image, reference: (H, W, 3), uint8, or float in grey levels, 0..255. columns, rows: where tiles meet; for tiles
    that are blended, the middle of the ramp. Returns: grey levels; the shift of a tile is the mean of image - reference
    in it, per channel; 0 for one tile.
    """
    difference = _difference(image, reference)
    shifts = difference
    for axis, places in enumerate((rows, columns)):
        length = difference.shape[axis]
        edges = np.array([0, *sorted({place for place in places if 0 < place < length})])
        sizes = np.diff([*edges, length])
        sums = np.add.reduceat(shifts, edges, axis=axis)
        shifts = sums / np.expand_dims(sizes, tuple(each for each in range(3) if each != axis))  # (tiles, tiles, 3)
    steps = [np.abs(np.diff(shifts, axis=axis)).max(initial=0.0) for axis in (0, 1)]
    return float(max(steps))


def _difference(image: Pixels, reference: Pixels | None) -> FloatArray:
    if reference is None:
        return image.astype(np.float64)
    if image.shape != reference.shape:
        raise ConfigError(f"image {image.shape} and reference {reference.shape} differ in size")
    return image.astype(np.float64) - reference


def _worst_line(plane: FloatArray, places: Sequence[int] | None, *, residual: bool) -> tuple[float, int, float] | None:
    """Score, position and step of the vertical line of `plane` that stands out most; None: too small to say."""
    width = plane.shape[1]
    if width < 2 * _REACH_PX + _MIN_LINES:
        return None
    steps = _levels(plane) if residual else _bends(_steps(plane, reach=1))  # (C, segments, W)
    usable = np.zeros(width, dtype=bool)
    usable[_REACH_PX : width - _REACH_PX + 1] = True
    usual, candidates = usable.copy(), np.flatnonzero(usable)
    if places is not None:
        candidates = np.array([place for place in places if 0 <= place < width and usable[place]], dtype=np.intp)
        for place in candidates:
            usual[max(0, place - _REACH_PX) : place + _REACH_PX + 1] = False
    if not len(candidates) or usual.sum() < _MIN_LINES:
        return None
    scores = _scores(steps, usual)
    worst = candidates[np.argmax(scores[candidates])]
    # A strong step shows at the lines around it too, as far as the means reach, and there also at the cut-off.
    sizes = np.abs(np.median(steps, axis=1)).max(axis=0)  # (W,)
    around = candidates[np.abs(candidates - worst) <= _REACH_PX]
    position = int(around[np.argmax(sizes[around])])
    return float(scores[worst]), position, float(sizes[position])


def _steps(plane: FloatArray, reach: int, gap: int = 0) -> FloatArray:
    """Mean of the pixels right of each line, as far as `reach`, less that of those left of it, averaged along segments.

    plane: (H, W, C). gap: so many pixels next to the line are left out. Returns: (C, segments, W); line c is left of
    column c; 0 where the image ends too soon.
    """
    height, width = plane.shape[:2]
    edges = np.linspace(0, height, max(1, height // _SEGMENT_PX) + 1).astype(np.intp)
    means = np.add.reduceat(plane, edges[:-1], axis=0) / np.diff(edges)[:, None, None]  # (segments, W, C)
    sums = np.cumsum(means.transpose(2, 0, 1), axis=-1)
    sums = np.pad(sums, ((0, 0), (0, 0), (1, 0)))  # (C, segments, W + 1)
    steps = np.zeros((*sums.shape[:2], width))
    line = np.arange(reach, width - reach + 1)
    right = sums[..., line + reach] - sums[..., line + gap]
    left = sums[..., line - gap] - sums[..., line - reach]
    steps[..., line] = (right - left) / (reach - gap)
    return steps


def _levels(plane: FloatArray) -> FloatArray:
    """Steps that are there next to the line and farther from it, the smaller of the two; 0 where their signs differ.

    A natural edge that got blurred leaves a step next to it, but none beyond. Shapes as `_steps`.
    """
    near, far = _steps(plane, _REACH_PX), _steps(plane, _REACH_PX, _GAP_PX)
    smaller = np.where(np.abs(near) < np.abs(far), near, far)
    return np.where(near * far > 0, smaller, 0.0)


def _bends(steps: FloatArray) -> FloatArray:
    """Each step less the mean of the two beside it: slopes and soft edges vanish, a step of one line stays."""
    bends = steps.copy()
    bends[..., 1:-1] -= (steps[..., :-2] + steps[..., 2:]) / 2
    return bends


def _scores(steps: FloatArray, usual: npt.NDArray[np.bool_]) -> FloatArray:
    """steps: (C, segments, W). usual: (W,), the lines that say what is usual. Returns: (W,)."""
    sizes = np.where(usual, np.abs(steps), np.nan).astype(np.float32)  # sorted: half the time
    beside = [(0, 0), (0, 0), (_NEIGHBOURS_PX, _NEIGHBOURS_PX)]
    windows = sliding_window_view(np.pad(sizes, beside, constant_values=np.nan), 2 * _NEIGHBOURS_PX + 1, axis=-1)
    around = _median_of_finite(windows)
    relative = np.clip(steps / (around + _FLOOR), -_CLIP, _CLIP)
    values = np.abs(relative).mean(axis=(0, 1)) + np.abs(relative.mean(axis=1)).mean(axis=0)  # (W,)
    phases = np.arange(len(usual)) % _PERIOD_PX
    for phase in range(_PERIOD_PX):
        same = usual & (phases == phase)
        values[phases == phase] -= np.median(values[same] if same.sum() >= 5 else values[usual])
    spread = 1.4826 * np.median(np.abs(values[usual]))  # 1.4826: of a normal distribution, its standard deviation
    return values / max(spread, _MIN_SPREAD)  # type: ignore[no-any-return]


def _median_of_finite(windows: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Median over the last axis, NaN left out; 0 where nothing is left. numpy's own warns there, and is slower."""
    ordered = np.sort(windows, axis=-1)  # NaN comes last
    count = np.isfinite(ordered).sum(axis=-1)
    middle = [
        np.take_along_axis(ordered, np.maximum(at, 0)[..., None], axis=-1) for at in ((count - 1) // 2, count // 2)
    ]
    return np.where(count > 0, (middle[0] + middle[1])[..., 0] / 2, 0.0)
