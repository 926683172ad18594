"""What is random in a step: Python's and NumPy's generators alike on all stages, torch's another on each.

Whatever a step draws from Python's and NumPy's generators (which layers to leave out, how to mix samples) is drawn
alike on every stage, and alike for any number of stages. What it draws from torch's, it draws on one stage only: with
the same seed on every rank, the first dropout of each stage would else have the very same mask.
"""

import random
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from hashlib import blake2b
from typing import Any

import torch

__all__ = ["TorchRandom", "drawn_from", "put_python", "python_random", "python_state", "seed_python"]


def seed_python(seed: int, serial: int) -> None:
    """Seed Python's and NumPy's generators for micro-batch ``serial`` of a run seeded with ``seed``."""
    mixed = int.from_bytes(blake2b(f"{seed} {serial}".encode(), digest_size=4).digest())
    random.seed(mixed)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(mixed)


def python_state() -> Any:
    """Where Python's and NumPy's generators are, for :func:`python_random`."""
    numpy = sys.modules.get("numpy")
    return random.getstate(), numpy.random.get_state() if numpy else None


def put_python(state: Any) -> None:
    """Put Python's and NumPy's generators to where :func:`python_state` has found them."""
    python, numpy = state
    random.setstate(python)
    if numpy is not None:
        sys.modules["numpy"].random.set_state(numpy)


@contextmanager
def python_random(state: Any = None) -> Iterator[None]:
    """Put Python's and NumPy's generators back afterwards as they were.

    Args:
        state: Where they are to be meanwhile, from :func:`python_state`; by default they go on.
    """
    before = python_state()
    if state is not None:
        put_python(state)
    try:
        yield
    finally:
        put_python(before)


def drawn_from(device: torch.device) -> list[torch.Generator]:
    """The generators that a step on a device draws from: torch's of the host, and that of an accelerator."""
    if device.type == "cpu":
        return [torch.default_generator]
    torch.empty(0, device=device)  # there is none before its first use
    own = getattr(torch.get_device_module(device), "default_generators", ())
    return [torch.default_generator, *own[device.index or 0 : (device.index or 0) + 1]]


class TorchRandom:
    """A stream of torch's random numbers that one stage has for itself.

    Args:
        seed: The seed of the run.
        stage: The stage. Stage 0 draws from the generators that the user has seeded, as one device would.
        device: Where it computes.
    """

    def __init__(self, seed: int, stage: int, device: torch.device) -> None:
        mixed = random.Random(f"{seed} stage {stage}").getrandbits(63)
        self._seeded = drawn_from(device)
        self.generators = [] if stage == 0 else self._seeded
        self.states = [torch.Generator(g.device).manual_seed(mixed).get_state() for g in self.generators]

    def drawn(self) -> AbstractContextManager[None]:
        """Draw from this stream; the generators are put back as they were."""
        return self._swapped() if self.generators else nullcontext()

    def position(self) -> list[torch.Tensor]:
        """Where this stream is, for :meth:`back_to`."""
        return self.states if self.generators else [generator.get_state() for generator in self._seeded]

    def back_to(self, position: list[torch.Tensor]) -> None:
        """Let the stream go on where it was."""
        if self.generators:
            self.states = position
            return
        for generator, state in zip(self._seeded, position, strict=True):
            generator.set_state(state)

    @contextmanager
    def _swapped(self) -> Iterator[None]:
        before = [generator.get_state() for generator in self.generators]
        for generator, state in zip(self.generators, self.states, strict=True):
            generator.set_state(state)
        try:
            yield
        finally:
            self.states = [generator.get_state() for generator in self.generators]
            for generator, state in zip(self.generators, before, strict=True):
                generator.set_state(state)
