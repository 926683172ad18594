"""Lets memory of the host go back to the system at once, where many large blocks are made and freed one by one.

glibc keeps freed blocks of up to 32 MiB for the next ones. Between weights that are made, used and freed in turn small
blocks settle, and aligned blocks do not fit the holes again, so that a process that never holds more than a few weights
came to take as much memory as all of them.
"""

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress

__all__ = ["freed_at_once"]

_MMAP_THRESHOLD = -3  # of `mallopt`: blocks from this size on are the system's own
_LARGE = 1 << 20
_USUAL = 32 << 20
"""What glibc's own rule, which ends with the first call of ``mallopt``, comes to where large tensors are freed."""


@contextmanager
def freed_at_once() -> Iterator[None]:
    """Within the block, memory of 1 MiB and more goes back as soon as it is freed; with glibc, elsewhere it may not."""
    changed = _set(_LARGE)
    try:
        yield
    finally:
        if changed:
            _set(_USUAL)


def _set(nbytes: int) -> bool:
    if platform.libc_ver()[0] != "glibc" or "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return False
    with suppress(OSError, AttributeError):
        return bool(ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, nbytes))
    return False
