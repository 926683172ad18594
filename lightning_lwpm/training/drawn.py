"""Random numbers in hooks that every rank runs: drawn alike, from where rank 0's generators are, as on one device."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from lightning_lwpm.staging.randomness import drawn_from, put_python, python_state

__all__ = ["Drawn"]


class Drawn:
    """The random generators of this process and its device.

    Args:
        device: Where this rank computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._generators = drawn_from(device)

    def here(self) -> Any:
        """Where they are."""
        return python_state(), [generator.get_state() for generator in self._generators]

    def since(self, before: Any) -> Any:
        """Where they are, if anything has been drawn since :meth:`here`; else ``None``."""
        python, states = now = self.here()
        same = all(map(torch.equal, before[1], states)) and before[0][0] == python[0]
        return None if same and _numpy(before[0][1]) == _numpy(python[1]) else now

    def adopt(self, now: Any) -> None:
        """Go on from where they are on another rank, if anything has been drawn there."""
        if now is not None:
            python, states = now
            put_python(python)
            for generator, state in zip(self._generators, states, strict=True):
                generator.set_state(state)

    @contextmanager
    def alike(self, first: Any, real: bool) -> Iterator[None]:
        """Draw what rank 0 draws; its generators go on, those of other ranks are put back.

        Args:
            first: Where rank 0's generators are.
            real: Whether this is rank 0.
        """
        before = None if real else self.here()
        if not real:
            self.adopt(first)
        try:
            yield
        finally:
            self.adopt(before)


def _numpy(state: Any) -> Any:
    return None if state is None else (state[1].tobytes(), state[2:])
