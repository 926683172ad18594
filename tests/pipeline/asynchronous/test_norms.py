"""Which stage clips by which stages' norms."""

import time
from typing import Any

import torch
from harness import connect
from pool import Pool
from torch import nn

from lightning_lwpm.pipeline.asynchronous.norms import Norms


def norms(rank: int, world: int, m: int, turns: int, empty_after: int) -> list[float]:
    """The squared norms that a stage uses; stage k's gradient at turn n is 10^k by n."""
    mailbox, _ = connect(rank, world)
    ranks = list(reversed(range(world)))
    made, weight = Norms(mailbox, ranks, m), nn.Parameter(torch.zeros(1))
    found = []
    for turn in range(1, turns + 1):
        time.sleep(0.02 * rank)  # earlier stages come later
        weight.grad = torch.tensor([(10.0 ** ranks.index(rank) * turn) ** 0.5])
        made.tell([weight])
        found.append(round(float(made.total()) ** 2, 1))
        if turn == empty_after:
            made.begin()
    mailbox.gather("end", None)
    mailbox.close()
    return found


def test_earlier_stages_count_as_they_were(pool: Pool) -> None:
    def expected(m: int, stage: int, turn: int, since: int) -> float:
        late = [max(0, -(-(stage - other) // m)) for other in range(3)]
        turns = [turn - steps if turn - steps > since else turn for steps in late]
        return sum(10.0**other * at for other, at in enumerate(turns))

    for m in (1, 2):
        results: list[Any] = pool.run(3, norms, m, 6, 3, timeout=60)
        for rank, found in enumerate(results):
            stage = 2 - rank
            assert found == [expected(m, stage, turn, 3 if turn > 3 else 0) for turn in range(1, 7)]
