"""Looks at the user's step before the model is partitioned: one run of it on rank 0's host, without a trace.

Where the host cannot run it (kernels that only the accelerator has, ``.cuda()`` in a step), the accelerator does, as
long as the whole model finds room there.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature

from lightning_lwpm.errors import ConfigurationError
from lightning_lwpm.partition.probe import Probe, probe
from lightning_lwpm.partition.undo import generators_kept, undone
from lightning_lwpm.staging.batch import Batch
from lightning_lwpm.staging.lazy import is_lazy
from lightning_lwpm.training.collectives import data_axis
from lightning_lwpm.training.course import Course
from lightning_lwpm.training.data import Feed
from lightning_lwpm.training.metrics import metrics_of
from lightning_lwpm.training.private import first_loaders, said_to_be_on, set_up_training_data
from lightning_lwpm.training.pulled import LookedAt

__all__ = ["STEPS", "Onlooker"]

STEPS = {
    TrainerFn.FITTING: "training_step",
    TrainerFn.VALIDATING: "validation_step",
    TrainerFn.TESTING: "test_step",
    TrainerFn.PREDICTING: "predict_step",
}
_HOST = torch.device("cpu")
_BATCHES = 8  # of which at most so many are looked at, where the step skips all before
_WHOLE = "If samples cannot be told apart so, pass num_microbatches=1."


class Onlooker:
    """Looks at one step of a module.

    Args:
        trainer: Runs the step.
        module: The whole model, in host memory.
        feed: Reads the first batch.
        name: The step.
        device: The device of this rank.
        reads: Whether this rank looks; the others only set up their loaders.
    """

    def __init__(
        self, trainer: Trainer, module: LightningModule, feed: Feed, name: str, device: torch.device, reads: bool
    ) -> None:
        self.trainer, self.module, self.feed, self.name, self.device = trainer, module, feed, name, device
        self.reads, self.train = reads, name == "training_step"
        self.inside_fit = trainer.state.fn == TrainerFn.FITTING and not self.train
        self.unfit = ""  # why no pipeline can run the step, if it is seen
        with self._stage():
            self.loaders = self._loaders()
            self.batch = self._read(0)

    @property
    def samples(self) -> int | None:
        """Samples of the first batch, if it has any tensor."""
        return Batch.of(self.batch, 1).samples

    def look(self, count: int, may_be_whole: bool = False) -> tuple[Probe | None, int]:
        """Run the step on its first micro-batch, or the first one that it does not skip by returning ``None``.

        Args:
            count: Number of micro-batches in training.
            may_be_whole: Whether to run it on the whole batch where it does not run on a part.

        Returns:
            What was seen, ``None`` if there is no batch; and of how many micro-batches.
        """
        if self.batch is None:
            return None, count
        batch = Batch.of(self.batch, count)
        if len(batch) == 1 or not self.train:
            return self._look_somewhere(count), count
        packed = batch.numbering()
        strange = f"a tensor of shape {packed} seems to number rows of others" if packed is not None else ""
        try:
            if strange and may_be_whole:
                raise ValueError(strange)
            seen = self._look_somewhere(count)
        except Exception as error:
            reason = strange or f"{type(error).__name__}: {error}".partition("\n")[0]
            told = f"`{self.name}` does not run on one of {len(batch)} parts of a batch ({reason}). {batch.told()}"
            if not may_be_whole:
                error.add_note(f"{told} {_WHOLE}")
                raise
        else:
            if strange:
                warnings.warn(f"In a batch {strange}. {batch.told()} {_WHOLE}", stacklevel=2)
            return seen, count
        seen = self._look_somewhere(1)
        warnings.warn(
            f"{told} So batches stay whole: devices take turns, which saves memory but no time. Let a batch be tensors "
            "with one row, or lists with one item, for each sample, and its parts are computed at the same time.",
            stacklevel=2,
        )
        return seen, 1

    def _look_somewhere(self, count: int) -> Probe:
        try:
            return self._look(count, _HOST)
        except Exception as error:
            if self.device == _HOST or any(map(is_lazy, self.module.parameters())):
                raise
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            rank_zero_info(f"`{self.name}` does not run on the host ({reason}): it is looked at on {self.device}")
            try:
                return self._look(count, self.device)
            except torch.OutOfMemoryError:
                error.add_note(f"The model was looked at on the host because it does not fit on {self.device} whole.")
                raise error from None

    def _look(self, count: int, device: torch.device) -> Probe:
        module, trainer, train = self.module, self.trainer, self.train
        step = getattr(module, self.name)
        kwargs: dict[str, Any] = {}
        if is_param_in_hook_signature(step, "batch_idx", min_args=2):
            kwargs["batch_idx"] = 0
        if is_param_in_hook_signature(step, "dataloader_idx", min_args=3) and not train:
            kwargs["dataloader_idx"] = 0
        modes = [(m, m.training) for m in module.modules()]
        if not train:
            module.eval()
        module.__dict__["log"] = module.__dict__["log_dict"] = lambda *_, **__: None
        loggers, trainer.loggers = trainer.loggers, [DummyLogger() for _ in trainer.loggers]
        course = Course(trainer)  # a step may set the learning rate
        course.watch()
        try:
            with (
                self._stage(),
                self._on(device),
                torch.set_grad_enabled(train),
                self.context(),
                self._unoptimized(),
                data_axis(),
            ):
                given = lambda micro: self._given(micro, count, device)  # noqa: E731
                seen = self._first_trained(count, device, lambda micro: step(given(micro), *kwargs.values()))
        finally:
            del module.__dict__["log"], module.__dict__["log_dict"]
            trainer.loggers = loggers
            course.back()
            for m, mode in modes:
                m.training = mode
        bound = [name for name in seen.written if len(seen.parameters[name]) > 1]
        if bound and module.automatic_optimization:
            more = f" and {len(bound) - 1} more" if len(bound) > 1 else ""
            warnings.warn(
                f"`{self.name}` itself changes the weights '{bound[0]}'{more}, so no stage can begin between their "
                "uses. Change them in `on_train_batch_end`, which may use and change all weights, and the model can be "
                "cut anywhere.",
                stacklevel=2,
            )
        return seen

    def _first_trained(self, count: int, device: torch.device, step: Callable[[Any], Any]) -> Probe:
        """The step on the first micro-batch that it does not skip: others may show some layers only, or none."""
        skips = self.train and self.module.automatic_optimization
        seen: list[Probe] = []
        returned: list[Any] = []
        for micro in self._microbatches(count if self.train else 1, device):
            returned.clear()
            try:
                seen.append(self._probe(lambda micro=micro: returned.append(step(micro))))  # type: ignore[misc]
            except ConfigurationError:  # no layer was called
                if not (skips and returned and returned[-1] is None):
                    raise
            if seen and not (skips and returned[-1] is None):
                return seen[-1]
        if not seen:
            raise ConfigurationError(
                "`training_step` returned None for the first batches before it called any layer, so there is nothing "
                "to partition: begin with a batch that is trained on"
            )
        return max(seen, key=lambda probe: len(probe.timeline.calls))

    def _given(self, micro: Any, count: int, device: torch.device) -> Any:
        """What the step is given of a micro-batch."""
        if not self.feed.loop.pulls():
            return micro

        def read(number: int) -> Any:
            if number == 1:
                self.unfit = f"`{self.name}` takes several batches from `dataloader_iter`"
            batch = move_data_to_device(self._read(number), device)
            return None if batch is None else Batch.of(batch, count).microbatch(0, private=True)

        return LookedAt(micro, read)

    def _microbatches(self, count: int, device: torch.device) -> Iterator[Any]:
        """Those of the first batch, and of some more."""
        for number in range(_BATCHES):
            batch = self._read(number) if number else self.batch
            if batch is None:
                return
            split = Batch.of(move_data_to_device(batch, device), count)
            yield from (split.microbatch(i, private=True) for i in range(len(split)))

    def _probe(self, step: Callable[[], Any]) -> Probe:
        module = self.module
        hooks = [name for name in self._hooks() if is_overridden(name, module)]
        try:
            return probe(module, step, metrics_of(module))
        except Exception:
            if not hooks:
                raise
        with undone(module):  # the step may use what its hooks have set
            for name in hooks:
                getattr(module, name)()
            return probe(module, step, metrics_of(module))

    def _hooks(self) -> list[str]:
        """The hooks that come before the first batch."""
        kind = self.name.removesuffix("_step").replace("training", "train")
        first = ["on_fit_start"] if self.train else []
        return [*first, f"on_{kind}_start", f"on_{kind}_epoch_start"]

    def context(self) -> Any:
        """Lightning's precision context for the step."""
        precision = self.trainer.precision_plugin
        return precision.train_step_context() if self.train else precision.val_step_context()

    def _loaders(self) -> Any:
        """Let Lightning set up the loaders of this step now (its loops find them done); those of the first batch."""
        trainer = self.trainer
        if self.train:
            set_up_training_data(trainer)
            return trainer.train_dataloader
        loop: Any = {
            TrainerFn.FITTING: trainer.fit_loop.epoch_loop.val_loop,
            TrainerFn.VALIDATING: trainer.validate_loop,
            TrainerFn.TESTING: trainer.test_loop,
            TrainerFn.PREDICTING: trainer.predict_loop,
        }[trainer.state.fn]  # type: ignore[index]
        loop.setup_data()
        return first_loaders(loop)

    def _read(self, number: int) -> Any:
        """A batch by its number in the epoch, on the host; ``None`` where there is none."""
        if not self.reads or self.loaders is None:
            return None
        with generators_kept():
            try:
                batch = _read(self.feed, self.loaders, number)
            except StopIteration:
                return None
            return None if batch is None else self.feed.loop.transfer(batch, device=_HOST)

    def _unoptimized(self) -> AbstractContextManager[None]:
        return nullcontext() if self.module.automatic_optimization else _unoptimized(self.trainer, self.module)

    @contextmanager
    def _on(self, device: torch.device) -> Iterator[None]:
        with said_to_be_on(self.module, device), generators_kept(device):
            if device == _HOST:
                yield
                return
            self.module.to(device)
            try:
                yield
            finally:
                self.module.cpu()

    def _stage(self) -> Any:
        return _validating(self.trainer) if self.inside_fit else nullcontext()


@contextmanager
def _unoptimized(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Let what a step does with manual optimization leave weights, optimizers and schedulers as they are."""
    strategy = trainer.strategy
    schedulers = [(vars(config.scheduler), dict(vars(config.scheduler))) for config in strategy.lr_scheduler_configs]
    steps = [(vars(optimizer), vars(optimizer).get("step")) for optimizer in strategy.optimizers]
    weights = [(p, p.detach().clone()) for p in module.parameters()]  # some clip them by hand
    vars(strategy)["backward"] = lambda loss, *_, **__: loss
    vars(strategy)["optimizer_step"] = lambda _, closure, *__, **___: closure()
    for attributes, _ in steps:
        attributes["step"] = lambda closure=None, **_: closure() if closure is not None else None
    try:
        yield
    finally:
        del vars(strategy)["backward"], vars(strategy)["optimizer_step"]
        for attributes, step in steps:
            del attributes["step"]
            if step is not None:  # a scheduler's
                attributes["step"] = step
        for now, before in schedulers:
            now.update(before)
        with torch.no_grad():
            for parameter, values in weights:
                parameter.copy_(values)


@contextmanager
def _validating(trainer: Trainer) -> Iterator[None]:
    trainer.validating = True
    try:
        yield
    finally:
        trainer.training = True


def _read(feed: Feed, loaders: Any, number: int) -> Any:
    if isinstance(loaders, dict):
        return {key: _read(feed, loader, number) for key, loader in loaders.items()}
    if isinstance(loaders, list | tuple):
        return type(loaders)([_read(feed, loader, number) for loader in loaders])
    return feed.read(loaders, number)
