"""Tensors of accelerators through pinned host memory and sockets: where ranks share a device, or NCCL is missing.

::

    compute    ... F ----+ . . F ...                            ... wait, F
    copying              +-- device to host --+              +-- host to device --^
    sending thread             waits for it --+-- socket     |
    main thread   goes on at once                waits for --+ what has come

No thread of Python ever waits for the compute stream, and no copy waits for another one's direction. Pinned memory is
that of torch's caching allocator, which gives it out again once the copies into and out of it are done.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from typing_extensions import override

from lightning_lwpm.pipeline.mailbox import Mailbox
from lightning_lwpm.pipeline.transport import Receive, Transport

__all__ = ["Staged"]


class Staged(Transport):
    """Point-to-point messages of a rank with an accelerator; made on all ranks at once.

    What goes over the sockets is what :class:`Transport` sends: a rank may compute on its CPU and talk to one that
    does not.

    Args:
        mailbox: Where failures are heard.
        device: The accelerator of this rank.
    """

    def __init__(self, mailbox: Mailbox, device: torch.device) -> None:
        super().__init__(mailbox)
        self.device = device
        self._out, self._in = torch.Stream(device), torch.Stream(device)

    @override
    def receive(self, source: int, numel: int, dtype: torch.dtype, on_host: bool = False) -> Receive:
        if on_host:
            return super().receive(source, numel, dtype)
        return _Lifted(self, source, torch.empty(numel, dtype=dtype, pin_memory=True))

    @override
    def send(self, target: int, flat: Tensor) -> None:
        if flat.device.type == "cpu":
            super().send(target, flat)
            return
        host = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True)
        self._out.wait_stream(torch.accelerator.current_stream(self.device))
        with self._out:
            host.copy_(flat, non_blocking=True)
        flat.record_stream(self._out)  # its memory is not given out again before the copy
        self._send(target, host, self._out.record_event().synchronize)

    def lift(self, host: Tensor) -> Tensor:
        """A pinned tensor on the device, in the order of the current stream, which alone waits for the copy."""
        compute = torch.accelerator.current_stream(self.device)
        with self._in:
            flat = host.to(self.device, non_blocking=True)
        compute.wait_stream(self._in)
        flat.record_stream(compute)  # it belongs to the other stream, but is used on this one
        return flat


class _Lifted(Receive):
    """A receive into pinned memory, and on to the device."""

    transport: Staged

    @override
    def wait(self, what: str | Callable[[], str]) -> Tensor:
        return self.transport.lift(super().wait(what))
