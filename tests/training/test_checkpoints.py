"""Checkpoints: the file of several ranks is the one of one device, and each resumes the other's."""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader
from training.modules import Classifier, data, small, train_loader
from training.runs import Runs, metrics, same, stock, weights

from lightning_lwpm import LWPMStrategy
from lightning_lwpm.errors import ConfigurationError
from lightning_lwpm.state.load import is_sharded
from lightning_lwpm.state.shards import crc


class Tied(Classifier):
    """BatchNorm, and a weight used at both ends."""

    def __init__(self) -> None:
        super().__init__(width=6)
        self.norm = nn.BatchNorm1d(6)
        self.last = nn.Linear(6, 6)
        self.last.weight = self.inlet.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(self.norm(self.last(self.inlet(x))))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)}


def train(kwargs: dict[str, Any], kind: Any, save: str, resume: str | None, epochs: int) -> dict[str, torch.Tensor]:
    """Train up to some epoch, from a checkpoint if one is named; save and return the weights."""
    L.seed_everything(5)
    module = kind()
    trainer = L.Trainer(**kwargs, max_epochs=epochs)
    trainer.fit(module, DataLoader(data(32), 8), ckpt_path=resume)
    trainer.save_checkpoint(save)
    return weights(module)


class Saved:
    """A scenario with arguments, named for the store of results."""

    def __init__(self, kind: Any, save: str, resume: str | None = None, epochs: int = 2) -> None:
        self.arguments = kind, save, resume, epochs

    def __call__(self, kwargs: dict[str, Any]) -> dict[str, torch.Tensor]:
        return train(kwargs, *self.arguments)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("kind", [Classifier, Tied])
def test_the_file_is_the_one_of_one_device(runs: Runs, world: int, kind: Any) -> None:
    one, many = str(runs.folder / f"{kind.__name__}-1.ckpt"), str(runs.folder / f"{kind.__name__}-{world}.ckpt")
    runs.on(0, Saved(kind, one))
    runs.on(world, Saved(kind, many))
    expected, found = (torch.load(path, weights_only=False) for path in (one, many))
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "epoch", "global_step", "loops"):
        same(_plain(expected[key]), _plain(found[key]), key)
    assert [*expected, "random_states"] == list(found)
    loaded = kind.load_from_checkpoint(many)
    same({n: t for n, t in expected["state_dict"].items()}, weights(loaded))


class SavesBoth:
    """Trains for two epochs, and saves both kinds: `saved-N.ckpt` and `saved-N.shards`."""

    def __init__(self, kind: Any, folder: Path) -> None:
        self.kind, self.folder = kind, folder

    def __call__(self, kwargs: dict[str, Any]) -> None:
        alone, world = stock(kwargs), kwargs["devices"]
        name = self.folder / f"saved-{0 if alone else world}"
        L.seed_everything(5)
        trainer = L.Trainer(**kwargs, max_epochs=2)
        trainer.fit(self.kind(), DataLoader(data(32), 8))
        trainer.save_checkpoint(f"{name}.ckpt")
        if not alone:
            trainer.strategy.state_dict_type = "sharded"
            trainer.save_checkpoint(f"{name}.shards")


class Continues:
    """Trains for a third epoch from each of some checkpoints; gives back the weights."""

    def __init__(self, kind: Any, paths: list[str]) -> None:
        self.kind, self.paths = kind, paths

    def __call__(self, kwargs: dict[str, Any]) -> list[Any]:
        ends, trainer = [], L.Trainer(**kwargs, max_epochs=3)
        for path in self.paths:
            L.seed_everything(6)
            module = self.kind()
            trainer.fit(module, DataLoader(data(32), 8), ckpt_path=path, weights_only=True)
            ends.append(weights(module))
        return ends


def test_any_number_of_stages_goes_on_from_any_other(runs: Runs) -> None:
    """As a run without a break, to the bit: saved by one, two, three, four stages and stock Lightning."""
    whole = runs.on(0, Saved(Tied, str(runs.folder / "whole.ckpt"), None, 3))[0]
    paths = [str(runs.folder / "saved-0.ckpt")]
    for world in (0, 1, 2, 3, 4):
        runs.on(world, SavesBoth(Tied, runs.folder))
        paths += [str(runs.folder / f"saved-{world}.{kind}") for kind in ("ckpt", "shards") if world]
    for world in (0, 1, 2, 3, 4):
        loadable = [path for path in paths if world or path.endswith(".ckpt")]
        for rank, ends in enumerate(runs.on(world, Continues(Tied, loadable))):
            for path, found in zip(loadable, ends, strict=True):
                same(whole, found, f"{path} on rank {rank} of {world}")


class Dropping(Classifier):
    """Draws random numbers in every stage."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.drop(self.inlet(x))
        for block in self.blocks:
            h = h + self.drop(block(h))
        return self.head(h)


class Shuffled:
    """Trains with dropout and shuffled data, without a break or with one."""

    def __init__(
        self, saves: str | None, resumes: str | None, seed: int, sharded: bool = False, reads: str | None = None
    ) -> None:
        self.arguments = saves, resumes, seed, sharded, reads

    def __call__(self, kwargs: dict[str, Any]) -> dict[str, torch.Tensor]:
        saves, resumes, seed, sharded, reads = self.arguments
        L.seed_everything(seed)
        module = Dropping()
        trainer = L.Trainer(**kwargs, max_epochs=2 if saves else 4)
        trainer.strategy.state_dict_type = "sharded" if sharded else "full"
        if reads:
            trainer.strategy.load_checkpoint(reads)
        trainer.fit(module, train_loader(32), ckpt_path=resumes, weights_only=True)
        if saves:
            trainer.save_checkpoint(saves)
        return weights(module)


@pytest.mark.parametrize("world", [1, 3])
def test_random_numbers_go_on(runs: Runs, world: int) -> None:
    """Dropout on every stage and the order of the data, whatever the seed of the process that goes on."""
    whole = runs.on(world, Shuffled(None, None, 5), 2)[0]
    for sharded in (False, True):
        half = str(runs.folder / f"shuffled-{world}-{sharded}.ckpt")
        runs.on(world, Shuffled(half, None, 5, sharded), 2)
        same(whole, runs.on(world, Shuffled(None, half, 77), 2)[0], f"sharded: {sharded}")
    same(whole, runs.on(world, Shuffled(None, None, 5, reads=half), 2)[0], "read, and not gone on from")


class Refusals:
    """What each of some checkpoints is refused with, and whether the weights are as they were."""

    def __init__(self, paths: list[str], other: str) -> None:
        self.paths, self.other = paths, other

    def __call__(self, kwargs: dict[str, Any]) -> list[str]:
        L.seed_everything(5)
        module = Tied()
        trainer = L.Trainer(**kwargs, max_epochs=1)
        trainer.fit(module, DataLoader(data(32), 8))
        before, told = weights(module), []
        for path in self.paths:
            with pytest.raises((ConfigurationError, FileNotFoundError)) as raised:
                trainer.strategy.load_checkpoint(path)
            told.append(str(raised.value))
        checkpoint = trainer.strategy.load_checkpoint(self.other)
        with pytest.raises(ConfigurationError) as raised:
            trainer.strategy.load_model_state_dict(checkpoint, strict=True)
        same(before, weights(module))
        fitting = {n: t for n, t in checkpoint["state_dict"].items() if n != "inlet.weight"}
        trainer.strategy.load_model_state_dict({"state_dict": fitting}, strict=False)
        same(checkpoint["state_dict"]["head.weight"], module.head.weight.detach())
        return [*told, str(raised.value)]


class RefusedAtFirst:
    """What a first run is refused with that is to go on from a checkpoint of another model."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __call__(self, kwargs: dict[str, Any]) -> str:
        L.seed_everything(5)
        module = Tied()
        before = weights(module)
        with pytest.raises(ConfigurationError) as raised:
            L.Trainer(**kwargs, max_epochs=1).fit(module, DataLoader(data(32), 8), ckpt_path=self.path)
        same(before, weights(module))
        return str(raised.value)


def test_what_cannot_be_used_changes_nothing(runs: Runs) -> None:
    """On all ranks the same words."""
    runs.on(2, SavesBoth(Tied, runs.folder))
    good, shards = runs.folder / "saved-2.ckpt", runs.folder / "saved-2.shards"
    content = good.read_bytes()
    bad = {name: runs.folder / name for name in ("short", "flipped", "foreign", "weights", "nowhere", "text")}
    bad["short"].write_bytes(content[: len(content) // 2])
    spot = content.index(torch.load(good, weights_only=True)["state_dict"]["head.weight"].numpy().tobytes())
    bad["flipped"].write_bytes(content[:spot] + bytes([content[spot] ^ 1]) + content[spot + 1 :])
    bad["text"].write_text("not a checkpoint")
    torch.save({"weights": torch.ones(3)}, bad["weights"])
    bad["foreign"].mkdir()
    for name, change in {"cut": lambda old: old[:-9], "swapped": lambda old: old[:-9] + b"x" * 9}.items():
        bad[name] = runs.folder / name
        shutil.copytree(shards, bad[name])
        part = max(bad[name].glob("data-*/*.distcp"))
        part.write_bytes(change(part.read_bytes()))
    called = {
        "evil": b"cposix\nsystem\n(S'touch owned'\ntR.",
        "reach": b"cbuiltins\ngetattr\n(ctorch\nSize\nS'mro'\ntR.",
    }
    for name, pickled in called.items():
        evil = bad[name] = runs.folder / name
        shutil.copytree(shards, evil)
        metadata = next(evil.glob("data-*")) / ".metadata"
        metadata.write_bytes(pickled)
        index = json.loads((evil / "index.json").read_text())
        index["files"][".metadata"] = crc(metadata)
        (evil / "index.json").write_text(json.dumps(index))
    other = torch.load(good, weights_only=True)
    other["state_dict"]["inlet.weight"] = torch.ones(2, 6)
    other["state_dict"]["extra"] = other["state_dict"].pop("blocks.3.0.bias")
    torch.save(other, runs.folder / "other.ckpt")
    told = runs.on(2, Refusals([str(path) for path in bad.values()], str(runs.folder / "other.ckpt")))
    assert told[0] == told[1]
    words = dict(zip([*bad, "other"], told[0], strict=True))
    for name, expected in {
        "short": "cannot be read",
        "flipped": "is damaged",
        "foreign": "without 'index.json'",
        "weights": "no 'state_dict'",
        "nowhere": "not found",
        "text": "cannot be read",
        "cut": "is damaged",
        "swapped": "is damaged",
        "evil": "posix.system has no place",
        "reach": "'mro') has no place",
    }.items():
        assert expected in words[name] and name in words[name], words[name]
    ends = [
        "\n    'inlet.weight' is (2, 6) in the checkpoint and (6, 6) in the model",
        "\n    missing in the checkpoint: 'blocks.3.0.bias' (6,)",
        "\n    not in the model: 'extra' (6,)",
    ]
    stages = ["stage 0 (rank 1)", "stage 1 (rank 0)", "Tied itself"]
    layers = ["layer 'inlet' (Linear)", "layer 'blocks.3.0' (Linear)", "Tied itself"]
    one, two = (runs.on(world, RefusedAtFirst(str(runs.folder / "other.ckpt"))) for world in (1, 2))
    assert two[0] == two[1]
    for places, found in ((stages, [words["other"]]), (layers, one), (stages, two)):
        for place, end in zip(places, ends, strict=True):
            assert all(f"\n  {place}:{end}" in message for message in found), found[0]


class Optimized(Classifier):
    """Its optimizer is of some kind, with its parameters in some order and groups."""

    def __init__(self, kind: str = "AdamW", order: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.form = kind, order, groups

    def configure_optimizers(self) -> Any:
        kind, order, groups = self.form
        parameters = list(self.parameters())[::order]
        groups = [{"params": parameters[number::groups]} for number in range(groups)]
        return getattr(torch.optim, kind)(groups, lr=0.01)


class OtherOptimizer:
    """What a first run is refused with whose optimizer is another than a checkpoint's; its model stays as built."""

    def __init__(self, path: str, form: Any, lazily: bool) -> None:
        self.path, self.form, self.lazily = path, form, lazily

    def __call__(self, kwargs: dict[str, Any]) -> str:
        trainer = L.Trainer(**kwargs, max_epochs=3)
        with trainer.init_module() if self.lazily else nullcontext(), small():
            module = Optimized(*self.form)
        before = weights(module)
        with pytest.raises(ConfigurationError) as raised:
            trainer.fit(module, DataLoader(data(32), 8), ckpt_path=self.path)
        same(before, weights(module))
        return str(raised.value)


@pytest.mark.parametrize("world", [1, 2])
def test_optimizers_that_do_not_fit(runs: Runs, world: int) -> None:
    path = str(runs.folder / "optimized.ckpt")
    runs.on(0, Saved(Optimized, path))
    head = "\n    'exp_avg' of 'head.bias' is (12, 6) in the checkpoint, and would be (3,) in"
    for form, words in {
        ("AdamW", 1, 2): ["AdamW (optimizer 0) has 2 groups of 6 and 6 parameters, in the checkpoint 1 group of 12"],
        ("SGD", 1, 1): ["SGD (optimizer 0) has an option 'momentum', which the checkpoint's has not"],
        ("AdamW", -1, 1): [head, "\n  layer 'inlet' (Linear):" if world == 1 else "\n  stage 0 (rank 1):"],
    }.items():
        told = runs.on(world, OtherOptimizer(path, form, lazily=world == 2))
        assert told[0] == told[-1], "the same words on all ranks"
        assert all(word in told[0] for word in words), told[0]
    torch.save({**torch.load(path, weights_only=True), "optimizer_states": [{"a": 1}]}, path + ".odd")
    for message in runs.on(world, OtherOptimizer(path + ".odd", ("AdamW", 1, 1), lazily=False)):
        assert "as 'optimizer_states' are none" in message


class Kept:
    """ModelCheckpoint with all that it can do; another module goes on from the last one."""

    def __init__(self, folder: Path, later: bool) -> None:
        self.folder, self.later = folder, later

    def __call__(self, kwargs: dict[str, Any]) -> Any:
        alone = stock(kwargs)
        if not alone:
            kwargs["strategy"].async_checkpoint = self.later
        del kwargs["enable_checkpointing"]

        keep = ModelCheckpoint(
            self.folder, "{step}", "train/loss_step", save_last=True, save_top_k=2, every_n_train_steps=2
        )
        trainer = L.Trainer(**kwargs, max_epochs=2, callbacks=[keep])
        for epochs, path in ((2, None), (3, "last")):
            L.seed_everything(5)
            module = Classifier()
            trainer.fit_loop.max_epochs = epochs
            trainer.fit(module, DataLoader(data(32), 8), ckpt_path=path)
        trainer.validate(module, DataLoader(data(32), 8), ckpt_path="best", verbose=False)
        return trainer.global_step, metrics(trainer), sorted(path.name for path in self.folder.iterdir())


@pytest.mark.parametrize("later", [False, True], ids=["at once", "later"])
def test_model_checkpoint(runs: Runs, later: bool) -> None:
    folders = [runs.folder / f"kept-{later}-{kind}" for kind in ("stock", "sharded")]
    expected = runs.on(0, Kept(folders[0], later))[0]
    for found in runs.on(2, Kept(folders[1], later), state_dict_type="sharded", async_checkpoint=later):
        same(expected, found)
    assert all(is_sharded(path) for path in folders[1].iterdir())


def test_read_before_a_run(tmp_path: Path) -> None:
    """What Lightning's strategies give, though no other process is there to read with."""
    path = tmp_path / "a.ckpt"
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    stock = L.Trainer(**quiet, devices=1, max_steps=1)
    stock.fit(Classifier(), DataLoader(data(32), 8))
    stock.save_checkpoint(path)
    strategy = L.Trainer(**quiet, devices=2, strategy=LWPMStrategy()).strategy
    same(stock.strategy.load_checkpoint(path), strategy.load_checkpoint(path))
    with pytest.raises(FileNotFoundError):
        strategy.load_checkpoint(tmp_path / "none.ckpt")


def _plain(value: Any) -> Any:
    """Containers as plain dicts and lists, so that only content and order are compared."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
