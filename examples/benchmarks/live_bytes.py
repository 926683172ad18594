"""Counts the bytes of the tensors that are alive, on any device and to the byte."""

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["LiveBytes"]


class LiveBytes(TorchDispatchMode):
    """While it is entered, follows each tensor that this thread makes, from its first operation until its memory is
    let go of, by whichever thread. What an operation uses for itself inside (a convolution's workspace) is not seen.

    Attributes:
        live: Bytes alive of what was made since.
        peak: The most of them at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            self._note(leaf, new=False)  # made before: its memory is not counted, nor that of its views
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            self._note(leaf, new=True)
        return out

    def _note(self, leaf: Any, new: bool) -> None:
        if type(leaf) not in (Tensor, nn.Parameter):
            return
        storage = leaf.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        nbytes = storage.nbytes() if new else 0

        def gone(_: Any) -> None:
            self.live -= nbytes
            del self._known[key]

        # a storage keeps its Python object, and so this reference, until its memory is let go of
        self._known[key] = weakref.ref(storage, gone)
        self.live += nbytes
        self.peak = max(self.peak, self.live)
