"""Says why no partition fits the devices, by how much, and which changes would help; each has been tried."""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from lightning_lwpm.partition.memory import Memory
from lightning_lwpm.partition.merge import places
from lightning_lwpm.partition.search import Array, least, trace
from lightning_lwpm.partition.units import human_bytes

__all__ = ["Alternative", "closest", "explain", "fits"]


class Alternative(NamedTuple):
    """Something that the user could change.

    Attributes:
        change: What to write or do: ``"num_microbatches=16"``, ``"8 devices"``.
        memory: What stages need then.
        num_stages: The number of stages then.
    """

    change: str
    memory: Memory
    num_stages: int


def explain(
    memory: Memory,
    num_stages: int,
    allowed: Sequence[bool],
    labels: Sequence[str],
    alternatives: Sequence[Iterable[Alternative]] = (),
) -> str:
    """The text of an error: what is missing in the partition that comes closest, and what would fit.

    Args:
        memory: What stages need; no partition fits.
        num_stages: Number of stages wanted.
        allowed: Whether a stage may begin at each call; entry 0 unused.
        labels: What the user calls each call.
        alternatives: Groups of changes, each of one kind, the smallest change first: the first of a group that fits is
            named, or its last one if none does. A group may be lazy.

    Returns:
        One line for each stage, one for what would fit, and one for what would not.
    """
    edges = [0, *closest(memory, num_stages, allowed), len(allowed)]
    lines = ["the model does not fit its devices; the partition that comes closest is"]
    for stage, (begin, end) in enumerate(pairwise(edges)):
        layers = labels[begin] if end == begin + 1 else f"{labels[begin]} … {labels[end - 1]}"
        lines.append(f"  stage {stage} ({layers}) {_needs(memory, stage, len(edges) - 1, begin, end)}")
    working: list[str] = []
    failing: list[str] = []
    for group in alternatives:
        tried = None
        for tried in group:
            if fits(tried.memory, tried.num_stages, allowed):
                working.append(tried.change)
                break
        else:
            failing += [tried.change] if tried else []
    if working:
        lines.append(f"it would fit with {', or with '.join(working)}")
    if failing:
        lines.append(f"it would not fit with {', nor with '.join(failing)}")
    if not working:
        lines.append("use devices with more memory, or a smaller model or batch")
    return "\n".join(lines)


def fits(memory: Memory, num_stages: int, allowed: Sequence[bool]) -> bool:
    """Whether some partition into that many stages, or as many as there are places to cut, fits the devices."""
    positions = places(allowed)
    num_stages = min(num_stages, len(positions) - 1)
    reached = positions == 0
    for stage in range(num_stages):
        feasible = memory.feasible(stage, num_stages)
        reached = feasible[np.ix_(positions[reached], positions)].any(axis=0)
    return bool(reached[-1])


def closest(memory: Memory, num_stages: int, allowed: Sequence[bool]) -> list[int]:
    """The partition whose worst stage needs the least part of its device; then that with the least sum of excesses.

    Returns:
        The positions of the first calls of all stages but the first.
    """
    positions = places(allowed)
    num_stages = min(num_stages, len(positions) - 1)

    def load(stage: int) -> Array:
        """The part of its device that a stage needs, by (begin, end); infinite where that is no stage."""
        loads = memory.need(stage, num_stages)[np.ix_(positions, positions)] / memory.limit(stage, num_stages)
        loads[np.tril_indices(len(positions))] = np.inf
        return loads

    worst = least(load, num_stages, len(positions))[-1][-1]

    def excess(stage: int) -> Array:
        loads = load(stage)
        return np.where(loads <= worst, np.maximum(loads - 1, 0), np.inf)

    totals = least(excess, num_stages, len(positions), np.add)
    cuts = trace(num_stages, len(positions) - 1, lambda stage, end: totals[stage] + excess(stage)[:, end])
    return [int(positions[cut]) for cut in cuts]


def _needs(memory: Memory, stage: int, num_stages: int, begin: int, end: int) -> str:
    """``needs 11.3 GiB: weights 6.1 GiB, ...; its device has 8.0 GiB``."""
    parts = memory.breakdown(stage, num_stages, begin, end)
    flying = memory.in_flight(stage, num_stages)
    of = {"activations": f" of {flying} micro-batch{'es' if flying != 1 else ''}"}
    listed = ", ".join(f"{name}{of.get(name, '')} {human_bytes(part)}" for name, part in parts.items() if part)
    limit = memory.limit(stage, num_stages)
    has = f"its device has {human_bytes(limit)}" if np.isfinite(limit) else "its device has no limit"
    total = sum(parts.values())
    return f"needs {human_bytes(total)}{': ' if listed else ''}{listed}; {has}{', too little' if total > limit else ''}"
