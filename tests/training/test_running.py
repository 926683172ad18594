"""Real models run in a callback between batches: on every rank, on rank 0 alone, in training mode."""

import functools
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from pool import WorkerError
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from training.modules import Classifier, train_loader, val_loader
from training.runs import Runs, metrics, same, weights


class Module(L.LightningModule):
    """Trains any network towards zero."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.ReLU()),
        )
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(256, 64), nn.ReLU())
        self.out = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.head(self.body(x)))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.inlet = nn.Linear(8, 16)
        self.cells = kind(16, 32, num_layers=2, batch_first=True)
        self.out = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.cells(self.inlet(x))[0])


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.Linear(8, 32), nn.TransformerEncoder(layer, 3), nn.Linear(32, 4))


class Language(nn.Module):
    """A language model of transformers: it returns an object, and its layers change a cache."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.model(x).logits
        return out

    def sample(self, x: Tensor) -> Any:
        return self.model.generate(x[:2], max_new_tokens=8, do_sample=False, pad_token_id=0)


def gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    dropout = {"resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0}
    config = transformers.GPT2Config(n_layer=3, n_head=4, n_embd=64, vocab_size=500, n_positions=64, **dropout)
    return Language(transformers.GPT2LMHeadModel(config))


def llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=500,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return Language(transformers.LlamaForCausalLM(config))


def images() -> Tensor:
    return torch.randn(16, 3, 12, 12)


def series() -> Tensor:
    return torch.randn(16, 5, 8)


def words() -> Tensor:
    return torch.randint(0, 500, (16, 12))


NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "convolutions": (Convolutions, images),
    "lstm": (functools.partial(Recurrent, nn.LSTM), series),
    "gru": (functools.partial(Recurrent, nn.GRU), series),
    "encoder": (encoder, series),
    "gpt2": (gpt2, words),
    "llama": (llama, words),
}


class Sample(L.Callback):
    """Runs the model after each epoch."""

    def __init__(self, x: Tensor, alone: bool, training: bool) -> None:
        self.x, self.alone, self.training = x, alone, training
        self.told: list[Any] = []

    @torch.no_grad()
    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if self.alone and not trainer.is_global_zero:
            return
        pl_module.train(self.training)
        self.told.append(pl_module.net(self.x))
        if isinstance(pl_module.net, Language):
            self.told.append(pl_module.net.sample(self.x))
        pl_module.train()


def scenario(kwargs: dict[str, Any], name: str, alone: bool, training: bool) -> Any:
    L.seed_everything(3)
    make, draw = NETS[name]
    module, x = Module(make()), draw()
    callback = Sample(draw(), alone, training)
    trainer = L.Trainer(**kwargs | {"max_epochs": 2, "callbacks": [callback]})
    trainer.fit(module, DataLoader(TensorDataset(x), 8))
    return weights(module), callback.told


@pytest.mark.parametrize(("alone", "training"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("name", list(NETS))
def test_models(runs: Runs, name: str, alone: bool, training: bool) -> None:
    run = functools.partial(scenario, name=name, alone=alone, training=training)
    expected = runs.on(0, run)[0]
    for rank, found in enumerate(runs.on(3, run)):
        same(expected[0], found[0], f"weights of rank {rank}")
        if not alone or rank == 0:
            same(expected[1], found[1], f"rank {rank}")


class AroundBatches(L.Callback):
    """Runs the model every other batch: on noise, on the batch, on other data; on every rank or on rank 0."""

    def __init__(self, alone: bool) -> None:
        self.alone = alone
        self.told: list[Any] = []

    def run(self, trainer: Any, pl_module: Any, x: Tensor) -> None:
        if self.alone and not trainer.is_global_zero:
            return
        training = pl_module.training
        pl_module.eval()
        with torch.no_grad():
            self.told += [pl_module(x + torch.randn_like(x)), next(pl_module.parameters()).norm()]
        pl_module.train(training)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx % 2:
            self.run(trainer, pl_module, batch[0])

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx % 2 == 0:
            self.run(trainer, pl_module, batch[0])

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx % 2 == 1:
            self.run(trainer, pl_module, batch[0])

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if not self.alone or trainer.is_global_zero:
            self.run(trainer, pl_module, next(iter(trainer.val_dataloaders))[0])
            for batch in trainer.train_dataloader:
                self.run(trainer, pl_module, batch[0])


class Wide(Classifier):
    """Takes batches of which a rank that does not use them gets no copy."""

    def __init__(self) -> None:
        super().__init__()
        self.inlet = nn.Linear(6000, 12)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.repeat(1, 1000) if x.shape[1] == 6 else x)


def wide(loader: Any) -> Any:
    x, y = loader.dataset.tensors
    return DataLoader(TensorDataset(x.repeat(1, 1000), y), 8, shuffle=True)


def around_batches(kwargs: dict[str, Any], alone: bool) -> Any:
    L.seed_everything(3)
    module, callback = Wide(), AroundBatches(alone)
    trainer = L.Trainer(**kwargs | {"max_epochs": 2, "callbacks": [callback]})
    trainer.fit(module, wide(train_loader(24)), wide(val_loader()))
    return weights(module), metrics(trainer), callback.told


@pytest.mark.parametrize("alone", [False, True])
def test_around_batches(runs: Runs, alone: bool) -> None:
    run = functools.partial(around_batches, alone=alone)
    expected = runs.on(0, run)[0]
    for world in (2, 3):
        for rank, found in enumerate(runs.on(world, run)):
            same(expected[:2], found[:2], f"rank {rank} of {world}")
            if not alone or rank == 0:
                same(expected[2], found[2], f"rank {rank} of {world}")


class Apart(L.Callback):
    """Gives each rank other numbers."""

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        with torch.no_grad():
            pl_module(torch.full((4, 6), float(trainer.global_rank)))


def apart(kwargs: dict[str, Any]) -> None:
    L.Trainer(**kwargs | {"max_epochs": 1, "callbacks": [Apart()]}).fit(Classifier(), train_loader(20))


def test_other_numbers_on_each_rank(runs: Runs) -> None:
    message = r"`on_train_epoch_end` of Apart runs 'inlet' on rank 0 with other numbers than on rank 1"
    with pytest.raises(WorkerError, match=message):
        runs.on(2, apart)


class OnlineEvaluator(L.Callback):
    """Trains a probe on features of the model after each batch, as callbacks of self-supervised learning do."""

    def __init__(self) -> None:
        self.told: list[float] = []

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        pl_module.probe = nn.Linear(64, 3)
        self.optimizer = torch.optim.Adam(pl_module.probe.parameters(), lr=0.01)

    def loss(self, pl_module: Any, batch: Any) -> Tensor:
        _, view, y = batch
        with torch.no_grad():
            features = pl_module.net.head(pl_module.net.body(view))
        return nn.functional.cross_entropy(pl_module.probe(features), y)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        loss = self.loss(pl_module, batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        pl_module.log("online", loss)

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        pl_module.log("online_val", self.loss(pl_module, batch), on_epoch=True)
        if trainer.is_global_zero:  # as those that write samples of a batch do
            self.told.append(float(pl_module.net(batch[0][:2]).mean()))


class Evaluated(Module):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", self.net(batch[0]).square().mean())


def online(kwargs: dict[str, Any]) -> Any:
    L.seed_everything(3)
    module, callback = Evaluated(Convolutions()), OnlineEvaluator()
    data = TensorDataset(torch.randn(32, 3, 12, 12), torch.randn(32, 3, 12, 12), torch.randint(3, (32,)))
    trainer = L.Trainer(**kwargs | {"max_epochs": 2, "callbacks": [callback]})
    trainer.fit(module, DataLoader(data, 16, shuffle=True), DataLoader(data, 16))
    return weights(module), metrics(trainer), callback.told


@pytest.mark.parametrize("world", [2, 3])
def test_a_callback_runs_the_model_after_each_batch(runs: Runs, world: int) -> None:
    """With parts of the batch that no other rank has been given."""
    expected = runs.one(online)
    for rank, found in enumerate(runs.on(world, online)):
        same(expected[:2], found[:2], f"rank {rank}")
        assert rank != 0 or found[2] == expected[2]
