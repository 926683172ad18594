"""The user's hooks that look at outputs or metrics run where those are real, and what they log or decide reaches all.

    on_..._batch_end of the module     rank 0; in training, what it logs and sets reaches all at once; in evaluation
                                       no rank waits for it, unless it reaches for weights of others
    hooks before an optimizer's step   every rank; they may read all gradients and weights (not where batches overlap)
    on_..._epoch_end of the module     rank 0; then what it logs and sets reaches all
    the same of callbacks              every rank: before them, all that the epoch has logged reaches every rank
    they, all hooks that come between  every rank; they may read all weights, save them and run the model
    batches, `on_save_checkpoint`, and (not before and after training batches that overlap)
    callbacks' hooks after each batch

What rank 0 alone runs may use and change all weights, and set more: see ``alone`` and ``settings``.
What all ranks read: see ``together``.
A hook on the module is replaced on the instance, for the time between ``setup`` and ``teardown``.
"""

import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning, BasePredictionWriter, ThroughputMonitor
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.optim import Optimizer

from lightning_lwpm.pipeline.mailbox import Mailbox
from lightning_lwpm.staging.layout import Unit
from lightning_lwpm.training.alone import Alone
from lightning_lwpm.training.before_callbacks import BeforeCallbacks
from lightning_lwpm.training.checks import BEFORE_STEPS, looks_at_gradients, users
from lightning_lwpm.training.course import Limits
from lightning_lwpm.training.data import Feed
from lightning_lwpm.training.example import Example
from lightning_lwpm.training.kept import Kept
from lightning_lwpm.training.logs import sendable
from lightning_lwpm.training.private import (
    BEFORE_TRANSFER,
    adopt_epoch,
    agree_on_validation,
    count_as_one_device,
    epoch_of,
    forget_agreement,
)
from lightning_lwpm.training.random_state import after, generators, put_generators
from lightning_lwpm.training.replaced import Replaced
from lightning_lwpm.training.settings import Settings
from lightning_lwpm.training.tickets import has_tickets
from lightning_lwpm.training.together import Together
from lightning_lwpm.training.weights import Holders

__all__ = ["Hooks"]

_STAGES = ("train", "validation", "test", "predict")
_EPOCH_ENDS = tuple(f"on_{stage}_epoch_end" for stage in _STAGES)
_BATCH_ENDS = tuple(f"on_{stage}_batch_end" for stage in _STAGES)
_AT_REST = (
    *("on_fit_start", "on_fit_end", "on_sanity_check_start", "on_sanity_check_end"),
    *(f"on_{stage}_{when}" for stage in _STAGES for when in ("start", "epoch_start", "epoch_end", "end")),
)
# Lightning sees a process group and cannot know that all ranks hold the same values.
_ADVICE = r"It is recommended to use `self\.log\(.*sync_dist=True\)`"


class Hooks:
    """Hooks of a module in a pipeline of several ranks.

    Args:
        module: The LightningModule.
        trainer: Its trainer.
        mailbox: The control connections.
        holders: Gives who holds which weights now.
        units: Gives the modules of which each lies in one stage now.
        feed: Gives the batches.
        before_data: Called before the training data is read.
        in_step: Whether all ranks come to the hooks before an optimizer's step at the same time.
        unread: On rank 0 where the random generators were before it began to read the data.

    Attributes:
        alone: The weights in hooks that only rank 0 runs.
        settings: What such hooks, and the ends of steps, set for steps to come.
        together: The gradients and weights in hooks that every rank runs.
        kept: What the module and callbacks keep beside the model.
        limits: What the loaders of training were set up by.
    """

    def __init__(
        self,
        module: LightningModule,
        trainer: Trainer,
        mailbox: Mailbox,
        holders: Callable[[], Holders],
        units: Callable[[], Sequence[Unit]],
        feed: Feed,
        before_data: Callable[[], None],
        in_step: bool,
        unread: dict[str, Any] | None,
    ) -> None:
        self.before_data, self.in_step, self._unread = before_data, in_step, unread
        self.kept = Kept(module, users(module, trainer))
        self.together, self.feed = Together(mailbox, module, holders, units, feed, self.kept), feed
        self.alone, self.settings = Alone(mailbox, module, holders), Settings(module, trainer)
        self.module, self.trainer, self.mailbox = module, trainer, mailbox
        self.real = mailbox.rank == 0
        self._before_callbacks = BeforeCallbacks(self)
        self.limits = Limits(trainer)
        self._example: Example | None = None
        self._turn = 0
        self._replaced: list[Replaced] = []
        self._own_way = {"on_fit_start": self._fit_start, "on_save_checkpoint": self._saves}
        self._heeded = False  # whether all ranks wait for the module's hook after a batch of this evaluation

    def install(self) -> None:
        """Replace the hooks."""
        for name in _EPOCH_ENDS:
            if is_overridden(name, self.module):
                self._replace(name, self._epoch_end)
        for name in _BATCH_ENDS:
            if is_overridden(name, self.module):
                self._replace(name, self._batch_end)
        for place in users(self.module, self.trainer):
            own = place is self.module
            for name in self._everywhere():
                has = hasattr(LightningModule if own else Callback, name)
                if has and is_overridden(name, place) and not (own and name in (*_EPOCH_ENDS, *_BATCH_ENDS)):
                    what = f"`{name}` of {type(place).__name__}"
                    late = "_batch_" in name and not looks_at_gradients(place, name)
                    run = self._own_way.get(name, self._batch_hook if late else self._reads_all)
                    self._replace(name, functools.partial(run, what), place)
            for name in self._around_steps():
                if is_overridden(name, place) and not (own and name in _BATCH_ENDS):
                    self._replace(name, self._stops_alike, place)
        self._replace(BEFORE_TRANSFER, self._before_transfer)
        self._example = Example(self.trainer, self.module)
        self.trainer.callbacks.insert(0, self._before_callbacks)  # type: ignore[attr-defined]
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, ThroughputMonitor):
                count_as_one_device(callback, self.mailbox.world)
            if not self.real and isinstance(callback, BasePredictionWriter):
                callback.__dict__["write_on_batch_end"] = callback.__dict__["write_on_epoch_end"] = _nothing
        agree_on_validation(self.trainer, lambda due: self._from_rank_0("validate", due, "whether rank 0 validates"))
        warnings.filterwarnings("ignore", _ADVICE)
        BaseFinetuning.filter_on_optimizer = staticmethod(_not_yet_in)  # type: ignore[assignment]

    def _everywhere(self) -> Iterable[str]:
        """The hooks to which all ranks come at the same time."""
        yield from (*_AT_REST, "on_save_checkpoint")
        yield from _BATCH_ENDS[1:]  # callbacks are given what rank 0's step has returned
        if self.in_step or not self.module.automatic_optimization:
            yield from ("on_train_batch_start", "on_train_batch_end")
        if self.in_step:
            yield from BEFORE_STEPS

    def _around_steps(self) -> Iterable[str]:
        """Other hooks of training batches, to which each rank comes in its own time."""
        if self.module.automatic_optimization:
            names = ("on_before_zero_grad", "on_before_backward", "on_train_batch_start", "on_train_batch_end")
            yield from names[:2] if self.in_step else (*names, *BEFORE_STEPS[:2])

    def show_example(self) -> None:
        """Give the module its ``example_input_array`` back."""
        if self._example is not None:
            self._example.show()

    def remove(self) -> None:
        """Put the hooks back."""
        forget_agreement(self.trainer)
        self.show_example()
        for replaced in self._replaced:
            replaced.undo()
        self._replaced.clear()
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        callbacks[:] = [callback for callback in callbacks if callback is not self._before_callbacks]
        for callback in callbacks:
            for name in ("write_on_batch_end", "write_on_epoch_end"):
                if callback.__dict__.get(name) is _nothing:
                    del callback.__dict__[name]
        BaseFinetuning.filter_on_optimizer = staticmethod(_filter_on_optimizer)  # type: ignore[method-assign]

    def outputs_wanted(self, name: str) -> bool:
        """Whether a callback of the user may look at the outputs of a step, so that every rank needs them.

        Args:
            name: The hook that gets them, such as "on_train_batch_end".
        """
        callbacks = (place for place in users(self.module, self.trainer) if isinstance(place, Callback))
        return any(is_overridden(name, callback) for callback in callbacks)

    def share_epoch(self) -> None:
        """Everything that the epoch has logged, from rank 0 to the others."""
        self._turn += 1
        key = ("epoch", self._turn)
        if self.real:
            # what steps and hooks of evaluation have set; those of training have told already
            news = None if self.trainer.training else self.settings.news()
            self.mailbox.post_all("epoch", key, (epoch_of(self.trainer), news))
        else:
            epoch, news = self.mailbox.take("epoch", key, "the metrics of this epoch from rank 0")
            adopt_epoch(self.trainer, epoch)
            if news is not None:
                self.settings.adopt(news)

    def _replace(self, name: str, run: Callable[..., Any], place: LightningModule | Callback | None = None) -> None:
        place = self.module if place is None else place
        original = getattr(place, name)
        replaced = Replaced(place, name, run, original)
        place.__dict__[name] = functools.update_wrapper(replaced, original)
        self._replaced.append(replaced)

    def _reads_all(self, what: str, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run it on every rank, with all gradients and weights to read."""
        if self.alone.active:  # in a hook that rank 0 runs alone, which reads all of them in its own way
            return original(*args, **kwargs)
        with self.together.hook(what, args):
            return original(*args, **kwargs)

    def _batch_hook(self, what: str, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The same for a hook that comes with each batch, and seldom reads any."""
        with self.together.hook(what, args, late=True):
            return original(*args, **kwargs)

    def _stops_alike(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run it on every rank; where it ends the run on rank 0, or sets how it goes on, all do so at this batch."""
        course, trainer = self.settings.course, self.trainer
        course.watch()
        out = original(*args, **kwargs)
        here = (trainer.should_stop, course.changes()) if self.real else None
        stop, changes = self._from_rank_0("course", here, "what a hook of rank 0 sets")
        trainer.should_stop = trainer.should_stop or stop
        if not self.real:
            course.follow(changes)
        return out

    def _from_rank_0(self, kind: str, value: Any, what: str) -> Any:
        """What rank 0 has."""
        self._turn += 1
        return self.mailbox.broadcast((kind, self._turn), value, what=what)

    def _saves(self, what: str, original: Callable[..., Any], *args: Any) -> Any:
        """The same for a hook that is given a checkpoint."""
        if self.alone.active:
            return original(*args)
        with self.together.hook(what, checkpoint=args[-1]):
            return original(*args)

    def _fit_start(self, what: str, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The same; random numbers (layers that a callback adds) are drawn as if rank 0 had read no data yet."""
        if self._unread is None:
            return self._reads_all(what, original, *args, **kwargs)
        device = self.trainer.strategy.root_device
        read = generators(device)
        put_generators(self._unread, device)
        try:
            return self._reads_all(what, original, *args, **kwargs)
        finally:
            drawn = generators(device)
            put_generators(after(drawn, self._unread, read), device)
            self._unread = drawn

    def draw_unread(self) -> None:
        """On rank 0, in the sanity check: draw as if no training data had been read yet. Lightning puts it back."""
        if self._unread is not None:
            put_generators({**self._unread, "device": ()}, self.trainer.strategy.root_device)

    def _epoch_end(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """On rank 0 run it, and give what it has logged and set to the others."""
        out = None
        if self.real:
            self.settings.watch()
            with self.alone.heard(), self.feed.read_aside(_by_itself):
                out = original(*args, **kwargs)
            self.alone.end(self.settings.news())
        else:
            self.settings.adopt(self.alone.listen("a hook of rank 0, and what it sets"))
        if not self.trainer.predicting:
            self.share_epoch()
        return out

    def _batch_end(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run it on rank 0; in training, what it logs and sets reaches the others at once."""
        if not self.trainer.training:
            return self._evaluation_batch_end(original, *args, **kwargs)
        if not self.real:
            entries, stop, news = self.alone.listen("a hook of rank 0, and what it logs and sets")
            self.settings.adopt(news)
            for name, value, options in entries:
                self.module.log(name, value, **options)
            self.trainer.should_stop = stop
            return None
        entries = []
        log = self.module.log

        def note(name: str, value: Any, *more: Any, **options: Any) -> None:
            log(name, value, *more, **options)
            entries.append((name, value, options))

        self.settings.watch()
        self.module.__dict__["log"] = note
        try:
            with self.alone.heard(), self.feed.read_aside(_by_itself):
                out = original(*args, **kwargs)
        finally:
            del self.module.__dict__["log"]
        self.alone.end((sendable(entries), self.trainer.should_stop, self.settings.news()))
        return out

    def _evaluation_batch_end(
        self, original: Callable[..., Any], outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> Any:
        """Run it on rank 0. Whether others wait for it, as it uses or changes their weights, the first batch shows."""
        heard = self._heeded or batch_idx == 0
        if not self.real:
            if heard:
                self._heeded = self.alone.listen("a hook of rank 0")
            return None
        if not heard:
            with self.alone.unheard(original.__name__), self.feed.read_aside(_by_itself):
                return original(outputs, batch, batch_idx, *args)
        with self.alone.heard(), self.feed.read_aside(_by_itself):
            out = original(outputs, batch, batch_idx, *args)
        self._heeded = self.alone.reached or (self._heeded and batch_idx > 0)
        self.alone.end(self._heeded)
        return out

    @staticmethod
    def _before_transfer(original: Callable[..., Any], batch: Any, *args: Any, **kwargs: Any) -> Any:
        """A ticket stands for a batch that has been through the user's hook, or will be on rank 0."""
        return batch if has_tickets(batch) else original(batch, *args, **kwargs)


def _by_itself(read: Iterator[Any] | None) -> Iterator[Any]:
    """Rank 0 alone reads data."""
    return read or iter(())


_filter_on_optimizer = BaseFinetuning.filter_on_optimizer


def _not_yet_in(optimizer: Optimizer, params: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Lightning compares values to find the parameters that an optimizer has already; here no rank knows all values."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return [parameter for parameter in params if id(parameter) not in held]


def _nothing(*_: Any, **__: Any) -> None:
    """What a prediction writer does on a rank that has no predictions."""
