"""Data of every kind, read by one rank: the batches, their order and the numbers are those of one device."""

import random
from collections import namedtuple
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader, move_data_to_device
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    TensorDataset,
    get_worker_info,
)
from training.modules import Classifier, Recorder, data, train_loader, val_loader
from training.runs import Runs, metrics, same, weights


class Seeing(Classifier):
    """Takes batches of any kind; notes what every step has been given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def pair(self, batch: Any) -> Any:
        return batch

    def training_step(self, batch: Any, batch_idx: int, *rest: Any) -> Any:
        x, y = self.pair(batch)
        loss = nn_loss(self(x), y)
        self.log("train/loss", loss, on_step=True, on_epoch=True, batch_size=len(x))
        return loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        x, y = self.pair(batch)
        loss = nn_loss(self(x), y)
        self.log("val/loss", loss, batch_size=len(x))
        return loss

    def on_validation_epoch_end(self) -> None: ...

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        x, y = self.pair(batch)
        self.log("test/loss", nn_loss(self(x), y), batch_size=len(x))

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return self(self.pair(batch)[0])


def nn_loss(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(out, y)


class Watch(L.Callback):
    """Notes the numbers of batches, and what of the data rank 0 sees in hooks."""

    def __init__(self) -> None:
        self.notes: list[Any] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self.notes.append((trainer.current_epoch, batch_idx))

    def on_validation_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int, *loader: int) -> None:
        self.notes.append(("val", batch_idx, *loader))

    def on_validation_epoch_end(self, trainer: Any, module: Any) -> None:
        self.notes.append("validated")


def fit(kwargs: dict[str, Any], module: L.LightningModule, train: Any = None, val: Any = None, **more: Any) -> Any:
    recorder, watch = Recorder(), Watch()
    options = {**kwargs, "max_epochs": 2, "logger": recorder, "log_every_n_steps": 1, "callbacks": [watch], **more}
    trainer = L.Trainer(**options)
    if isinstance(train, L.LightningDataModule):
        trainer.fit(module, datamodule=train)
    else:
        trainer.fit(module, train if train is not None else train_loader(36), val)
    return {
        "weights": weights(module),
        "metrics": metrics(trainer),
        "steps": trainer.global_step,
        "notes": watch.notes,
        "after": (torch.rand(1), random.random(), float(np.random.rand())),
        "rows": recorder.rows,
    }


def check(runs: Runs, scenario: Any, world: int = 2) -> None:
    expected = runs.one(scenario)
    for rank, found in enumerate(runs.on(world, scenario, 1)):
        own = {} if rank == 0 else {"rows": [], "after": found["after"]}
        same({**expected, **own}, found, f"rank {rank}")


def seeded(kind: type = Seeing, **kwargs: Any) -> Any:
    L.seed_everything(7, workers=True)
    return kind(**kwargs)


FORK = {"num_workers": 2, "multiprocessing_context": "fork"}


class Augmented(Dataset):
    """Noise from each of the three generators."""

    def __len__(self) -> int:
        return 36

    def __getitem__(self, i: int) -> Any:
        x, y = data()[i]
        return x + 0.1 * torch.randn(6) + 0.1 * random.random() + 0.1 * float(np.random.rand()), y


def augmentation(kwargs: dict[str, Any]) -> Any:
    return fit(kwargs, seeded(), DataLoader(Augmented(), 8, shuffle=True), DataLoader(Augmented(), 8))


def augmentation_in_workers(kwargs: dict[str, Any]) -> Any:
    return fit(kwargs, seeded(), DataLoader(Augmented(), 8, shuffle=True, **FORK), DataLoader(Augmented(), 8, **FORK))


class Stream(IterableDataset):
    """Shared out over workers; its length is not known."""

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        yield from (data()[i] for i in range(info.id if info else 0, 36, info.num_workers if info else 1))


def stream_in_workers(kwargs: dict[str, Any]) -> Any:
    return fit(kwargs, seeded(), DataLoader(Stream(), 8, **FORK), DataLoader(Stream(), 8, **FORK))


class Plain:
    """An iterable that is no DataLoader."""

    def __init__(self, count: int = 4) -> None:
        self.count = count

    def __iter__(self) -> Iterator[Any]:
        for _ in range(self.count):
            yield torch.randn(5, 6), torch.randint(3, (5,))


def plain_iterable(kwargs: dict[str, Any]) -> Any:
    return fit(kwargs, seeded(), Plain(), Plain(2))


class Evaluating(Seeing):
    """Has a layer that only evaluation uses, so that its first batch is looked at too."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = torch.nn.Linear(6, 6)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return super().validation_step((self.extra(batch[0]), batch[1]), batch_idx)


def batches_by_sampler(kwargs: dict[str, Any]) -> Any:
    """A sampler gives whole batches; what its first one draws was not drawn, so later epochs had another order."""

    def loader() -> DataLoader:
        return DataLoader(data(36), batch_size=None, sampler=BatchSampler(RandomSampler(range(36)), 8, False))

    return fit(kwargs, seeded(Evaluating), loader(), loader(), num_sanity_val_steps=0)


class Several(DataLoader):
    """Reads several loaders: what it says of its dataset is not what it gives."""

    def __init__(self, *loaders: DataLoader) -> None:
        super().__init__(loaders[0])  # type: ignore[arg-type]
        self.loaders = loaders

    def __iter__(self) -> Any:
        for pairs in zip(*self.loaders, strict=False):
            yield [torch.cat(parts) for parts in zip(*pairs, strict=True)]


def several_in_one(kwargs: dict[str, Any]) -> Any:
    return fit(kwargs, seeded(), Several(train_loader(16, 4), train_loader(36, 4)), val_loader())


class Combined(Seeing):
    def pair(self, batch: Any) -> Any:
        if isinstance(batch, dict):
            batch = list(batch.values())
        batch = [item for item in batch if item is not None]
        if isinstance(batch[0], list | tuple):
            return torch.cat([x for x, _ in batch]), torch.cat([y for _, y in batch])
        return batch


def _combined(kwargs: dict[str, Any], mode: str) -> Any:
    loaders = {"a": train_loader(16, 4), "b": DataLoader(data(36), 4)}
    return fit(kwargs, seeded(Combined), CombinedLoader(loaders, mode), CombinedLoader([val_loader(), Plain()], mode))


def combined_min_size(kwargs: dict[str, Any]) -> Any:
    return _combined(kwargs, "min_size")


def combined_max_size(kwargs: dict[str, Any]) -> Any:
    return _combined(kwargs, "max_size")


def combined_max_size_cycle(kwargs: dict[str, Any]) -> Any:
    return _combined(kwargs, "max_size_cycle")


class Large(Combined):
    """The first layer needs what is too large to be sent to everybody."""

    def pair(self, batch: Any) -> Any:
        parts = [part for part in batch if part is not None] if isinstance(batch[0], list | tuple) else [batch]
        return torch.cat([x + big.mean(1, keepdim=True) for x, _, big in parts]), torch.cat([y for _, y, _ in parts])


def large_batches_in_turn(kwargs: dict[str, Any]) -> Any:
    """Loaders that are read in turn begin at different times, and must leave each other's batches alone."""
    generator = torch.Generator().manual_seed(1)
    sets = [TensorDataset(*data(n).tensors, torch.randn(n, 3000, generator=generator)) for n in (36, 20)]
    loaders = [DataLoader(items, 8) for items in sets]
    return fit(kwargs, seeded(Large), loaders[0], CombinedLoader(loaders, "min_size"))


class ByEpoch(Sampler):
    """Another order in each epoch, of which it is told."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        yield from np.random.default_rng(self.epoch).permutation(36).tolist()

    def __len__(self) -> int:
        return 36


def samplers(kwargs: dict[str, Any]) -> Any:
    weighted = torch.utils.data.WeightedRandomSampler(torch.arange(36.0), 20)
    loaders = [DataLoader(data(36), 4, sampler=ByEpoch()), DataLoader(data(36), 4, sampler=weighted)]
    return fit(kwargs, seeded(Combined), loaders)


class Growing(BatchSampler):
    """Batches of growing sizes."""

    def __init__(self) -> None: ...

    def __iter__(self) -> Iterator[list[int]]:
        for size in range(2, 7):
            yield torch.randperm(36)[:size].tolist()

    def __len__(self) -> int:
        return 5


def batch_sampler(kwargs: dict[str, Any]) -> Any:
    return fit(kwargs, seeded(), DataLoader(data(36), batch_sampler=Growing()), val_loader())


def no_batching(kwargs: dict[str, Any]) -> Any:
    x, y = data()[:16]
    items = list(zip(x.split(2), y.split(2), strict=True))
    return fit(kwargs, seeded(), DataLoader(items, batch_size=None), DataLoader(items, batch_size=None))


class Transfers(Seeing):
    """Every transfer hook does something, at random."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.seen.append(("before", dataloader_idx))
        return batch[0] + 0.1 * torch.randn(6, device=batch[0].device), batch[1]

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        self.seen.append(("transfer", dataloader_idx))
        return super().transfer_batch_to_device((batch[0] * random.uniform(0.9, 1.1), batch[1]), device, dataloader_idx)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.seen.append(("after", dataloader_idx))
        return {"x": batch[0] + 0.1 * torch.randn(6, device=batch[0].device), "y": batch[1], "from": dataloader_idx}

    def pair(self, batch: Any) -> Any:
        return batch["x"], batch["y"]


def transfer_hooks(kwargs: dict[str, Any]) -> Any:
    return fit(kwargs, seeded(Transfers), None, [val_loader(), val_loader(12)])


class Module(L.LightningDataModule):
    """With hooks of its own, and a loader for each epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.made = 0

    def train_dataloader(self) -> Any:
        self.made += 1
        return train_loader(16 + 8 * self.made)

    def val_dataloader(self) -> Any:
        return [val_loader(), val_loader(12)]

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch[0] + dataloader_idx, batch[1]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch[0] * torch.rand(1, device=batch[0].device), batch[1]


def data_module(kwargs: dict[str, Any]) -> Any:
    return fit(kwargs, seeded(), Module(), reload_dataloaders_every_n_epochs=1, max_epochs=3)


Point = namedtuple("Point", "x y")


@dataclass
class Sample:
    x: torch.Tensor
    y: torch.Tensor
    name: str


class Kinds(Seeing):
    """A batch is of another kind each time."""

    def pair(self, batch: Any) -> Any:
        if isinstance(batch, dict) and "parts" in batch:
            x = torch.stack([part.mean(0) for part in batch["parts"]])
            return x * batch["scale"] + len(batch["names"]) + batch["deep"]["list"][1], batch["y"]
        if isinstance(batch, dict):
            return batch["x"], batch["y"]
        if isinstance(batch, Sample | Point):
            return batch.x, batch.y
        if isinstance(batch, torch.Tensor):
            return batch, batch[:, :3].argmax(1)
        if not isinstance(batch, list | tuple):  # a BatchEncoding
            assert batch.word_ids is not None
            return batch["x"], batch.y
        return batch


class OfKinds:
    """Yields batches of all kinds."""

    def __iter__(self) -> Iterator[Any]:
        from transformers import BatchEncoding

        x, y = torch.randn(4, 6), torch.randint(3, (4,))
        yield x
        yield (x, y)
        yield Point(x, y)
        yield {"x": x, "y": y, "n": 4, "name": "four"}
        yield Sample(x, y, "four")
        yield BatchEncoding({"x": x, "y": y})
        parts = [torch.randn(i + 1, 6) for i in range(4)]
        deep = {"list": [None, 0.5], "set": {1, 2}, "array": np.arange(3), "none": None}
        yield {"parts": parts, "y": y, "scale": torch.tensor(0.5), "names": ["a", "b", "c", "d"], "deep": deep}


def kinds(kwargs: dict[str, Any]) -> Any:
    return fit(kwargs, seeded(Kinds), OfKinds(), OfKinds())


class Pulling(Seeing):
    """Takes its batches itself."""

    def training_step(self, dataloader_iter: Any) -> Any:
        batch, batch_idx, _ = next(dataloader_iter)
        return super().training_step(move_data_to_device(batch, self.device), batch_idx)

    def validation_step(self, dataloader_iter: Any) -> Any:
        batch, batch_idx, _ = next(dataloader_iter)
        return super().validation_step(move_data_to_device(batch, self.device), batch_idx)


def pulling(kwargs: dict[str, Any]) -> Any:
    return fit(kwargs, seeded(Pulling), None, val_loader())


class ManuallyPulling(Pulling):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, dataloader_iter: Any) -> Any:
        loss = super().training_step(dataloader_iter)
        self.optimizers().zero_grad()
        self.manual_backward(loss)
        self.optimizers().step()


def pulling_manually(kwargs: dict[str, Any]) -> Any:
    return fit(kwargs, seeded(ManuallyPulling), None, val_loader())


def overfit(kwargs: dict[str, Any]) -> Any:
    return fit(kwargs, seeded(), None, val_loader(), overfit_batches=2)


def limits(kwargs: dict[str, Any]) -> Any:
    return fit(kwargs, seeded(), None, [val_loader(), val_loader(12)], limit_train_batches=0.7, limit_val_batches=0.6)


def no_validation(kwargs: dict[str, Any]) -> Any:
    return fit(kwargs, seeded(), None, val_loader(), limit_val_batches=0)


def empty_validation(kwargs: dict[str, Any]) -> Any:
    return fit(kwargs, seeded(), None, [DataLoader(data(40), 8, sampler=[]), val_loader(4)])


def one_batch(kwargs: dict[str, Any]) -> Any:
    return fit(kwargs, seeded(), train_loader(8), val_loader(1))


def across_epochs(kwargs: dict[str, Any]) -> Any:
    return fit(kwargs, seeded(), None, val_loader(), val_check_interval=3, check_val_every_n_epoch=None, max_epochs=3)


def validation_within_epochs(kwargs: dict[str, Any]) -> Any:
    return fit(kwargs, seeded(), None, DataLoader(Augmented(), 8), val_check_interval=0.4)


def validation_of_a_stream(kwargs: dict[str, Any]) -> Any:
    return fit(kwargs, seeded(), DataLoader(Stream(), 8), DataLoader(Stream(), 8), val_check_interval=2)


class Counted(DataLoader):
    """A loader with a state, by the protocol of torchdata: it goes on within an epoch."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.given, self.skip = 0, 0

    def state_dict(self) -> dict[str, int]:
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.skip = state["given"]

    def __iter__(self) -> Iterator[Any]:
        self.given = 0
        for item in super().__iter__():
            self.given += 1
            if self.given > self.skip:
                yield item
        self.skip = 0


def _resumed(kwargs: dict[str, Any], kind: Any, **more: Any) -> Any:
    """Stopped in the middle of the second epoch; a new loader goes on there."""
    module, path = seeded(), f"{kwargs['default_root_dir']}/middle.ckpt"
    watch = Watch()
    trainer = L.Trainer(**{**kwargs, "max_steps": 7, "max_epochs": -1, "callbacks": [watch]})
    trainer.fit(module, kind(data(36), 8, **more))
    trainer.save_checkpoint(path)
    states = torch.load(path, weights_only=False)["loops"]["fit_loop"]["state_dict"]["combined_loader"]
    trainer.fit_loop.epoch_loop.max_steps = 12
    trainer.fit(module, kind(data(36), 8, **more), ckpt_path=path)
    return {"weights": weights(module), "steps": trainer.global_step, "notes": watch.notes, "states": repr(states)}


def stateful_protocol(kwargs: dict[str, Any]) -> Any:
    return _resumed(kwargs, Counted)


def stateful_dataloader(kwargs: dict[str, Any]) -> Any:
    from torchdata.stateful_dataloader import StatefulDataLoader

    return _resumed(kwargs, StatefulDataLoader, shuffle=True)


def stateful_dataloader_with_workers(kwargs: dict[str, Any]) -> Any:
    from torchdata.stateful_dataloader import StatefulDataLoader

    return _resumed(kwargs, StatefulDataLoader, shuffle=True, **FORK)


@pytest.mark.parametrize("scenario", [stateful_protocol, stateful_dataloader, stateful_dataloader_with_workers])
def test_goes_on_in_the_middle_of_an_epoch(runs: Runs, scenario: Any) -> None:
    if scenario is not stateful_protocol:
        pytest.importorskip("torchdata")
    expected = runs.one(scenario)
    assert expected["states"] != "[]"
    for rank, found in enumerate(runs.on(2, scenario, 1)):
        same(expected, found, f"rank {rank}")


def early(kwargs: dict[str, Any], module: Any = None, loader: Any = None) -> list[int]:
    """How many batches rank 0 has sent early, or is about to, when each step begins."""
    sent = []

    class Count(L.Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            sent.append(trainer.strategy._feed._number["early"])

    trainer = L.Trainer(**{**kwargs, "max_epochs": 2, "limit_train_batches": 3, "callbacks": [Count()]})
    trainer.fit(module or Seeing(), loader or train_loader(36, num_workers=1, multiprocessing_context="fork"))
    return sent


def early_unless_hooked(kwargs: dict[str, Any]) -> list[int]:
    return early(kwargs, Transfers())


def early_unless_drawn(kwargs: dict[str, Any]) -> list[int]:
    return early(kwargs, loader=DataLoader(data(36), batch_sampler=Growing(), **FORK))


def test_the_next_batch_is_read_while_one_is_computed(runs: Runs) -> None:
    """Where workers read; but not what hooks or samplers of the user would notice."""
    assert runs.on(2, early, 1)[0] == [2, 3, 3, 5, 6, 6]
    assert runs.on(2, early_unless_hooked, 1)[0] == runs.on(2, early_unless_drawn, 1)[0] == [0] * 6


SCENARIOS = [
    augmentation,
    augmentation_in_workers,
    stream_in_workers,
    plain_iterable,
    batches_by_sampler,
    several_in_one,
    combined_min_size,
    combined_max_size,
    combined_max_size_cycle,
    large_batches_in_turn,
    samplers,
    batch_sampler,
    no_batching,
    transfer_hooks,
    data_module,
    kinds,
    pulling,
    pulling_manually,
    overfit,
    limits,
    no_validation,
    empty_validation,
    one_batch,
    across_epochs,
    validation_within_epochs,
    validation_of_a_stream,
]


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_numbers_of_one_device(runs: Runs, scenario: Any) -> None:
    check(runs, scenario)
