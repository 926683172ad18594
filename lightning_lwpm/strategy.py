"""The strategy that Lightning sees: layer-wise model parallelism over the devices of a Trainer."""

import atexit
import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.fabric.utilities.distributed import _init_dist_connection
from lightning.fabric.utilities.optimizer import _optimizers_to_device
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies.parallel import ParallelStrategy
from lightning.pytorch.trainer import Trainer
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_lwpm.checkpoint import held_states, merge_checkpoint
from lightning_lwpm.errors import ConfigurationError, LWPMError
from lightning_lwpm.options import check_options
from lightning_lwpm.partition.apply import make_layout
from lightning_lwpm.partition.plan import PartitionPlan, make_plan
from lightning_lwpm.partition.probe import Probe
from lightning_lwpm.pipeline.engine import Engine
from lightning_lwpm.pipeline.mailbox import Mailbox
from lightning_lwpm.pipeline.schedule import place as place_stages
from lightning_lwpm.pipeline.transport import Transport
from lightning_lwpm.report import show_plan
from lightning_lwpm.staging.batch import Batch
from lightning_lwpm.staging.layout import Layout
from lightning_lwpm.staging.placeholder import is_placeholder
from lightning_lwpm.staging.step import StagedStep
from lightning_lwpm.training.checks import check_module, check_optimizers
from lightning_lwpm.training.data import Feed
from lightning_lwpm.training.gradients import Stash, clip_by_norm
from lightning_lwpm.training.hooks import Hooks
from lightning_lwpm.training.launchers import ProcessLauncher, ScriptLauncher
from lightning_lwpm.training.logs import LogBook, sendable
from lightning_lwpm.training.metrics import Metrics
from lightning_lwpm.training.outputs import loss_of, mean_loss, merge_outputs
from lightning_lwpm.training.planning import look, setup_loaders
from lightning_lwpm.training.weights import gather, hand_out

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
        self.num_microbatches, self.schedule, self.partition = num_microbatches, schedule, partition
        self.patience = patience
        self._timeout = timeout or timedelta(minutes=30)
        self._start_method = start_method
        self._num_nodes = 1
        self._mailbox: Mailbox | None = None
        self._transport: Transport | None = None
        self._turn = 0
        self._feed: Feed | None = None
        self._engine: Engine | None = None
        self._hooks: Hooks | None = None
        self._failed = False
        self._seen: tuple[int, Probe] | None = None
        self.plan: PartitionPlan | None = None

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
            rank_zero_only.rank = self.cluster_environment.global_rank()

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
        _init_dist_connection(self.cluster_environment, "gloo", timeout=self._timeout)
        self._mailbox = Mailbox(self.global_rank, self.world_size, _gather_once, self.patience)
        self._transport = Transport(self._mailbox, {way: dist.new_group() for way in ("down", "up")})
        atexit.register(self._mailbox.close)

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
                self.mailbox,
                2 * self.world_size,
                self._prepare,
                self._is_evaluating,
                self._eval_limit,
                self.root_device,
            )
            if fitting:
                self.setup_optimizers(trainer)
                check_optimizers(self.optimizers)
            layout = self._partition(trainer)
            self.model_to_device()
            self.setup_precision_plugin()
            if fitting:
                _optimizers_to_device(self.optimizers, self.root_device)
            self._engine = Engine(self.mailbox, self._transport, module, layout, self.root_device, self.schedule)
            self._metrics = Metrics(module, self._engine.last)
            self._book = LogBook(module, self.mailbox)
            held = [(n, p) for n, p in module.named_parameters() if not is_placeholder(p)]
            self._stash = Stash([p for _, p in held], [p for n, p in held if n in layout.shared])
            if self.world_size > 1:
                self._hooks = Hooks(module, trainer, self.mailbox)
                self._hooks.install()
                self.precision_plugin.clip_grad_by_norm = self._clip_by_norm  # type: ignore[method-assign]

    def _partition(self, trainer: Trainer) -> Layout:
        """Look at the step on rank 0, make the plan everywhere, and keep this rank's share of the weights."""
        module = self.lightning_module
        assert module is not None and self._feed is not None
        if self.world_size == 1:
            names = [name for name, _ in module.named_parameters()]
            return Layout(1, (), dict.fromkeys(names, (0,)))
        loaders = setup_loaders(trainer)
        if self._seen is None or self._seen[0] != id(module):
            seen: Any = None
            if self.global_rank == 0:
                try:
                    to_host = functools.partial(self._prepare, device=torch.device("cpu"))
                    seen = look(trainer, module, self._feed, loaders, to_host, self._count(self.world_size))
                except ConfigurationError as error:
                    seen = error
            seen = self.mailbox.broadcast(self._next(), seen, what="the description of the model")
            if isinstance(seen, ConfigurationError):
                raise seen
            self._seen = (id(module), seen)
        seen = self._seen[1]
        self.plan = make_plan(seen.timeline, self.world_size, self.partition, place_stages)
        layout = make_layout(module, seen, self.plan)
        if trainer.state.fn == TrainerFn.FITTING:
            show_plan(self.plan, self.global_rank)
        hand_out(self.mailbox, self._next(), module, layout, self.optimizers)
        return layout

    @override
    def model_to_device(self) -> None:
        assert self.lightning_module is not None
        self.lightning_module.to(self.root_device)

    def _count(self, stages: int) -> int:
        if self.num_microbatches == "auto":
            return 4 * stages if stages > 1 else 1
        return self.num_microbatches

    # -- data ----------------------------------------------------------------------------------------------------

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

    def _prepare(self, batch: Any, device: torch.device | None = None) -> Any:
        """Lightning's way of a batch from the loader to the device, hooks included."""
        module = self.lightning_module
        assert module is not None
        batch = self.precision_plugin.convert_input(batch)
        batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
        return super().batch_to_device(batch, device or self.root_device, 0)

    def _is_evaluating(self) -> bool:
        assert self.lightning_module is not None
        return self.lightning_module.trainer.state.stage != RunningStage.TRAINING

    def _eval_limit(self) -> float:
        """How many batches of one evaluation loader the loop will use."""
        assert self.lightning_module is not None
        trainer = self.lightning_module.trainer
        counts = {
            RunningStage.SANITY_CHECKING: lambda: trainer.num_sanity_val_batches,
            RunningStage.VALIDATING: lambda: trainer.num_val_batches,
            RunningStage.TESTING: lambda: trainer.num_test_batches,
            RunningStage.PREDICTING: lambda: trainer.num_predict_batches,
        }[trainer.state.stage]()  # type: ignore[index]
        return max(counts) if isinstance(counts, list) and counts else float("inf")

    # -- steps ---------------------------------------------------------------------------------------------------

    @override
    def training_step(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        module, engine, book = self.lightning_module, self._engine, self._book
        assert module is not None and engine is not None and self._feed is not None
        loop = module.trainer.fit_loop
        split = Batch.of(batch, self._count(engine.layout.num_stages))
        losses: list[Tensor] = []
        scale = 1 / module.trainer.accumulate_grad_batches
        scaler = getattr(self.precision_plugin, "scaler", None)

        def forward(micro: Any, i: int) -> Any:
            book.microbatch(split.sizes[i])
            with self.precision_plugin.train_step_context(), self._metrics.in_step(_step(engine)):
                out = module.training_step(micro, *args, **kwargs)
            if engine.last:
                losses.append(loss_of(out, self._last_layer()))
            return out

        def backward(out: Any, i: int) -> None:
            share = split.weights[i] * scale
            loss = losses[i] if share == 1 else losses[i] * share
            module.backward(loss if scaler is None else scaler.scale(loss))

        window_begins = loop.batch_idx % module.trainer.accumulate_grad_batches == 0
        self._stash.begin(zeroed=window_begins)
        fetch = self._fetcher(split)
        with book.recording():
            if loop._skip_backward:  # private: SWA's pass over the data that only updates BatchNorm
                outputs = engine.evaluate(split, forward, fetch, "train")
            else:
                outputs = engine.train(split, forward, backward, fetch)
        self._stash.end()
        return self._share(split, outputs, losses)

    def _share(self, split: Batch, outputs: list[Any], losses: list[Tensor]) -> Any:
        """Give the loss and the logs of a batch to every rank, and log them there."""
        assert self._feed is not None
        key = self._next()
        if self.mailbox.rank == 0:
            entries = self._book.merged(split.samples)
            merged = merge_outputs(outputs, losses, split.sizes)
            if self.world_size > 1:
                self.mailbox.post_all("step", key, (mean_loss(losses, split.sizes), sendable(entries)))
                self._feed.used("train")
        else:
            merged, entries = self.mailbox.take("step", key, "the loss of this batch from rank 0")
            merged = merged.to(self.root_device)
        self._book.replay(entries)
        return merged

    @override
    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        assert self.lightning_module is not None
        self.pre_backward(closure_loss)
        closure_loss = self.precision_plugin.pre_backward(closure_loss, self.lightning_module)
        self._stash.hand_over()
        closure_loss = self.precision_plugin.post_backward(closure_loss, self.lightning_module)
        self.post_backward(closure_loss)
        return closure_loss

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        return self._evaluate("validation_step", self.precision_plugin.val_step_context, *args, **kwargs)

    @override
    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        return self._evaluate("test_step", self.precision_plugin.test_step_context, *args, **kwargs)

    @override
    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        return self._evaluate("predict_step", self.precision_plugin.predict_step_context, *args, **kwargs)

    def _evaluate(self, name: str, context: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """One batch of evaluation, whole; stages work on consecutive batches at the same time."""
        module, engine = self.lightning_module, self._engine
        assert module is not None and engine is not None and self._feed is not None
        split = Batch.of(batch, 1)

        def forward(micro: Any, _: int) -> Any:
            with context(), self._metrics.in_step(_step(engine)), self._logs_aside(engine):
                return getattr(module, name)(micro, *args, **kwargs)

        out = engine.evaluate(split, forward, self._fetcher(split), name)[0]
        if self.mailbox.rank == 0:
            self._feed.used("ahead")
        return out

    def _fetcher(self, split: Batch) -> Any:
        feed = self._feed
        assert feed is not None
        return lambda index: feed.fetch(split.absent[index])

    def _logs_aside(self, engine: Engine) -> Any:
        return self._book.in_evaluation(_step(engine), engine.last)

    def _last_layer(self) -> str:
        return self.plan.stages[-1].calls[0][0] if self.plan is not None else "the first"

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
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any | None = None) -> None:
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
            with self._told("merging the weights after the run"):
                gather(self.mailbox, self._next(), self.lightning_module, self._engine.layout)
        self._engine = None
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


def _step(engine: Engine) -> StagedStep | None:
    """The step that runs now."""
    return engine.executor.step if engine.executor is not None else None


def _gather_once(value: Any) -> list[Any]:
    """One object from each rank, before there is a mailbox."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
