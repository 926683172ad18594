"""The first batch, the probe and the plan: all that happens before the model is partitioned."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import nn
from torchmetrics import Metric, MetricCollection

from lightning_lwpm.partition.apply import make_layout
from lightning_lwpm.partition.plan import PartitionPlan, make_plan
from lightning_lwpm.partition.probe import Probe, probe
from lightning_lwpm.partition.undo import generators_kept
from lightning_lwpm.pipeline.mailbox import Mailbox
from lightning_lwpm.pipeline.schedule import place
from lightning_lwpm.report import show_plan
from lightning_lwpm.staging.batch import Batch
from lightning_lwpm.staging.layout import Layout
from lightning_lwpm.training.data import Feed
from lightning_lwpm.training.private import first_loaders

__all__ = ["Planner"]

_STEPS = {
    TrainerFn.FITTING: "training_step",
    TrainerFn.VALIDATING: "validation_step",
    TrainerFn.TESTING: "test_step",
    TrainerFn.PREDICTING: "predict_step",
}
_HOST = torch.device("cpu")


class Planner:
    """Makes the layout of each run; what is known of a module is kept for its next run.

    Args:
        partition: "auto", or the names of the layers that begin a stage.

    Attributes:
        plan: The latest plan.
    """

    def __init__(self, partition: str | list[str]) -> None:
        self.partition = partition
        self.plan: PartitionPlan | None = None
        self._known: _Known | None = None

    def layout(
        self, trainer: Trainer, module: LightningModule, feed: Feed, mailbox: Mailbox, key: Any, count: int
    ) -> Layout:
        """Look at the step on rank 0 and make the same layout on every rank.

        Args:
            trainer: Runs the step.
            module: The whole module.
            feed: Reads the first batch.
            mailbox: The control connections.
            key: Names this exchange; the same on all ranks.
            count: Number of micro-batches.
        """
        if mailbox.world == 1:
            return _whole(module)
        fitting = trainer.state.fn == TrainerFn.FITTING
        name = _STEPS[trainer.state.fn]  # type: ignore[index]
        loaders = _setup_loaders(trainer)

        def ask(name: str, loaders: Any) -> Probe | None:
            seen = _look(trainer, module, feed, loaders, name, count) if mailbox.rank == 0 else None
            return mailbox.broadcast((key, name), seen, what=f"the description of `{name}`")

        known = self._recall(module, fitting)
        if known is None:
            seen = ask(name, loaders)
            if seen is None:  # there is no batch, so nothing will run
                return _whole(module)
            known = self._known = _Known(weakref.ref(module), _form(module), {name}, seen)
        if _unseen(module, known.seen):
            with _validating(trainer) if fitting else nullcontext():
                if fitting:
                    name, loaders = "validation_step", _setup_validation(trainer)
                if name not in known.steps:
                    known.steps.add(name)
                    other = ask(name, loaders)
                    known.seen = _extended(module, known.seen, other) if other is not None else known.seen
        plan = make_plan(known.seen.timeline, mailbox.world, self.partition, place)
        if fitting and plan != self.plan:
            show_plan(plan, mailbox.rank)
        self.plan = plan
        return make_layout(module, known.seen, plan)

    def _recall(self, module: nn.Module, fitting: bool) -> "_Known | None":
        """What is known of this very module; a step of training shows more than one of evaluation."""
        known = self._known
        if known is None or known.module() is not module or known.form != _form(module):
            return None
        return None if fitting and "training_step" not in known.steps else known


@dataclass
class _Known:
    """What has been seen of a module.

    Attributes:
        module: The module.
        form: What it was made of.
        steps: The steps that were looked at.
        seen: What they showed.
    """

    module: weakref.ref[nn.Module]
    form: Any
    steps: set[str]
    seen: Probe


def _form(module: nn.Module) -> Any:
    return [(name, tuple(p.shape), p.requires_grad) for name, p in module.named_parameters()]


def _unseen(module: nn.Module, seen: Probe) -> set[str]:
    """The modules with parameters that no step has called, such as a layer that only evaluation uses."""
    return {name for name, m in module.named_modules() if name and m._parameters and name not in seen.spans}


def _extended(module: nn.Module, seen: Probe, other: Probe) -> Probe:
    """``seen``, and layers that only another step calls: they go to the stage of the layer called before them."""
    unseen = _unseen(module, seen)
    positions = {call.name: position for position, call in enumerate(seen.timeline.calls)}
    parameters, buffers, latest = dict(seen.parameters), dict(seen.buffers), 0
    for call in other.timeline.calls:
        latest = positions.get(call.name, latest)
        if call.name in unseen:
            for found, theirs in ((parameters, other.parameters), (buffers, other.buffers)):
                inside = [name for name in theirs if name.startswith(f"{call.name}.")]
                found.update(dict.fromkeys(inside, (latest,)))
    return replace(seen, parameters=parameters, buffers=buffers)


def _whole(module: nn.Module) -> Layout:
    """Everything in one stage."""
    return Layout(1, (), dict.fromkeys([name for name, _ in module.named_parameters()], (0,)))


def _setup_loaders(trainer: Trainer) -> Any:
    """Let Lightning set up the loaders of this run now (its loops find them done); return those of the first batch."""
    fn = trainer.state.fn
    if fn == TrainerFn.FITTING:
        trainer.fit_loop.setup_data()
        return trainer.train_dataloader
    loop: Any = {
        TrainerFn.VALIDATING: trainer.validate_loop,
        TrainerFn.TESTING: trainer.test_loop,
        TrainerFn.PREDICTING: trainer.predict_loop,
    }[fn]  # type: ignore[index]
    loop.setup_data()
    return first_loaders(loop)


def _setup_validation(trainer: Trainer) -> Any:
    """The same for the validation within ``fit``."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    loop.setup_data()
    return first_loaders(loop)


@contextmanager
def _validating(trainer: Trainer) -> Iterator[None]:
    trainer.validating = True
    try:
        yield
    finally:
        trainer.training = True


def _look(trainer: Trainer, module: LightningModule, feed: Feed, loaders: Any, name: str, count: int) -> Probe | None:
    """Run a step once on its first micro-batch, on the whole model in host memory.

    Args:
        trainer: Runs the step.
        module: The whole model.
        feed: Reads the first batch.
        loaders: The loaders of the step; ``None`` if there are none.
        name: The step.
        count: Number of micro-batches in training.

    Returns:
        What was seen; ``None`` if there is no batch.
    """
    train = name == "training_step"
    with generators_kept():
        try:
            batch = _first(feed, loaders) if loaders is not None else None
        except StopIteration:
            batch = None
        if batch is None:
            return None
        batch = feed.loop.transfer(batch, device=_HOST)
    micro = Batch.of(batch, count if train else 1).microbatch(0)
    step = getattr(module, name)
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
    precision = trainer.precision_plugin
    context = precision.train_step_context if train else precision.val_step_context
    try:
        with torch.set_grad_enabled(train), context():
            metrics = [m for m in module.modules() if isinstance(m, Metric | MetricCollection)]
            return probe(module, lambda: step(micro, *kwargs.values()), metrics)
    finally:
        del module.__dict__["log"], module.__dict__["log_dict"]
        trainer.loggers = loggers
        for m, mode in modes:
            m.training = mode


def _first(feed: Feed, loaders: Any) -> Any:
    if isinstance(loaders, dict):
        return {key: _first(feed, loader) for key, loader in loaders.items()}
    if isinstance(loaders, list | tuple):
        return type(loaders)([_first(feed, loader) for loader in loaders])
    return feed.read(loaders)
