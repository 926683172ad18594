"""BatchNorm's running statistics, taken from a whole batch, as torchgpipe's ``DeferredBatchNorm`` takes them.

::

    micro-batches       0          1          2          3         end of the batch
    normalised by       its own    its own    its own    its own
    running statistics                                             one update, by mean and variance over 0 to 3

A micro-batch is normalised by its own statistics in any case: those of the batch are not known before its last
micro-batch has come. So the running statistics of a layer are those of one device with the whole batch as far as what
goes into the layer is the same, which is so for the first such layer of a model.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_lwpm.staging.forwards import replaced

__all__ = ["DeferredBatchNorm", "batch_norms"]


def batch_norms(root: nn.Module) -> dict[str, _BatchNorm]:
    """The layers of a model that have running statistics, by name."""
    named = root.named_modules()
    return {name: m for name, m in named if isinstance(m, _BatchNorm) and m.running_mean is not None}


class DeferredBatchNorm:
    """Updates running statistics once a batch.

    Args:
        root: The model.
    """

    def __init__(self, root: nn.Module) -> None:
        self._layers: dict[nn.Module, _Tracked] = {layer: _Tracked(layer) for layer in batch_norms(root).values()}

    @contextmanager
    def batch(self) -> Iterator[None]:
        """The time of a batch; statistics are updated at its end."""
        for layer, stand_in in self._layers.items():
            stand_in.forward = layer.forward
        with replaced(self._layers):
            yield
        for stand_in in self._layers.values():
            stand_in.update()


class _Tracked:
    """Stands in for a layer's ``forward``: always the same object, or a compiler would begin anew each time."""

    def __init__(self, layer: _BatchNorm) -> None:
        self.layer, self.forward = layer, layer.forward
        self.count, self.mean, self.squares = 0, torch.empty(0), torch.empty(0)  # squares: of distances from the mean

    def __call__(self, x: Tensor) -> Any:
        layer = self.layer
        if not layer.training:
            return self.forward(x)
        held, momentum = dict(layer._buffers), layer.momentum
        assert layer.running_mean is not None and layer.running_var is not None
        mean, variance = torch.zeros_like(layer.running_mean), torch.zeros_like(layer.running_var)
        layer._buffers.update(running_mean=mean, running_var=variance, num_batches_tracked=None)
        layer.momentum = 1.0  # what is written there are the micro-batch's own
        try:
            out = self.forward(x)
        finally:
            layer._buffers.update(held)
            layer.momentum = momentum
        if torch._C._current_graph_task_id() == -1:  # else this is a backward pass, which computes the layer again
            self._add(x.numel() // x.shape[1], mean, variance)
        return out

    @torch.no_grad()
    def _add(self, count: int, mean: Tensor, variance: Tensor) -> None:
        squares = variance * (count - 1)
        if self.count:
            apart, total = mean - self.mean, self.count + count
            mean = self.mean + apart * (count / total)
            squares = self.squares + squares + apart.square() * (self.count * count / total)
        self.count, self.mean, self.squares = self.count + count, mean, squares

    @torch.no_grad()
    def update(self) -> None:
        """Update the running statistics as one call with all that came would have done."""
        layer, count, self.count = self.layer, self.count, 0
        if not count:
            return
        assert layer.running_mean is not None and layer.running_var is not None
        share = layer.momentum
        if layer.num_batches_tracked is not None:
            layer.num_batches_tracked.add_(1)
            share = 1 / float(layer.num_batches_tracked) if share is None else share
        assert share is not None
        layer.running_mean.mul_(1 - share).add_(self.mean, alpha=share)
        layer.running_var.mul_(1 - share).add_(self.squares / (count - 1), alpha=share)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., Any]:
        return self.forward
