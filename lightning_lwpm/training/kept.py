"""Tensors that the user's module and callbacks keep beside the model, such as averages of its weights.

A rank computes what follows from its own weights, so that of ``{name: average}`` it has values where it has the weight,
and placeholders elsewhere. What was kept whole (loaded from a checkpoint, or by an earlier run) is partitioned like the
model when a run begins, where it is like the weights; and all of it is whole again when the run ends.

Lists, dicts and modules in attributes are looked through, and objects that have such in theirs.
"""

from collections.abc import Collection, Iterable, Iterator, MutableMapping
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn

from lightning_lwpm.pipeline.mailbox import Mailbox
from lightning_lwpm.staging.placeholder import COPIED, LEFT, is_placeholder, placeholder_like
from lightning_lwpm.state.tree import Path

__all__ = ["Kept"]

_DEEP = 6
_MANY = 1000
"""What has more items, and no tensor as its first one, is data of the user's: to look through it takes long."""
_LIGHTNINGS = frozenset(vars(LightningModule()))  # attributes of any LightningModule
_NO_CONTAINERS = (Tensor, str, int, float, type, Trainer, LightningDataModule, Callback)

Slot = tuple[Path, Any, Any, Tensor]
"""A path, and the tensor that a container has at a key."""


class Kept:
    """What some places keep.

    Args:
        module: The model, which is not looked at itself.
        places: The module and callbacks, in the same order on all ranks.
    """

    def __init__(self, module: nn.Module, places: Iterable[LightningModule | Callback]) -> None:
        self.module, self.places = module, list(places)

    def lacking(self, more: Any = None) -> list[Path]:
        """The paths of tensors that other ranks have.

        Args:
            more: Something else to look through.
        """
        return [path for path, _, _, tensor in self._slots(more) if is_placeholder(tensor)]

    def at(self, paths: Collection[Path], more: Any = None) -> dict[Path, Tensor]:
        """The tensors at some paths, placeholders included.

        Args:
            paths: The paths.
            more: Something else to look through.
        """
        return {path: tensor for path, _, _, tensor in self._slots(more) if path in paths} if paths else {}

    def partition(self) -> None:
        """Put placeholders into what is like the weights, where the model has placeholders."""
        weights: dict[Any, Tensor] = {k: t for k, t in self.module.state_dict(keep_vars=True).items() if _tensor(t)}
        parameters = list(self.module.parameters())
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        for _, container in self._containers():
            if isinstance(container, MutableMapping):
                like = weights
            else:
                forms = (form for form in (parameters, trained) if len(form) == len(container))
                like = next((dict(enumerate(f)) for f in forms if all(map(_alike, container, f))), {})
            for key, tensor in _items(container):
                if is_placeholder(like.get(key)) and _alike(tensor, like[key]):
                    container[key] = placeholder_like(tensor)

    def gather(self, mailbox: Mailbox, key: Any, everywhere: bool) -> None:
        """Bring together at the end of a run what each rank has a share of.

        Args:
            mailbox: The control connections.
            key: Names this exchange; the same on all ranks.
            everywhere: Whether all ranks are to have it, or rank 0 alone.
        """
        everyone = [frozenset(p) for p in mailbox.gather(("kept", key), self.lacking(), "all ranks to end the run")]
        slots = {path: slot for path, *slot in self._slots()} if any(everyone) else {}
        made: dict[int, Tensor] = {}  # a tensor that is kept in several places
        for path in sorted(frozenset.union(*everyone), key=repr):
            owner = next((rank for rank, lacks in enumerate(everyone) if path not in lacks), None)
            takers = [rank for rank, lacks in enumerate(everyone) if path in lacks and (everywhere or rank == 0)]
            if owner == mailbox.rank:
                for taker in takers:
                    mailbox.post(taker, "kept", (key, path), slots[path][2].detach() if path in slots else None)
            elif path in everyone[mailbox.rank]:
                container, name, old = slots[path]
                old.left = LEFT  # type: ignore[attr-defined]
                if mailbox.rank in takers and owner is not None:
                    new = mailbox.take("kept", (key, path), f"{path} from rank {owner}", owner)
                    if new is not None:
                        new = new.to(old.device)
                        new = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
                        container[name] = made.setdefault(id(old), new)
                    else:
                        old.left = COPIED  # type: ignore[attr-defined]

    def _slots(self, more: Any = None) -> Iterator[Slot]:
        for path, container in self._containers(more):
            for key, tensor in _items(container):
                yield (*path, key), container, key, tensor

    def _containers(self, more: Any = None) -> Iterator[tuple[Path, Any]]:
        seen = {id(part) for part in self.module.modules()}
        for number, place in enumerate(self.places):
            own = _LIGHTNINGS if isinstance(place, nn.Module) else frozenset()
            yield from _containers(vars(place), (number, type(place).__name__), seen, own)
        if more is not None:
            yield from _containers(more, ("more",), seen)


def _containers(
    value: Any, path: Path, seen: set[int], without: Collection[str] = (), objects: bool = True
) -> Iterator[tuple[Path, Any]]:
    """The dicts and lists of a value, and those in which modules have their tensors; each once."""
    if id(value) in seen or len(path) > _DEEP or isinstance(value, _NO_CONTAINERS) or value is None:
        return
    seen.add(id(value))
    if isinstance(value, nn.Module):
        for name, part in value.named_modules():
            yield (*path, name, "parameters"), part._parameters
            yield (*path, name, "buffers"), part._buffers
        return
    items: Any = ()
    if isinstance(value, MutableMapping | list | tuple) and len(value) > _MANY and not _holds_tensors(value):
        return
    if isinstance(value, MutableMapping | list):
        yield path, value
        items = value.items() if isinstance(value, MutableMapping) else enumerate(value)
    elif isinstance(value, tuple):
        items = enumerate(value)
    elif objects and hasattr(value, "__dict__"):
        yield from _containers(vars(value), path, seen, objects=False)
    for key, item in list(items):
        if isinstance(key, str | int) and key not in without:
            yield from _containers(item, (*path, key), seen, (), objects)


def _items(container: Any) -> list[tuple[Any, Tensor]]:
    items = container.items() if isinstance(container, MutableMapping) else enumerate(container)
    return [(key, item) for key, item in items if isinstance(key, str | int) and _tensor(item)]


def _holds_tensors(container: Any) -> bool:
    items = container.values() if isinstance(container, MutableMapping) else container
    return isinstance(next(iter(items), None), Tensor)


def _tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _alike(tensor: Any, weight: Tensor) -> bool:
    return isinstance(tensor, Tensor) and tensor.shape == weight.shape
