"""Chooses how tensors travel between ranks: by what devices they have, alike on all of them.

::

    all ranks compute on CPUs                           sockets                            Transport
    each rank has a CUDA device of its own, and NCCL    straight from device to device     Direct
    other accelerators, or a device that ranks share    sockets, through pinned memory     Staged
"""

import socket
from datetime import timedelta

import torch
import torch.distributed as dist

from lightning_lwpm.errors import ConfigurationError
from lightning_lwpm.pipeline.direct import Direct
from lightning_lwpm.pipeline.mailbox import Mailbox
from lightning_lwpm.pipeline.staged import Staged
from lightning_lwpm.pipeline.transport import Transport

__all__ = ["connect"]


def connect(
    mailbox: Mailbox, device: torch.device, backend: str | None = None, timeout: timedelta = timedelta(minutes=30)
) -> Transport:
    """The data connections of one rank; called on all ranks at once, where ``torch.distributed`` is initialised.

    Args:
        mailbox: The control connections.
        device: The device of this rank.
        backend: ``"nccl"`` or ``"gloo"`` (through host memory); ``None``: the faster one of those that can be used.
        timeout: See :class:`Direct`.

    Raises:
        ConfigurationError: for ``"nccl"`` where it cannot be used.
    """
    mine = (socket.gethostname(), _identity(device), device.type == "cuda" and dist.is_nccl_available())
    found = mailbox.gather("devices", mine, "the devices of all ranks")
    shared = len({(host, identity) for host, identity, _ in found}) < len(found)
    able = all(nccl for _, _, nccl in found)
    if backend == "nccl" and (shared or not able):
        problem = "several ranks share a device" if able else f"not all ranks have CUDA and NCCL (here: {device})"
        raise ConfigurationError(
            f"process_group_backend='nccl' cannot be used: {problem}. Leave it out, or pass 'gloo': it serves all "
            "devices, through host memory."
        )
    if able and not shared and backend != "gloo":
        return Direct(mailbox, device, "nccl", timeout)
    return Transport(mailbox) if device.type == "cpu" else Staged(mailbox, device)


def _identity(device: torch.device) -> str:
    """What tells a device of this host from others, also where processes number them differently."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else str(device)
