"""What a device can hold."""

import math
from contextlib import suppress

import torch

__all__ = ["free_bytes"]

_KEPT_FREE = 0.05  # for the allocator's rounding and the libraries' workspaces


def free_bytes(device: torch.device) -> float:
    """The bytes that a device has free; infinite for a CPU, whose memory all ranks of a host share."""
    if device.type != "cpu":
        with suppress(AttributeError, RuntimeError):
            free, _ = torch.get_device_module(device).mem_get_info(device)
            return float(free) * (1 - _KEPT_FREE)
    return math.inf
