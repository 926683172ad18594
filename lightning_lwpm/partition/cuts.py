"""Finds the places that a user has named in a timeline, or says what is wrong with the names."""

import difflib
from itertools import accumulate, pairwise

from lightning_lwpm.errors import ConfigurationError
from lightning_lwpm.partition.timeline import Timeline

__all__ = ["ancestors", "find_cuts", "label"]


def label(name: str, occurrence: int) -> str:
    """What a user writes for a call of a layer: ``"h.1"``, and ``"h.1@2"`` where it is called for the third time."""
    return f"{name}@{occurrence}" if occurrence else name


def find_cuts(timeline: Timeline, num_ranks: int, names: list[str]) -> list[int]:
    """The position at which each named stage begins.

    Args:
        timeline: The layer calls of a step.
        num_ranks: Number of stages.
        names: For stages 1, 2, ... the layer with which it begins, any module around such layers (``"model.h.5"``), or
            a later call of a layer (``"tower@1"``).

    Raises:
        ConfigurationError: saying what is wrong with the names.
    """
    if len(names) != num_ranks - 1:
        raise ConfigurationError(
            f"partition={names!r} names {len(names)} layer(s), but {num_ranks} rank(s) need {num_ranks - 1}: "
            f"one for each stage except the first, which begins by itself"
        )
    begins: dict[str, int] = {}
    for index, call in enumerate(timeline.calls):
        for ancestor in ancestors(call.name) + ancestors(_as_written(call.name)):
            begins.setdefault(ancestor, index)
    # a layer that is also a module around others: its own call counts
    begins |= {label(call.name, call.occurrence): index for index, call in enumerate(timeline.calls)}
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


def ancestors(name: str) -> list[str]:
    """A name and the names of all modules around it: ``"a.b.c"`` gives ``["a", "a.b", "a.b.c"]``."""
    return list(accumulate(name.split("."), lambda path, part: f"{path}.{part}"))


def _as_written(name: str) -> str:
    """A name without what ``torch.compile`` puts into it: users write ``net.h.5`` for ``net._orig_mod.h.5``."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def _near(name: str, known: dict[str, int]) -> str:
    # A forgotten prefix ("h.5" for "model.h.5") is the commonest slip, and far off for difflib.
    inside = [candidate for candidate in known if candidate.endswith(f".{name}")]
    near = (inside + [c for c in difflib.get_close_matches(str(name), known) if c not in inside])[:3]
    return f"did you mean {_listed(near)}?" if near else f"it begins with {_listed(list(known)[:3])}"


def _listed(names: list[str]) -> str:
    return ", ".join(map(repr, names))
