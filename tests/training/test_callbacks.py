"""Lightning's own callbacks that hold or change weights, and modules of which evaluation uses other layers."""

from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from torch import nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix, MulticlassF1Score
from training.modules import Classifier, Recorder, train_loader, val_loader
from training.runs import Runs, metrics, same, stock, weights

from lightning_lwpm import LWPMStrategy


def fit(kwargs: dict[str, Any], module: L.LightningModule, *callbacks: Any, **more: Any) -> dict[str, Any]:
    recorder = Recorder()
    settings = {"logger": recorder, "log_every_n_steps": 1, "max_epochs": 2, "callbacks": list(callbacks), **more}
    trainer = L.Trainer(**kwargs | settings)
    trainer.fit(module, train_loader(36), val_loader())
    path = trainer.default_root_dir + "/end.ckpt"
    trainer.save_checkpoint(path)
    saved = torch.load(path, weights_only=False)
    return {
        "weights": weights(module),
        "metrics": metrics(trainer),
        "saved": saved["state_dict"],
        "optimizer": saved["optimizer_states"][0]["state"],
        "rows": recorder.rows if trainer.is_global_zero else [],
    }


def seeded(kind: Any = Classifier) -> Any:
    L.seed_everything(5)
    return kind()


def moving_average(kwargs: dict[str, Any]) -> Any:
    return fit(kwargs, seeded(), EMAWeightAveraging(decay=0.8))


def stochastic_average(kwargs: dict[str, Any]) -> Any:
    return fit(kwargs, seeded(Normed), StochasticWeightAveraging(0.05, swa_epoch_start=1), max_epochs=3)


class Normed(Classifier):
    """With BatchNorm, which stochastic weight averaging computes anew in a last pass over the data."""

    def __init__(self) -> None:
        super().__init__(width=6)
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(self.norm(x))


def accumulation_in_thirds(kwargs: dict[str, Any]) -> Any:
    return fit(kwargs, seeded(), GradientAccumulationScheduler({0: 3, 1: 2}), LearningRateMonitor())


class Backbone(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(self.inlet, nn.Linear(12, 12), nn.BatchNorm1d(12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.backbone(x)
        for block in self.blocks:
            h = h + block(h)
        return self.head(h)

    def configure_optimizers(self) -> Any:
        parameters = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.Adam(parameters, lr=0.02)


def finetuning(kwargs: dict[str, Any]) -> Any:
    return fit(kwargs, seeded(Backbone), BackboneFinetuning(unfreeze_backbone_at_epoch=1, lambda_func=lambda _: 1.5))


class Thawing(BaseFinetuning):
    """All is frozen when the model is partitioned."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        self.unfreeze_and_add_param_group(pl_module.blocks if epoch else pl_module.head, optimizer, lr=0.05)


def thawing(kwargs: dict[str, Any]) -> Any:
    found = fit(kwargs, seeded(), Thawing())
    # one device writes them in the order in which they came to be
    return {**found, "optimizer": dict(sorted(found["optimizer"].items()))}


class Collected(Classifier):
    """Metrics in collections, of classes, compared over epochs, and logged for each step."""

    def __init__(self) -> None:
        super().__init__()
        found = MetricCollection({"acc": MulticlassAccuracy(3), "f1": MulticlassF1Score(3)})
        self.collections = nn.ModuleDict({"fit": found.clone("fit/"), "val": found.clone("val/")})
        self.confusion = MulticlassConfusionMatrix(3)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss, out, y = self.loss(batch)
        self.log_dict(self.collections["fit"](out, y))
        self.train_acc(out, y)
        self.log("acc", self.train_acc, on_step=True, on_epoch=True)
        self.log("most", loss.detach(), reduce_fx="max", on_step=False, on_epoch=True)
        self.log("weighted", loss.detach(), batch_size=3, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        _, out, y = self.loss(batch)
        self.outputs.append(out)
        self.val_acc.update(out, y)
        self.confusion.update(out, y)
        self.collections["val"].update(out, y)
        self.log_dict(self.collections["val"], on_epoch=True)

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        self.log("diagonal", self.confusion.compute().diag().sum())
        self.confusion.reset()


def collections(kwargs: dict[str, Any]) -> Any:
    return fit(kwargs, seeded(Collected))


class OtherLayers(Classifier):
    """Evaluation passes over a layer of training and has one of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.auxiliary, self.reader = nn.Linear(12, 3), nn.Linear(3, 3)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        h = self.blocks[0](self.inlet(x))
        guess = self.auxiliary(h)
        for block in self.blocks:
            h = block(h)
        return nn.functional.cross_entropy(self.head(h), y) + nn.functional.cross_entropy(guess, y)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        loss, out, y = self.loss(batch)
        self.outputs.append(self.reader(out))
        self.val_acc.update(out, y)
        self.log("val/loss", loss)

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.reader(self(batch[0]))


def other_layers(kwargs: dict[str, Any]) -> Any:
    return fit(kwargs, seeded(OtherLayers))


class Keeping(Classifier):
    """Puts tensors of its own into the checkpoint."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {f"kept.{name}": value.half() for name, value in state.items() if "bias" in name}


def keeping(kwargs: dict[str, Any]) -> Any:
    return fit(kwargs, seeded(Keeping))


@pytest.mark.parametrize(
    "scenario",
    [
        moving_average,
        stochastic_average,
        accumulation_in_thirds,
        finetuning,
        thawing,
        collections,
        other_layers,
        keeping,
    ],
)
def test_like_one_device(runs: Runs, scenario: Any) -> None:
    expected = runs.one(scenario)
    world = 3 if scenario in (moving_average, collections) else 2
    results = runs.on(world, scenario)
    same(expected, results[0], "rank 0")
    for rank, found in enumerate(results[1:], 1):
        same({**expected, "rows": []}, found, f"rank {rank}")


def every_step(kwargs: dict[str, Any]) -> Any:
    """Checkpoints by step, the last one always, and a run that goes on from it in the middle of an epoch.

    Unshuffled: a run under lwpm goes on with the random numbers of the one that saved, one of stock Lightning does not.
    """
    module = seeded()
    files = ModelCheckpoint(every_n_train_steps=2, save_top_k=2, monitor="step", mode="max", save_last=True)
    trainer = L.Trainer(**kwargs | {"enable_checkpointing": True, "callbacks": [files], "max_epochs": 2})
    trainer.fit(module, val_loader(36), val_loader())
    tested = trainer.test(module, val_loader(), ckpt_path="last", verbose=False)
    again = seeded()
    if not stock(kwargs):
        kwargs["strategy"] = LWPMStrategy(num_microbatches=1)
    trainer = L.Trainer(**kwargs | {"max_epochs": 3})
    trainer.fit(again, val_loader(36), val_loader(), ckpt_path=files.best_model_path)
    names = sorted(path.rsplit("/", 1)[-1] for path in files.best_k_models)
    return names, files.last_model_path.rsplit("/", 1)[-1], tested, weights(again), trainer.global_step


def test_checkpoints_by_step(runs: Runs) -> None:
    expected = runs.one(every_step)
    for rank, found in enumerate(runs.on(2, every_step)):
        same(expected, found, f"rank {rank}")
