"""The state of corrections in checkpoints: by name of the weights, so that any other number of stages can go on.

A correction keeps lists with one tensor for each of its stage's weights. In a checkpoint they are dicts by name, and
the dicts of all stages are one.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lightning_lwpm.pipeline.mailbox import Mailbox

__all__ = ["by_name", "collected", "in_order", "merged"]

_MARK = "by name"


def by_name(state: Any, names: Sequence[str]) -> Any:
    """A stage's state with each list of tensors as a dict by name."""
    if isinstance(state, dict):
        return {key: by_name(value, names) for key, value in state.items()}
    if isinstance(state, list):
        if all(isinstance(item, Tensor) for item in state):
            return {_MARK: {name: tensor.cpu() for name, tensor in zip(names, state, strict=bool(state))}}
        return [by_name(item, names) for item in state]
    return state


def merged(states: Sequence[Any]) -> Any:
    """The states of all stages in one; numbers are alike on all."""
    first = states[0] if states else None
    if isinstance(first, dict):
        if _MARK in first:
            return {_MARK: {name: tensor for state in states for name, tensor in state[_MARK].items()}}
        return {key: merged([state[key] for state in states]) for key in first}
    if isinstance(first, list):
        return [merged([state[i] for state in states]) for i in range(len(first))]
    return max(states) if states else None


def collected(mailbox: Mailbox, key: Any, own: Any) -> Any:
    """On rank 0 the states of all ranks in one; all ranks take part.

    Args:
        mailbox: The control connections.
        key: Names this exchange.
        own: The state of this rank by name; ``None`` if it has none.
    """
    if mailbox.rank:
        mailbox.post(0, "corrections", (key, mailbox.rank), own)
        return None
    states = [own]
    for rank in range(1, mailbox.world):
        states.append(
            mailbox.take("corrections", (key, rank), f"the state of the corrections of {mailbox.names[rank]}")
        )
    return merged([state for state in states if state is not None])


def in_order(state: Any, names: Sequence[str]) -> Any:
    """A stage's state from that of all; a list is empty where a weight is missing: what it was kept for begins anew."""
    if isinstance(state, dict):
        if _MARK in state:
            found = state[_MARK]
            return [found[name] for name in names] if all(name in found for name in names) else []
        return {key: in_order(value, names) for key, value in state.items()}
    if isinstance(state, list):
        return [in_order(item, names) for item in state]
    return state
