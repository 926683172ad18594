"""Every private name of Lightning that the library touches, in one place, each with its reason; three of torch's too.

`tests/training/test_private_names.py` fails with the name where a new version of Lightning lacks one of them.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch.trainer.trainer
import torch
import torch.distributed as dist
from lightning.fabric.utilities.device_dtype_mixin import _DeviceDtypeModuleMixin
from lightning.fabric.utilities.distributed import _init_dist_connection
from lightning.fabric.utilities.optimizer import _optimizers_to_device
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ThroughputMonitor
from lightning.pytorch.overrides.distributed import _IndexBatchSamplerWrapper
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher, _SubprocessScriptLauncher
from lightning.pytorch.utilities.exceptions import _TunerExitException
from torch import Tensor
from torch.optim import Optimizer

__all__ = [
    "BEFORE_TRANSFER",
    "EpochState",
    "MultiProcessingLauncher",
    "PathLike",
    "SubprocessScriptLauncher",
    "TunerExit",
    "WrappingCheckpointIO",
    "accept_compiled",
    "adopt_epoch",
    "after_closure",
    "after_unscaling",
    "agree_on_validation",
    "before_collectives",
    "before_transfer",
    "count_as_one_device",
    "end_on_sigterm",
    "epoch_of",
    "epoch_values",
    "first_loaders",
    "forget_after_closure",
    "forget_after_unscaling",
    "forget_agreement",
    "forget_indices",
    "forget_sigterm",
    "given",
    "init_connection",
    "one_after_another",
    "optimizers_to_device",
    "replace_sigterm",
    "restoring",
    "said_to_be_on",
    "saves_every",
    "set_up_training_data",
    "skips_backward",
    "taking_norms",
    "transfer",
]

# What every strategy of Lightning imports; there are no public names for them.
init_connection = _init_dist_connection
optimizers_to_device = _optimizers_to_device
MultiProcessingLauncher = _MultiProcessingLauncher
SubprocessScriptLauncher = _SubprocessScriptLauncher
PathLike = _PATH

# What wraps another plugin for checkpoints (``AsyncCheckpointIO``): it is to wrap the library's own.
WrappingCheckpointIO = _WrappingCheckpointIO

# Ends a tuner's run in an orderly way on all ranks: no failure.
TunerExit = _TunerExitException

# The loops call it on each batch before `batch_to_device`; what stands for a batch must not reach the user's hook.
BEFORE_TRANSFER = "_on_before_batch_transfer"


@contextmanager
def said_to_be_on(module: LightningModule, device: torch.device) -> Iterator[None]:
    """Let ``self.device`` be another one: Lightning names the accelerator before weights go there."""
    parts = [part for part in module.modules() if isinstance(part, _DeviceDtypeModuleMixin)]
    before = [part._device for part in parts]
    for part in parts:
        part._device = device
    try:
        yield
    finally:
        for part, said in zip(parts, before, strict=True):
            part._device = said


def before_transfer(module: LightningModule, batch: Any, dataloader_idx: int) -> Any:
    """Run the user's ``on_before_batch_transfer`` as a loop does."""
    return module._on_before_batch_transfer(batch, dataloader_idx=dataloader_idx)


def transfer(module: LightningModule, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
    """Run the user's ``transfer_batch_to_device`` and ``on_after_batch_transfer`` as a strategy does."""
    return module._apply_batch_transfer_handler(batch, device=device, dataloader_idx=dataloader_idx)


def forget_indices(loader: Any) -> None:
    """Where a loader is not iterated, prediction writers find no indices; the wrapper makes them when it is."""
    sampler = getattr(loader, "batch_sampler", None)
    if isinstance(sampler, _IndexBatchSamplerWrapper):
        sampler.seen_batch_indices = []


def skips_backward(trainer: Trainer) -> bool:
    """Whether this pass over the data only updates BatchNorm, as stochastic weight averaging has it."""
    return trainer.fit_loop._skip_backward


def replace_sigterm(trainer: Trainer, notice: Callable[[int, Any], None], check: Callable[[], None]) -> None:
    """Call ``notice`` when SIGTERM comes and ``check`` before each training batch, in the place of Lightning's own.

    To be called before Lightning registers its handlers, in ``Strategy.setup``.
    """
    trainer._signal_connector.__dict__["_sigterm_notifier_fn"] = notice
    trainer.fit_loop.epoch_loop.__dict__["_broadcast_sigterm_tensor"] = check


def forget_sigterm(trainer: Trainer) -> None:
    """Undo :func:`replace_sigterm`."""
    trainer._signal_connector.__dict__.pop("_sigterm_notifier_fn", None)
    trainer.fit_loop.epoch_loop.__dict__.pop("_broadcast_sigterm_tensor", None)


def end_on_sigterm(trainer: Trainer) -> None:
    """Let ``trainer.received_sigterm`` be true."""
    trainer._signal_connector.received_sigterm = True


def count_as_one_device(monitor: ThroughputMonitor, devices: int) -> None:
    """Let a monitor count a batch once, not once for each stage, and hold its FLOPs against what all devices can do.

    It takes every process of a trainer for a copy of the model.
    """
    for throughput in monitor._throughputs.values():
        if throughput.world_size > 1:
            throughput.world_size = 1
            if throughput.available_flops is not None:
                throughput.available_flops *= devices


def saves_every(trainer: Trainer) -> list[int]:
    """After how many steps each checkpoint callback saves; 0 for those that save at other times."""
    return [getattr(callback, "_every_n_train_steps", 0) or 0 for callback in trainer.checkpoint_callbacks]


def after_closure(plugin: Precision, then: Callable[[], None]) -> None:
    """Call ``then`` in each optimizer's step once gradients are there and clipped, before the optimizer uses them.

    The hooks of torch's optimizers come before the closure or after the step.
    """
    before = plugin._after_closure

    def after(model: LightningModule, optimizer: Optimizer) -> None:
        before(model, optimizer)
        then()

    plugin.__dict__["_after_closure"] = after


def forget_after_closure(plugin: Precision) -> None:
    """Undo :func:`after_closure`."""
    plugin.__dict__.pop("_after_closure", None)


def after_unscaling(
    scaler: torch.amp.GradScaler, anywhere: Callable[[bool], bool], lowers: Callable[[bool], bool]
) -> None:
    """Let a gradient scaler skip a step, and lower its scale, where gradients of any stage overflow.

    All that it learns of gradients comes from this method, also for optimizers that unscale gradients themselves.

    Args:
        scaler: The scaler of this rank.
        anywhere: Told whether gradients of this rank overflow, it tells whether the step is to be skipped.
        lowers: Told whether a step was skipped, it tells whether the scale is to be lowered after it.
    """
    unscale = scaler._unscale_grads_
    update = scaler.update

    def everywhere(
        optimizer: Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        found = unscale(optimizer, inv_scale, found_inf, allow_fp16)
        overflow = anywhere(any(bool(value) for value in found.values()))
        return {found_inf.device: torch.full_like(found_inf, float(overflow))}  # also where there is no gradient

    def updated(new_scale: float | Tensor | None = None) -> None:
        found = [f for state in scaler._per_optimizer_states.values() for f in state["found_inf_per_device"].values()]
        lower = lowers(any(bool(value) for value in found))
        for value in found:
            value.fill_(float(lower))
        update(new_scale)

    scaler.__dict__["_unscale_grads_"] = everywhere
    scaler.__dict__["update"] = updated


def forget_after_unscaling(scaler: torch.amp.GradScaler) -> None:
    """Undo :func:`after_unscaling`."""
    scaler.__dict__.pop("_unscale_grads_", None)
    scaler.__dict__.pop("update", None)


@contextmanager
def taking_norms(total_norm: Callable[..., Tensor]) -> Iterator[None]:
    """Let ``torch.nn.utils.clip_grad_norm_`` take norms by another function, wherever it was imported from."""
    module = torch.nn.utils.clip_grad
    before, module._get_total_norm = module._get_total_norm, total_norm
    try:
        yield
    finally:
        module._get_total_norm = before


@contextmanager
def before_collectives(check: Callable[[str, dist.ProcessGroup], None]) -> Iterator[None]:
    """Call ``check`` with each process group that a function of ``torch.distributed`` is given, and with its name.

    All of them ask first whether this rank belongs to it.
    """
    module = dist.distributed_c10d
    before = module._rank_not_in_group

    def checked(group: dist.ProcessGroup | None) -> bool:
        apart = before(group)
        if group is not None and not apart:
            check(sys._getframe(1).f_code.co_name, group)
        return apart

    module._rank_not_in_group = checked
    try:
        yield
    finally:
        module._rank_not_in_group = before


def agree_on_validation(trainer: Trainer, agree: Callable[[bool], bool]) -> None:
    """Where validation comes by the clock, let ``agree`` say after each batch whether it does.

    Lightning looks at the clock of each process.

    Args:
        trainer: Runs the loop.
        agree: Told what the clock of this process says.
    """
    loop = trainer.fit_loop.epoch_loop
    due = loop._should_check_val_fx
    if getattr(trainer, "_val_check_time_interval", None) is not None:
        loop.__dict__["_should_check_val_fx"] = lambda fetcher: agree(due(fetcher))


def forget_agreement(trainer: Trainer) -> None:
    """Undo :func:`agree_on_validation`."""
    trainer.fit_loop.epoch_loop.__dict__.pop("_should_check_val_fx", None)


def first_loaders(loop: Any) -> Any:
    """The loaders from which an evaluation loop takes its first batch, once it has set them up; ``None`` for none.

    Its combined loader tells the mode; ``trainer.val_dataloaders`` and its like do not.
    """
    combined = loop._combined_loader
    if combined is None:
        return None
    return next(iter(combined.flattened), None) if combined._mode == "sequential" else combined.iterables


def one_after_another(trainer: Trainer) -> bool:
    """Whether this evaluation reads its loaders one after another, not a batch of each in turn."""
    loop = trainer._active_loop
    combined = getattr(loop, "_combined_loader", None)
    return combined is None or combined._mode == "sequential"


def given(dataloader_iter: Any, batch: Any) -> None:
    """Let Lightning's loop hand this batch to hooks, in the place of what the loader of this rank gave."""
    dataloader_iter.data_fetcher._batch = batch


def restoring(trainer: Trainer) -> bool:
    """Whether this run goes on from a checkpoint that has been read."""
    return bool(trainer._checkpoint_connector._loaded_checkpoint)


def set_up_training_data(trainer: Trainer) -> None:
    """Let the fit loop set up its loaders now; where a checkpoint holds their states, with these.

    Lightning sets them up after it has restored the loops; once they are there, it does not load states any more.
    """
    loop, checkpoint = trainer.fit_loop, trainer._checkpoint_connector._loaded_checkpoint
    states = checkpoint.get("loops", {}).get("fit_loop", {}).get("state_dict", {}).get("combined_loader")
    if not states:
        loop.setup_data()
        return
    before, loop._restarting, loop._combined_loader_states_to_load = loop._restarting, True, states
    try:
        loop.setup_data()
    finally:
        loop._restarting = before


def accept_compiled(kind: type[Strategy]) -> None:
    """Let strategies of a class run what ``torch.compile`` returns; Lightning has a closed list of those that may."""
    trainer = lightning.pytorch.trainer.trainer
    verify = trainer._verify_strategy_supports_compile

    def verify_others(model: LightningModule, strategy: Strategy) -> None:
        if not isinstance(strategy, kind):
            verify(model, strategy)

    trainer._verify_strategy_supports_compile = verify_others


EpochState = dict[str, Any]


def epoch_values(trainer: Trainer) -> list[tuple[str, str, str, Tensor, dict[str, Any]]]:
    """Key, hook, name, value and options of all that the epoch has logged so far: Lightning's own collection.

    The collection is ``trainer._results``; there is no public way to what has been logged but not yet computed.
    """
    values = []
    for key, item in (trainer._results or {}).items():
        meta = item.meta
        if item.has_reset or not meta.on_epoch or meta.dataloader_idx is not None:
            continue
        value = item._computed if item._computed is not None else item.compute()
        options = {
            name: getattr(meta, name)
            for name in ("prog_bar", "logger", "on_step", "on_epoch", "reduce_fx", "add_dataloader_idx")
        }
        values.append((key, meta.fx, meta.name, torch.as_tensor(value).detach().cpu(), options))
    return values


def epoch_of(trainer: Trainer) -> EpochState:
    """All that rank 0 knows at the end of an epoch and other ranks may not.

    Some of it is in the connector's dicts only, such as values of an evaluation loader that ended before the last one.
    """
    values = epoch_values(trainer)
    return {
        "values": values,
        "dicts": [
            _on_host(trainer.callback_metrics),
            _on_host(trainer.logged_metrics),
            dict(trainer.progress_bar_metrics),
        ],
        "outputs": None if trainer.training else list(map(_on_host, trainer._evaluation_loop._logged_outputs)),
        "stop": trainer.should_stop,
    }


def adopt_epoch(trainer: Trainer, state: EpochState) -> None:
    """Make what this rank knows what rank 0 knows."""
    results = trainer._results
    if results is None:
        return
    for key, fx, name, value, options in state["values"]:
        item = results.get(key)
        if item is None:
            results.log(fx, name, value, batch_size=1, **options)
        elif item.is_tensor:
            item.value, item._computed, item.has_reset = value.to(item.value.device), None, False
            if item.meta.is_mean_reduction:
                item.cumulated_batch_size = torch.tensor(1, device=item.value.device)
    connector = trainer._logger_connector
    _ = trainer.callback_metrics  # what this rank has itself goes first
    dicts: Any = connector._callback_metrics, connector._logged_metrics, connector._progress_bar_metrics
    for mine, theirs in zip(dicts, state["dicts"], strict=True):
        mine.update(theirs)
    if state["outputs"] is not None:
        trainer._evaluation_loop._logged_outputs = state["outputs"]
    trainer.should_stop = state["stop"]


def _on_host(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value.detach().cpu() if isinstance(value, Tensor) else value for name, value in values.items()}
