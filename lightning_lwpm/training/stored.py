"""What layers have stored on themselves, told to all ranks at the end of a run and before layers move.

While a run lasts, an attribute in which a layer of another rank has stored a tensor holds a remote one here, and its
micro-batch has ended. The next run may cut the model elsewhere, so that this rank runs the layer.
"""

from typing import Any

from torch import Tensor, nn

from lightning_lwpm.pipeline.mailbox import Mailbox
from lightning_lwpm.pipeline.wire import to_device
from lightning_lwpm.staging.layout import Layout
from lightning_lwpm.staging.remote import Remote
from lightning_lwpm.staging.tree import flatten, map_tensors, portable, tensors, unflatten

__all__ = ["tell_stored"]

_MOST_BYTES = 1 << 20
"""Larger are what a step looks at (maps of attention), which the next one makes anew."""


def tell_stored(mailbox: Mailbox, key: int, module: nn.Module, layout: Layout) -> None:
    """Put values in the place of other ranks' tensors that layers have stored; all ranks take part.

    Args:
        mailbox: The control connections.
        key: Names this exchange; the same on all ranks.
        module: The model, partitioned.
        layout: The partition.
    """
    for unit in layout.units:
        owner = layout.ranks[unit.stages[-1]]
        for path, name in unit.attributes:
            part = module.get_submodule(f"{unit.name}.{path}" if path else unit.name)
            store, about = vars(part), (key, unit.name, path, name)
            if mailbox.rank == owner:
                mailbox.post_all("stored", about, _told(store.get(name)))
                continue
            told = mailbox.take("stored", about, f"'{unit.name}.{name}' from rank {owner}")
            held = tensors(store.get(name))
            if told is not None and any(type(tensor) is Remote for tensor in held):
                device = next(tensor.device for tensor in held if type(tensor) is Remote)
                spec, leaves = told
                store[name] = unflatten(spec, iter([to_device(leaf, device) for leaf in leaves]))


def _told(value: Any) -> Any:
    """A value without its graph, as something that can be sent; ``None`` if it is large."""
    leaves: list[Tensor] = []
    spec = portable(flatten(map_tensors(Tensor.detach, value), leaves))
    return (spec, leaves) if sum(leaf.nbytes for leaf in leaves) <= _MOST_BYTES else None
