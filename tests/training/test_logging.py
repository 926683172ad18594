"""Everything that is logged, in every hook and with every option, and metric objects of all kinds, as on one device."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torchmetrics import CatMetric, MeanAbsoluteError, MeanMetric, MetricCollection, SumMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassAUROC, MulticlassPrecision, MulticlassRecall
from torchmetrics.wrappers import ClasswiseWrapper, MetricTracker, MinMaxMetric, MultioutputWrapper, Running
from training.modules import Classifier, Recorder, train_loader, val_loader
from training.runs import Runs, metrics, same


def shown(trainer: L.Trainer, recorder: Recorder) -> dict[str, Any]:
    """What callbacks, loggers and the progress bar get."""
    return {
        "callbacks": metrics(trainer),
        "logged": {name: float(value) for name, value in sorted(trainer.logged_metrics.items())},
        "bar": {name: float(value) for name, value in sorted(trainer.progress_bar_metrics.items())},
        "rows": list(recorder.rows),
    }


def fit(kwargs: dict[str, Any], module: L.LightningModule, val: Any = None, **more: Any) -> tuple[L.Trainer, Recorder]:
    recorder = Recorder()
    trainer = L.Trainer(**kwargs | {"logger": recorder, "max_epochs": 2, "log_every_n_steps": 1, **more})
    trainer.fit(module, train_loader(36), val or val_loader())
    return trainer, recorder


def everywhere(runs: Runs, scenario: Any, count: int = 1) -> None:
    """Every rank of two and three stages returns what one device does; a logger only has rows on rank 0."""
    expected = runs.one(scenario, count)
    for world in (2, 3):
        for rank, found in enumerate(runs.on(world, scenario, count)):
            same(expected if rank == 0 else {**expected, "rows": []}, found, f"rank {rank} of {world}")


class Talkative(Classifier):
    """Logs in every hook that may, and with every option."""

    def on_train_start(self) -> None:
        self.log("start", 1.0)

    def on_train_epoch_start(self) -> None:
        self.log("epoch start", float(self.current_epoch))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.log("batch start", float(batch_idx), on_step=True, on_epoch=True)

    def on_before_zero_grad(self, optimizer: Any) -> None:
        self.log("zero", 2.0)

    def on_before_backward(self, loss: torch.Tensor) -> None:
        self.log("before backward", loss)

    def on_after_backward(self) -> None:
        self.log("after backward", 3.0)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.log("lr", optimizer.param_groups[0]["lr"])

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss, out, _ = self.loss(batch)
        both = {"on_step": True, "on_epoch": True}
        self.log("plain", loss)
        self.log("step", loss, on_step=True, on_epoch=False)
        self.log("epoch", loss, on_step=False, on_epoch=True)
        self.log("max", loss, reduce_fx="max", **both)
        self.log("min", loss, reduce_fx=torch.min, **both)
        self.log("sum", loss, reduce_fx="sum", **both)
        self.log("bar only", loss, True, False, **both)
        self.log("synchronised", loss, sync_dist=True, **both)
        self.log("weighted", loss, batch_size=5, **both)
        self.log("integer", torch.tensor(4), **both)
        self.log("number", 3, **both)
        self.log("rank 0", loss, rank_zero_only=True, **both)
        self.log("double", loss.double(), **both)
        self.log_dict({"group/a": loss, "group/b": 2 * loss}, prog_bar=True, **both)
        if batch_idx == 1:
            self.log("once", loss, **both)
        return {"loss": loss, "out": out}

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.log("batch end", outputs["loss"] * 2, on_step=True, on_epoch=True)
        self.log_dict({"mean": outputs["out"].mean(), "number of batch": float(batch_idx)}, on_epoch=True)

    def on_train_epoch_end(self) -> None:
        self.log("epoch end", self.trainer.callback_metrics["epoch"] * 2)

    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val/batch start", float(batch_idx))

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        loss, out, y = self.loss(batch)
        self.val_acc(out, y)
        self.outputs.append(out)
        self.log("val/loss", loss, on_step=True, on_epoch=True)
        self.log("val/max", loss, reduce_fx="max")
        self.log_dict({"val/dict": loss, "val/object": self.val_acc}, sync_dist=True)
        return {"loss": loss}

    def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val/batch end", outputs["loss"] * 3)


def talk(kwargs: dict[str, Any]) -> Any:
    L.seed_everything(5)
    module = Talkative()
    trainer, recorder = fit(kwargs, module, log_every_n_steps=2, val_check_interval=0.5, accumulate_grad_batches=2)
    found = shown(trainer, recorder)
    return found | {"validated": trainer.validate(module, val_loader(), verbose=False)}


def test_logs_of_every_hook_and_option(runs: Runs) -> None:
    everywhere(runs, talk)


def test_logs_over_microbatches(runs: Runs) -> None:
    everywhere(runs, talk, count=2)


class Measuring(Classifier):
    """Metrics in wrappers, collections and containers of torch and Python; with states that are sums and lists."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.kept, self.auroc = MeanMetric(), CatMetric(), MulticlassAUROC(3)
        self.extremes = MinMaxMetric(MulticlassAccuracy(3))
        self.tracker = MetricTracker(MulticlassAccuracy(3, average="micro"))
        self.errors = MultioutputWrapper(MeanAbsoluteError(), 3)
        self.by_class = ClasswiseWrapper(MulticlassRecall(3, average=None))
        self.running = Running(MeanMetric(), window=3)
        self.collection = MetricCollection([MulticlassPrecision(3), MulticlassRecall(3)], prefix="all/")
        self.listed = nn.ModuleList([MeanMetric(), MulticlassAccuracy(3)])
        self.unregistered = [MeanMetric()]
        self.total = SumMetric()
        self.total.persistent(True)

    def on_train_epoch_start(self) -> None:
        self.tracker.increment()
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss, out, y = self.loss(batch)
        chances = out.softmax(-1)
        self.losses.append(float(loss))
        for metric in (self.mean, self.kept, self.total, self.listed[0], self.unregistered[0]):
            metric.to(self.device).update(loss.detach())
        self.auroc.update(chances, y)
        self.errors.update(chances, nn.functional.one_hot(y, 3).float())
        for metric in (self.extremes, self.tracker, self.by_class, self.listed[1]):
            metric(out, y)
        self.log("running", self.running(loss), on_step=True)
        self.log("mean", self.mean, on_step=False, on_epoch=True, prog_bar=True)
        self.log("auroc", self.auroc, on_step=False, on_epoch=True)
        self.log("acc", self.listed[1], on_step=True, on_epoch=True)
        self.log("updated", self.total)  # it has no value in a step
        self.log_dict(self.collection(out, y), on_step=True, on_epoch=False)
        return loss

    def on_train_epoch_end(self) -> None:
        self.log("kept", self.kept.compute().std())
        self.log("highest", self.extremes.compute()["max"])
        self.log("best", self.tracker.best_metric())
        self.log_dict(self.by_class.compute())
        self.log_dict({f"error {i}": error for i, error in enumerate(self.errors.compute())})
        self.log_dict(self.collection.compute())
        self.log("listed", self.listed[0].compute())
        self.log("unregistered", self.unregistered[0].compute())
        self.log("total", self.total.compute())
        self.log("last", self.losses[-1])
        for metric in (self.kept, self.extremes, self.by_class, self.errors, self.collection, self.listed[0]):
            metric.reset()


def measure(kwargs: dict[str, Any]) -> Any:
    """Also: a metric's state in a checkpoint."""
    L.seed_everything(5)
    module = Measuring()
    trainer, recorder = fit(kwargs, module)
    path = trainer.default_root_dir + "/metrics.ckpt"
    trainer.save_checkpoint(path)
    saved = torch.load(path, weights_only=False)["state_dict"]["total.sum_value"]
    return shown(trainer, recorder) | {"saved": saved}


def test_metric_objects(runs: Runs) -> None:
    """A step may need what `on_train_epoch_start` has set, also when it is looked at; no metric waits for ranks."""
    everywhere(runs, measure)


class SeveralLoaders(Classifier):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> torch.Tensor:
        loss, out, y = self.loss(batch)
        self.outputs.append(out)
        self.val_acc.update(out, y)
        self.log("loss", loss)
        self.log(f"own {dataloader_idx}", loss, add_dataloader_idx=False)
        if dataloader_idx == 1:
            self.log("second only", loss)
        return loss

    def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("end", outputs)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("test", self.loss(batch)[0])


def several_loaders(kwargs: dict[str, Any]) -> Any:
    L.seed_everything(5)
    module, loaders = SeveralLoaders(), [val_loader(20), val_loader(9), val_loader(12, 4)]
    best = ModelCheckpoint(monitor="loss/dataloader_idx_1", filename="{epoch}")
    trainer, recorder = fit(kwargs, module, loaders, callbacks=[best], enable_checkpointing=True)
    found = shown(trainer, recorder)
    validated = trainer.validate(module, loaders, verbose=False)
    tested = trainer.test(module, loaders, ckpt_path="best", verbose=False)
    return found | {"validated": validated, "tested": tested, "best": best.best_model_path.rsplit("/", 1)[-1]}


def test_several_loaders(runs: Runs) -> None:
    everywhere(runs, several_loaders)
