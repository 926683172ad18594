"""The words that schedules are written in: an action, what it waits for and what it costs.

::

    2F3  forward       needs 1F3                 2I3  gradient of the input   needs 2F3 and 3I3
    2B3  backward      needs 2F3 and 3B3         2W3  gradient of the weights needs 2I3

A micro-batch's backward pass in a stage is B, or I and W in its place.
"""

import re
from collections.abc import Callable, Container
from typing import NamedTuple

from lightning_lwpm.errors import ConfigurationError


class Action(NamedTuple):
    """One unit of work of one rank, printed as ``2F3``: stage 2, forward, micro-batch 3.

    Args:
        kind: ``"F"`` forward, ``"B"`` backward, or its two parts: ``"I"`` the gradient of the input, which the stage
            before waits for, and ``"W"`` the gradient of the weights, which nobody waits for.
        stage: Number of the stage, from 0 at the model's beginning.
        microbatch: Number of the micro-batch, from 0.
    """

    kind: str
    stage: int
    microbatch: int

    def __repr__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"

    @classmethod
    def parse(cls, text: str) -> "Action":
        """Read the notation back: ``Action.parse("2F3") == Action("F", 2, 3)``.

        Raises:
            ConfigurationError: If ``text`` is not of this form.
        """
        match = re.fullmatch(r"(\d+)([A-Z])(\d+)", text.strip())
        if match is None:
            raise ConfigurationError(f"{text!r} is no action; write stage, kind, micro-batch, such as '2F3'")
        return cls(match[2], int(match[1]), int(match[3]))


Table = list[list[Action]]
Costs = Callable[[Action], float]
Latency = float | Callable[[Action], float]
"""Seconds from the end of an action to the arrival of its result on another rank."""

UNITS = {"F": 1.0, "B": 2.0, "I": 1.0, "W": 1.0}


def unit(action: Action) -> float:
    """Return the time of an action in units of a forward pass: 1 for F, I and W, 2 for B."""
    return UNITS[action.kind]


def delay(latency: Latency, source: Action) -> float:
    """Return the time that the result of ``source`` takes to another rank."""
    return latency(source) if callable(latency) else latency


def dependencies(action: Action, num_stages: int, present: Container[Action] = ()) -> list[Action]:
    """Return the actions whose end an action waits for, in the order of the flow of data.

    ``F(s, m)`` waits for ``F(s-1, m)``; ``B(s, m)`` for ``F(s, m)`` and ``B(s+1, m)``, and ``I`` likewise for ``F``
    and ``I``; ``W(s, m)`` for ``I(s, m)``.

    Args:
        action: What waits.
        num_stages: Number of stages.
        present: The actions of a table that has both whole and split backward passes: what B or I waits for is then
            whichever of the two the next stage has.
    """
    kind, stage, microbatch = action
    if kind == "F":
        return [Action("F", stage - 1, microbatch)] if stage > 0 else []
    if kind == "W":
        return [Action("I", stage, microbatch)]
    own = [Action("F", stage, microbatch)]
    return [*own, present_one(Action(kind, stage + 1, microbatch), present)] if stage < num_stages - 1 else own


def present_one(action: Action, present: Container[Action]) -> Action:
    """Return ``action``, or the other one of B and I (which pass on the same gradient) if only that one is present."""
    other = action._replace(kind={"B": "I", "I": "B"}.get(action.kind, action.kind))
    return other if action not in present and other in present else action
