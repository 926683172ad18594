"""Whichever rank is told to end, all ranks end at the same batch, at once, and can train again."""

import os
import signal
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import Callback
from training.modules import Classifier, train_loader
from training.runs import Runs


class Killed(Callback):
    """Sends SIGTERM to a rank's own process after the third batch."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == 3 and trainer.global_rank == self.rank:
            os.kill(os.getpid(), signal.SIGTERM)


def terminated(kwargs: dict[str, Any], rank: int) -> tuple[bool, int, bool]:
    trainer = L.Trainer(**kwargs, max_epochs=1, callbacks=[Killed(rank)])
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
