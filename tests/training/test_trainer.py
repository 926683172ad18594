"""Flags of the Trainer and callbacks of Lightning around a run: files, hooks and numbers of one device."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    DeviceStatsMonitor,
    EarlyStopping,
    LambdaCallback,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelPruning,
    ModelSummary,
    OnExceptionCheckpoint,
    ThroughputMonitor,
    Timer,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities import rank_zero_only
from pool import WorkerError
from training.modules import Classifier, Recorder, train_loader, val_loader
from training.runs import Runs, metrics, same, stock, weights

from lightning_lwpm import LWPMStrategy


def seeded(kind: Any = Classifier, **more: Any) -> Any:
    L.seed_everything(5)
    return kind(**more)


def everywhere(runs: Runs, scenario: Any, worlds: tuple[int, ...] = (2, 3)) -> None:
    """Every rank returns what one device does; what only rank 0 has is under "rank 0"."""
    expected = runs.one(scenario)
    for world in worlds:
        for rank, found in enumerate(runs.on(world, scenario)):
            mine = expected if rank == 0 else {**expected, "rank 0": None}
            same(mine, found if rank == 0 else {**found, "rank 0": None}, f"rank {rank} of {world}")


def again(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The settings for one more trainer: a strategy serves one."""
    if stock(kwargs):
        return kwargs
    return {**kwargs, "strategy": LWPMStrategy(num_microbatches=1, costs="estimated")}


def files(folder: str) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file())


CHECKPOINTS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "best two": {"monitor": "val/acc", "mode": "max", "save_top_k": 2, "filename": "{epoch}-{step}-{val/acc:.2f}"},
    "by steps": {"every_n_train_steps": 2, "save_top_k": -1, "save_last": "link"},
    "weights by epochs": {"every_n_epochs": 2, "save_top_k": -1, "save_weights_only": True},
    "after training": {"save_on_train_epoch_end": True, "monitor": "train/acc", "mode": "max", "save_last": True},
    "by time": {"train_time_interval": timedelta(seconds=0), "save_top_k": -1},
    "last only": {"monitor": "val/loss", "save_top_k": 0, "save_last": True},
}


def checkpoints(kwargs: dict[str, Any]) -> Any:
    """All modes of ModelCheckpoint in one run."""
    root = kwargs["default_root_dir"]
    savers = [ModelCheckpoint(f"{root}/{name}", **options) for name, options in CHECKPOINTS.items()]
    more = {"enable_checkpointing": True, "callbacks": savers, "max_epochs": 3, "val_check_interval": 3}
    trainer = L.Trainer(**kwargs | more)
    trainer.fit(seeded(lr=0.3), train_loader(36), val_loader())
    kept = [{path.removeprefix(root): float(score) for path, score in s.best_k_models.items()} for s in savers]
    paths = [(s.best_model_path.removeprefix(root), s.last_model_path.removeprefix(root)) for s in savers]
    return {"files": files(root), "kept": kept, "paths": paths}


def test_modes_of_checkpoints(runs: Runs) -> None:
    everywhere(runs, checkpoints)


def stopping(kwargs: dict[str, Any]) -> Any:
    """Callbacks that stop, watch and print, at a pace of their own."""
    stop = EarlyStopping("train/loss_step", stopping_threshold=0.3, check_on_train_epoch_end=True, patience=10)
    never = EarlyStopping("val/loss", divergence_threshold=50.0, patience=2, min_delta=0.5)
    watch = [LearningRateMonitor("step", log_momentum=True, log_weight_decay=True), DeviceStatsMonitor(cpu_stats=True)]
    recorder, timer = Recorder(), Timer("00:12:00:00")
    callbacks = [stop, never, *watch, timer, ModelSummary(2)]
    more = {"callbacks": callbacks, "logger": recorder, "log_every_n_steps": 2, "max_epochs": 9}
    trainer = L.Trainer(**kwargs | more)
    trainer.fit(seeded(lr=0.3), train_loader(36), val_loader())
    rows = [(step, {k: v for k, v in row.items() if not k.startswith("DeviceStats")}) for step, row in recorder.rows]
    stops = [(s.stopped_epoch, s.wait_count, float(s.best_score)) for s in (stop, never)]
    return {"stops": stops, "steps": trainer.global_step, "metrics": metrics(trainer), "rank 0": rows}


def test_callbacks_that_stop_and_watch(runs: Runs) -> None:
    everywhere(runs, stopping)


def throughput(kwargs: dict[str, Any]) -> Any:
    recorder, monitor = Recorder(), ThroughputMonitor(lambda batch: len(batch[0]), window_size=3)
    trainer = L.Trainer(
        **kwargs | {"callbacks": [monitor], "logger": recorder, "log_every_n_steps": 1, "max_epochs": 2}
    )
    trainer.fit(seeded(), train_loader(36), val_loader())
    counts = ("train/samples", "train/batches", "validate/samples")
    rows = [{name: value if name in counts else None for name, value in row.items()} for _, row in recorder.rows]
    return {"rank 0": rows}


def test_throughput_counts_a_batch_once(runs: Runs) -> None:
    everywhere(runs, throughput, (2,))


HOOKS = [n for n in dir(L.Callback) if n.startswith(("on_", "setup", "teardown")) and "_checkpoint" not in n]


def hooks(kwargs: dict[str, Any]) -> Any:
    """All hooks of fit, validate, test and predict, and what predict returns."""
    called: list[str] = []
    callback = LambdaCallback(**{name: lambda *_, name=name, **__: called.append(name) for name in HOOKS})
    trainer = L.Trainer(**kwargs | {"callbacks": [callback], "max_epochs": 2, "num_sanity_val_steps": 2})
    module = seeded()
    trainer.fit(module, train_loader(36), val_loader())
    trainer.validate(module, val_loader(), verbose=False)
    trainer.test(module, val_loader(), verbose=False)
    predicted = trainer.predict(module, val_loader())
    return {"called": called, "rank 0": torch.cat(predicted) if trainer.is_global_zero else None}


def test_number_and_order_of_hooks(runs: Runs) -> None:
    everywhere(runs, hooks)


class Curious(Classifier):
    """Asks the trainer and itself for what one may ask in a step."""

    def __init__(self) -> None:
        super().__init__()
        self.example_input_array = torch.ones(2, 6)
        self.seen: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        trainer = self.trainer
        if trainer.is_global_zero:
            state = (self.global_step, self.current_epoch, trainer.is_last_batch, trainer.num_training_batches)
            self.seen.append((*state, str(self.device), trainer.model is self, self.training, str(self.dtype)))
        return loss


class Graphs(Recorder):
    """Runs the whole model, as the logger of TensorBoard does."""

    @rank_zero_only
    def log_graph(self, model: L.LightningModule, input_array: Any = None) -> None:
        self.rows.append((None, {"graph": float(model(model.example_input_array.to(model.device)).sum())}))


def graph(kwargs: dict[str, Any]) -> Any:
    module, logger = seeded(Curious), Graphs()
    trainer = L.Trainer(**kwargs | {"logger": logger, "max_epochs": 1})
    trainer.fit(module, train_loader(36), val_loader())
    trainer.test(module, val_loader(), verbose=False)
    return {"rank 0": [row for row in logger.rows if "graph" in row[1]], "example": module.example_input_array}


def test_graphs_are_logged_while_the_model_is_whole(runs: Runs) -> None:
    everywhere(runs, graph, (3,))


FLAGS: dict[str, dict[str, Any]] = {
    "plain": {"enable_model_summary": True},
    "fast": {"fast_dev_run": 2},
    "time": {"max_time": {"hours": 1}},
    "no time": {"max_time": {"seconds": 0}},
    "anomalies": {"detect_anomaly": True, "deterministic": True},
    "no sanity": {"num_sanity_val_steps": 0},
    "all sanity": {"num_sanity_val_steps": -1},
    "simple": {"profiler": "simple"},
    "advanced": {"profiler": "advanced"},
    "bare": {"barebones": True},
}
_BARE = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")


def flags(kwargs: dict[str, Any]) -> Any:
    """One run with each flag, in the same process."""
    found: dict[str, Any] = {"rank 0": {}}
    for name, flag in FLAGS.items():
        settings = {k: v for k, v in kwargs.items() if name != "bare" or k not in _BARE}
        module = seeded(Curious)
        trainer = L.Trainer(**again(settings) | {"max_epochs": 2, **flag})
        trainer.fit(module, train_loader(36), val_loader())
        found[name] = weights(module), metrics(trainer), trainer.global_step
        found["rank 0"][name] = module.seen
    torch.use_deterministic_algorithms(False)
    return found


def test_flags(runs: Runs) -> None:
    everywhere(runs, flags, (2,))


def logged_files(kwargs: dict[str, Any]) -> Any:
    """One folder for all ranks, with the files that one device writes."""
    root = kwargs["default_root_dir"]
    trainer = L.Trainer(**kwargs | {"logger": CSVLogger(root), "enable_checkpointing": True, "max_epochs": 2})
    trainer.fit(seeded(), train_loader(36), val_loader())
    trainer.test(ckpt_path="best", dataloaders=val_loader(), verbose=False)
    rows = Path(trainer.log_dir, "metrics.csv").read_text()
    return {"files": files(root), "folder": trainer.log_dir.removeprefix(root), "rows": rows}


def test_files_are_written_once(runs: Runs) -> None:
    everywhere(runs, logged_files)


def learning_rate(kwargs: dict[str, Any]) -> Any:
    module = seeded()
    trainer = L.Trainer(**kwargs)
    before = weights(module)
    finder = Tuner(trainer).lr_find(module, train_loader(36), val_loader(), num_training=12, attr_name="lr")
    same(before, weights(module))
    left = [name for name in files(kwargs["default_root_dir"]) if ".lr_find" in name]
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, train_loader(36), val_loader())  # in the order that one device draws after the finder
    module_of_callback = seeded()
    other = L.Trainer(**again(kwargs) | {"max_epochs": 2, "callbacks": [LearningRateFinder(num_training_steps=8)]})
    other.fit(module_of_callback, train_loader(36), val_loader())
    after = [weights(module), metrics(trainer), weights(module_of_callback), metrics(other)]
    return {
        "after": after,
        "results": finder.results,
        "suggestion": finder.suggestion(),
        "lr": module.hparams.lr,
        "left": left,
    }


def test_learning_rate_finder(runs: Runs) -> None:
    everywhere(runs, learning_rate, (2,))


class Sized(Classifier):
    batch_size = 2

    def train_dataloader(self) -> Any:
        return train_loader(36, self.batch_size)


def batch_size(kwargs: dict[str, Any]) -> None:
    trainer = L.Trainer(**kwargs | {"callbacks": [BatchSizeFinder(max_trials=1)], "limit_val_batches": 0})
    trainer.fit(seeded(Sized))


def test_batch_size_finder_is_refused(runs: Runs) -> None:
    with pytest.raises(WorkerError, match=r"ConfigurationError.*BatchSizeFinder.*Set the batch size yourself"):
        runs.on(2, batch_size)


def pruning(kwargs: dict[str, Any]) -> None:
    trainer = L.Trainer(**kwargs | {"callbacks": [ModelPruning("l1_unstructured", amount=0.3)]})
    trainer.fit(seeded(), train_loader(36))


def test_pruning_is_refused(runs: Runs) -> None:
    with pytest.raises(WorkerError, match=r"ConfigurationError.*ModelPruning.*Prune it after `fit`"):
        runs.on(2, pruning)


class Failing(Classifier):
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.current_epoch == 1:
            raise KeyError("the user's own")


def exception(kwargs: dict[str, Any]) -> None:
    callbacks = [OnExceptionCheckpoint(kwargs["default_root_dir"])]
    trainer = L.Trainer(**kwargs | {"callbacks": callbacks, "enable_checkpointing": True, "max_epochs": 2})
    trainer.fit(seeded(Failing), train_loader(36), val_loader())


def test_no_checkpoint_after_a_failure(runs: Runs) -> None:
    """What another process held cannot be had any more; the user's error is what is raised, on every rank."""
    with pytest.raises(WorkerError, match='KeyError: "the user\'s own"'):
        runs.on(2, exception)
