"""Steps of evaluation that run the model several times, or on its own output, with the numbers of one device."""

import functools
from typing import Any

import lightning as L
import pytest
import torch
from pool import WorkerError
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from training.modules import Classifier, Recorder, train_loader, val_loader
from training.runs import Runs, metrics, same, weights
from training.test_running import gpt2, llama


class Passes(Classifier):
    """Averages over versions of a batch, feeds the model with its own output, every other batch only."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(6))
        self.register_buffer("scale", torch.rand(12))
        self.blocks[1].register_buffer("shift", torch.randn(12))

    def forward(self, x: Tensor) -> Tensor:
        h = self.inlet(x + self.position) * self.scale
        for block in self.blocks:
            h = h + block(h)
        return self.head(h)

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().validation_step(batch, batch_idx)
        x, y = batch
        if batch_idx % 2:
            out = torch.stack([self(x), self(x.flip(0)).flip(0), self(-x)]).mean(0)
            self.log("val/averaged", nn.functional.cross_entropy(out, y))
            for step in range(3):
                x = torch.cat([x[:, 3:], self(x)], 1)
                self.log(f"val/own_{step}", x.norm(), on_step=True, on_epoch=True)
        return loss

    def test_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        with torch.no_grad():
            h = self.blocks[0](self.blocks[1](self.inlet(x)))  # another order than that of training
        self.val_acc(self.head(h), y)
        self.log("test/acc", self.val_acc)

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return {"out": self(self(batch[0]).repeat(1, 2)), "early": self.inlet(batch[0])}


def passes(kwargs: dict[str, Any]) -> Any:
    L.seed_everything(5)
    module, recorder = Passes(), Recorder()
    trainer = L.Trainer(**kwargs | {"max_epochs": 2, "logger": recorder, "log_every_n_steps": 1})
    trainer.fit(module, train_loader(36), val_loader())
    found = [weights(module), metrics(trainer), recorder.rows if trainer.is_global_zero else None]
    found += [trainer.test(module, val_loader()), trainer.predict(module, val_loader())]
    return [*found, trainer.validate(module, val_loader())]


def test_passes(runs: Runs) -> None:
    expected = runs.one(passes)
    for world, options in ((2, {}), (3, {}), (2, {"schedule": "interleaved_1f1b"})):
        for rank, found in enumerate(runs.on(world, passes, **options)):
            if rank:
                found[2] = expected[2]
                found[4] = expected[4]
            same(expected, found, f"rank {rank} of {world} {options}")


class Keeping(nn.Linear):
    """Counts its calls in evaluation."""

    seen = 0

    def forward(self, x: Tensor) -> Tensor:
        self.seen += not self.training
        return super().forward(x) + self.seen


def keeping(kwargs: dict[str, Any]) -> None:
    module = Passes()
    module.inlet = Keeping(6, 12)
    L.Trainer(**kwargs | {"max_epochs": 1}).fit(module, train_loader(20), val_loader())


def test_what_layers_keep_for_themselves(runs: Runs) -> None:
    with pytest.raises(WorkerError, match=r"layer 'inlet' leaves something on itself.*next call"):
        runs.on(2, keeping)


class Doubting(Passes):
    """Monte-Carlo dropout every other batch: layers are set to training after a pass, and put back or left so."""

    def __init__(self, put_back: bool) -> None:
        super().__init__()
        self.put_back, self.dropout = put_back, nn.ModuleList(nn.Dropout(1.0) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.inlet(x)
        for block, dropout in zip(self.blocks, [*self.dropout, nn.Identity()], strict=True):
            h = h + dropout(block(h))
        return self.head(h)

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        if batch_idx == 2:
            self.dropout[0].train()  # on every rank; what follows, on rank 0 only
        loss = Classifier.validation_step(self, batch, batch_idx)
        if batch_idx % 2 == 0:
            self.dropout.train()
            self.log("val/spread", torch.stack([self(batch[0]) for _ in range(2)]).norm())
            if self.put_back:
                self.eval()
        return loss


def doubting(kwargs: dict[str, Any], put_back: bool) -> Any:
    L.seed_everything(5)
    module = Doubting(put_back)
    trainer = L.Trainer(**kwargs | {"max_epochs": 1})
    trainer.fit(module, train_loader(20), val_loader(40))
    return weights(module), metrics(trainer), trainer.validate(module, val_loader(40))


def test_modes_are_changed_between_passes(runs: Runs) -> None:
    """Dropout of all, so that the numbers do not depend on what is drawn."""
    run = functools.partial(doubting, put_back=True)
    expected = runs.on(0, run)[0]
    for found in runs.on(3, run):
        same(expected, found)
    message = r"layer 'dropout.*earlier batch has left it: `train\(\)` was called.*Call `eval\(\)`"
    with pytest.raises(WorkerError, match=message):
        runs.on(2, functools.partial(doubting, put_back=False))


class Generating(L.LightningModule):
    """Language models that generate in steps, as in the examples of transformers."""

    def __init__(self, net: nn.Module, **options: Any) -> None:
        super().__init__()
        self.net, self.options = net, {"max_new_tokens": 6, "pad_token_id": 0, "do_sample": False, **options}
        self.words: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net.model(input_ids=batch[0], labels=batch[0]).loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("loss", self.training_step(batch, batch_idx))
        if batch_idx == 1:
            self.words.append(self.net.model.generate(batch[0][:, :4], **self.options))

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.net.model.generate(batch[0][:, :4], **self.options)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


NETS: Any = {"gpt2": gpt2, "llama": llama}
OPTIONS: dict[str, Any] = {"greedy": {}, "beams": {"num_beams": 2}, "no cache": {"use_cache": False}}


def generating(kwargs: dict[str, Any], net: str, option: str) -> Any:
    L.seed_everything(3)
    module = Generating(NETS[net](), **OPTIONS[option])
    loader = DataLoader(TensorDataset(torch.randint(0, 500, (12, 10))), 4)
    trainer = L.Trainer(**kwargs | {"max_epochs": 1})
    trainer.fit(module, loader, loader)
    return weights(module), metrics(trainer), module.words, trainer.predict(module, loader)


@pytest.mark.parametrize(("net", "option"), [("gpt2", "greedy"), ("gpt2", "beams"), ("llama", "greedy")])
def test_generation(runs: Runs, net: str, option: str) -> None:
    run = functools.partial(generating, net=net, option=option)
    expected = runs.on(0, run)[0]
    for world in (2, 3):
        same(expected, runs.on(world, run)[0], f"{net}, {option}, {world} ranks")


class Sampled(Classifier):
    """Scheduled sampling: some batches, the first among them, run the model once more on what it has returned."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        out = self(x)
        if batch_idx == 0 or batch_idx % 3 == 2:
            out = self(x + nn.functional.pad(out.detach(), (0, 3)))
        return nn.functional.cross_entropy(out, y)


def sampled(kwargs: dict[str, Any]) -> Any:
    L.seed_everything(5)
    module = Sampled()
    L.Trainer(**kwargs, max_epochs=2).fit(module, train_loader(48))
    return weights(module)


def test_some_batches_of_training_run_the_model_again(runs: Runs) -> None:
    for found in runs.on(2, sampled):
        same(runs.one(sampled), found, tolerance=1e-6)  # weights that several stages use
