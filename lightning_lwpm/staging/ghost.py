"""What a call of another stage's layer or function returns here, from the record that its stage has told of it.

::

    record of a call     tensors that are new       -> remote tensors, by name
                         an argument returned       -> that very argument
                         views of an argument       -> remote tensors that are made again from it when they are touched
                         arguments changed in place -> these have other values from now on: other names
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lightning_lwpm.staging.placeholder import Placeholder
from lightning_lwpm.staging.record import Key, Record
from lightning_lwpm.staging.remote import Name, Remote
from lightning_lwpm.staging.tree import flatten, unflatten

__all__ = ["NoHandle", "Peers", "like"]


class Peers(Protocol):
    """What a staged step asks of the other stages."""

    def record(self, stage: int, key: Key) -> Record:
        """What the call ``key`` of an earlier stage returned."""

    def value(self, remote: Remote) -> Tensor:
        """The data of a remote tensor, joined to this stage's autograd graph."""


def like(
    record: Record,
    key: Key,
    stage: int,
    arguments: list[Tensor],
    replay: Callable[[], Any] | None,
    device: torch.device,
    owner: Any,
) -> Any:
    """The like of what a call of another stage returned.

    Args:
        record: What that stage has told of the call.
        key: Names the call.
        stage: The stage.
        arguments: The tensors among its arguments, as they are here.
        replay: Makes the call here, on real values; ``None`` where that cannot be.
        device: Of remote tensors.
        owner: The step, which fetches them.
    """
    for i, meta in record.mutated:
        changed = arguments[i]
        if type(changed) is not Remote:
            if isinstance(changed, Placeholder | nn.Parameter):
                continue
            if replay is not None:
                return replay()  # a local tensor is written: it needs the values
            values = Remote(meta, device, Name(*key, -1 - i), stage, owner).materialise()
            with torch.set_grad_enabled(meta.requires_grad and torch.is_grad_enabled()):
                changed.copy_(values)  # joins it to the graph, as the layer has done
            continue
        if changed.base is None:
            changed.label, changed.stage, changed.local = Name(*key, -1 - i), stage, None
            changed.meta = meta
    out: list[Any] = []
    for i, leaf in enumerate(record.leaves):
        if leaf.same >= 0:
            out.append(arguments[leaf.same])
            continue
        new = Remote(leaf.meta, device, Name(*key, i), stage, owner)
        if leaf.view >= 0 and type(arguments[leaf.view]) is Remote:
            if replay is None:
                new.shared = True
            else:
                new.base, new.replay = arguments[leaf.view], _Replay(replay, i)  # type: ignore[assignment]
        out.append(new)
    return unflatten(record.spec, iter(out))


class _Replay:
    """Makes the i-th tensor of a view function's result from materialised arguments."""

    def __init__(self, function: Callable[[], Any], leaf: int) -> None:
        self.function, self.leaf = function, leaf

    def __call__(self) -> Tensor:
        out: list[Tensor] = []
        flatten(self.function(), out)
        return out[self.leaf]


class NoHandle:
    """The handle of a hook that was registered on another stage's tensor."""

    def remove(self) -> None:
        """Nothing to remove here."""
