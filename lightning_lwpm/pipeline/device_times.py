"""What a rank measures of its work on an accelerator: by events in its stream, because the host runs ahead of it.

::

    host      F0 F1 wait .. B0 F2                         queues work, and waits for words of other ranks
    device       |-- F0 --|-- F1 --|      |--- B0 ---|    what is measured
                 ready    add                             two events an action, read when both have passed

The first event is recorded behind the stream's own wait for the action's inputs, so that no wait is taken for work.
"""

import time
from collections import deque
from typing import Any

import torch
from typing_extensions import override

from lightning_lwpm.pipeline.schedule import Action
from lightning_lwpm.pipeline.times import Record, Times

__all__ = ["DeviceTimes"]


class DeviceTimes(Times):
    """Busy seconds of the device in the latest actions of training, by stage and kind; complete some actions later.

    Args:
        device: The accelerator.
    """

    on_device = True

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self._begun: Any = None  # the latest event of ``ready``
        self._pending: deque[tuple[Action, Any, Any, Record | None]] = deque()  # with both events
        self._anchor: tuple[Any, float] | None = None  # an event that has passed, and when that was on the host

    @override
    def ready(self) -> None:
        if self.record is None:
            self._anchor = None
        elif self._anchor is None:  # the device stands still once for each stretch of recorded batches
            event = self._event()
            event.synchronize()
            self._anchor = event, time.perf_counter()
        self._begun = self._event()

    @override
    def add(self, action: Action, begin: float, end: float, waited: float) -> None:
        self._pending.append((action, self._begun, self._event(), self.record))
        self._read(wait=False)

    @override
    def settle(self) -> None:
        self._read(wait=True)

    def _event(self) -> Any:
        event = torch.Event(self.device, enable_timing=True)
        event.record(torch.accelerator.current_stream(self.device))
        return event

    def _read(self, wait: bool) -> None:
        """Note the actions that the device has finished; with ``wait``, all of them."""
        while self._pending and (wait or self._pending[0][2].query()):
            action, begun, ended, record = self._pending.popleft()
            ended.synchronize()
            seconds, at = begun.elapsed_time(ended) / 1000, 0.0
            if self._anchor is not None:
                event, when = self._anchor
                at = when + event.elapsed_time(begun) / 1000
            self._note(action, seconds, record, at, at + seconds)
