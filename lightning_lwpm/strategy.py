"""The strategy that Lightning sees: layer-wise model parallelism over the devices of a Trainer."""

import atexit
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies.parallel import ParallelStrategy
from lightning.pytorch.trainer import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_lwpm.checkpoint import held_states, merge_checkpoint
from lightning_lwpm.errors import LWPMError
from lightning_lwpm.options import check_options
from lightning_lwpm.partition.plan import PartitionPlan
from lightning_lwpm.pipeline.engine import Engine
from lightning_lwpm.pipeline.mailbox import Mailbox
from lightning_lwpm.pipeline.transport import Transport
from lightning_lwpm.training.checks import check_module, check_optimizers
from lightning_lwpm.training.data import Feed
from lightning_lwpm.training.gradients import clip_by_norm
from lightning_lwpm.training.hooks import Hooks
from lightning_lwpm.training.launchers import ProcessLauncher, ScriptLauncher
from lightning_lwpm.training.loop import Loop
from lightning_lwpm.training.planning import Planner
from lightning_lwpm.training.private import PathLike, init_connection, optimizers_to_device
from lightning_lwpm.training.steps import Steps
from lightning_lwpm.training.weights import copies, gather, hand_out

__all__ = ["LWPMStrategy"]


class LWPMStrategy(ParallelStrategy):
    """Layer-wise model parallelism: the layers of an unchanged LightningModule, partitioned over the devices.

    Implements the aims of "Layer-Wise Partitioning and Merging for Efficient and Scalable Deep Learning"
    (Akintoye et al., arXiv 2207.11019): layers are merged into stages that communicate little, and forward and
    backward passes of micro-batches overlap. The result is that of one device accumulating the same micro-batches.

    Example::

        trainer = Trainer(devices=4, strategy=LWPMStrategy(num_microbatches=8))

    Args:
        num_microbatches: Into how many micro-batches a training batch is split. More of them idle less, but each is
            smaller. ``"auto"``: four for each stage.
        schedule: The order of forward and backward passes: ``"1f1b"`` or ``"gpipe"``.
        partition: ``"auto"``, or the dotted names of the layers that begin the second, third, ... stage.
        virtual_stages: Stages for each device; only 1 for now.
        data_parallel_size: Copies of the pipeline; only 1 for now.
        process_group_backend: ``"gloo"``, also for accelerators (through host memory).
        timeout: Of the process group.
        start_method: How processes are started: ``"popen"``, ``"spawn"`` or ``"fork"``.
        patience: A wait longer than this many seconds is explained on standard error; 0 for never.

    Raises:
        ConfigurationError: for a value that cannot be used, saying which can.
    """

    def __init__(
        self,
        num_microbatches: int | Literal["auto"] = "auto",
        schedule: str = "1f1b",
        partition: str | list[str] = "auto",
        virtual_stages: int = 1,
        data_parallel_size: int = 1,
        process_group_backend: str | None = None,
        timeout: timedelta | None = None,
        start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen",
        patience: float = 30.0,
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
    ) -> None:
        super().__init__(accelerator, parallel_devices, cluster_environment, checkpoint_io, precision_plugin)
        check_options(
            num_microbatches=num_microbatches,
            schedule=schedule,
            partition=partition,
            virtual_stages=virtual_stages,
            data_parallel_size=data_parallel_size,
            process_group_backend=process_group_backend,
            start_method=start_method,
        )
        self.num_microbatches, self.schedule = num_microbatches, schedule
        self.patience = patience
        self._timeout = timeout or timedelta(minutes=30)
        self._start_method = start_method
        self._num_nodes = 1
        self._mailbox: Mailbox | None = None
        self._transport: Transport | None = None
        self._turn = 0
        self._planner = Planner(partition)
        self._feed: Feed | None = None
        self._engine: Engine | None = None
        self._hooks: Hooks | None = None
        self._steps: Steps | None = None
        self._copies: list[torch.nn.Module] = []
        self._failed = False

    # -- processes -----------------------------------------------------------------------------------------------

    @property
    @override
    def root_device(self) -> torch.device:
        assert self.parallel_devices is not None
        return self.parallel_devices[self.local_rank]

    @property
    def num_nodes(self) -> int:
        """Number of hosts."""
        return self._num_nodes

    @num_nodes.setter
    def num_nodes(self, num_nodes: int) -> None:
        self._num_nodes = num_nodes

    @property
    def num_processes(self) -> int:
        """Number of processes on this host."""
        return len(self.parallel_devices) if self.parallel_devices is not None else 0

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {"num_replicas": 1, "rank": 0}  # one pipeline reads the data once

    @property
    @override
    def restore_checkpoint_after_setup(self) -> bool:
        return False

    @override
    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        if self.num_processes * self.num_nodes == 1:
            return
        if self._start_method != "popen":
            self._launcher = ProcessLauncher(self, start_method=self._start_method)
        else:  # also where processes are there already: it tells all of them when one fails
            self._launcher = ScriptLauncher(self.cluster_environment, self.num_processes, self.num_nodes)

    def set_world_ranks(self) -> None:
        """Tell the cluster environment this process's place; called by Lightning."""
        if self.cluster_environment is not None:
            self.cluster_environment.set_global_rank(self.node_rank * self.num_processes + self.local_rank)
            self.cluster_environment.set_world_size(self.num_nodes * self.num_processes)
            rank_zero_only.rank = self.cluster_environment.global_rank()  # type: ignore[attr-defined]

    @override
    def setup_environment(self) -> None:
        super().setup_environment()
        self._failed = False
        if self._mailbox is not None:
            self._mailbox.resting = False
            return
        if self.world_size == 1:
            self._mailbox = Mailbox(0, 1, lambda value: [value])
            return
        self.set_world_ranks()
        assert self.cluster_environment is not None
        init_connection(self.cluster_environment, "gloo", timeout=self._timeout)
        self._mailbox = Mailbox(self.global_rank, self.world_size, _gather_once, self.patience)
        self._transport = Transport(self._mailbox)
        atexit.register(self._mailbox.close)
        atexit.register(self._transport.close)

    @property
    def mailbox(self) -> Mailbox:
        """The control connections; there once the environment has been set up."""
        assert self._mailbox is not None
        return self._mailbox

    # -- setup ---------------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: Trainer) -> None:
        assert self.accelerator is not None and self.model is not None and self.lightning_module is not None
        self.accelerator.setup(trainer)
        fitting = trainer.state.fn == TrainerFn.FITTING
        module = self.lightning_module
        with self._told("setup"):
            check_module(module, fitting, self.global_rank == 0)
            self.model = self.precision_plugin.convert_module(self.model)
            self._feed = Feed(
                self.mailbox, Loop(trainer, module, self.precision_plugin, self.root_device), ahead=2 * self.world_size
            )
            if fitting:
                self.setup_optimizers(trainer)
                check_optimizers(self.optimizers)
            count = self._count(self.world_size)
            layout = self._planner.layout(trainer, module, self._feed, self.mailbox, self._next(), count)
            if self.world_size > 1:
                self._copies = copies(module, trainer.callbacks)  # type: ignore[attr-defined]
                hand_out(self.mailbox, self._next(), module, layout, self.optimizers)
                for copy in self._copies:
                    hand_out(self.mailbox, self._next(), copy, layout, ())
            self.model_to_device()
            self.setup_precision_plugin()
            if fitting:
                optimizers_to_device(self.optimizers, self.root_device)
            self._engine = Engine(self.mailbox, self._transport, module, layout, self.root_device, self.schedule)
            if self.world_size > 1:
                self._hooks = Hooks(module, trainer, self.mailbox)
                self._hooks.install()
                self.precision_plugin.clip_grad_by_norm = self._clip_by_norm  # type: ignore[method-assign]
            count = self._count(layout.num_stages)
            self._steps = Steps(trainer, module, self._engine, self._feed, self._hooks, self.precision_plugin, count)

    @property
    def plan(self) -> PartitionPlan | None:
        """Which stage runs which layers; ``None`` before the first run."""
        return self._planner.plan

    @override
    def model_to_device(self) -> None:
        assert self.lightning_module is not None
        self.lightning_module.to(self.root_device)

    def _count(self, stages: int) -> int:
        if self.num_microbatches == "auto":
            return 4 * stages if stages > 1 else 1
        return self.num_microbatches

    @override
    def process_dataloader(self, dataloader: object) -> object:
        if self.world_size == 1 or self._feed is None:
            return dataloader
        return self._feed.wrap(dataloader)

    @override
    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        if self.world_size == 1 or self._feed is None:
            return super().batch_to_device(batch, device, dataloader_idx)
        return self._feed.give(
            batch, lambda raw: super(LWPMStrategy, self).batch_to_device(raw, device, dataloader_idx)
        )

    # -- steps ---------------------------------------------------------------------------------------------------

    @property
    def steps(self) -> Steps:
        """Runs the user's steps; there while a run is."""
        assert self._steps is not None
        return self._steps

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        return self.steps.train(*args, **kwargs)

    @override
    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        assert self.lightning_module is not None
        self.pre_backward(closure_loss)
        closure_loss = self.precision_plugin.pre_backward(closure_loss, self.lightning_module)
        self.steps.stash.hand_over()
        closure_loss = self.precision_plugin.post_backward(closure_loss, self.lightning_module)
        self.post_backward(closure_loss)
        return closure_loss

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        return self.steps.evaluate("validation_step", self.precision_plugin.val_step_context, *args, **kwargs)

    @override
    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        return self.steps.evaluate("test_step", self.precision_plugin.test_step_context, *args, **kwargs)

    @override
    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        return self.steps.evaluate("predict_step", self.precision_plugin.predict_step_context, *args, **kwargs)

    def _clip_by_norm(self, optimizer: Optimizer, clip_val: int | float) -> None:
        clip_by_norm(self.mailbox, self._next(), self.precision_plugin.main_params(optimizer), float(clip_val))

    # -- all ranks -----------------------------------------------------------------------------------------------

    def _next(self) -> int:
        """A number for an exchange in which all ranks take part."""
        self._turn += 1
        return self._turn

    @override
    def barrier(self, name: str | None = None) -> None:
        if self._mailbox is not None and self.world_size > 1 and not self._failed:
            self._mailbox.gather(("barrier", self._next()), None, f"all ranks at '{name or 'barrier'}'")

    @override
    def broadcast(self, obj: Any, src: int = 0) -> Any:
        if self._mailbox is None or self.world_size == 1:
            return obj
        return self._mailbox.broadcast(self._next(), obj, src)

    @override
    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        if self._mailbox is None or self.world_size == 1:
            return decision
        votes = self._mailbox.gather(("vote", self._next()), bool(decision), "the decision of all ranks")
        return min(votes) if all else max(votes)

    @override
    def reduce(self, tensor: Tensor | Any, group: Any = None, reduce_op: Any = "mean") -> Tensor | Any:
        return tensor  # over the data axis, which has one member

    @override
    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        return tensor  # over the data axis, which has one member

    # -- state ---------------------------------------------------------------------------------------------------

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: PathLike, storage_options: Any | None = None
    ) -> None:
        with self._told("saving a checkpoint"):
            merged = merge_checkpoint(self.mailbox, self._next(), checkpoint)
        if self.is_global_zero:
            self.checkpoint_io.save_checkpoint(merged, filepath, storage_options=storage_options)

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        states = []
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=False):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            states.append(held_states(saved, parameters))
        super().load_optimizer_state_dict({"optimizer_states": states})

    # -- end -----------------------------------------------------------------------------------------------------

    @override
    def on_exception(self, exception: BaseException) -> None:
        self.tell(exception)
        super().on_exception(exception)

    def tell(self, exception: BaseException) -> None:
        """Let every rank know of an exception that leaves Lightning's loop here."""
        self._failed = True
        if self._mailbox is not None:
            self._mailbox.failed("", exception)

    @override
    def teardown(self) -> None:
        if self._hooks is not None:
            self._hooks.remove()
            self._hooks = None
        self.precision_plugin.__dict__.pop("clip_grad_by_norm", None)
        if not self._failed and self._engine is not None and self.world_size > 1:
            assert self.lightning_module is not None
            with self._told("merging the weights after the run"):
                for module in (self.lightning_module, *self._copies):
                    gather(self.mailbox, self._next(), module, self._engine.layout)
        self._engine = self._steps = None
        self._copies = []
        if self._mailbox is not None:
            self._mailbox.resting = True
        super().teardown()

    @contextmanager
    def _told(self, what: str) -> Iterator[None]:
        """Tell all ranks of a failure in the block, so that none waits for this one."""
        try:
            yield
        except Exception as error:
            self._failed = True
            heard = self.mailbox.failure
            failure = self.mailbox.failed(what, error)
            if heard is not None and isinstance(error, LWPMError):
                raise
            raise failure from error

    @classmethod
    @override
    def register_strategies(cls, strategy_registry: Any) -> None:
        for name, start_method in (
            ("lwpm", "popen"),
            ("lwpm_spawn", "spawn"),
            ("lwpm_fork", "fork"),
            ("lwpm_notebook", "fork"),
        ):
            if name not in strategy_registry:
                strategy_registry.register(
                    name,
                    cls,
                    description=f"Layer-wise model parallelism with `start_method` '{start_method}'",
                    start_method=start_method,
                )


def _gather_once(value: Any) -> list[Any]:
    """One object from each rank, before there is a mailbox."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
