"""Who gives what to a checkpoint, and the merged one: all of it on rank 0, as one device would have it.

All ranks hold a checkpoint of the same structure, because they ran the same code. A placeholder found at a path is
replaced by the tensor that another rank has at the same path; the states of an optimizer are united, because parameter
numbers are the same everywhere. So copies kept by callbacks (averages) and by user hooks are merged too.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_lwpm.errors import PipelineError
from lightning_lwpm.pipeline.mailbox import Mailbox
from lightning_lwpm.staging.placeholder import is_placeholder
from lightning_lwpm.state.tree import Path, replaced, tell, walk

__all__ = ["Shares", "agree", "held_states", "merge_checkpoint", "place_of", "unite"]

Entry = tuple[int, Any]
"""Number of an optimizer, and the key of one of its states."""


@dataclass(frozen=True)
class Shares:
    """Who gives what that rank 0 has not.

    Attributes:
        owners: By the path of a placeholder, the rank that gives the tensor.
        entries: The rank that gives each optimizer state.
    """

    owners: Mapping[Path, int]
    entries: Mapping[Entry, int]

    def given(self, rank: int, checkpoint: Mapping[str, Any]) -> Iterator[tuple[Path, Any]]:
        """What a rank other than 0 gives of its checkpoint: tensors, and whole optimizer states."""
        mine = dict(walk(checkpoint))
        for path, owner in self.owners.items():
            if owner == rank:
                if path not in mine:
                    raise PipelineError(f"rank {rank} has no {tell(path)} in its checkpoint, but rank 0 has")
                yield path, mine[path]
        for (number, index), owner in self.entries.items():
            if owner == rank:
                yield _path(number, index), checkpoint["optimizer_states"][number]["state"][index]


def agree(mailbox: Mailbox, key: Any, checkpoint: Mapping[str, Any]) -> Shares:
    """All ranks tell what they have.

    Raises:
        PipelineError: if a tensor is held by no rank, naming its path.
    """
    lacking = [path for path, value in walk(checkpoint) if is_placeholder(value)]
    states = [set(optimizer["state"]) for optimizer in checkpoint.get("optimizer_states", [])]
    everyone = mailbox.gather(("merge", key), (lacking, states), "all ranks to save a checkpoint")
    lacks = [set(part[0]) for part in everyone]
    owners: dict[Path, int] = {}
    for path in everyone[0][0]:
        owner = next((r for r in range(1, mailbox.world) if path not in lacks[r]), None)
        if owner is None:
            raise PipelineError(f"{tell(path)} is held by no rank, so the checkpoint cannot be merged")
        owners[path] = owner
    return Shares(owners, _entry_owners([part[1] for part in everyone]))


def merge_checkpoint(mailbox: Mailbox, key: Any, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The whole checkpoint, on rank 0 and in its host's memory; elsewhere the rank's own.

    Args:
        mailbox: The control connections.
        key: Names this exchange; the same on all ranks.
        checkpoint: This rank's checkpoint.

    Raises:
        PipelineError: if a tensor is held by no rank, naming its path.
    """
    if mailbox.world == 1:
        return checkpoint
    shares = agree(mailbox, key, checkpoint)
    if mailbox.rank != 0:
        posted: dict[Any, Path] = {}
        for path, value in shares.given(mailbox.rank, checkpoint):
            # weights under several names stay one tensor in the file
            first = posted.setdefault(place_of(value), path) if isinstance(value, Tensor) and value.numel() else path
            mailbox.post(0, "state", (key, path), (first, value if first == path else None))
        return checkpoint
    fetched: dict[Path, Any] = {}
    for path, owner in [*shares.owners.items(), *((_path(*entry), owner) for entry, owner in shares.entries.items())]:
        if owner:
            first, value = mailbox.take("state", (key, path), f"{tell(path)} from rank {owner}", owner)
            fetched[path] = fetched.get(first, value)
    entries = {entry: fetched[_path(*entry)] for entry, owner in shares.entries.items() if owner}
    hosted: dict[Any, Tensor] = {}

    def whole(path: Path, tensor: Tensor) -> Tensor:
        if path in fetched or tensor.device.type == "cpu":
            return fetched.get(path, tensor)
        place = place_of(tensor) if tensor.numel() else path  # weights under several names stay one tensor
        if place not in hosted:
            hosted[place] = tensor.detach().cpu()
        return hosted[place]

    return unite(replaced(checkpoint, whole), entries)


def unite(checkpoint: dict[str, Any], entries: Mapping[Entry, Any]) -> dict[str, Any]:
    """Put other ranks' optimizer states into a checkpoint's, in the order of one device."""
    for (number, index), state in entries.items():
        checkpoint["optimizer_states"][number]["state"][index] = state
    for optimizer in checkpoint.get("optimizer_states", []):
        optimizer["state"] = dict(sorted(optimizer["state"].items(), key=lambda item: _order(item[0])))
    return checkpoint


def held_states(saved: Mapping[str, Any], parameters: list[Tensor]) -> dict[str, Any]:
    """A saved optimizer state without the states of parameters that live on other ranks.

    Args:
        saved: The optimizer's saved ``state_dict``.
        parameters: Its parameters, in order.
    """
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    absent = {n for n, parameter in zip(numbers, parameters, strict=False) if is_placeholder(parameter)}
    return {**saved, "state": {n: state for n, state in saved["state"].items() if n not in absent}}


def _path(number: int, index: Any) -> Path:
    return "optimizer_states", number, "state", index


def place_of(tensor: Tensor) -> Any:
    """Where a tensor lies: alike for tensors that are the same."""
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _entry_owners(states: list[list[set[Any]]]) -> dict[Entry, int]:
    """The rank that gives each optimizer state: the first that has it."""
    owners: dict[Entry, int] = {}
    for rank, optimizers in enumerate(states):
        for number, indices in enumerate(optimizers):
            for index in indices:
                owners.setdefault((number, index), rank)
    return dict(sorted(owners.items(), key=lambda item: (item[0][0], _order(item[0][1]))))


def _order(index: Any) -> tuple[int, Any]:
    return (0, index) if isinstance(index, int) else (1, str(index))
