"""The version formula: which weights each pass uses where no step waits for the pipeline to empty."""

from dataclasses import dataclass

__all__ = ["Delay"]


@dataclass(frozen=True)
class Delay:
    """How late gradients come at one stage in steady-state 1F1B without a flush.

    Stage k of p runs p-1-k forward passes ahead, then by turns one forward and one backward pass, and steps after every
    ``num_microbatches`` backward passes of its own (PACI, arXiv 2606.07881). Its version is the number of its steps so
    far. Stage 0 of 2 with 2 micro-batches in a batch, passes numbered across batches, S a step:

        version   0              1              2
                  F0 F1 B0 F2 B1 S F3 B2 F4 B3 S F5 B4 ...
                                   ^ of batch 1: no step until B3      ^ F4 is of batch 2: one step until B4

    Args:
        stage: The stage, from 0 on the side of the input.
        num_stages: Number of stages.
        num_microbatches: Micro-batches of a batch, which are those between two steps.
        limit: The most steps that a gradient may be late; ``None`` for any.
    """

    stage: int
    num_stages: int
    num_microbatches: int
    limit: int | None = None

    @property
    def ahead(self) -> int:
        """Other micro-batches whose backward pass comes between a micro-batch's forward and backward passes."""
        return self.num_stages - 1 - self.stage

    @property
    def mean(self) -> float:
        """Steps that a gradient is late, on average over the micro-batches of a batch."""
        m = self.num_microbatches
        return sum(min(-((i - self.ahead) // m), self._limit) for i in range(m) if i < self.ahead) / m

    @property
    def most(self) -> int:
        """Steps that a gradient is late at most."""
        return min(-(-self.ahead // self.num_microbatches), self._limit)

    def forward_version(self, microbatch: int) -> int:
        """The version that the forward pass of a micro-batch uses; micro-batches are counted since the last drain."""
        late = max(0, microbatch - self.ahead) // self.num_microbatches
        return max(late, self.backward_version(microbatch) - self._limit)

    def backward_version(self, microbatch: int) -> int:
        """The version that is there when the backward pass of a micro-batch runs."""
        return microbatch // self.num_microbatches

    def crossed(self, microbatch: int) -> int:
        """Steps of the stage between the forward and the backward pass of a micro-batch, counted alike."""
        return self.backward_version(microbatch) - self.forward_version(microbatch)

    @property
    def _limit(self) -> int:
        return self.ahead if self.limit is None else self.limit
