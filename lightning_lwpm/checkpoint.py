"""Merging state: what lies on other ranks is fetched into rank 0's checkpoint, which is then the one of one device.

All ranks hold a checkpoint of the same structure, because they ran the same code. A placeholder found at a path is
replaced by the tensor that another rank has at the same path; the states of an optimizer are united, because parameter
numbers are the same everywhere. So copies kept by callbacks (averages) and by user hooks are merged too.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from lightning_lwpm.errors import PipelineError
from lightning_lwpm.pipeline.mailbox import Mailbox
from lightning_lwpm.staging.placeholder import is_placeholder

__all__ = ["held_states", "merge_checkpoint"]

Path = tuple[Any, ...]


def merge_checkpoint(mailbox: Mailbox, key: Any, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The whole checkpoint, on rank 0; elsewhere the rank's own.

    Args:
        mailbox: The control connections.
        key: Names this exchange; the same on all ranks.
        checkpoint: This rank's checkpoint.

    Raises:
        PipelineError: if a tensor is held by no rank, naming its path.
    """
    if mailbox.world == 1:
        return checkpoint
    mine = dict(_walk(checkpoint))
    lacking = [path for path, value in mine.items() if is_placeholder(value)]
    states = [set(optimizer["state"]) for optimizer in checkpoint.get("optimizer_states", [])]
    everyone = mailbox.gather(("merge", key), (lacking, states), "all ranks to save a checkpoint")
    wanted = everyone[0][0]
    lacks = [set(part[0]) for part in everyone]
    owners = {path: next((r for r in range(1, mailbox.world) if path not in lacks[r]), None) for path in wanted}
    entries = _entry_owners([part[1] for part in everyone])
    if mailbox.rank != 0:
        for path, owner in owners.items():
            if owner == mailbox.rank:
                if path not in mine:
                    raise PipelineError(f"rank {mailbox.rank} has no {_tell(path)} in its checkpoint, but rank 0 has")
                mailbox.post(0, "state", (key, path), mine[path])
        for (number, index), owner in entries.items():
            if owner == mailbox.rank:
                mailbox.post(0, "state", (key, number, index), checkpoint["optimizer_states"][number]["state"][index])
        return checkpoint
    fetched: dict[Path, Any] = {}
    for path, owner in owners.items():
        if owner is None:
            raise PipelineError(f"{_tell(path)} is held by no rank, so the checkpoint cannot be merged")
        fetched[path] = mailbox.take("state", (key, path), f"{_tell(path)} from rank {owner}")
    merged = _replaced(checkpoint, (), fetched)
    for (number, index), owner in entries.items():
        if owner:
            what = f"the optimizer state of parameter {index} from rank {owner}"
            merged["optimizer_states"][number]["state"][index] = mailbox.take("state", (key, number, index), what)
    for optimizer in merged.get("optimizer_states", []):
        optimizer["state"] = dict(sorted(optimizer["state"].items(), key=lambda item: _order(item[0])))
    return merged


def held_states(saved: Mapping[str, Any], parameters: list[Tensor]) -> dict[str, Any]:
    """A saved optimizer state without the states of parameters that live on other ranks.

    Args:
        saved: The optimizer's saved ``state_dict``.
        parameters: Its parameters, in order.
    """
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    absent = {n for n, parameter in zip(numbers, parameters, strict=False) if is_placeholder(parameter)}
    return {**saved, "state": {n: state for n, state in saved["state"].items() if n not in absent}}


def _entry_owners(states: list[list[set[Any]]]) -> dict[tuple[int, Any], int]:
    """The rank that gives each optimizer state: the first that has it."""
    owners: dict[tuple[int, Any], int] = {}
    for rank, optimizers in enumerate(states):
        for number, indices in enumerate(optimizers):
            for index in indices:
                owners.setdefault((number, index), rank)
    return dict(sorted(owners.items(), key=lambda item: (item[0][0], _order(item[0][1]))))


def _order(index: Any) -> tuple[int, Any]:
    return (0, index) if isinstance(index, int) else (1, str(index))


def _walk(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """All tensors by path. Optimizer states are united as a whole, not here."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _walk(item, (*path, key))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _walk(item, (*path, index))


def _replaced(value: Any, path: Path, fetched: dict[Path, Any]) -> Any:
    """A copy of the containers, with fetched tensors in place; classes and attributes of containers are kept."""
    if path in fetched:
        return fetched[path]
    if isinstance(value, dict):
        new = value.copy()
        for key in value:
            new[key] = _replaced(value[key], (*path, key), fetched)
        return new
    if isinstance(value, list):
        return [_replaced(item, (*path, index), fetched) for index, item in enumerate(value)]
    if isinstance(value, tuple) and any(p[: len(path)] == path for p in fetched):
        items = [_replaced(item, (*path, index), fetched) for index, item in enumerate(value)]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def _tell(path: Path) -> str:
    return "".join(f"[{part!r}]" for part in path)
