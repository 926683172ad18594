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

__all__ = ["TorchRandom", "put_python", "python_random", "python_state", "seed_python"]


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


class TorchRandom:
    """A stream of torch's random numbers that one stage has for itself.

    Args:
        seed: The seed of the run.
        stage: The stage. Stage 0 draws from the generators that the user has seeded, as one device would.
        device: Where it computes.
    """

    def __init__(self, seed: int, stage: int, device: torch.device) -> None:
        mixed = random.Random(f"{seed} stage {stage}").getrandbits(63)
        self._seeded = [torch.device("cpu"), *([device] if device.type == "cuda" else [])]
        self.devices = [] if stage == 0 else self._seeded
        self.states = [torch.Generator(device).manual_seed(mixed).get_state() for device in self.devices]

    def drawn(self) -> AbstractContextManager[None]:
        """Draw from this stream; the generators are put back as they were."""
        return self._swapped() if self.devices else nullcontext()

    def position(self) -> list[torch.Tensor]:
        """Where this stream is, for :meth:`back_to`."""
        return self.states if self.devices else [_get(device) for device in self._seeded]

    def back_to(self, position: list[torch.Tensor]) -> None:
        """Let the stream go on where it was."""
        if self.devices:
            self.states = position
            return
        for device, state in zip(self._seeded, position, strict=True):
            _set(device, state)

    @contextmanager
    def _swapped(self) -> Iterator[None]:
        before = [_get(device) for device in self.devices]
        for device, state in zip(self.devices, self.states, strict=True):
            _set(device, state)
        try:
            yield
        finally:
            self.states = [_get(device) for device in self.devices]
            for device, state in zip(self.devices, before, strict=True):
                _set(device, state)


def _get(device: torch.device) -> torch.Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set(device: torch.device, state: torch.Tensor) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)
