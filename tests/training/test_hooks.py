"""Hooks and callbacks of users: what they see, and that what one decides is decided on every rank."""

import copy
import functools
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BasePredictionWriter, LambdaCallback, RichProgressBar, TQDMProgressBar
from lightning.pytorch.utilities import grad_norm, rank_zero_only
from pool import WorkerError
from torch import nn
from torch.utils.data import DataLoader
from training.modules import Classifier, Recorder, data, train_loader, val_loader
from training.runs import Runs, metrics, same, weights

from lightning_lwpm.training.checks import warn_of_gradients


def alike(runs: Runs, scenario: Any, count: int = 1, worlds: tuple[int, ...] = (2,)) -> None:
    """Every rank returns what one device returns."""
    expected = runs.one(scenario, count)
    for world in worlds:
        for rank, found in enumerate(runs.on(world, scenario, count)):
            same(expected, found, f"rank {rank} of {world}")


class Looker(L.Callback):
    """Looks at outputs in every hook that gets them, and at metrics where they are first complete."""

    def __init__(self) -> None:
        self.seen: dict[str, list[Any]] = {"train": [], "validation": [], "epoch": [], "train epoch": []}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen["train"].append({key: value.clone() for key, value in outputs.items()})

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any, **__: Any) -> None:
        self.seen["validation"].append(outputs.clone())

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self.seen["epoch"].append(float(trainer.callback_metrics["val/loss"]))

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.seen["train epoch"].append(float(trainer.callback_metrics["train/acc"]))


def looking(kwargs: dict[str, Any]) -> Any:
    L.seed_everything(5)
    module, looker = Classifier(), Looker()
    trainer = L.Trainer(**kwargs | {"callbacks": [looker], "max_epochs": 2})
    trainer.fit(module, train_loader(20), val_loader())
    return looker.seen, metrics(trainer), [type(callback).__name__ for callback in trainer.callbacks]


def test_callbacks_of_every_rank_see_what_one_device_shows(runs: Runs) -> None:
    alike(runs, looking, worlds=(3,))


class Deciding(Classifier):
    """Stops, freezes and sets a learning rate in hooks that run where the loss is."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)["loss"]
        self.last = float(loss.detach())
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.log("last", self.last)
        if self.current_epoch == 2:
            self.trainer.should_stop = self.last < 100

    def on_train_epoch_end(self) -> None:
        self.log("epoch/last", self.last)
        if self.last < 100:
            self.blocks[0].requires_grad_(False)
            self.optimizers().param_groups[0]["lr"] *= 0.5


def deciding(kwargs: dict[str, Any]) -> Any:
    L.seed_everything(5)
    module, recorder = Deciding(), Recorder()
    trainer = L.Trainer(**kwargs | {"max_epochs": 5, "logger": recorder, "log_every_n_steps": 1, "min_epochs": 1})
    trainer.fit(module, train_loader(20), val_loader())
    shown = recorder.rows if trainer.is_global_zero else []
    return {"weights": weights(module), "steps": trainer.global_step, "metrics": metrics(trainer), "rows": len(shown)}


def test_decisions_of_hooks_reach_every_rank(runs: Runs) -> None:
    expected = runs.one(deciding)
    results = runs.on(3, deciding)
    same(expected, results[0])
    for result in results[1:]:
        same({**expected, "rows": 0}, result)


class Stopping(L.Callback):
    """Ends the run on rank 0 alone, in any hook."""

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None: ...

    def on_before_zero_grad(self, trainer: Any, *_: Any) -> None: ...

    def on_validation_end(self, trainer: Any, *_: Any) -> None: ...

    def on_train_epoch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.is_global_zero:
            trainer.fit_loop.max_epochs = 2


def stopping(kwargs: dict[str, Any], hook: str = "on_train_batch_end") -> tuple[int, int]:
    stop = Stopping()

    def run(trainer: Any, *_: Any) -> None:
        if trainer.is_global_zero and trainer.global_step >= 3:
            trainer.should_stop = True

    setattr(stop, hook, run)
    trainer = L.Trainer(**kwargs | {"callbacks": [stop], "max_epochs": 3})
    trainer.fit(Classifier(), train_loader(20), val_loader(8))
    return trainer.global_step, trainer.current_epoch


def test_one_rank_stops_the_run(runs: Runs) -> None:
    for hook in ("on_train_batch_end", "on_before_zero_grad", "on_validation_end", "on_fit_end"):
        run = functools.partial(stopping, hook=hook)
        assert runs.on(2, run) == [runs.on(0, run)[0]] * 2
    steps = runs.on(2, stopping, 2, schedule="async")
    assert steps[0] == steps[1] and steps[0][0] < 9


class PerLoader(Classifier):
    """Metrics of each validation loader, logged as objects and as values."""

    def __init__(self) -> None:
        super().__init__()
        self.accs = nn.ModuleList(copy.deepcopy(self.val_acc) for _ in range(2))

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        loss, out, y = self.loss(batch)
        self.outputs.append(out)
        self.val_acc.update(out, y)
        self.accs[dataloader_idx](out, y)
        self.log(f"acc{dataloader_idx}", self.accs[dataloader_idx], add_dataloader_idx=False)
        self.log("loss", loss, on_step=True, on_epoch=True)


def per_loader(kwargs: dict[str, Any]) -> Any:
    L.seed_everything(5)
    module = PerLoader()
    loaders = [val_loader(20), val_loader(9), val_loader(12)][:2]
    trainer = L.Trainer(**kwargs | {"max_epochs": 1, "limit_val_batches": 2})
    first = trainer.validate(module, loaders, verbose=False)
    trainer.fit(module, train_loader(20), loaders)
    between = metrics(trainer)
    limited = trainer.validate(module, loaders, verbose=False)
    return first, [list(part) for part in first], between, limited, metrics(trainer)


def test_unequal_validation_loaders(runs: Runs) -> None:
    """The validation of the last epoch logs values on each step too: those stay on rank 0."""
    expected = _without_steps(runs.one(per_loader))
    for rank, found in enumerate(runs.on(2, per_loader)):
        same(expected, _without_steps(found), f"rank {rank}")


def _without_steps(result: Any) -> Any:
    first, _, between, limited, last = result
    return first, {k: v for k, v in between.items() if "_step" not in k}, limited, last


class Writer(BasePredictionWriter):
    def __init__(self, folder: str) -> None:
        super().__init__("batch_and_epoch")
        self.folder, self.written = Path(folder), []

    def write_on_batch_end(self, trainer: Any, pl_module: Any, prediction: Any, *_: Any) -> None:
        self.written.append(tuple(prediction.shape))

    def write_on_epoch_end(self, trainer: Any, pl_module: Any, predictions: Any, batch_indices: Any) -> None:
        self.written.append(sum(len(p) for p in predictions))
        with open(self.folder / "predictions.txt", "x") as file:
            file.write("once")


def writing(kwargs: dict[str, Any]) -> Any:
    L.seed_everything(5)
    writer = Writer(kwargs["default_root_dir"])
    trainer = L.Trainer(**kwargs | {"callbacks": [writer]})
    trainer.predict(Classifier(), val_loader())
    return writer.written, "write_on_batch_end" in vars(writer)


def test_predictions_are_written_once(runs: Runs) -> None:
    expected = runs.one(writing)
    results = runs.on(3, writing)
    same(expected, results[0])
    same([([], False)] * 2, results[1:])


def nothing_to_train(kwargs: dict[str, Any]) -> Any:
    L.seed_everything(5)
    module = Classifier()
    trainer = L.Trainer(**kwargs | {"max_epochs": 1, "limit_train_batches": 0})
    trainer.fit(module, train_loader(20), val_loader())
    return weights(module), trainer.global_step


def test_no_batches(runs: Runs) -> None:
    alike(runs, nothing_to_train)


@pytest.mark.parametrize("bar", [RichProgressBar, TQDMProgressBar])
def test_progress_bars_run_quietly(runs: Runs, bar: Any) -> None:
    """No advice to synchronise what every rank has."""

    def shown(kwargs: dict[str, Any]) -> Any:
        L.seed_everything(5)
        module = Classifier()
        more = {"callbacks": [bar()], "enable_progress_bar": True, "enable_model_summary": True, "max_epochs": 1}
        trainer = L.Trainer(**kwargs | more)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.fit(module, train_loader(20), val_loader())
            trainer.validate(module, val_loader())
        return [str(w.message) for w in caught if "sync_dist" in str(w.message)]

    same([[], []], runs.on(2, shown))


class Copier(L.Callback):
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        copied = copy.deepcopy(pl_module)
        assert copied.on_validation_epoch_end.__self__ is copied
        self.held = [name for name, _ in copied.named_parameters()]


class Guarded(Classifier):
    """Code that is meant for one process only, in a step."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss, _, _ = self.loss(batch)
        if self.trainer.is_global_zero:
            self.ran = getattr(self, "ran", 0) + 1
            self.logger.log_metrics({"own": float(loss)}, step=self.global_step)
        self.log("lr", self.trainer.optimizers[0].param_groups[0]["lr"], rank_zero_only=True)
        return loss


def guarded(kwargs: dict[str, Any]) -> Any:
    L.seed_everything(5)
    module, recorder, copier = Guarded(), Recorder(), Copier()
    trainer = L.Trainer(**kwargs | {"logger": recorder, "max_epochs": 1, "callbacks": [copier]})
    trainer.fit(module, train_loader(20))
    return [row for row in recorder.rows if "own" in row[1]], copier.held


def test_code_for_rank_zero_runs_where_the_loss_is(runs: Runs) -> None:
    same(runs.one(guarded), runs.on(2, guarded)[0])


class Transfers(Classifier):
    """Hooks around the transfer of a batch, of which one draws random numbers."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        x, y = batch
        return x * (2 + dataloader_idx), y

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        x, y = batch
        return (x + torch.rand_like(x) if self.training else x), y


def transfers(kwargs: dict[str, Any]) -> Any:
    L.seed_everything(5)
    module = Transfers()
    trainer = L.Trainer(**kwargs | {"max_epochs": 2})
    generator = torch.Generator().manual_seed(3)
    trainer.fit(module, DataLoader(data(20), 8, shuffle=True, generator=generator), val_loader())
    return weights(module), metrics(trainer), generator.get_state()


def test_transfer_hooks_run_once(runs: Runs) -> None:
    expected = runs.one(transfers, 2)
    same(expected, runs.on(2, transfers, 2)[0])


class Teaching(Classifier):
    """A teacher that follows, weights kept small, the norm of gradients, samples: in hooks, of all layers."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = copy.deepcopy(self.blocks).requires_grad_(False)
        self.norm = nn.BatchNorm1d(6)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.inlet(self.norm(x))
        for block, teacher in zip(self.blocks, self.teacher, strict=True):
            h = h + block(h) - 0.1 * teacher(h)
        return self.head(h)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        for mine, theirs in zip(self.teacher.parameters(), self.blocks.parameters(), strict=True):
            mine.data.mul_(0.5).add_(0.5 * theirs.data)
        with torch.no_grad():
            self.head.weight.clamp_(-0.2, 0.2)
            torch._foreach_mul_(list(self.inlet.parameters()), 0.99)

        norms = [parameter.grad.data.norm() for parameter in self.parameters() if parameter.grad is not None]
        self.log("gradients", torch.stack(norms).norm())

    def on_train_epoch_end(self) -> None:
        self.count += 1
        self.log("sampled", self(data().tensors[0].to(self.device)).std())  # batch normalisation counts it
        self.log("size", sum(parameter.square().sum() for parameter in self.parameters()))
        assert self.trainer.log_dir == self.trainer.default_root_dir


def teaching(kwargs: dict[str, Any]) -> Any:
    L.seed_everything(5)
    module = Teaching()
    trainer = L.Trainer(**kwargs | {"max_epochs": 2})
    trainer.fit(module, train_loader(20), val_loader())
    return metrics(trainer), weights(module)


def test_hooks_that_rank_0_runs_alone_use_and_change_all_weights(runs: Runs) -> None:
    alike(runs, teaching, worlds=(2, 3))


class Norms(L.Callback):
    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        pl_module.log_dict(grad_norm(pl_module, 2))


def test_hooks_that_see_a_part_of_the_gradients_are_named() -> None:
    with pytest.warns(UserWarning, match=r"`on_before_optimizer_step` of Norms.*`on_train_batch_end`"):
        warn_of_gradients([Classifier(), Norms()])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_gradients([Teaching(), Looker()])


class Reading(Classifier):
    """Hooks that every rank runs read gradients and weights of all layers, in many ways."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(3, 3)
        self.sum = torch.zeros(())
        self.told: list[Any] = []

    def on_after_backward(self) -> None:
        for name, parameter in self.named_parameters():
            if parameter.grad is None:
                self.told.append(name)
            else:
                self.told.append((parameter.grad * 2).abs().max().item())
                self.sum += (parameter.grad.data.norm() + parameter.detach().mean()).cpu()
        self.told.append(any(p.grad is not None and p.grad.isnan().any() for p in self.parameters()))

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.log_dict(grad_norm(self, 2))
        flat = torch.cat([p.grad.flatten() for p in self.parameters() if p.grad is not None])
        self.log("noise", flat.std() / nn.utils.parameters_to_vector(self.parameters()).norm())
        self.told.append(float(nn.utils.clip_grad_norm_(self.parameters(), 0.5)))
        self.told.append(float(nn.utils.clip_grad_norm_(self.head.parameters(), 0.1)))
        self.told.append(grad_norm(self, 1))
        self.told.append(float(sum(p.grad.square().sum() for p in self.parameters() if p.grad is not None)) ** 0.5)

    def configure_gradient_clipping(self, optimizer: Any, gradient_clip_val: Any, gradient_clip_algorithm: Any) -> None:
        self.clip_gradients(optimizer, 0.4, "norm")
        norms = [p.grad.norm() for p in self.parameters() if p.grad is not None]
        scale = 0.3 / max(float(torch.stack(norms).norm()), 0.3)
        for parameter in self.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(scale)
        largest = torch.zeros_like(self.head.weight.sum())
        for parameter in self.parameters():
            if parameter.grad is not None:
                torch.maximum(largest, parameter.grad.abs().amax(), out=largest)
        self.told.append(float(largest))


class Watching(L.Callback):
    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        pl_module.log("largest", max(p.grad.abs().max() for p in pl_module.parameters() if p.grad is not None))


def reading(kwargs: dict[str, Any]) -> Any:
    L.seed_everything(5)
    module = Reading()
    first = LambdaCallback(on_before_optimizer_step=lambda _, m, __: m.told.append(m.inlet.weight.grad.sum().item()))
    trainer = L.Trainer(**kwargs | {"max_epochs": 2, "callbacks": [Watching(), first]})
    trainer.fit(module, train_loader(20), val_loader())
    assert "on_after_backward" not in vars(module)
    return metrics(trainer), weights(module), module.sum, module.told


def test_hooks_that_every_rank_runs_read_all_gradients(runs: Runs) -> None:
    alike(runs, reading, worlds=(2, 3))


class ReadingAlone(Classifier):
    """Rank 0 alone reads in one hook, as it does that writes histograms; in another all do."""

    def __init__(self, wrong: str) -> None:
        super().__init__()
        self.wrong = wrong
        self.told: list[Any] = []

    @rank_zero_only
    def on_after_backward(self) -> None:
        for parameter in self.parameters():
            self.told.append(float((parameter.grad.detach().abs() + 1).sum()))
            self.told.append((parameter.grad.cpu().numpy().sum(), parameter.tolist()))

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.told.append([parameter.grad.cpu().numpy().max() for parameter in self.parameters()])
        if self.trainer.is_global_zero:  # what all do next waits for it
            self.told.append(self.inlet.weight.grad.norm().item())
        if self.wrong == "order":
            names = sorted(dict(self.named_parameters()), reverse=not self.trainer.is_global_zero)
            self.told.append([self.get_parameter(name).grad.sum().item() for name in names])
        for parameter in self.parameters():
            parameter.grad.mul_(0.5)
        if self.wrong == "late" and self.trainer.is_global_zero:
            self.told.append(grad_norm(self, 2))


def reading_alone(kwargs: dict[str, Any], wrong: str) -> Any:
    L.seed_everything(5)
    module = ReadingAlone(wrong)
    L.Trainer(**kwargs | {"max_epochs": 2}).fit(module, train_loader(20))
    return weights(module), module.told if module.trainer.is_global_zero else []


def test_reading_on_one_rank(runs: Runs) -> None:
    scenario = functools.partial(reading_alone, wrong="")
    expected = runs.on(0, scenario)[0]
    for world in (2, 3):
        found, *others = runs.on(world, scenario)
        same(expected, found, f"{world} ranks")
        for other in others:
            same(expected[0], other[0])


@pytest.mark.parametrize(("wrong", "words"), [("order", "in another order than on rank"), ("late", "on one rank only")])
def test_reading_otherwise_on_one_rank_is_an_error(runs: Runs, wrong: str, words: str) -> None:
    with pytest.raises(WorkerError, match=rf"`on_before_optimizer_step` of ReadingAlone [^$]* {words}"):
        runs.on(2, functools.partial(reading_alone, wrong=wrong))


class Setting(Classifier):
    """The end of a step, and hooks that rank 0 runs, set what decides on steps to come, on every rank."""

    def __init__(self) -> None:
        super().__init__()
        self.so_far, self.centre, self.told = 1.0, torch.zeros(()), [0.0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x * self.so_far - self.centre + self.told[-1] + getattr(self.inlet, "shift", 0))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)["loss"]
        self.so_far = 0.9 * self.so_far + 0.1 * float(loss.detach())
        self.centre = self.centre + 0.1 * loss.detach()
        return loss

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        self.clip_gradients(optimizer, gradient_clip_val=0.1 * self.so_far, gradient_clip_algorithm="norm")

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.optimizers().param_groups[0]["lr"] *= self.so_far
        self.told.append(float(outputs["loss"]))

    def validation_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.latest = float(super().validation_step(batch, batch_idx))
        return self.latest

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        self.inlet.shift = self.latest


def setting(kwargs: dict[str, Any]) -> Any:
    L.seed_everything(5)
    module = Setting()
    trainer = L.Trainer(**kwargs | {"max_epochs": 2})
    trainer.fit(module, train_loader(20), val_loader())
    return metrics(trainer), weights(module), module.so_far, module.told


def test_what_rank_0_alone_sets_reaches_every_rank(runs: Runs) -> None:
    alike(runs, setting, worlds=(3,))


class Evaluating(Classifier):
    """Weights and counts that are changed after batches of evaluation, first or later ones."""

    def __init__(self, later: bool = False) -> None:
        super().__init__()
        self.later = later
        self.register_buffer("count", torch.zeros(()))

    def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx or not self.later:
            self.inlet.weight.data.mul_(0.9).add_(outputs * self.inlet.weight.norm() * 0.01)
            self.count += len(batch[0])

    def on_test_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx:
            self.log("later", self(batch[0]).norm() + self.inlet.weight.norm())

    def on_predict_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.blocks[0][0].bias.data.add_(outputs.mean(0)[0] * self.head.bias.data[0])


def evaluating(kwargs: dict[str, Any]) -> Any:
    L.seed_everything(5)
    module = Evaluating()
    trainer = L.Trainer(**kwargs | {"max_epochs": 1})
    trainer.fit(module, train_loader(20), val_loader())
    trainer.predict(module, val_loader(), return_predictions=False)
    found = metrics(trainer), weights(module)
    return *found, trainer.test(module, val_loader())


def evaluating_later(kwargs: dict[str, Any]) -> None:
    L.Trainer(**kwargs | {"max_epochs": 1}).validate(Evaluating(later=True), val_loader())


def test_weights_change_after_batches_of_evaluation(runs: Runs) -> None:
    alike(runs, evaluating, worlds=(3,))
    with pytest.raises(WorkerError, match=r"`on_validation_batch_end` changes 'inlet.weight'.*after each batch"):
        runs.on(2, evaluating_later)


class Saving(Classifier):
    def on_train_epoch_end(self) -> None:
        self.trainer.save_checkpoint("never.ckpt")


def saving(kwargs: dict[str, Any]) -> None:
    L.Trainer(**kwargs | {"max_epochs": 1}).fit(Saving(), train_loader(20))


def test_what_one_rank_cannot_do_alone_says_so(runs: Runs) -> None:
    with pytest.raises(WorkerError, match=r"runs on rank 0 only.*trainer\.save_checkpoint.*Do it in a callback"):
        runs.on(2, saving)
