"""The private names of Lightning that the library uses are all there, and are used in one file only."""

import re
from pathlib import Path

import lightning.fabric.utilities.distributed
import lightning.fabric.utilities.optimizer
import lightning.fabric.utilities.types
import lightning.pytorch as L
import lightning.pytorch.plugins.io.wrapper
import lightning.pytorch.strategies.launchers
import lightning.pytorch.trainer.trainer
import lightning.pytorch.utilities.exceptions
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, ThroughputMonitor
from lightning.pytorch.loops.fetchers import _DataFetcherWrapper, _DataLoaderIterDataFetcher
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.utilities import _select_data_fetcher
from lightning.pytorch.overrides.distributed import _IndexBatchSamplerWrapper
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.trainer.connectors.logger_connector.result import _Metadata, _ResultCollection, _ResultMetric
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import BatchSampler
from torchmetrics import Metric

import lightning_lwpm

TRAINER = L.Trainer(
    accelerator="cpu",
    devices=1,
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
METADATA = ("fx", "name", "prog_bar", "logger", "on_step", "on_epoch", "reduce_fx", "add_dataloader_idx")
NAMES = [
    (lightning.fabric.utilities.distributed, "_init_dist_connection"),
    (lightning.fabric.utilities.optimizer, "_optimizers_to_device"),
    (lightning.fabric.utilities.types, "_PATH"),
    (lightning.pytorch.strategies.launchers, "_MultiProcessingLauncher"),
    (lightning.pytorch.strategies.launchers, "_SubprocessScriptLauncher"),
    (lightning.pytorch.plugins.io.wrapper, "_WrappingCheckpointIO"),
    (lightning.pytorch.trainer.trainer, "_verify_strategy_supports_compile"),
    (lightning.pytorch.utilities.exceptions, "_TunerExitException"),
    (ParallelStrategy, "_configure_launcher"),
    (L.LightningModule, "_on_before_batch_transfer"),
    (L.LightningModule, "_apply_batch_transfer_handler"),
    (_FitLoop, "_skip_backward"),
    (_FitLoop, "setup_data"),
    (_FitLoop, "batch_idx"),
    (TRAINER.fit_loop.epoch_loop.automatic_optimization, "_skip_backward"),
    (TRAINER, "_logger_connector"),
    (L.Trainer, "_results"),
    (L.Trainer, "_evaluation_loop"),
    (TRAINER._logger_connector, "_callback_metrics"),
    (TRAINER._logger_connector, "_logged_metrics"),
    (TRAINER._logger_connector, "_progress_bar_metrics"),
    (TRAINER, "_signal_connector"),
    (TRAINER._signal_connector, "_sigterm_notifier_fn"),
    (TRAINER._signal_connector, "received_sigterm"),
    (TRAINER.fit_loop.epoch_loop, "_broadcast_sigterm_tensor"),
    (TRAINER.fit_loop.epoch_loop, "_should_check_val_fx"),
    (TRAINER.fit_loop.epoch_loop.automatic_optimization, "output_result_cls"),
    (TRAINER, "_val_check_time_interval"),
    (Precision, "_after_closure"),
    (torch.amp.GradScaler, "_unscale_grads_"),
    (torch.amp.GradScaler("cpu"), "_per_optimizer_states"),
    (torch.nn.utils.clip_grad, "_get_total_norm"),
    (torch.distributed.distributed_c10d, "_rank_not_in_group"),
    (ThroughputMonitor(len), "_throughputs"),
    (ModelCheckpoint(every_n_train_steps=5), "_every_n_train_steps"),
    (TRAINER.validate_loop, "_logged_outputs"),
    (TRAINER.validate_loop, "_combined_loader"),
    (TRAINER.predict_loop, "_combined_loader"),
    (TRAINER, "_active_loop"),
    (TRAINER._checkpoint_connector, "_loaded_checkpoint"),
    (TRAINER.fit_loop, "_combined_loader_states_to_load"),
    (TRAINER.fit_loop, "_restarting"),
    (_DataLoaderIterDataFetcher(), "_batch"),
    (_DataFetcherWrapper(_DataLoaderIterDataFetcher()), "data_fetcher"),
    (TRAINER.validate_loop, "setup_data"),
    (TRAINER.predict_loop, "setup_data"),
    (CombinedLoader([], "sequential"), "_mode"),
    (_IndexBatchSamplerWrapper(BatchSampler([0], 1, False)), "_batch_sampler"),
    (_ResultCollection(training=True), "log"),
    (_ResultMetric(_Metadata("f", "n"), is_tensor=True), "has_reset"),
    (_ResultMetric(_Metadata("f", "n"), is_tensor=True), "_computed"),
    (_ResultMetric(_Metadata("f", "n"), is_tensor=True), "value"),
    (_ResultMetric(_Metadata("f", "n"), is_tensor=True), "cumulated_batch_size"),
    *((_Metadata("f", "n"), name) for name in (*METADATA, "dataloader_idx", "is_mean_reduction")),
]


@pytest.mark.parametrize(("holder", "name"), NAMES, ids=[name for _, name in NAMES])
def test_lightning_has(holder: object, name: str) -> None:
    """Fails where Lightning has changed: look up the reason in `lightning_lwpm/training/private.py`."""
    assert hasattr(holder, name), f"Lightning's {holder!r} has no `{name}` any more"


def test_instance_names_are_set_where_expected() -> None:
    assert "DataFetcher" in _select_data_fetcher.__annotations__["return"].__name__
    assert hasattr(Metric, "forward")  # sets `_forward_cache`


def test_private_names_are_in_one_file() -> None:
    """No other file imports or reads a private name of Lightning."""
    root = Path(lightning_lwpm.__file__).parent
    own = r"trainer\._|_loop\._|loop\._|pl_module\._|lightning_module\._"
    offences = []
    for path in root.rglob("*.py"):
        if path.name == "private.py":
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if re.search(rf"from lightning\S* import .*\b_\w+|{own}", line):
                offences.append(f"{path.relative_to(root)}:{number}: {line.strip()}")
    assert not offences, "\n".join(offences)
