"""Python's and NumPy's generators, seeded alike on all ranks for one micro-batch.

Whatever a step draws from them (which layers to leave out, how to mix samples) is then drawn alike on every stage, and
alike for any number of stages.
"""

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["python_random"]


@contextmanager
def python_random(seed: int, serial: int) -> Iterator[None]:
    """Seed for micro-batch ``serial`` of a run seeded with ``seed``; what was before is put back afterwards."""
    numpy = sys.modules.get("numpy")
    state, numpy_state = random.getstate(), numpy.random.get_state() if numpy else None
    mixed = random.Random(f"{seed} {serial}").getrandbits(32)
    random.seed(mixed)
    if numpy:
        numpy.random.seed(mixed)
    try:
        yield
    finally:
        random.setstate(state)
        if numpy:
            numpy.random.set_state(numpy_state)
