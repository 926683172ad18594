"""The promise with a transport of which the host does not see what has come: words of each stage take its place."""

import random
import time
from typing import Any

import pytest
import torch
from cases import CASES
from compare import compare
from harness import train_pipelined, train_single
from pool import Pool
from test_transparency import adamw

from lightning_lwpm.pipeline.direct import Direct
from lightning_lwpm.pipeline.mailbox import Mailbox
from lightning_lwpm.pipeline.transport import Receive

NAMES = [
    "long skip",
    "tied weights",
    "in place",
    "mixture of experts",
    "variable length",
    "late inputs",
    "frozen between",
    "siamese",
]

SETTINGS = [
    # the rank of each stage, micro-batches, schedule
    ([1, 0], 4, "gpipe"),
    ([1, 0], 3, "zb1p"),
    ([2, 1, 0], 5, "1f1b"),
    ([2, 1, 0], 4, "zb1p"),
    ([1, 0, 1, 0], 4, "interleaved_1f1b"),
    ([0, 1, 1, 0], 4, "zbv"),
]


class Delayed(Direct):
    """Process groups of gloo, with messages and receives that come late at random."""

    def __init__(self, mailbox: Mailbox) -> None:
        super().__init__(mailbox, torch.device("cpu"), "gloo")
        self._dice = random.Random(mailbox.rank)

    def receive(self, source: int, numel: int, dtype: torch.dtype, on_host: bool = False) -> Receive:
        self._doze()
        return super().receive(source, numel, dtype, on_host)

    def send(self, target: int, flat: torch.Tensor) -> None:
        self._doze()
        super().send(target, flat)

    def _doze(self) -> None:
        time.sleep(self._dice.choice([0, 0, 0, 0.002, 0.01]))


def train(rank: int, world: int, *args: Any) -> dict[str, Any]:
    return train_pipelined(rank, world, *args, carry=Delayed)


@pytest.mark.parametrize(("placement", "count", "schedule"), SETTINGS)
@pytest.mark.parametrize("name", NAMES)
def test_equals_one_device(pool: Pool, name: str, placement: list[int], count: int, schedule: str) -> None:
    case, stages = CASES[name], len(placement)
    expected = train_single(case.build, case.step, case.batches(), count, adamw)
    partition = case.partition.get(stages, "auto")
    arguments = (case.build, case.step, case.batches(), count, schedule, partition, adamw, placement)
    results = pool.run(max(placement) + 1, train, *arguments, timeout=60)
    compare(expected, results, 1e-5 if case.rounding(stages, count) else 0.0)


def test_words_are_said_once_for_each_micro_batch_and_all_taken(pool: Pool) -> None:
    case = CASES["long skip"]
    said = pool.run(2, words, case.build, case.step, case.batches())
    assert said[1] == ["forward-left"] * 4 * len(case.batches())
    assert said[0] == ["backward-done"] * 4 * len(case.batches())


def words(rank: int, world: int, build: Any, step: Any, batches: list[Any]) -> list[str]:
    """What this rank says to the other about the ends of its passes."""
    said: list[str] = []

    def carry(mailbox: Mailbox) -> Direct:
        post = mailbox.post

        def listening(target: int, kind: str, key: Any, payload: Any = None) -> None:
            if kind in ("forward-left", "backward-done"):
                said.append(kind)
            post(target, kind, key, payload)

        mailbox.post = listening  # type: ignore[method-assign]
        return Direct(mailbox, torch.device("cpu"), "gloo")

    train_pipelined(rank, world, build, step, batches, 4, carry=carry)
    return said
