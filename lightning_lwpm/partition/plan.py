"""Which stage computes which layer calls, on which rank: found by merging, or given by the user.

::

    timeline      embedding  h.0  h.1 | h.2  h.3  head        partition=["h.2"]
    stage                 0           |       1
    rank                  1           |       0               the last stage lives on rank 0
"""

import difflib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

from rich.markup import escape
from rich.table import Table

from lightning_lwpm.errors import ConfigurationError
from lightning_lwpm.partition.costs import estimate_seconds, transfer_seconds
from lightning_lwpm.partition.merge import merge
from lightning_lwpm.partition.timeline import Timeline

Placement = Callable[[int], Sequence[int]] | Sequence[int]
"""The rank of each stage, or a function from the number of stages to them."""


@dataclass(frozen=True)
class StagePlan:
    """One stage.

    Args:
        index: Number of the stage, from 0 at the model's beginning.
        rank: The rank that executes it.
        calls: Its layer calls, as (name, occurrence), in execution order.
        parameters: Number of (scalar) parameters first used in it.
        parameter_bytes: Their bytes.
        share: Its part of the work of the whole step, from 0 to 1.
        bytes_onward: Bytes alive at its end, which later stages may need; 0 for the last stage.
    """

    index: int
    rank: int
    calls: tuple[tuple[str, int], ...]
    parameters: int
    parameter_bytes: int
    share: float
    bytes_onward: int


@dataclass(frozen=True)
class PartitionPlan:
    """All stages, in execution order.

    Args:
        stages: The stages; fewer than ``num_ranks`` where the model has too few layers.
        num_ranks: Number of ranks; those without a stage stay idle.
    """

    stages: tuple[StagePlan, ...]
    num_ranks: int

    @property
    def cuts(self) -> list[int]:
        """Index in the timeline of the first call of each stage but the first."""
        return list(accumulate(len(stage.calls) for stage in self.stages[:-1]))

    @cached_property
    def stage_of(self) -> dict[tuple[str, int], int]:
        """The stage of each layer call (name, occurrence)."""
        return {call: stage.index for stage in self.stages for call in stage.calls}

    def table(self) -> Table:
        """Draw the plan as a table, one row a stage, and one for each rank that holds none."""
        table = Table("stage", "rank", "layers", title="partition")
        for column in ("parameters", "share of work", "sent onward"):
            table.add_column(column, justify="right")
        for stage, layers in zip(self.stages, self._layers(), strict=True):
            last = stage is self.stages[-1]
            table.add_row(
                str(stage.index),
                str(stage.rank),
                escape(layers),
                _human(stage.parameters, 1000, ("", "K", "M", "B")),
                f"{stage.share:.1%}",
                "-" if last else _human(stage.bytes_onward, 1024, ("B", "KiB", "MiB", "GiB")),
            )
        for rank in sorted(set(range(self.num_ranks)) - {stage.rank for stage in self.stages}):
            table.add_row("-", str(rank), "none", "-", "-", "-")
        return table

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain numbers, strings, lists and dicts, ready for JSON or YAML."""
        stages = [{**asdict(stage), "calls": [list(call) for call in stage.calls]} for stage in self.stages]
        return {"stages": stages, "num_ranks": self.num_ranks}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "PartitionPlan":
        """Build the plan that ``to_dict`` was called on."""
        stages = (
            StagePlan(**{**stage, "calls": tuple((str(name), int(k)) for name, k in stage["calls"])})
            for stage in data["stages"]
        )
        return cls(tuple(stages), data["num_ranks"])

    def _layers(self) -> Iterator[str]:
        """Name the layers of each stage by the largest modules that lie in it as a whole."""
        homes: dict[str, set[int]] = {}
        for stage in self.stages:
            for name, _ in stage.calls:
                for ancestor in _ancestors(name):
                    homes.setdefault(ancestor, set()).add(stage.index)
        for stage in self.stages:
            whole = (next((a for a in _ancestors(name) if len(homes[a]) == 1), name) for name, _ in stage.calls)
            labels = list(dict.fromkeys(whole))
            span = ", ".join(labels) if len(labels) <= 2 else f"{labels[0]} … {labels[-1]}"
            yield f"{span} ({len(stage.calls)} call{'s' if len(stage.calls) != 1 else ''})"


def make_plan(
    timeline: Timeline, num_ranks: int, partition: str | Sequence[str], placement: Placement
) -> PartitionPlan:
    """Partition a timeline over ranks, one stage a rank.

    Args:
        timeline: The layer calls of a step.
        num_ranks: Number of ranks.
        partition: ``"auto"`` for the best balance, or the names of the layers that begin stages 1, 2, ...: of a
            layer that is called, or of any module around such layers (``"model.h.5"``).
        placement: The rank of each stage, or a function from the number of stages to them.

    Returns:
        The plan. With ``"auto"`` it has fewer stages than ranks where the timeline has too few places to cut.

    Raises:
        ConfigurationError: If ``partition`` or ``placement`` does not fit the timeline and the ranks.
    """
    if num_ranks < 1:
        raise ConfigurationError(f"num_ranks={num_ranks!r}: at least one rank is needed")
    if not timeline.calls:
        raise ConfigurationError("the step calls no layer, so there is nothing to partition; is the model empty?")
    work = [estimate_seconds(call.flops, call.bytes_moved) for call in timeline.calls]
    if isinstance(partition, str):
        if partition != "auto":
            raise ConfigurationError(
                f"unknown partition={partition!r}; use 'auto', or a list of the layers that begin a stage, "
                f"such as [{partition!r}]"
            )
        # Activations cross in the forward pass and gradients of the same size in the backward pass.
        boundary = [2 * transfer_seconds(nbytes) for nbytes in timeline.boundary_bytes]
        cuts = merge(work, boundary, timeline.allowed, num_ranks)
    else:
        cuts = _find_cuts(timeline, num_ranks, list(partition))
    ranks = _ranks(placement, len(cuts) + 1, num_ranks)

    edges = [0, *cuts, len(work)]
    total = sum(work)
    stages = []
    for index, (begin, end) in enumerate(pairwise(edges)):
        calls = timeline.calls[begin:end]
        stages.append(
            StagePlan(
                index=index,
                rank=ranks[index],
                calls=tuple((call.name, call.occurrence) for call in calls),
                parameters=sum(call.parameters for call in calls),
                parameter_bytes=sum(call.parameter_bytes for call in calls),
                share=sum(work[begin:end]) / total if total else len(calls) / len(work),
                bytes_onward=timeline.boundary_bytes[end] if end < len(work) else 0,
            )
        )
    return PartitionPlan(tuple(stages), num_ranks)


def _find_cuts(timeline: Timeline, num_ranks: int, names: list[str]) -> list[int]:
    """Return the position at which each name begins, or say what is wrong with the names."""
    if len(names) != num_ranks - 1:
        raise ConfigurationError(
            f"partition={names!r} names {len(names)} layer(s), but {num_ranks} rank(s) need {num_ranks - 1}: "
            f"one for each stage except the first, which begins by itself"
        )
    begins: dict[str, int] = {}
    for index, call in enumerate(timeline.calls):
        for ancestor in _ancestors(call.name):
            begins.setdefault(ancestor, index)
    for name in names:
        if name not in begins:
            raise ConfigurationError(f"partition={names!r}: the step calls no layer {name!r}; {_near(name, begins)}")
        if begins[name] == 0:
            raise ConfigurationError(
                f"partition={names!r}: {name!r} is where the step begins, so the stage before it would be empty; "
                f"leave it out or name a later layer"
            )
    ordered = sorted(names, key=lambda name: begins[name])
    for left, right in pairwise(ordered):
        if begins[left] == begins[right]:
            where = repr(left) if left == right else f"{left!r} and {right!r}"
            raise ConfigurationError(
                f"partition={names!r}: two stages would begin at the same place, {where}; name two different layers"
            )
    if names != ordered:
        raise ConfigurationError(
            f"partition={names!r} is not in the order in which the layers run; write partition={ordered!r}"
        )
    for name in names:
        if not timeline.allowed[begins[name]]:
            places = {begin: place for place, begin in reversed(begins.items()) if begin and timeline.allowed[begin]}
            near = sorted(sorted(places, key=lambda begin: abs(begin - begins[name]))[:3])
            hint = f"the nearest places are {_listed([places[i] for i in near])}" if near else "nor anywhere else"
            raise ConfigurationError(f"partition={names!r}: no stage can begin at {name!r}; {hint}")
    return [begins[name] for name in names]


def _ranks(placement: Placement, num_stages: int, num_ranks: int) -> list[int]:
    ranks = list(placement(num_stages) if callable(placement) else placement)
    if len(ranks) != num_stages:
        raise ConfigurationError(f"placement={ranks!r} places {len(ranks)} stage(s), but there are {num_stages}")
    for rank in ranks:
        if not 0 <= rank < num_ranks:
            raise ConfigurationError(f"placement={ranks!r}: there is no rank {rank!r} among {num_ranks}")
    return ranks


def _ancestors(name: str) -> list[str]:
    """``"a.b.c"`` gives ``["a", "a.b", "a.b.c"]``."""
    return list(accumulate(name.split("."), lambda path, part: f"{path}.{part}"))


def _near(name: str, known: dict[str, int]) -> str:
    # A forgotten prefix ("h.5" for "model.h.5") is the commonest slip, and far off for difflib.
    inside = [candidate for candidate in known if candidate.endswith(f".{name}")]
    near = (inside + [c for c in difflib.get_close_matches(str(name), known) if c not in inside])[:3]
    return f"did you mean {_listed(near)}?" if near else f"it begins with {_listed(list(known)[:3])}"


def _listed(names: list[str]) -> str:
    return ", ".join(map(repr, names))


def _human(value: float, base: int, units: tuple[str, ...]) -> str:
    """``_human(3_200_000, 1000, ("", "K", "M"))`` gives ``"3.2 M"``."""
    text = f"{value:.0f} {units[0]}"
    for unit in units[1:]:
        if value < base - 0.05:  # what would be rounded up to the base belongs to the next unit
            break
        value /= base
        text = f"{value:.1f} {unit}"
    return text.strip()
