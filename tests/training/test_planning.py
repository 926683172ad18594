"""Plans in a run: given as files and objects, limited by memory, reviewed, and layers that move while training."""

import json
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn
from torch.utils.data import DataLoader
from training.modules import Classifier, data, train_loader
from training.runs import Runs, same, weights

from lightning_lwpm import ConfigurationError
from lightning_lwpm.partition.plan import PartitionPlan


class Slow(nn.Linear):
    """A layer that takes a while, however busy the machine is."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.003)
        return super().forward(x)


class SlowBlocks(Classifier):
    """Blocks of one cost; BatchNorm, and a weight that is used twice, at the ends."""

    def __init__(self) -> None:
        super().__init__(width=6, depth=4)
        self.norm = nn.BatchNorm1d(6)
        for block in self.blocks:
            block[0] = Slow(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(self.norm(x))

    def configure_optimizers(self) -> Any:
        groups = [{"params": self.blocks.parameters()}, {"params": [*self.inlet.parameters(), *self.norm.parameters()]}]
        groups += [{"params": self.head.parameters(), "lr": 1e-3}]
        return torch.optim.AdamW(groups, lr=1e-2)


def train(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Train for some epochs; the averages of the weights, the checkpoint, and where the cuts were in each epoch."""
    L.seed_everything(5)
    module = SlowBlocks()
    cuts = []

    class Watch(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, *_: Any) -> None:
            plan = getattr(trainer.strategy, "plan", None)
            cuts.append([stage.begins for stage in plan.stages[1:]] if plan is not None else [])

    average = EMAWeightAveraging(decay=0.5)
    trainer = L.Trainer(**kwargs, max_epochs=4, num_sanity_val_steps=0, callbacks=[Watch(), average])
    trainer.fit(module, DataLoader(data(40), 8), DataLoader(data(16), 8))
    path = Path(kwargs["default_root_dir"]) / "end.ckpt"
    trainer.save_checkpoint(path)
    states = torch.load(path, weights_only=False)["optimizer_states"]
    return {"weights": weights(module), "states": states, "cuts": cuts}


@pytest.mark.parametrize(
    ("world", "partition"), [(2, ["head"]), (3, ["blocks.3.0", "head"]), (2, ["inlet"]), (3, ["inlet", "blocks.0.0"])]
)
def test_layers_that_move_change_no_number(runs: Runs, world: int, partition: list[str]) -> None:
    one = runs.one(train, 4)
    many = runs.on(world, train, 4, partition=partition, repartition_every_n_epochs=1)
    cuts = many[0]["cuts"]
    assert cuts[0] == partition
    assert cuts[1] != partition, "the layers were to move after the first epoch"
    for rank, found in enumerate(many):
        assert found["cuts"] == cuts
        same(one["weights"], found["weights"], f"rank {rank}")
    same(_plain(one["states"]), _plain(many[0]["states"]), "optimizer states")


def short(kwargs: dict[str, Any]) -> Any:
    """A short training; the plan, and what was logged."""
    L.seed_everything(5)
    trainer = L.Trainer(**kwargs, max_steps=2)
    module = Classifier()
    trainer.fit(module, DataLoader(data(16), 8))
    return {"weights": weights(module), "plan": trainer.strategy.plan}


def test_a_plan_can_be_saved_and_given_back(runs: Runs, tmp_path: Path) -> None:
    path = str(tmp_path / "plan.yaml")
    first = runs.on(2, short, "auto", costs="measured", partition=["blocks.1"])[0]
    plan: PartitionPlan = first["plan"]
    assert plan.prediction is not None and plan.prediction.measured == len(plan.stage_of)
    plan.save(path)
    for given in (path, plan):
        again = runs.on(2, short, "auto", partition=given)
        assert all(found["plan"].cuts == plan.cuts for found in again)
        assert again[0]["plan"].prediction.num_microbatches == plan.prediction.num_microbatches
        same(first["weights"], again[1]["weights"])


def test_what_is_chosen_does_not_depend_on_the_moment(runs: Runs, tmp_path: Path) -> None:
    """Connections are measured once, as layers are: a second run has the same number of micro-batches, and bits."""

    def expected(kwargs: dict[str, Any]) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("LWPM_CACHE", str(tmp_path))
            return short(kwargs)["plan"].prediction

    first = runs.on(2, expected, "auto", costs="measured")
    assert runs.on(2, expected, "auto", costs="measured") == first
    (file,) = tmp_path.iterdir()
    kept = json.loads(file.read_text())
    (link,) = (name for name in kept["seconds"] if name.startswith("link "))
    kept["seconds"][link] = [10.0, 1e12]
    file.write_text(json.dumps(kept))
    assert runs.on(2, expected, "auto", costs="measured")[0].step_seconds > 20


def test_a_model_that_does_not_fit_is_refused_on_every_rank(runs: Runs) -> None:
    def attempt(kwargs: dict[str, Any]) -> str:
        with pytest.raises(ConfigurationError) as caught:
            short(kwargs)
        return str(caught.value)

    told = runs.on(2, attempt, 1, device_memory="6 KiB")
    assert told[0] == told[1]
    for text in ("stage 1 (", "its device has 6.0 KiB", "it would fit with num_microbatches="):
        assert text in told[0]


def test_advice_names_the_faster_partition(runs: Runs) -> None:
    def advised(kwargs: dict[str, Any]) -> list[str]:
        from lightning_lwpm.training import reviewing

        told: list[str] = []
        kept, reviewing.rank_zero_info = reviewing.rank_zero_info, told.append
        try:
            L.seed_everything(5)
            L.Trainer(**kwargs, max_epochs=4).fit(SlowBlocks(), DataLoader(data(40), 8))
        finally:
            reviewing.rank_zero_info = kept
        return told

    told = runs.on(2, advised, 4, partition=["head"])
    assert len(told[0]) == 1 and not told[1]
    assert "partition=['blocks." in told[0][0] and "faster" in told[0][0]
    assert not runs.on(2, advised, 4, partition=["blocks.2"])[0]


def _plain(states: Any) -> Any:
    return [{"state": dict(sorted(s["state"].items())), "param_groups": s["param_groups"]} for s in states]


class Batchwise(Classifier):
    """Its normalisation has no statistics of a single sample."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(12, 12), nn.BatchNorm1d(12)) for _ in range(4))
        self.sizes: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.sizes.append(len(batch[0]))
        return super().training_step(batch, batch_idx)


def batchwise(kwargs: dict[str, Any]) -> list[int]:
    module = Batchwise()
    L.Trainer(**kwargs | {"max_epochs": 1}).fit(module, train_loader(13))
    return module.sizes


def test_batch_normalisation_gets_no_single_sample(runs: Runs) -> None:
    """Also in the last batch, of 5 samples."""
    sizes, _ = runs.on(2, batchwise, "auto", partition=["blocks.2"])
    assert sum(sizes) == 13 and min(sizes) >= 2


class Packed(Classifier):
    """Takes sequences end to end, and where each of them ends, or a pair of lists with one item a sample."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        rows, ends, labels = batch
        if isinstance(rows, list):
            out = self(nn.utils.rnn.pad_sequence(rows, batch_first=True)).mean(1)
            labels = torch.stack([label["class"] for label in labels])
        else:
            numbers = torch.repeat_interleave(ends.diff(prepend=ends.new_zeros(1)))
            out = torch.zeros(len(ends), 3).index_add(0, numbers, self(rows))
        loss = nn.functional.cross_entropy(out, labels)
        self.log("loss", loss, batch_size=len(labels))
        return loss


def sequences(index: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(index)
    return torch.randn(2 + index % 3, 6, generator=generator), torch.tensor(index % 3)


def packed(kwargs: dict[str, Any], lists: bool = False) -> dict[str, Any]:
    def collate(samples: Any) -> Any:
        rows, labels = zip(*samples, strict=True)
        if lists:
            return list(rows), None, [{"class": label} for label in labels]
        return torch.cat(rows), torch.tensor([len(row) for row in rows]).cumsum(0), torch.stack(labels)

    L.seed_everything(5)
    module, trainer = Packed(), L.Trainer(**kwargs, max_epochs=1, limit_val_batches=0)
    loader: Any = DataLoader([sequences(i) for i in range(16)], 8, collate_fn=collate)  # type: ignore[arg-type]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, loader)
    told = [str(entry.message) for entry in caught if "whole" in str(entry.message)]
    return {"weights": weights(module), "loss": trainer.callback_metrics["loss"], "told": told}


def in_lists(kwargs: dict[str, Any]) -> dict[str, Any]:
    return packed(kwargs, lists=True)


def test_batches_whose_samples_cannot_be_told_apart_stay_whole(runs: Runs) -> None:
    """A part of the nodes of a graph, with all its edges, made an error in the user's step, or another number."""
    one, many = runs.one(packed), runs.on(2, packed, "auto")  # type: ignore[arg-type]
    assert "(8,) seems to number rows of others" in many[0]["told"][0]
    assert "so batches stay whole" in many[0]["told"][0].lower()
    for found in many:
        same({**one, "told": []}, {**found, "told": []})


def test_lists_of_samples_are_split(runs: Runs) -> None:
    one = runs.one(in_lists, 4)
    for found in runs.on(2, in_lists, 4):
        same(one, found)
