"""Spans of time: what each rank did or waited for, planned by a schedule or measured in a run.

::

    action                     |--------------- 2F3 ---------------|
    waits of the same thread        |-- wait --|
    spans                      | 2F3|-- wait --|-------- 2F3 -------|     the longest piece carries the number
"""

import re
from bisect import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain

from lightning_lwpm.pipeline.schedule import Action, Costs, Latency, Table, delay, dependencies
from lightning_lwpm.pipeline.simulate import Simulation

__all__ = ["COMPUTE", "KINDS", "Panel", "Span", "bubble", "busy", "longest_pieces", "measured", "planned", "reason"]

COMPUTE = ("F", "B", "I", "W")
"""Kinds of span that are work of a schedule."""

KINDS = {
    "F": "forward",
    "B": "backward",
    "I": "gradient of inputs",
    "W": "gradient of weights",
    "optimizer": "optimizer, loss to all ranks",
    "data": "data, between batches",
    "wait": "wait",
}
"""All kinds of span, in words."""


@dataclass(frozen=True)
class Span:
    """A stretch of time of one rank's main thread; spans of a rank do not overlap.

    Args:
        rank: The rank.
        name: What it is, in few letters: ``"2F3"``, or what is waited for: ``"activation"``, ``"gradient"``,
            ``"optimizer"``, ``"data"``, ``"other"``.
        kind: One of ``KINDS``.
        stage: The stage that works, or that is waited for; -1 for none.
        microbatch: The micro-batch; -1 for none.
        begin: When it begins, in seconds (or units of time) from the beginning of the timeline.
        end: When it ends.
        what: Of a wait, what was waited for, in words.
        batch: The batch.
    """

    rank: int
    name: str
    kind: str
    stage: int
    microbatch: int
    begin: float
    end: float
    what: str = ""
    batch: int = 0

    @property
    def seconds(self) -> float:
        """How long it is."""
        return self.end - self.begin

    def moved(self, by: float) -> "Span":
        """The same span, so much later."""
        return replace(self, begin=self.begin + by, end=self.end + by)


@dataclass(frozen=True)
class Panel:
    """Spans of all ranks that belong together, such as those of one schedule.

    Args:
        title: What they are.
        spans: The spans.
        ranks: The rank of each stage.
        num_ranks: Number of ranks.
    """

    title: str
    spans: tuple[Span, ...]
    ranks: tuple[int, ...]
    num_ranks: int


def planned(table: Table, placement: Sequence[int], run: Simulation, seconds: Costs, latency: Latency) -> list[Span]:
    """The spans of a table that was simulated, with its waits.

    A rank waits before an action for whichever result comes last. What is left idle behind the last action of a rank is
    no wait.

    Args:
        table: The actions of each rank.
        placement: The rank of each stage.
        run: What ``simulate`` found, with the same times.
        seconds: Time of each action.
        latency: Time that a result takes to another rank.
    """
    spans = []
    present = frozenset(chain.from_iterable(table))
    for rank, actions in enumerate(table):
        free = 0.0
        for action in actions:
            begin = run.starts[action]
            end = begin + seconds(action)
            foreign = [a for a in dependencies(action, len(placement), present) if placement[a.stage] != rank]
            if begin > free and foreign:
                arrivals = {a: run.starts[a] + seconds(a) + delay(latency, a) for a in foreign}
                source = max(arrivals, key=lambda a: arrivals[a])
                name = "activation" if source.kind == "F" else "gradient"
                what = f"the {name} of micro-batch {source.microbatch} from stage {source.stage}"
                spans.append(Span(rank, name, "wait", source.stage, source.microbatch, free, begin, what))
            spans.append(Span(rank, str(action), action.kind, action.stage, action.microbatch, begin, end))
            free = end
    return spans


def measured(
    rank: int,
    actions: Iterable[tuple[Action, float, float]],
    others: Iterable[tuple[str, float, float]],
    waits: Iterable[tuple[str, float, float]],
    batch: int = 0,
    on_device: bool = False,
) -> list[Span]:
    """The spans of one rank in one batch, in order. While one computes, it does not wait.

    Args:
        rank: The rank.
        actions: What it computed, with begin and end, waits included: ``Engine.record``.
        others: Other stretches of time, by kind: ``("optimizer", begin, end)``.
        waits: What its main thread waited for, with begin and end: ``Mailbox.waits``.
        batch: Number of the batch.
        on_device: Whether a device computed, which goes on while the main thread waits: what it did is no wait then.
    """
    pauses = sorted((begin, end, what) for what, begin, end in waits)
    whole = [Span(rank, str(a), a.kind, a.stage, a.microbatch, begin, end, "", batch) for a, begin, end in actions]
    whole += [Span(rank, kind, kind, -1, -1, begin, end, "", batch) for kind, begin, end in others]
    idle = []
    for begin, end, what in pauses:
        stage, microbatch = _number("stage", what), _number("micro-batch", what)
        idle.append(Span(rank, reason(what), "wait", stage, microbatch, begin, end, what, batch))
    spans = whole + _outside(idle, whole) if on_device else _outside(whole, idle) + idle
    return sorted(spans, key=lambda span: span.begin)


def _outside(spans: Iterable[Span], others: Iterable[Span]) -> list[Span]:
    """The pieces of spans that lie in none of others, which do not overlap."""
    others = sorted(others, key=lambda span: span.begin)
    begins, ends = [span.begin for span in others], [span.end for span in others]
    return [piece for span in spans for piece in _without(span, begins, ends)]


def _without(span: Span, begins: Sequence[float], ends: Sequence[float]) -> list[Span]:
    """The pieces of a span that lie in no pause; pauses are in order and do not overlap."""
    pieces, begin = [], span.begin
    for i in range(bisect(ends, span.begin), bisect(begins, span.end)):
        if begins[i] > begin:
            pieces.append(replace(span, begin=begin, end=begins[i]))
        begin = ends[i]
    if begin < span.end:
        pieces.append(replace(span, begin=begin))
    return pieces


def reason(what: str) -> str:
    """What kind of thing is waited for: ``"activation"``, ``"gradient"``, ``"optimizer"``, ``"data"``, or ``"other"``.

    Args:
        what: The words in which a wait is explained to people.
    """
    return next((name for name, words in _REASONS.items() if what.startswith(words)), "other")


# In this order: the norms of gradients are waited for in the optimizer's step.
_REASONS = {
    "optimizer": ("the gradient norms", "the loss of this batch", "what a hook of rank 0"),
    "gradient": ("the gradient", "the shared gradients", "the end of backward"),
    "activation": ("the activation", "the end of forward", "the shapes of stage"),
    "data": ("batch ", "word from rank 0 whether", "leaf "),
}


def _number(word: str, what: str) -> int:
    found = re.search(rf"\b{word} (\d+)", what)
    return int(found[1]) if found else -1


def longest_pieces(spans: Iterable[Span]) -> dict[tuple[int, Action], Span]:
    """By batch and action, the longest of the pieces into which waits have cut the action."""
    longest: dict[tuple[int, Action], Span] = {}
    for span in spans:
        if span.kind in COMPUTE:
            key = (span.batch, Action(span.kind, span.stage, span.microbatch))
            if key not in longest or span.seconds > longest[key].seconds:
                longest[key] = span
    return longest


def busy(spans: Iterable[Span]) -> float:
    """The time in which a schedule's work was done, summed over ranks."""
    return sum(span.seconds for span in spans if span.kind in COMPUTE)


def bubble(spans: Iterable[Span]) -> float:
    """The idle part, from 0 to 1, of the ranks that have a stage: 1 - busy / (ranks x time of a batch).

    The time of a batch goes from the begin of its first action to the end of its last one, over all ranks. Of several
    batches the sum of the work and the sum of the times count.
    """
    batches: dict[int, list[Span]] = {}
    for span in spans:
        if span.kind in COMPUTE:
            batches.setdefault(span.batch, []).append(span)
    capacity = sum(
        (max(s.end for s in batch) - min(s.begin for s in batch)) * len({s.rank for s in batch})
        for batch in batches.values()
    )
    return 1.0 - sum(map(busy, batches.values())) / capacity if capacity else 0.0
