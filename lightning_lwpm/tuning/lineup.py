"""Which schedules come into question for a number of ranks, and where their stages would lie.

::

    2 ranks      1f1b, gpipe, zb1p    interleaved_1f1b    zbv
    stages       0 1                  0 1 2 3             0 1 2 3
    ranks        1 0                  1 0 1 0             0 1 1 0       the last stage lives on rank 0
"""

from dataclasses import dataclass

from lightning_lwpm.partition.again import again
from lightning_lwpm.partition.cuts import label
from lightning_lwpm.partition.describe import Probe
from lightning_lwpm.partition.plan import PartitionPlan
from lightning_lwpm.pipeline.schedule import POLICIES, place
from lightning_lwpm.tuning.sized import Look
from lightning_lwpm.tuning.wish import Wish

__all__ = ["FEWEST", "MOST", "Lineup", "called_again", "lineups"]

FEWEST = {"interleaved_1f1b": 2, "zbv": 2}
"""The stages that a rank needs for a schedule; one suffices for all others."""

MOST = {"zbv": 2, "sequential": 1, "async": 1}
"""The stages that a rank can have in a schedule; all others take any number."""


@dataclass(frozen=True)
class Lineup:
    """A schedule, and where its stages lie.

    Args:
        schedule: Its name; "" for evaluation.
        ranks: The rank of each stage.
        begins: The layer calls with which stages 1, 2, ... begin; ``None`` where that is left open.
    """

    schedule: str
    ranks: tuple[int, ...]
    begins: tuple[str, ...] | None = None

    @property
    def stages(self) -> int:
        """Number of stages."""
        return len(self.ranks)


def lineups(wish: Wish, num_ranks: int, places: int, train: bool = True) -> list[Lineup]:
    """What comes into question, simple things first.

    Args:
        wish: What the user asked for.
        num_ranks: Number of ranks.
        places: Number of stages into which the step can be cut at most.
        train: Whether there is a backward pass; without one, a rank needs no second stage.
    """
    if wish.ranks is not None and max(wish.ranks) < num_ranks:
        names = [wish.schedule] if wish.schedule != "auto" else ["1f1b", *POLICIES]
        return [Lineup(name if train else "", wish.ranks) for name in dict.fromkeys(names)]
    if not train:
        return [Lineup("", tuple(place(_count(wish, num_ranks, 1, places), num_ranks)))]
    found = []
    for name in ["1f1b", *POLICIES] if wish.schedule == "auto" else [wish.schedule]:
        stages = _count(wish, num_ranks, FEWEST.get(name, 1), places)
        each = stages / min(stages, num_ranks)
        if wish.schedule == "auto" and not FEWEST.get(name, 1) <= each <= MOST.get(name, each):
            continue
        style = "v" if name in POLICIES and POLICIES[name].style == "v" else "loop"
        found.append(Lineup(name, tuple(place(stages, min(stages, num_ranks), style))))
    return list(dict.fromkeys(found))


def called_again(look: Look, seen: Probe, wish: Wish, num_ranks: int) -> list[Lineup]:
    """What comes into question besides where layers are called again later: their stages on one rank.

    Args:
        look: The step.
        seen: Where parameters are used.
        wish: What the user asked for.
        num_ranks: Number of ranks.
    """
    if wish.partition != "auto" or wish.virtual_stages != "auto" or wish.schedule in (*FEWEST, "sequential", "async"):
        return []
    found = again(look.timeline, look.costs.work, seen.parameters.values(), num_ranks)
    if found is None:
        return []
    calls = [look.timeline.calls[cut] for cut in found[0]]
    begins = tuple(label(call.name, call.occurrence) for call in calls)
    names = ("1f1b", "interleaved_1f1b") if wish.schedule == "auto" else (wish.schedule,)
    return [Lineup(name, tuple(found[1]), begins) for name in names]


def _count(wish: Wish, num_ranks: int, each: int, places: int) -> int:
    """Number of stages: what the user says, or else ``each`` a rank, as long as there are places to cut."""
    assert not isinstance(wish.partition, PartitionPlan), "resolve the wish first"
    if not isinstance(wish.partition, str) and (len(wish.partition) + 1) % num_ranks == 0:
        return len(wish.partition) + 1
    return min(num_ranks * (each if wish.virtual_stages == "auto" else wish.virtual_stages), places)
