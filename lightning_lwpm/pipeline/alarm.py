"""The failure that ends a run, as one rank knows it; if its main thread does not hear of it, the process is ended."""

import os
import sys
import threading
import traceback
from collections.abc import Callable

from lightning_lwpm.errors import ConfigurationError, LWPMError, PipelineError
from lightning_lwpm.pipeline.kinds import raised_like

__all__ = ["Alarm", "described"]

_GRACE_SECONDS = 8.0  # for a rank to notice a failure by itself before its process is ended


class Alarm:
    """The first failure that this rank has heard of, or had.

    Args:
        changed: Notified when there is one.
        idle: Whether this process need not hear of failures now.

    Attributes:
        failure: What every rank raises; ``None`` as long as none has failed.
        reactions: What is called once, each on a thread of its own, when there is one.
        owner: The thread that must notice a failure: the one that made this.
    """

    def __init__(self, changed: threading.Condition, idle: Callable[[], bool]) -> None:
        self.failure: str | None = None
        self.reactions: list[Callable[[], None]] = []
        self.owner = threading.get_ident()
        self._raised: type[LWPMError] = PipelineError
        self._changed, self._idle = changed, idle
        self._noticed = threading.Event()

    def ring(self, message: str, raised: type[LWPMError], label: str) -> bool:
        """Note a failure.

        Args:
            message: What every rank raises.
            raised: The type of what is raised.
            label: What this rank calls itself.

        Returns:
            ``False`` if it is not the first: then the first still counts.
        """
        with self._changed:
            if self.failure is not None:
                return False
            self.failure, self._raised = message, raised
            self._changed.notify_all()
        self.notice()
        for react in self.reactions:
            threading.Thread(target=react, name="lwpm-react", daemon=True).start()
        threading.Thread(target=self._insist, args=(label,), name="lwpm-insist", daemon=True).start()
        return True

    def error(self) -> LWPMError:
        """What to raise, once there is a failure."""
        assert self.failure is not None
        return self._raised(self.failure)

    def check(self) -> None:
        """Raise the failure, if there is one."""
        if self.failure is not None:
            self.notice()
            raise self.error()

    def notice(self) -> None:
        """The owner, if it is here now, knows of the failure."""
        if threading.get_ident() == self.owner:
            self._noticed.set()

    def _insist(self, label: str) -> None:
        """End this process if its main thread is stuck where it cannot hear (a foreign collective, an endless loop)."""
        if not self._noticed.wait(_GRACE_SECONDS) and not self._idle():
            stuck = f"[lwpm] {label}: the main thread has not listened for {_GRACE_SECONDS:.0f} s; ending the process"
            print(f"{stuck}: {self.failure}", file=sys.stderr, flush=True)
            os._exit(1)


def described(label: str, what: str, error: BaseException) -> tuple[str, type[LWPMError]]:
    """An exception in words, for all ranks.

    Args:
        label: The rank that had it.
        what: What failed, such as "forward of micro-batch 3"; "" if nothing is known but the exception.
        error: The exception.

    Returns:
        The words, with the traceback unless it was a wrong setting, and the type to raise.
    """
    where = f"{label} failed in {what}" if what else f"{label} failed"
    if isinstance(error, ConfigurationError):
        return f"{where}: {error}", ConfigurationError
    kind = "" if isinstance(error, LWPMError) else f"{type(error).__name__}: "
    trace = "".join(traceback.format_exception(error)).rstrip()
    return f"{where}: {kind}{error}\n\nOn {label}:\n{trace}", raised_like(type(error))
