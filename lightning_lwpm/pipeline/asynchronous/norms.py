"""The norm of all gradients where no step waits for the others.

Stage k takes, of later stages, their norm at step n, and of earlier ones the latest that is known without waiting::

    norm(k, n)^2 = sum over j >= k of norm_j(n)^2 + sum over j < k of norm_j(n - ceil((k-j)/m))^2

Stages so clip by slightly different norms, which differ by how much norms change from step to step. At the
first steps after a drain all take the norm at step n, which is the exact one.
"""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from lightning_lwpm.pipeline.asynchronous.told import Told
from lightning_lwpm.pipeline.mailbox import Mailbox

__all__ = ["Norms"]


class Norms:
    """The norms of all ranks' gradients, by step.

    Args:
        mailbox: Carries them.
        ranks: The rank of each stage.
        num_microbatches: Micro-batches between two steps.
        skipped: Whether a step is skipped where gradients overflow: the norm before it is told then, so that the steps
            of other stages are clipped by a number.
    """

    def __init__(self, mailbox: Mailbox, ranks: Sequence[int], num_microbatches: int, skipped: bool = False) -> None:
        self._squares: Told[float] = Told("gradient norm", mailbox, ranks, num_microbatches)
        self._skipped, self._finite = skipped, 0.0

    def tell(self, parameters: Iterable[nn.Parameter]) -> None:
        """Begin a turn: tell all ranks of the norm here; to be called once a step on all ranks.

        Args:
            parameters: Those that count here.
        """
        gradients = [p.grad for p in parameters if p.grad is not None]
        own = float(torch.nn.utils.get_total_norm(gradients)) ** 2 if gradients else 0.0
        if math.isfinite(own):
            self._finite = own
        self._squares.tell(self._finite if self._skipped else own)

    def begin(self) -> None:
        """The pipeline is empty: what stages were like before says nothing any more."""
        self._squares.begin()

    def total(self) -> Tensor:
        """The norm to clip by in this turn."""
        told, found = self._squares, 0.0
        for stage in range(len(told.ranks)):
            turn = told.turn - told.late(stage, told.here)
            found += told.value(stage, turn if turn > told.since else told.turn)
        return torch.tensor(found).sqrt()
