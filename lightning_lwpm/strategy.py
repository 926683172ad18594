"""The strategy that Lightning sees: layer-wise model parallelism over the devices of a Trainer."""

from collections.abc import Sequence
from contextlib import nullcontext
from datetime import timedelta
from typing import Any, Literal

import torch
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.trainer import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

from lightning_lwpm.options import check_options, check_rules, parse_bytes
from lightning_lwpm.partition.plan import PartitionPlan
from lightning_lwpm.pipeline.asynchronous.registry import DEFAULT
from lightning_lwpm.pipeline.engine import Engine
from lightning_lwpm.staging.heap import freed_at_once
from lightning_lwpm.staging.layer_random import LayerRandom
from lightning_lwpm.staging.layout import Layout, Unit
from lightning_lwpm.staging.lazy import is_lazy
from lightning_lwpm.training.admission import Rules
from lightning_lwpm.training.checks import (
    warn_of_batch_norm,
)
from lightning_lwpm.training.example import log_graphs
from lightning_lwpm.training.hooks import Hooks
from lightning_lwpm.training.metrics import Metrics
from lightning_lwpm.training.overlap import Overlap
from lightning_lwpm.training.private import PathLike, optimizers_to_device
from lightning_lwpm.training.random_state import generators, streams
from lightning_lwpm.training.recording import Recorder
from lightning_lwpm.training.reviewing import Reviewer
from lightning_lwpm.training.stepping import SteppingStrategy
from lightning_lwpm.training.steps import Steps
from lightning_lwpm.training.stored import tell_stored
from lightning_lwpm.training.termination import Interruption, OrderlyInterrupt
from lightning_lwpm.training.weights import Holders, copies, gather, holders, move
from lightning_lwpm.training.whole import WholeSteps
from lightning_lwpm_autoload import STRATEGIES

__all__ = ["LWPMStrategy"]


class LWPMStrategy(SteppingStrategy):
    """Layer-wise model parallelism: the layers of an unchanged LightningModule, partitioned over the devices.

    Implements the aims of "Layer-Wise Partitioning and Merging for Efficient and Scalable Deep Learning"
    (Akintoye et al., arXiv 2207.11019): layers are merged into stages that communicate little, and forward and
    backward passes of micro-batches overlap. The result is that of one device accumulating the same micro-batches.

    Example::

        trainer = Trainer(devices=4, strategy=LWPMStrategy(num_microbatches=8))

    Args:
        num_microbatches: Into how many micro-batches a training batch is split. More of them idle less, but each is
            smaller. ``"auto"``: the number that makes the shortest step, by simulation.
        schedule: The order of forward and backward passes: ``"1f1b"``, ``"gpipe"``, ``"interleaved_1f1b"`` (several
            stages a device), ``"zb1p"`` and ``"zbv"`` (gradients of weights put off until a device would idle; the
            latter with two stages a device), or ``"auto"``: the fastest of all, or an order made for the measured
            times, by simulation; 1F1B, which holds the fewest activations, where they are alike.
            ``"sequential"``: every rank runs the whole step on the whole batch and they take turns, for steps that no
            pipeline can run. It saves memory, not time, and the numbers are those of one device.
            ``"async"``: no stage waits for the others at optimizer steps; the numbers are not those of one device.
        partition: ``"auto"``, the dotted names of the layers that begin the second, third, ... stage, the path of a
            plan (``"plan.yaml"``), or a plan (``trainer.strategy.plan`` of an earlier run).
        costs: ``"measured"``: each distinct layer is timed at the first start, and never again on the same machine.
            ``"estimated"``: from FLOPs, without running anything twice.
        device_memory: What each device may hold, in bytes or as in ``"12 GiB"``; by default all that an accelerator
            has free, and no limit on a CPU.
        repartition_every_n_epochs: After so many epochs layers move to other stages, weights and optimizer state with
            them, where the measured times show that this makes a step over 5 % faster; 0 for never.
        virtual_stages: Stages for each device. With several of them, apart from each other, a device idles less at the
            ends of a batch, and more tensors are sent. ``"auto"``: as many as the schedule needs.
        activation_checkpointing: What is kept of a micro-batch for its backward pass: ``"none"``: everything;
            ``"layer"``: what goes into each block of a list of layers, which is computed again; ``"stage"``: only what
            a stage has received, and the last one goes by layers. Numbers stay; a step takes a forward pass more.
        state_dict_type: What checkpoints are: ``"full"``: one file, the one of one device; ``"sharded"``: a folder, to
            which every rank writes its own share. Each loads on any number of devices.
        async_checkpoint: Let training go on while a sharded checkpoint is written, from a copy in host memory.
        weights_after_run: Which processes have the whole model after ``fit``, ``test`` and their like: ``"all_ranks"``,
            as scripts expect that every process runs to its end; ``"rank_zero"``: the others keep their share, which
            saves host memory, and an error tells where they use the rest.
        data_parallel_size: Copies of the pipeline; only 1 for now.
        process_group_backend: How tensors travel between accelerators: ``"nccl"``, straight; ``"gloo"``, through host
            memory, also where several processes share a device. By default the former where it can be used.
        timeout: Of the process group.
        start_method: How processes are started: ``"popen"`` (in a notebook ``"fork"`` in its place), ``"spawn"`` or
            ``"fork"``.
        patience: A wait longer than this many seconds is explained on standard error; 0 for never.
        timeline: A file to which rank 0 writes what ran when in three early batches, planned beside measured: a picture
            (``"timeline.svg"``, ``".png"``) or a trace for Perfetto (``"trace.json"``).
        log_bubble: Log the idle part of the devices' time, every ``log_every_n_steps`` batches: ``lwpm/bubble``, and
            with measured costs ``lwpm/bubble_predicted``. Also done where there is a ``timeline``.
        deterministic_rng: Whether torch's random numbers in a step (dropout) are to depend on the seed, the micro-batch
            and the layer only: then they are the same for any number of devices, one included. Otherwise each stage
            draws from a stream of its own.
        deferred_batch_norm: Whether BatchNorm updates its running statistics once a batch, by those of the whole batch.
            A micro-batch is normalised by its own in any case, as it is where gradients are accumulated.
        staleness_correction: For ``schedule="async"``, as all that follow: what is done about gradients that are late;
            a name, or several joined by ``+``: see ``pipeline.asynchronous.registry``.
        max_staleness: The most optimizer steps that a gradient may be late; 0 is exact training, ``None`` any number.
        exact_warmup_steps: So many first steps are exact.
        exact_final_steps: So many last steps are exact.
        drain_every_n_steps: After so many steps the pipeline runs empty; 0 for never.

    Raises:
        ConfigurationError: for a value that cannot be used, saying which can.
    """

    def __init__(
        self,
        num_microbatches: int | Literal["auto"] = "auto",
        schedule: str = "auto",
        partition: str | list[str] | PartitionPlan = "auto",
        costs: Literal["measured", "estimated"] = "measured",
        device_memory: float | str | None = None,
        repartition_every_n_epochs: int = 0,
        virtual_stages: int | Literal["auto"] = "auto",
        activation_checkpointing: Literal["none", "layer", "stage"] = "none",
        state_dict_type: Literal["full", "sharded"] = "full",
        async_checkpoint: bool = False,
        weights_after_run: Literal["all_ranks", "rank_zero"] = "all_ranks",
        data_parallel_size: int = 1,
        process_group_backend: str | None = None,
        timeout: timedelta | None = None,
        start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen",
        patience: float = 30.0,
        timeline: PathLike | None = None,
        log_bubble: bool = False,
        deterministic_rng: bool = False,
        deferred_batch_norm: bool = False,
        staleness_correction: str = DEFAULT,
        max_staleness: int | None = None,
        exact_warmup_steps: int = 0,
        exact_final_steps: int = 0,
        drain_every_n_steps: int = 0,
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
            costs=costs,
            repartition_every_n_epochs=repartition_every_n_epochs,
            virtual_stages=virtual_stages,
            activation_checkpointing=activation_checkpointing,
            state_dict_type=state_dict_type,
            async_checkpoint=async_checkpoint,
            weights_after_run=weights_after_run,
            data_parallel_size=data_parallel_size,
            process_group_backend=process_group_backend,
            start_method=start_method,
            patience=patience,
            timeline=timeline,
            log_bubble=log_bubble,
            deterministic_rng=deterministic_rng,
            deferred_batch_norm=deferred_batch_norm,
        )
        self._rules = Rules(
            staleness_correction, max_staleness, exact_warmup_steps, exact_final_steps, drain_every_n_steps
        )
        check_rules(self._rules, schedule, repartition_every_n_epochs)
        self.timeline, self.log_bubble, self.process_group_backend = timeline, log_bubble, process_group_backend
        self.deterministic_rng, self.deferred_batch_norm = deterministic_rng, deferred_batch_norm
        self._device_memory = parse_bytes(device_memory)
        self.num_microbatches, self.schedule, self.virtual_stages = num_microbatches, schedule, virtual_stages
        self.patience, self.timeout, self.start_method = patience, timeout or timedelta(minutes=30), start_method
        self.activation_checkpointing = activation_checkpointing
        self.state_dict_type, self.async_checkpoint = state_dict_type, async_checkpoint
        self.weights_after_run = weights_after_run
        self.partition, self.costs, self.repartition_every_n_epochs = partition, costs, repartition_every_n_epochs
        self._recorder: Recorder | None = None
        self._copies: list[torch.nn.Module] = []
        self._interruption = Interruption()

    def __getstate__(self) -> dict[str, Any]:
        """What a copy needs, as of ``torch.save(trainer)``: connections, and what rests on them, are made anew."""
        made = ("_mailbox", "transport", "_planner", "_feed", "_engine", "_hooks", "_steps", "_reviewer", "_recorder")
        return {name: None if name in made else value for name, value in super().__getstate__().items()}

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {"num_replicas": 1, "rank": 0}  # one pipeline reads the data once

    @property
    @override
    def restore_checkpoint_after_setup(self) -> bool:
        return False

    # -- setup ---------------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: Trainer) -> None:
        assert self.accelerator is not None and self.lightning_module is not None
        self._end_configuring()
        self.accelerator.setup(trainer)
        fitting = trainer.state.fn == TrainerFn.FITTING
        module = self.lightning_module
        if fitting and self.world_size > 1:
            self._interruption.install()  # workers of loaders, which may start from now on, are to outlive it too
        with self.told("setup"):
            feed = self._prepare(trainer)
        self.check_optimizer_states()
        with self.told("setup"):
            self._resume_data(trainer)
            if self.is_global_zero:
                if self.world_size > 1:
                    log_graphs(trainer, module)
                self._unread = generators(self.root_device)
            with freed_at_once() if any(map(is_lazy, module.parameters())) else nullcontext():
                layout = self._plan(trainer, feed)
                if self.world_size > 1:
                    self._copies = copies(module, trainer.callbacks)  # type: ignore[attr-defined]
                self._move_weights(None, layout)
            self.model_to_device()
            self.setup_precision_plugin()
            if fitting:
                optimizers_to_device(self.optimizers, self.root_device)
            if fitting and not self._whole and (self.timeline is not None or self.log_bubble):
                self._recorder = Recorder(self.mailbox, self.next_turn(), self.timeline)
            engine = self._start_engine(layout)
            if self.world_size > 1:
                in_step = module.automatic_optimization and not self._asynchronous
                places, begin_again = (self._holders, self._units), self.begin_again
                self._hooks = Hooks(module, trainer, self.mailbox, *places, feed, begin_again, in_step, self._unread)
                self._hooks.kept.partition()
                self._hooks.install()
                self._join_precision()
            if self._recorder is not None:
                trainer.callbacks.insert(0, self._recorder)  # type: ignore[attr-defined]
            count = self._settled()[0]
            if fitting and self.is_global_zero:
                warn_of_batch_norm(module, count, self.deferred_batch_norm)
            if fitting and self._asynchronous and layout.num_stages > 1:
                overlap = Overlap(trainer, module, engine, self.optimizers, self._rules, count)
                self._begin_overlap(overlap, self.precision_plugin)
            common = trainer, module, engine, feed, self._hooks, self.precision_plugin, self._interruption
            self._steps = (
                WholeSteps(*common, self.optimizers, self.activation_checkpointing)
                if self._whole
                else Steps(*common, count, self._overlap, self._least_samples())
            )
            if self.world_size > 1:
                self._steps.termination.install()

    def _start_engine(self, layout: Layout, serial: int = 0) -> Engine:
        assert self._planner is not None and self.lightning_module is not None
        module, schedule = self.lightning_module, self._settled()[1]
        self._engine = Engine(
            self.mailbox,
            self.transport,
            module,
            layout,
            self.root_device,
            schedule,
            serial,
            layout.ranks,
            self.activation_checkpointing,
            continuous=self._asynchronous,
            random=LayerRandom(module, Metrics(module).parts(), self.root_device) if self.deterministic_rng else None,
            deferred_batch_norm=self.deferred_batch_norm,
        )
        if self._reviewer is not None:
            self._reviewer.attach(self._engine)
        elif self.world_size > 1 and not self._whole:
            self._reviewer = Reviewer(self._planner, self.mailbox, self._engine, self.repartition_every_n_epochs)
        if self._recorder is not None:
            self._recorder.attach(self._engine, self.plan)
        return self._engine

    def _move_weights(self, before: Layout | None, after: Layout) -> None:
        """Bring weights, their copies in callbacks and optimizer states to the ranks that hold them from now on."""
        assert self.lightning_module is not None
        if before is not None:
            tell_stored(self.mailbox, self.next_turn(), self.lightning_module, before)
        old, new = holders(before, self.world_size), holders(after, self.world_size)
        move(self.mailbox, self.next_turn(), self.lightning_module, old, new, self.optimizers)
        for copy in self._copies:
            move(self.mailbox, self.next_turn(), copy, old, new, ())

    def _holders(self) -> Holders:
        assert self._engine is not None
        return holders(self._engine.layout, self.world_size)

    def _units(self) -> Sequence[Unit]:
        assert self._engine is not None
        return self._engine.layout.units

    @override
    def model_to_device(self) -> None:
        assert self.lightning_module is not None
        self.lightning_module.to(self.root_device)

    # -- steps ---------------------------------------------------------------------------------------------------

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        assert self.lightning_module is not None
        if self._reviewer is None or batch_idx or not self._reviewer.due(self.lightning_module.current_epoch):
            return
        with self.told("moving layers between stages"):
            layout = self._reviewer.better()
            if layout is not None:
                assert self._engine is not None
                self._move_weights(self._engine.layout, layout)
                self.steps.attach(self._start_engine(layout, self._engine.serial))

    # -- end -----------------------------------------------------------------------------------------------------

    @override
    def teardown(self) -> None:
        self._end_configuring()
        kept = None
        if self._hooks is not None:
            kept = self._hooks.kept
            self._hooks.remove()
            self._hooks = None
        if self._recorder is not None and self.lightning_module is not None:
            self._recorder.remove(self.lightning_module.trainer)
            self._recorder = None
        if self._steps is not None:
            self._steps.remove()
        self._part_precision()
        if not self.failed and self._engine is not None and self.world_size > 1:
            assert self.lightning_module is not None
            self.on_train_end()  # not reached where the run was cut short
            everywhere = self.weights_after_run == "all_ranks"
            with self.told("merging the weights after the run"):
                for module in (self.lightning_module, *self._copies):
                    gather(self.mailbox, self.next_turn(), module, self._engine.layout, everywhere, self.optimizers)
                if kept is not None:
                    kept.gather(self.mailbox, self.next_turn(), everywhere)
        self._end_overlap()
        if self._engine is not None:
            self._streams = streams(self._engine)
        self._engine = self._steps = self._reviewer = None
        self._copies = []
        super().teardown()
        self.begin_again()
        self._interruption.remove()
        if self._interruption.noted and not self.failed:  # after the last batch
            self._interruption.noted = False
            raise OrderlyInterrupt

    @classmethod
    @override
    def register_strategies(cls, strategy_registry: Any) -> None:
        for name, (about, options) in STRATEGIES.items():
            strategy_registry.register(name, cls, about, override=True, **options)  # may be there: see `autoload`
