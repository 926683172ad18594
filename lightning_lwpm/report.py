"""What people see at the start of a run: the plan."""

import warnings

from rich.console import Console

from lightning_lwpm.partition.plan import PartitionPlan

__all__ = ["show_plan"]


def show_plan(plan: PartitionPlan, rank: int) -> None:
    """Print the plan as a table on rank 0; warn where devices stay without a stage.

    Args:
        plan: The partition.
        rank: This process's rank.
    """
    if rank != 0:
        return
    Console().print(plan.table())
    stages = len(plan.stages)
    if stages < plan.num_ranks:
        warnings.warn(
            f"the model calls only {stages} layer(s) that can be set apart, so {plan.num_ranks - stages} of "
            f"{plan.num_ranks} devices have no stage and stay idle. Use `devices={stages}`.",
            stacklevel=2,
        )
