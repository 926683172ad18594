"""Torch's random numbers that depend on the layers called so far, and not on which rank calls them.

::

    step of micro-batch 7     glue     h.0 (    drop (     )   )    glue    h.1 (   ...
    seed                      a        b        c          d        e       f          each a hash of the one before
                              ^ of the run and 7                            and of the layer's name

Torch's generator is seeded anew wherever a layer begins and ends. A layer of another stage is passed over with the same
seed behind it. The seed before comes from the generator itself, so what is computed again in a backward pass, with the
generator put back as it was, draws the same numbers.
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from hashlib import blake2b
from typing import Any

import torch
from torch import nn

from lightning_lwpm.staging.forwards import replaced
from lightning_lwpm.staging.randomness import drawn_from

__all__ = ["LayerRandom"]


class LayerRandom:
    """Random numbers of the steps of a run.

    Args:
        root: The model.
        apart: Modules within it that are no part of it, such as metrics.
        device: Where this rank computes.

    Attributes:
        called: Whether a layer has been called lately.
    """

    def __init__(self, root: nn.Module, apart: Iterable[nn.Module], device: torch.device) -> None:
        self._generators = drawn_from(device)
        self.called = False
        apart = set(apart)
        named = root.named_modules()
        self._layers = {layer: _Seeded(n, layer, self, self._generators) for n, layer in named if layer not in apart}

    def batch(self) -> AbstractContextManager[None]:
        """The time of a batch, in which layers draw random numbers of their own."""
        for layer, stand_in in self._layers.items():
            stand_in.forward = layer.forward
        return replaced(self._layers)

    @contextmanager
    def drawn(self, seed: int, serial: int) -> Iterator[None]:
        """The time of a step on micro-batch ``serial`` of a run; the generators are put back as they were."""
        before = [generator.get_state() for generator in self._generators]
        _seed(self._generators, seed, b"micro-batch %d" % serial)
        try:
            yield
        finally:
            for generator, state in zip(self._generators, before, strict=True):
                generator.set_state(state)

    @contextmanager
    def recomputing(self) -> Iterator[None]:
        """The time of a backward pass: layers computed again leave the generators as they were, whoever calls them.

        On one device such layers draw nothing, so what is drawn later (the order of the data) must not depend on them.
        """
        before = [generator.get_state() for generator in self._generators]
        self.called = False
        try:
            yield
        finally:
            if self.called:
                for generator, state in zip(self._generators, before, strict=True):
                    generator.set_state(state)

    def pass_over(self, layer: nn.Module) -> None:
        """Go on as if a layer had been called, which belongs to another stage."""
        _seed(self._generators, torch.default_generator.initial_seed(), self._layers[layer].end)


class _Seeded:
    """Stands in for a layer's ``forward``: always the same object, or a compiler would begin anew each time."""

    def __init__(self, name: str, layer: nn.Module, random: LayerRandom, generators: list[torch.Generator]) -> None:
        self.forward, self.random, self.generators = layer.forward, random, generators
        self.begin, self.end = f"begin {name}".encode(), f"end {name}".encode()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # within a compiled layer numbers are drawn in the order of its code
            return self.forward(*args, **kwargs)
        self.random.called = True
        before = torch.default_generator.initial_seed()
        _seed(self.generators, before, self.begin)
        out = self.forward(*args, **kwargs)
        _seed(self.generators, before, self.end)
        return out

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self.forward


def _seed(generators: list[torch.Generator], before: int, event: bytes) -> None:
    digest = blake2b(before.to_bytes(8) + event, digest_size=8).digest()
    for generator in generators:
        generator.manual_seed(int.from_bytes(digest) >> 1)
