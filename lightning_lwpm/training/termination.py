"""SIGTERM and Ctrl-C: whichever rank is told to end, all ranks end before the same batch.

Lightning asks rank 0 by a broadcast before each training batch, and tells the others by one in the signal's handler.
The former is a barrier in each batch, so that no stage could begin a batch before all have ended the one before; and a
handler that waits for other ranks may wait for ever. Here a handler only takes note. Ranks tell rank 0 when they next
come to the end of a batch, and rank 0 tells all of them with the batch's loss.

Ctrl-C, which a terminal sends to all ranks at once, would break each of them off at another place, and what one of them
holds of a batch is of no use without the others. So it is taken in the same way, and a second one at once.
"""

import signal
import threading
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_lwpm.pipeline.mailbox import Mailbox
from lightning_lwpm.training.private import end_on_sigterm, forget_sigterm, replace_sigterm

__all__ = ["Interruption", "OrderlyInterrupt", "Termination"]


class OrderlyInterrupt(KeyboardInterrupt):
    """Ctrl-C, as all ranks raise it before the same batch: no failure, and checkpoints can be written."""


class Interruption:
    """Takes note of the first Ctrl-C while a model is trained; the second is raised at once, as always.

    Attributes:
        noted: Whether there was one that has not been raised yet.
    """

    def __init__(self) -> None:
        self.noted = False

    def install(self) -> None:
        """From now on; unless the user has a handler, or this is not the thread that gets signals."""
        global _active
        main = threading.current_thread() is threading.main_thread()
        if main and signal.getsignal(signal.SIGINT) in (signal.default_int_handler, _notice):
            _active = self
            signal.signal(signal.SIGINT, _notice)

    def remove(self) -> None:
        """Not any more."""
        global _active
        if _active is self:
            _active = None
            if signal.getsignal(signal.SIGINT) is _notice:
                signal.signal(signal.SIGINT, signal.default_int_handler)


_active: Interruption | None = None


def _notice(signum: int, frame: Any) -> None:
    """The handler; at the end of a run Lightning puts back the one that it found at the start, which may be this."""
    if _active is None or _active.noted:
        signal.default_int_handler(signum, frame)
    else:
        _active.noted = True


class Termination:
    """What this rank knows of a wish to end.

    Args:
        trainer: Runs the loop.
        mailbox: Tells rank 0.
        interruption: Has taken note of Ctrl-C.

    Attributes:
        agreed: Why all ranks end before the next batch, "" if they do not; set on all of them at the end of a batch.
    """

    def __init__(self, trainer: Trainer, mailbox: Mailbox, interruption: Interruption) -> None:
        self.trainer, self.mailbox, self.interruption = trainer, mailbox, interruption
        self.agreed = ""
        self._asked = ""
        self._told = False
        if mailbox.rank == 0:
            mailbox.handle("?terminate", lambda _, key, why: self._ask(why))

    def install(self) -> None:
        """Take the place of Lightning's way."""
        replace_sigterm(self.trainer, self._notice, self._check)

    def remove(self) -> None:
        """Give it back."""
        forget_sigterm(self.trainer)

    def batch_ended(self) -> str:
        """To be called at the end of a batch; on rank 0, why to tell all ranks to end."""
        if self.interruption.noted:
            self._ask("interrupted")
        if self.mailbox.rank and self._asked and not self._told:
            self._told = True
            self.mailbox.post(0, "?terminate", None, self._asked)
        return self._asked

    def _ask(self, why: str) -> None:
        self._asked = self._asked or why

    def _notice(self, signum: int, _: Any) -> None:
        launcher = self.trainer.strategy.launcher
        if not self._asked and launcher is not None:
            launcher.kill(signum)  # a scheduler may have told this process only
        self._ask("terminated")

    def _check(self) -> None:
        if not self.agreed:
            return
        self.mailbox.gather(self.agreed, None, f"all ranks to end, because one of them was {self.agreed}")
        if self.agreed == "interrupted":
            self.interruption.noted = False
            raise OrderlyInterrupt
        end_on_sigterm(self.trainer)
        raise SIGTERMException
