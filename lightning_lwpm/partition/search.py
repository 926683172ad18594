"""The dynamic programmes behind merging: least maximum of stages, least sum of boundaries, and the best of both.

::

    sum of boundaries
      |
      |---.                      each step down is a partition that no other beats in both;
      |   '--.                   only those between the least maximum and the limit beyond which
      |      '-------.           nothing that is saved on boundaries makes up for it can win
      +---|----------|-------- maximum of stage times
        least      limit
"""

import heapq
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

__all__ = ["Array", "Found", "Mask", "Search", "least", "trace"]

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]


class Found(NamedTuple):
    """A partition.

    Attributes:
        total: The sum of its boundaries.
        maximum: The time of its slowest stage.
        cuts: The places where all stages but the first begin.
    """

    total: float
    maximum: float
    cuts: list[int]


def least(
    cost: Callable[[int], Array], num_stages: int, num_places: int, combine: np.ufunc = np.maximum
) -> list[Array]:
    """The least cost of the first stages, for each number of them and each place where they may end.

    Args:
        cost: The cost of a stage by (begin, end), not negative, infinite where that is no stage.
        num_stages: Number of stages.
        num_places: Number of places.
        combine: Makes one cost of two: ``np.maximum`` or ``np.add``.

    Returns:
        Entry ``k`` for the first ``k`` stages: a vector over places.
    """
    costs = [_start(num_places)]
    for stage in range(num_stages):
        costs.append(combine(costs[-1][:, None], cost(stage)).min(axis=0))
    return costs


def trace(num_stages: int, last: int, candidates: Callable[[int, int], Array]) -> list[int]:
    """Walk back through a dynamic programme.

    Args:
        num_stages: Number of stages.
        last: The place where the last one ends.
        candidates: From a stage and the place of its end to the value of each place where it may begin.

    Returns:
        The places where all stages but the first begin.
    """
    cuts: list[int] = []
    for stage in reversed(range(1, num_stages)):
        cuts.append(int(candidates(stage, cuts[-1] if cuts else last).argmin()))
    return cuts[::-1]


class _Band(NamedTuple):
    """Stages of at most ``width`` steps between places, by (width - steps, end).

    Attributes:
        seconds: The time of each; infinite where that is no stage.
        fits: For each stage which of them fit, eight in a byte; empty where all fit.
    """

    seconds: Array
    fits: list[NDArray[np.uint8]]

    def usable(self, within: Mask, stage: int) -> Mask:
        """Which of those ``within`` a limit fit a stage."""
        if not self.fits:
            return within
        return within & np.unpackbits(self.fits[stage], count=within.size).view(np.bool_).reshape(within.shape)


class Search:
    """Finds partitions into a given number of stages; at least one has to exist.

    Args:
        seconds: The time of a stage by (begin, end), infinite where that is no stage.
        boundary: What a cut at each place costs either side, in seconds.
        num_stages: Number of stages.
        fits: From a stage to a matrix like ``seconds``: whether it fits its device; ``None`` where all fits.
        rounding: Times that differ by less than this part of them are equal.
    """

    def __init__(
        self,
        seconds: Array,
        boundary: Array,
        num_stages: int,
        fits: Callable[[int], Mask] | None,
        rounding: float,
    ) -> None:
        self._seconds = seconds
        self._boundary = boundary
        self._num_stages = num_stages
        self._fits = fits
        self._rounding = rounding

    def within(self, limit: float) -> Found:
        """The partition with the least sum of boundaries whose stages all take at most ``limit`` seconds."""
        return self._within(self._band(limit, self._fits), limit)

    def best(self, least_maximum: float, weight: float) -> Found:
        """The partition that minimises ``weight * maximum + 2 * total``; of equal ones that of least maximum.

        Args:
            least_maximum: The least maximum that is possible.
            weight: How often the slowest stage counts, at least 0.
        """
        best = self.within(least_maximum)
        score = slack = self._score(best, weight)
        slack *= self._rounding

        def limit(total: float) -> float:
            """Beyond this maximum, and with boundaries of at least this sum, nothing wins."""
            return (score + slack - 2 * total) / weight if weight else np.inf

        highest = limit(float(np.sort(self._boundary[1:-1])[: self._num_stages - 1].sum()))
        if self._fits is not None:  # what is best without memory limits is a bound too, and quickly found
            highest = limit(self._within(self._band(highest, None), highest).total)
        band = self._band(highest, self._fits)
        times = self._seconds[np.isfinite(self._seconds) & (self._seconds <= highest)]
        levels = np.unique([least_maximum, *times[times > least_maximum * (1 + self._rounding)]])
        # intervals between two levels that have been tried: their bound, their ends and the sums found there
        heap: list[tuple[float, int, int, float, float]] = []

        def push(low: int, high: int, at_low: float, at_high: float) -> None:
            if high - low > 1 and at_low > at_high + slack:
                heapq.heappush(heap, (weight * levels[low + 1] + 2 * at_high, low, high, at_low, at_high))

        def attempt(index: int) -> tuple[int, float]:
            """The least level with the same sum as this one, as far as known, and the sum."""
            nonlocal best, score
            found = self._within(band, float(levels[index]))
            new = self._score(found, weight)
            if new < score - slack or (new <= score + slack and self._less(found.maximum, best.maximum)):
                best, score = found, min(new, score)
            return int(np.searchsorted(levels, found.maximum * (1 - self._rounding))), found.total

        at_least = best.total
        if len(levels) > 1:
            index, total = attempt(len(levels) - 1)
            push(0, index, at_least, total)
        while heap:
            bound, low, high, at_low, at_high = heapq.heappop(heap)
            if bound > score + slack:
                break
            if bound >= score - slack and not self._less(float(levels[low + 1]), best.maximum):
                continue
            winning = int(np.searchsorted(levels, limit(at_high), side="right")) - 1
            middle = max(low + 1, min((low + high) // 2, winning))
            index, total = attempt(middle)
            push(low, index, at_low, total)
            push(middle, high, total, at_high)
        return best

    def _score(self, found: Found, weight: float) -> float:
        return weight * found.maximum + 2 * found.total

    def _less(self, maximum: float, other: float) -> bool:
        return maximum < other * (1 - self._rounding)

    def _band(self, limit: float, fits: Callable[[int], Mask] | None) -> _Band:
        """What may be used within a limit. It is narrow where the limit is: stages of many calls take too long."""
        begin, end = np.nonzero(self._seconds <= min(limit * (1 + self._rounding), np.finfo(float).max))
        width = int((end - begin).max())
        ends = np.arange(len(self._boundary))
        begins = ends - np.arange(width, 0, -1)[:, None]
        seconds = np.where(begins >= 0, self._seconds[begins, ends], np.inf)
        return _Band(seconds, [np.packbits(fits(s)[begins, ends]) for s in range(self._num_stages)] if fits else [])

    def _within(self, band: _Band, limit: float) -> Found:
        within = band.seconds <= min(limit * (1 + self._rounding), np.finfo(float).max)
        width, size = within.shape

        def begins(totals: Array) -> Array:
            """The totals by (width - steps, end)."""
            return sliding_window_view(np.concatenate([np.full(width, np.inf), totals[:-1]]), size)

        totals = [_start(size)]
        for stage in range(self._num_stages):
            usable = band.usable(within, stage)
            totals.append(np.where(usable, begins(totals[-1]), np.inf).min(axis=0) + self._boundary)

        def candidates(stage: int, end: int) -> Array:
            values = np.full(size, np.inf)
            first = max(0, end - width)
            usable = band.usable(within, stage)[width - (end - first) :, end]
            values[first:end] = np.where(usable, totals[stage][first:end], np.inf)
            return values

        cuts = trace(self._num_stages, size - 1, candidates)
        edges = [0, *cuts, size - 1]
        return Found(float(totals[-1][-1]), float(self._seconds[edges[:-1], edges[1:]].max()), cuts)


def _start(num_places: int) -> Array:
    """The value of no stages: 0 at the beginning; they reach no other place."""
    return np.where(np.arange(num_places) == 0, 0.0, np.inf)
