"""Times segments: forward pass, backward pass and the weight gradients' part of it, on the device that will run them.

A pipeline holds several micro-batches between their forward and their backward pass, and between two uses of a layer
all others run. So that a segment meets the same by itself, a few forward passes run first, and their backward passes
after them; and where a model is larger than a CPU's caches, its weights are not in them, but what comes in is.
"""

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from lightning_lwpm.partition.costs import CallCost
from lightning_lwpm.partition.segment import Segment
from lightning_lwpm.staging.compiled import AsWritten

__all__ = ["CACHE_BYTES", "time_segment"]

CACHE_BYTES = 32 << 20
"""A model with more weights than this does not stay in the caches of a CPU."""

_HELD = 4
"""Forward passes before the first backward pass."""

_MOST_ROUNDS = 8


def time_segment(
    segment: Segment,
    root: nn.Module,
    device: torch.device,
    train: bool = True,
    cold: bool = False,
    seconds: float = 0.02,
    context: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> CallCost:
    """Time a segment by itself.

    Args:
        segment: What to run.
        root: The model, whose layers are copied to the device; nothing of it is changed.
        device: Where to run.
        train: Whether a backward pass follows.
        cold: Whether weights are to come from memory, not from a CPU's caches.
        seconds: Repeat it until this much time has been measured.
        context: Entered around each forward pass (precision).

    Raises:
        Exception: whatever the segment raises, because it cannot be run by itself.
    """
    cold = cold and device.type == "cpu"
    modules = [segment.modules(root, device)]
    if cold and sum(_bytes(p) for module in modules[0].values() for p in module.parameters()) < CACHE_BYTES:
        modules += [segment.modules(root, device) for _ in range(_HELD - 1)]
    parameters = [p for copy in modules for module in copy.values() for p in module.parameters() if p.requires_grad]
    clock = _Clock(device)
    others = torch.zeros(2 * CACHE_BYTES if cold else 0, dtype=torch.uint8)

    def rounds(count: int, copies: int = _HELD) -> tuple[list[float], list[float]]:
        forwards, backwards = [], []
        for _ in range(count):
            held = []
            others.add_(1)
            for number in range(copies):
                env = segment.inputs(device)
                with context(), torch.set_grad_enabled(train), AsWritten():
                    begin = clock()
                    results = segment.run(modules[number % len(modules)], env)
                    forwards.append(clock() - begin)
                held.append(results if train else [])
                del env, results
            others.add_(1)
            while held:
                results = held.pop(0)
                gradients = [torch.ones_like(result) for result in results]
                begin = clock()
                if results:
                    torch.autograd.backward(results, gradients)
                backwards.append(clock() - begin)
                del results, gradients
        return forwards, backwards

    first = sum(map(sum, rounds(1)))  # also warms up: memory for all that is held is fetched now
    count = max(1, min(_MOST_ROUNDS, round(seconds / max(first, 1e-9))))
    forwards, backwards = rounds(count)
    forward, backward = _typical(forwards), _typical(backwards)
    if not (train and parameters):
        return CallCost(forward, backward if train else 0.0, 0.0)
    for parameter in parameters:
        parameter.requires_grad_(False).grad = None
    _, rest = rounds(max(1, count // 2), _HELD // 2)
    return CallCost(forward, backward, max(0.0, backward - _typical(rest)))


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _typical(seconds: list[float]) -> float:
    """The median of the quicker half: whatever else a machine does only adds time."""
    return statistics.median(sorted(seconds)[: (len(seconds) + 1) // 2])


class _Clock:
    """Seconds, once the device has done what it was given."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self) -> float:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter()
