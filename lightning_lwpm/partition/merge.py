"""Merges adjacent layer calls into stages, so that a step takes least time and every stage fits its device.

::

    work        3   1   1 | 5 | 2   2         three stages, two cuts: merge(...) == [3, 4]
    boundary              ^   ^               each cut costs both its neighbours its transfer time
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from lightning_lwpm.errors import ConfigurationError
from lightning_lwpm.partition.search import Array, Mask, Search, least

__all__ = ["Feasible", "NothingFits", "merge", "places"]

Feasible = Callable[[int, int], Mask]
"""From stage and number of stages to a matrix: whether calls ``i`` to ``j - 1`` fit the device of that stage."""


class NothingFits(ConfigurationError):
    """No partition into that many stages fits the devices."""


def merge(
    work: Sequence[float],
    boundary_seconds: Sequence[float],
    allowed: Sequence[bool],
    num_stages: int,
    microbatches: int | None = None,
    feasible: Feasible | None = None,
    rounding: float = 1e-9,
) -> list[int]:
    r"""Cut a sequence of layer calls into contiguous, non-empty stages, exactly optimally.

    With cuts :math:`0 = c_0 < c_1 < \dots < c_S = n` the stage :math:`s` takes, for one micro-batch,

    .. math:: t_s = \sum_{i=c_s}^{c_{s+1}-1} work_i + boundary_{c_s} + boundary_{c_{s+1}}

    and no boundary at the two ends. Under ``gpipe`` and ``1f1b`` a step of :math:`m` micro-batches takes, on links
    without latency, one way of a micro-batch through all stages and :math:`m-1` turns of the slowest:

    .. math:: T = (m-1) \max_s t_s + \sum_s t_s = (m-1) \max_s t_s + \sum_i work_i + 2 \sum_s boundary_{c_s}

    This is minimised; of equal times, the least maximum wins. Without ``microbatches`` (infinitely many) the largest
    :math:`t_s` is minimised, and among partitions equal in it the sum of the boundaries.

    Maximum and sum are two objectives, and no dynamic programme over prefixes minimises both: a prefix with a worse
    maximum and cheaper cuts may win once a later stage is slower than both. So one programme finds the least
    maximum :math:`B^*`, and another the least sum :math:`\Sigma(B)` of boundaries of stages that each take at most
    :math:`B`. As :math:`\Sigma` only falls as :math:`B` grows, between the two limits :math:`a < b` no partition
    beats :math:`(m-1) a + 2 \Sigma(b)`: limits are bisected among the times that stages can take, the most promising
    interval first, until none can win.

    Each programme takes :math:`O(S n w)`, where :math:`w` is the largest number of calls in a stage within the
    limit; 2 to 40 runs of the second were seen to suffice. Measured on one core of a shared CPU, calls of various
    random times, the slowest case of each: 500 calls into 4 stages 0.02 s, into 64 stages 0.08 s, with memory limits
    that differ by stage 0.04 s and 0.5 s; with a single micro-batch, where any maximum may win, 0.04 s and 0.3 s, with
    memory limits 0.09 s and 0.7 s. 1000 calls into 64 stages, several micro-batches: 0.2 s, with memory limits 1.1 s.

    Args:
        work: Seconds of each call, forward and backward, for one micro-batch.
        boundary_seconds: Seconds that the cut just before each call costs the stage on either side; entry 0 unused.
        allowed: Whether a stage may begin at each call; entry 0 unused.
        num_stages: Number of stages wanted.
        microbatches: Number of micro-batches of a step; ``None`` for very many.
        feasible: Says what fits the device of a stage: ``feasible(stage, num_stages)[i, j]`` for the calls ``i`` to
            ``j - 1``, of shape (n + 1, n + 1); ``num_stages`` is the number of stages that there will be.
            By default all fits.
        rounding: Times that differ by less than this part of them are equal. Stage times are differences of prefix
            sums: equal ones may differ in the last bits, which must not decide a tie.

    Returns:
        The sorted positions of the first calls of stages 1, 2, ...; fewer than ``num_stages - 1`` of them only
        where there are not enough allowed cuts.

    Raises:
        NothingFits: If no partition is feasible.
        ConfigurationError: If ``num_stages`` or ``microbatches`` is below 1, lengths differ, or a time is negative or
            not finite.
    """
    _check(work, boundary_seconds, allowed, num_stages, microbatches)
    positions = places(allowed)
    num_stages = min(num_stages, len(positions) - 1)
    if num_stages == 0 or (num_stages == 1 and feasible is None):
        return []

    boundary = np.array([0.0, *(boundary_seconds[i] for i in positions[1:-1]), 0.0])
    prefix = np.concatenate([[0.0], np.cumsum(np.asarray(work, dtype=float))])[positions]
    seconds = (prefix[None, :] + boundary[None, :]) - (prefix[:, None] - boundary[:, None])
    seconds[np.tril_indices(len(positions))] = np.inf  # a stage is not empty

    def fits(stage: int) -> Mask:
        assert feasible is not None
        return feasible(stage, num_stages)[np.ix_(positions, positions)]

    def limited(stage: int) -> Array:
        return seconds if feasible is None else np.where(fits(stage), seconds, np.inf)

    maximum = float(least(limited, num_stages, len(positions))[-1][-1])
    if maximum == np.inf:
        raise NothingFits(f"num_stages={num_stages}: no partition of {len(work)} layer calls fits the devices")
    search = Search(seconds, boundary, num_stages, None if feasible is None else fits, rounding)
    found = search.within(maximum) if microbatches is None else search.best(maximum, microbatches - 1)
    return [int(positions[cut]) for cut in found.cuts]


def places(allowed: Sequence[bool]) -> NDArray[np.int64]:
    """The positions between which stages lie: the beginning, the allowed cuts and the end."""
    n = len(allowed)
    return np.array([0, *(i for i in range(1, n) if allowed[i]), *([n] if n else [])], dtype=np.int64)


def _check(
    work: Sequence[float],
    boundary_seconds: Sequence[float],
    allowed: Sequence[bool],
    num_stages: int,
    microbatches: int | None,
) -> None:
    if num_stages < 1:
        raise ConfigurationError(f"num_stages={num_stages!r}: at least one stage is needed")
    if microbatches is not None and microbatches < 1:
        raise ConfigurationError(f"microbatches={microbatches!r}: at least one micro-batch is needed")
    if not len(work) == len(boundary_seconds) == len(allowed):
        raise ConfigurationError(
            f"work, boundary_seconds and allowed must be of one length, "
            f"got {len(work)}, {len(boundary_seconds)} and {len(allowed)}"
        )
    for name, values in (("work", work), ("boundary_seconds", boundary_seconds)):
        for index, value in enumerate(values):
            if not 0 <= value < float("inf"):
                raise ConfigurationError(f"{name}[{index}]={value!r}: a time must be finite and not negative")
