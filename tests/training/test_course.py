"""How a run goes on is set on rank 0 alone, or on every rank: all ranks go on as one device does."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import lightning as L
import pytest
from training.modules import Classifier, train_loader, val_loader
from training.runs import Runs, metrics, same, weights

SETTINGS: dict[str, Callable[[L.Trainer, float], None]] = {
    "on_train_epoch_start": lambda trainer, n: setattr(trainer, "accumulate_grad_batches", int(n)),
    "on_before_optimizer_step": lambda trainer, n: trainer.optimizers[0].param_groups[0].update(weight_decay=n / 100),
    "on_before_zero_grad": lambda trainer, n: trainer.optimizers[0].param_groups[0].update(momentum=n / 9),
    "on_train_batch_end": lambda trainer, n: setattr(trainer, "gradient_clip_val", n / 5),
    "on_train_epoch_end": lambda trainer, n: setattr(trainer.fit_loop, "max_batches", 3 + int(n)),
    "on_validation_end": lambda trainer, n: setattr(trainer, "val_check_batch", 1 + int(n)),
}


class Setting(Classifier):
    """Sets the learning rate at the end of its step, and more after epochs."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        out = super().training_step(batch, batch_idx)
        self.trainer.optimizers[0].param_groups[0]["lr"] = 0.05 + 0.2 * float(out["loss"].detach())
        return out

    def on_train_epoch_end(self) -> None:
        self.trainer.fit_loop.epoch_loop.max_steps = 22


class Somewhere(L.Callback):
    """Sets something in several hooks: where it counts, and on the other ranks where it must not."""

    def __init__(self, everywhere: bool) -> None:
        for name, run in SETTINGS.items():
            setattr(self, name, self._hook(run, everywhere))
        self.rows: list[Any] = []

    def _hook(self, run: Callable[[L.Trainer, float], None], everywhere: bool) -> Callable[..., None]:
        def hook(trainer: L.Trainer, *_: Any) -> None:
            if trainer.is_global_zero or everywhere:
                run(trainer, 1 + trainer.global_step % 3)
            else:
                run(trainer, 8)

        return hook

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        group = trainer.optimizers[0].param_groups[0]
        self.rows.append((trainer.current_epoch, trainer.global_step, group["lr"], group["momentum"]))

    def on_validation_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.rows.append("validation")


for _name in SETTINGS:
    setattr(Somewhere, _name, lambda *_: None)  # Lightning looks at the class


def fit(kwargs: dict[str, Any], everywhere: bool) -> Any:
    L.seed_everything(5)
    module, callback = Setting(), Somewhere(everywhere)
    trainer = L.Trainer(**kwargs, max_epochs=9, callbacks=[callback], num_sanity_val_steps=0)
    trainer.fit(module, train_loader(44), val_loader())
    rows = callback.rows
    return {"rows": rows, "steps": trainer.global_step, "weights": weights(module), "metrics": metrics(trainer)}


def on_rank_0(kwargs: dict[str, Any]) -> Any:
    return fit(kwargs, everywhere=False)


def on_every_rank(kwargs: dict[str, Any]) -> Any:
    return fit(kwargs, everywhere=True)


@pytest.mark.parametrize("options", [{}, {"schedule": "async", "max_staleness": 0}], ids=["exact", "async"])
def test_all_ranks_go_on_as_rank_0_has_set_it(runs: Runs, options: dict[str, Any]) -> None:
    expected = runs.one(on_rank_0)
    for scenario, world in ((on_rank_0, 3), (on_every_rank, 2)):
        for found in runs.on(world, scenario, **options):
            same(expected, found)


def limited_late(kwargs: dict[str, Any]) -> Any:
    class Limiting(L.Callback):
        def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            trainer.limit_train_batches = 2

    L.Trainer(**kwargs, max_epochs=1, callbacks=[Limiting()]).fit(Classifier(), train_loader())


def test_limits_that_come_too_late(runs: Runs) -> None:
    with pytest.raises(AssertionError, match=r"`trainer\.limit_train_batches` was set to 2 in a hook") as caught:
        runs.on(2, limited_late)
    assert str(caught.value).count("ConfigurationError") >= 2  # on both ranks


class Slow(L.Callback):
    """On one rank the time for validation has come before others begin to look."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, int]] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.rows.append(("batch", trainer.global_step))
        if trainer.global_rank == 1:
            trainer._last_val_time = -1e9

    def on_validation_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.rows.append(("validation", trainer.global_step))


def by_the_clock(kwargs: dict[str, Any]) -> Any:
    L.seed_everything(5)
    module, callback = Classifier(), Slow()
    trainer = L.Trainer(**kwargs, max_epochs=2, val_check_interval=timedelta(hours=1), callbacks=[callback])
    trainer.fit(module, train_loader(), val_loader())
    return callback.rows, weights(module)


def test_validation_by_the_clock_is_that_of_rank_0(runs: Runs) -> None:
    expected = runs.one(by_the_clock)
    for found in runs.on(2, by_the_clock):
        same(expected, found)
