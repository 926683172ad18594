"""What a rank measures of its own work: busy seconds of each action, waits left out."""

import statistics
from collections import defaultdict, deque

__all__ = ["Times"]

_KEPT = 64  # latest actions of each kind


class Times:
    """Busy seconds of the latest actions of training, by stage and kind."""

    def __init__(self) -> None:
        self._seconds: dict[tuple[int, str], deque[float]] = defaultdict(lambda: deque(maxlen=_KEPT))

    def add(self, stage: int, kind: str, seconds: float) -> None:
        """Note an action.

        Args:
            stage: Its stage.
            kind: "F", "B", ...
            seconds: How long it took, without the time spent waiting for other ranks.
        """
        self._seconds[stage, kind].append(seconds)

    def median(self, stage: int, kind: str) -> float | None:
        """The median of what is kept; ``None`` of what has not been done yet."""
        seconds = self._seconds.get((stage, kind))
        return statistics.median(seconds) if seconds else None

    def clear(self) -> None:
        """Begin anew."""
        self._seconds.clear()
