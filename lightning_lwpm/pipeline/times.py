"""What a rank measures of its own work: busy seconds of each action, waits left out.

Seconds are those of the host; copies into and out of messages count as work. For accelerators see ``device_times``.
"""

import statistics
from collections import defaultdict, deque

from lightning_lwpm.pipeline.schedule import Action

__all__ = ["Record", "Times"]

Record = list[tuple[Action, float, float]]
"""Actions with their begin and end."""

_KEPT = 64  # latest actions of each stage and kind


class Times:
    """Busy seconds of the latest actions of training, by stage and kind.

    Attributes:
        record: If it is a list, every action of training is added to it with its begin and end
            (``time.perf_counter()``, seconds, waits included).
        on_device: Whether these are the times of a device, which works while the host waits; then begin and end are
            those of the work, without waits.
    """

    on_device = False

    def __init__(self) -> None:
        self.record: Record | None = None
        self._seconds: dict[tuple[int, str], deque[float]] = defaultdict(lambda: deque(maxlen=_KEPT))

    def ready(self) -> None:
        """All that the next action needs from other ranks is there: it computes from now on."""

    def settle(self) -> None:
        """Wait until all that was done has been noted."""

    def add(self, action: Action, begin: float, end: float, waited: float) -> None:
        """Note an action.

        Args:
            action: What was done.
            begin: When it began (``time.perf_counter()``).
            end: When it ended.
            waited: Seconds of it spent waiting for other ranks.
        """
        self._note(action, end - begin - waited, self.record, begin, end)

    def _note(self, action: Action, seconds: float, record: Record | None, begin: float, end: float) -> None:
        self._seconds[action.stage, action.kind].append(seconds)
        if record is not None:
            record.append((action, begin, end))

    def seconds(self, stage: int, kind: str) -> list[float]:
        """Busy seconds of the latest actions of a stage and kind ("F", "B", ...), oldest first."""
        return list(self._seconds.get((stage, kind), ()))

    def median(self, stage: int, kind: str) -> float | None:
        """The median of what is kept; ``None`` of what has not been done yet."""
        seconds = self._seconds.get((stage, kind))
        return statistics.median(seconds) if seconds else None

    def clear(self) -> None:
        """Begin anew."""
        self._seconds.clear()
        if self.record is not None:
            self.record = []
