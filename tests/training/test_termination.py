"""Whichever rank is told to end, by SIGTERM or Ctrl-C, all ranks end at the same batch, and can train again."""

import os
import signal
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, OnExceptionCheckpoint
from training.modules import Classifier, train_loader, val_loader
from training.runs import Runs, same, weights


class Told(Callback):
    """Sends a signal to a rank's own process after the third batch, or in the validation that follows the fifth."""

    def __init__(self, what: int, rank: int | None, validating: bool = False) -> None:
        self.what, self.rank, self.validating = what, rank, validating

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == 3 and not self.validating:
            self.tell(trainer)

    def on_validation_epoch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == 5 and self.validating:
            self.tell(trainer)

    def tell(self, trainer: L.Trainer) -> None:
        if self.rank in (None, trainer.global_rank):
            os.kill(os.getpid(), self.what)


def terminated(kwargs: dict[str, Any], rank: int) -> tuple[bool, int, bool]:
    trainer = L.Trainer(**kwargs, max_epochs=1, callbacks=[Told(signal.SIGTERM, rank)])
    try:
        trainer.fit(Classifier(), train_loader(160))
    except SystemExit:
        return True, trainer.global_step, trainer.received_sigterm
    return False, trainer.global_step, trainer.received_sigterm


def first(kwargs: dict[str, Any]) -> Any:
    return terminated(kwargs, 0)


def second(kwargs: dict[str, Any]) -> Any:
    return terminated(kwargs, 1)


@pytest.mark.parametrize("scenario", [first, second])
@pytest.mark.parametrize("schedule", ["1f1b", "async"])
def test_all_ranks_end_at_the_same_batch(runs: Runs, scenario: Any, schedule: str) -> None:
    found = runs.on(3, scenario, 2, schedule=schedule)
    assert len(set(found)) == 1
    ended, steps, received = found[0]
    assert ended and received and 3 <= steps <= 6


def interrupted(kwargs: dict[str, Any], rank: int | None, validating: bool = False, epochs: int = 9) -> Any:
    """Ctrl-C; the file that is written then, beside the weights of a run that ends after as many steps by itself."""
    folder = Path(kwargs["default_root_dir"])
    L.seed_everything(5)
    callbacks = [Told(signal.SIGINT, rank, validating), OnExceptionCheckpoint(folder)]
    trainer = L.Trainer(**kwargs | {"enable_checkpointing": True}, max_epochs=epochs, callbacks=callbacks)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    module = Classifier()
    try:
        trainer.fit(module, train_loader(), val_loader())
    except SystemExit:
        with pytest.raises(KeyboardInterrupt):  # a later one is nobody's business
            signal.raise_signal(signal.SIGINT)
        saved = torch.load(folder / "on_exception.ckpt", weights_only=False)
        same(weights(module), saved["state_dict"])
        return trainer.global_step, saved["global_step"], weights(module), saved["optimizer_states"]
    finally:
        signal.signal(signal.SIGINT, before)
    raise AssertionError("not interrupted")


def by_all(kwargs: dict[str, Any]) -> Any:
    return interrupted(kwargs, None)


def by_one(kwargs: dict[str, Any]) -> Any:
    return interrupted(kwargs, 1)


def while_validating(kwargs: dict[str, Any]) -> Any:
    return interrupted(kwargs, None, validating=True)


def in_the_last_validation(kwargs: dict[str, Any]) -> Any:
    return interrupted(kwargs, None, validating=True, epochs=1)


@pytest.mark.parametrize("scenario", [by_all, by_one, while_validating, in_the_last_validation])
def test_ctrl_c_ends_all_ranks_with_a_checkpoint(runs: Runs, scenario: Any) -> None:
    for world in (2, 3):
        found = runs.on(world, scenario)
        for steps, in_file, *state in found:
            assert steps == in_file == found[0][0] and 3 <= steps <= 6
            same(found[0][2:], state)
