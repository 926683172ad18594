"""The user's hooks that look at outputs or metrics run where those are real, and their logs reach every rank.

A hook on the module is replaced on the instance, for the time between ``setup`` and ``teardown``.
"""

import functools
from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_lwpm.pipeline.mailbox import Mailbox
from lightning_lwpm.training.data import has_tickets
from lightning_lwpm.training.private import adopt_epoch, epoch_of

__all__ = ["Hooks"]

_EPOCH_ENDS = ("on_train_epoch_end", "on_validation_epoch_end", "on_test_epoch_end", "on_predict_epoch_end")
_BATCH_ENDS = ("on_train_batch_end", "on_validation_batch_end", "on_test_batch_end", "on_predict_batch_end")


class Hooks:
    """Hooks of a module in a pipeline of several ranks.

    Args:
        module: The LightningModule.
        trainer: Its trainer.
        mailbox: The control connections.
    """

    def __init__(self, module: LightningModule, trainer: Trainer, mailbox: Mailbox) -> None:
        self.module, self.trainer, self.mailbox = module, trainer, mailbox
        self.real = mailbox.rank == 0
        self._installed: list[str] = []
        self._turn = 0

    def install(self) -> None:
        """Replace the hooks."""
        for name in _EPOCH_ENDS:
            self._replace(name, self._epoch_end)
        for name in _BATCH_ENDS:
            if is_overridden(name, self.module, LightningModule):
                self._replace(name, self._batch_end)
        # private: Lightning calls it on every batch before `batch_to_device`; a ticket has been through it
        self._replace("_on_before_batch_transfer", self._before_transfer)

    def remove(self) -> None:
        """Put the hooks back."""
        for name in self._installed:
            self.module.__dict__.pop(name, None)
        self._installed = []

    def _replace(self, name: str, run: Callable[..., Any]) -> None:
        original = getattr(self.module, name)
        self.module.__dict__[name] = functools.wraps(original)(functools.partial(run, original))
        self._installed.append(name)

    def _epoch_end(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """On rank 0 run it, and give everything the epoch has logged to the others."""
        self._turn += 1
        key = ("results", self._turn)
        if self.real:
            out = original(*args, **kwargs)
            self.mailbox.post_all("results", key, epoch_of(self.trainer))
            return out
        adopt_epoch(self.trainer, self.mailbox.take("results", key, "the metrics of this epoch from rank 0"))
        return None

    def _batch_end(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run it on rank 0; in training, what it logs reaches the others at once."""
        training = self.trainer.training
        self._turn += training
        key = ("hook", self._turn)
        if not self.real:
            for name, value, options in self.mailbox.take("hook", key, "the logs of a hook") if training else ():
                self.module.log(name, value, **options)
            return None
        entries: list[Any] = []
        log = self.module.log

        def note(name: str, value: Any, *more: Any, **options: Any) -> None:
            log(name, value, *more, **options)
            entries.append((name, value, options))

        self.module.__dict__["log"] = note
        try:
            out = original(*args, **kwargs)
        finally:
            del self.module.__dict__["log"]
        if training:
            self.mailbox.post_all("hook", key, entries)
        return out

    @staticmethod
    def _before_transfer(original: Callable[..., Any], batch: Any, *args: Any, **kwargs: Any) -> Any:
        return batch if has_tickets(batch) else original(batch, *args, **kwargs)
