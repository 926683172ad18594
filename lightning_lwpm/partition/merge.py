"""Merges adjacent layer calls into stages, so that the slowest stage is as fast as can be.

::

    work        3   1   1 | 5 | 2   2         three stages, two cuts: merge(...) == [3, 4]
    boundary              ^   ^               each cut costs both its neighbours its transfer time
"""

from collections.abc import Sequence

import numpy as np

from lightning_lwpm.errors import ConfigurationError

# Stage times are differences of prefix sums: equal ones may differ in the last bits, which must not decide a tie.
_ROUNDING = 1e-9


def merge(
    work: Sequence[float], boundary_seconds: Sequence[float], allowed: Sequence[bool], num_stages: int
) -> list[int]:
    r"""Cut a sequence of layer calls into contiguous, non-empty stages, exactly optimally.

    With cuts :math:`0 = c_0 < c_1 < \dots < c_S = n` the stage :math:`s` takes

    .. math:: t_s = \sum_{i=c_s}^{c_{s+1}-1} work_i + boundary_{c_s} + boundary_{c_{s+1}}

    and no boundary at the two ends. The largest :math:`t_s` is minimised; among partitions equal in it, the sum of
    the boundaries. Two dynamic programmes over (stages, end of the last stage) do so, one for each objective: a
    single one over the pair would be wrong, because a prefix with a worse maximum and cheaper cuts may win once a
    later stage is slower than both. Time :math:`O(S n^2)`, vectorised over :math:`n^2`; memory :math:`O(n^2 + S n)`.

    Args:
        work: Seconds of each call.
        boundary_seconds: Seconds that the cut just before each call costs the stage on either side; entry 0 unused.
        allowed: Whether a stage may begin at each call; entry 0 unused.
        num_stages: Number of stages wanted.

    Returns:
        The sorted positions of the first calls of stages 1, 2, ...; fewer than ``num_stages - 1`` of them only
        where there are not enough allowed cuts.

    Raises:
        ConfigurationError: If ``num_stages`` is below 1, lengths differ, or a time is negative or not finite.
    """
    _check(work, boundary_seconds, allowed, num_stages)
    ends = np.array([i for i in range(1, len(work)) if allowed[i]] + [len(work)])
    num_stages = min(num_stages, len(ends))
    if num_stages <= 1:
        return []

    # Position 0 is the beginning, position -1 the end; seconds[i, j] is the stage between positions i and j.
    positions = np.concatenate([[0], ends])
    boundary = np.array([0.0, *(boundary_seconds[i] for i in ends[:-1]), 0.0])
    prefix = np.concatenate([[0.0], np.cumsum(np.asarray(work, dtype=float))])[positions]
    seconds = (prefix[None, :] + boundary[None, :]) - (prefix[:, None] - boundary[:, None])
    seconds[np.tril_indices(len(positions))] = np.inf  # a stage is not empty

    bottleneck = seconds[0]  # the least maximum of stages that cover everything up to each position
    for _ in range(num_stages - 1):
        bottleneck = np.maximum(bottleneck[:, None], seconds).min(axis=0)
    limit = bottleneck[-1] * (1 + _ROUNDING)

    step = np.where(seconds <= limit, boundary[None, :], np.inf)
    total = step[0]  # the least sum of boundaries, of stages within the limit
    choices = []
    for _ in range(num_stages - 1):
        candidates = total[:, None] + step
        choice = candidates.argmin(axis=0)
        total = np.take_along_axis(candidates, choice[None, :], axis=0)[0]
        choices.append(choice)

    cuts = []
    position = len(positions) - 1
    for choice in reversed(choices):
        position = int(choice[position])
        cuts.append(int(positions[position]))
    return cuts[::-1]


def _check(work: Sequence[float], boundary_seconds: Sequence[float], allowed: Sequence[bool], num_stages: int) -> None:
    if num_stages < 1:
        raise ConfigurationError(f"num_stages={num_stages!r}: at least one stage is needed")
    if not len(work) == len(boundary_seconds) == len(allowed):
        raise ConfigurationError(
            f"work, boundary_seconds and allowed must be of one length, "
            f"got {len(work)}, {len(boundary_seconds)} and {len(allowed)}"
        )
    for name, values in (("work", work), ("boundary_seconds", boundary_seconds)):
        for index, value in enumerate(values):
            if not 0 <= value < float("inf"):
                raise ConfigurationError(f"{name}[{index}]={value!r}: a time must be finite and not negative")
