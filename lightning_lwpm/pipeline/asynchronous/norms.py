"""The norm of all gradients where no step waits for the others.

Stages step one after the other, the last one first. At step n stage k takes, of later stages, their norm at step n,
and of earlier ones, which have not come there, their norm at step n - ceil((k-j)/m), the latest that is known without
waiting::

    norm(k, n)^2 = sum over j >= k of norm_j(n)^2 + sum over j < k of norm_j(n - ceil((k-j)/m))^2

Stages so clip by slightly different norms, which differ by how much norms change from step to step. At the
first steps after a drain all take the norm at step n, which is the exact one.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from lightning_lwpm.pipeline.mailbox import Mailbox

__all__ = ["Norms"]


class Norms:
    """The norms of all ranks' gradients, by step.

    Args:
        mailbox: Carries them.
        ranks: The rank of each stage.
        num_microbatches: Micro-batches between two steps.
    """

    def __init__(self, mailbox: Mailbox, ranks: Sequence[int], num_microbatches: int) -> None:
        self.mailbox, self.ranks, self.num_microbatches = mailbox, list(ranks), num_microbatches
        self._here = self.ranks.index(mailbox.rank) if mailbox.rank in self.ranks else None
        self._squares: dict[int, dict[int, float]] = {stage: {} for stage in range(len(ranks))}  # by turn
        self._heard = [0] * len(ranks)
        self._turn = self._since = 0

    def tell(self, parameters: Iterable[nn.Parameter]) -> None:
        """Begin a turn: tell all ranks of the norm here; to be called once a step on all ranks.

        Args:
            parameters: Those that count here.
        """
        self._turn += 1
        if self._here is None:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        own = float(torch.nn.utils.get_total_norm(gradients)) ** 2 if gradients else 0.0
        self._squares[self._here][self._turn] = own
        self.mailbox.post_all("norm", (self._turn, self.mailbox.rank), own)

    def begin(self) -> None:
        """The pipeline is empty: what stages were like before says nothing any more."""
        self._since = self._turn

    def total(self) -> Tensor:
        """The norm to clip by in this turn."""
        here = len(self.ranks) if self._here is None else self._here
        found = []
        for stage in range(len(self.ranks)):
            late = 0 if stage >= here else -(-(here - stage) // self.num_microbatches)
            found.append(self._square(stage, self._turn - late if self._turn - late > self._since else self._turn))
        return torch.tensor(sum(found)).sqrt()

    def _square(self, stage: int, turn: int) -> float:
        known, rank = self._squares[stage], self.ranks[stage]
        while stage != self._here and self._heard[stage] < turn:
            self._heard[stage] += 1
            what = f"the gradient norm of stage {stage} (rank {rank}) for a step"
            known[self._heard[stage]] = self.mailbox.take("norm", (self._heard[stage], rank), what)
        for old in [each for each in known if each < turn - len(self.ranks)]:
            del known[old]
        return known[turn]
