"""What a user asks of a plan, and what there is to make it with."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from lightning_lwpm.partition.plan import PartitionPlan
from lightning_lwpm.partition.planfile import load_plan

__all__ = ["Wish"]


@dataclass(frozen=True)
class Wish:
    """What the user asked for, and what there is.

    Args:
        partition: "auto", the layers that begin stages, the path of a plan, or a plan.
        num_microbatches: A number, or "auto".
        schedule: A name, or "auto"; "sequential" where every rank runs the user's whole step, in turns.
        limits: Bytes of each rank's device; infinite where there is no limit.
        state_factor: Bytes of optimizer state for each byte of trained parameters.
        virtual_stages: Stages a rank, or "auto": as many as the schedule needs.
        ranks: The rank of each stage, where a plan says it.
        activation_checkpointing: What is computed again in backward passes: "none", "layer" or "stage".
        least_samples: Of a micro-batch, where their number is "auto" and the batch has as many.
    """

    partition: str | Sequence[str] | PartitionPlan = "auto"
    num_microbatches: int | Literal["auto"] = "auto"
    schedule: str = "auto"
    limits: tuple[float, ...] = ()
    state_factor: float = 0.0
    virtual_stages: int | Literal["auto"] = "auto"
    ranks: tuple[int, ...] | None = None
    activation_checkpointing: str = "none"
    least_samples: int = 1

    @property
    def whole(self) -> bool:
        """Whether every rank runs the user's whole step, in turns, and nothing is pipelined."""
        return self.schedule == "sequential"

    def in_turns(self) -> "Wish":
        """The same without a pipeline: a batch is whole, and each layer has one place."""
        return replace(self, schedule="sequential", num_microbatches=1, virtual_stages=1)

    def resolved(self) -> "Wish":
        """The same with the layers that a plan names, and what else it says where the user has left it open.

        Raises:
            ConfigurationError: if a plan's file cannot be used.
        """
        if isinstance(self.partition, PartitionPlan):
            told = self.partition.prediction
            cuts = [stage.begins for stage in self.partition.stages[1:]]
            count, schedule = (told.num_microbatches, told.schedule) if told is not None else (None, None)
            ranks = None if self.partition.goes_round else self.partition.ranks
        elif isinstance(self.partition, str) and self.partition != "auto":
            file = load_plan(self.partition)
            cuts, count, schedule, ranks = file.cuts, file.num_microbatches, file.schedule, file.ranks
        else:
            return self
        return replace(
            self,
            partition=cuts,
            ranks=ranks,
            num_microbatches=(count or "auto") if self.num_microbatches == "auto" else self.num_microbatches,
            schedule=(schedule or "auto") if self.schedule == "auto" else self.schedule,
        )
