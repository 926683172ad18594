"""The part of the strategy that decides, before anything runs, which stage runs which layers and in which order."""

from abc import ABC
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from typing_extensions import override

from lightning_lwpm.partition.plan import PartitionPlan
from lightning_lwpm.pipeline.schedule import Table
from lightning_lwpm.staging.batch_norm import batch_norms
from lightning_lwpm.staging.layout import Layout
from lightning_lwpm.staging.lazy import built_lazily
from lightning_lwpm.state.before import Before
from lightning_lwpm.training.building import called_within, initialise
from lightning_lwpm.training.checks import check_callbacks, check_module, check_optimizers, users, warn_of_gradients
from lightning_lwpm.training.data import Feed
from lightning_lwpm.training.loop import Loop
from lightning_lwpm.training.planning import Planner
from lightning_lwpm.training.stateful import StatefulStrategy
from lightning_lwpm.training.weights import to_host
from lightning_lwpm.tuning.devices import free_bytes
from lightning_lwpm.tuning.optimizer_state import state_factor
from lightning_lwpm.tuning.predict import table_of
from lightning_lwpm.tuning.wish import Wish

__all__ = ["PlannedStrategy"]


class PlannedStrategy(StatefulStrategy, ABC):
    """Checks a model, looks at its step and plans.

    Attributes:
        num_microbatches: As the user wrote it, like all that follow: see ``LWPMStrategy``.
        schedule: The same.
        partition: The same.
        costs: The same.
        virtual_stages: The same.
        activation_checkpointing: The same.
    """

    num_microbatches: int | Literal["auto"]
    schedule: str
    partition: str | list[str] | PartitionPlan
    costs: Literal["measured", "estimated"]
    virtual_stages: int | Literal["auto"]
    activation_checkpointing: Literal["none", "layer", "stage"]
    _device_memory: float | None = None
    _planner: Planner | None = None
    _feed: Feed | None = None
    _configured: Callable[[], None] | None = None  # lets the module's `configure_model` be as it was

    # -- building ------------------------------------------------------------------------------------------------

    @override
    @contextmanager
    def tensor_init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        """Around ``configure_model`` and in ``trainer.init_module()``: large weights are made where they are held."""
        with super().tensor_init_context(empty_init):
            if self.num_processes * self.num_nodes == 1:
                yield
                return
            with torch.device("cpu"), built_lazily():
                yield

    @override
    def connect(self, model: LightningModule) -> None:
        super().connect(model)
        if self.num_processes * self.num_nodes > 1 and is_overridden("configure_model", model):
            self._end_configuring()
            self._configured = called_within(model, self.tensor_init_context)

    def _end_configuring(self) -> None:
        if self._configured is not None:
            self._configured()
            self._configured = None

    # -- planning ------------------------------------------------------------------------------------------------

    def _prepare(self, trainer: Trainer) -> Feed:
        """Everything that comes before the model is looked at."""
        assert self.model is not None and self.lightning_module is not None
        fitting, module = trainer.state.fn == TrainerFn.FITTING, self.lightning_module
        check_module(module, fitting, self.global_rank == 0, self._asynchronous)
        if self.world_size > 1:
            check_callbacks(trainer.callbacks)  # type: ignore[attr-defined]
        initialise(module)
        to_host(module)
        self.model = self.precision_plugin.convert_module(self.model)
        loop = Loop(trainer, module, self.precision_plugin, self.root_device)
        # whatever the number of micro-batches, a batch has one at least
        ahead = self.world_size + 1 if fitting and self._asynchronous else 0
        self._feed = Feed(self.mailbox, loop, 2 * self.world_size, ahead)
        if fitting:
            self.setup_optimizers(trainer)
            if self.world_size > 1:
                check_optimizers(self.optimizers)
                if self._asynchronous or not module.automatic_optimization:
                    warn_of_gradients(users(module, trainer))
        return self._feed

    @property
    def _asynchronous(self) -> bool:
        return self.schedule == "async" and self.world_size > 1

    @property
    def _whole(self) -> bool:
        """Whether every rank runs the user's whole step, in turns: see ``training.whole``."""
        if self._planner is not None and self._planner.whole:
            return True
        assert self.lightning_module is not None
        return self.schedule == "sequential" or not self.lightning_module.automatic_optimization

    @property
    def plan(self) -> PartitionPlan | None:
        """Which stage runs which layers; ``None`` before the first run."""
        return self._planner.plan if self._planner is not None else None

    @override
    def plan_ahead(self) -> PartitionPlan | None:
        assert self.lightning_module is not None
        plan = self._planner.plan_of(self.lightning_module) if self._planner is not None else None
        return plan or (self.partition if isinstance(self.partition, PartitionPlan) else None)

    @override
    def plan_in_vain(self) -> PartitionPlan | None:
        module = self.lightning_module
        assert module is not None
        before = Before(module, self.num_processes)
        try:
            with self.told("setup"):
                self._plan(module.trainer, self._prepare(module.trainer))
        except Exception:  # another error is on its way
            return None
        finally:
            before.put_back(module)
        return self.plan

    def _plan(self, trainer: Trainer, feed: Feed) -> Layout:
        assert self.lightning_module is not None
        self._planner = self._planner or Planner(self.mailbox, self.transport, self.root_device, self.costs)
        return self._planner.layout(trainer, self.lightning_module, feed, self._wish())

    def _wish(self) -> Wish:
        """What the user asked for, and what the devices hold."""
        limit = self._device_memory or free_bytes(self.root_device)
        limits = self.mailbox.gather(("memory", self.next_turn()), limit, "the memory of all devices")
        assert self.lightning_module is not None
        factor = state_factor(self.optimizers) if self.world_size > 1 else 0.0  # it makes a step of their like
        idle = self.num_microbatches not in ("auto", 1) or self.schedule not in ("auto", "sequential", "async")
        if idle and not self.lightning_module.automatic_optimization:
            rank_zero_warn(
                "with manual optimization a batch is whole and ranks take turns: `num_microbatches`, `schedule` "
                "and what goes with them have no effect"
            )
        wish = Wish(
            self.partition,
            self.num_microbatches,
            self.schedule,
            tuple(limits),
            factor,
            self.virtual_stages,
            activation_checkpointing=self.activation_checkpointing,
            least_samples=self._least_samples(),
        )
        return wish.in_turns() if self._whole else wish

    def _least_samples(self) -> int:
        """The fewest samples of a micro-batch, where the user leaves that open: one alone has no statistics."""
        assert self.lightning_module is not None
        return 2 if self.num_microbatches == "auto" and batch_norms(self.lightning_module) else 1

    def _settled(self) -> tuple[int, str | Callable[[int], Table]]:
        """The number of micro-batches and the schedule, as far as they matter."""
        plan = self.plan
        if self.world_size > 1 and plan is not None and plan.prediction is not None:
            return plan.prediction.num_microbatches, table_of(plan, plan.prediction.schedule)
        count = 1 if self._whole or self.num_microbatches == "auto" else self.num_microbatches
        return count, "1f1b" if self.schedule in ("auto", "sequential", "async") else self.schedule
