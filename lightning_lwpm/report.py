"""What people see at the start of a run: the plan."""

import warnings

from rich.console import Console

from lightning_lwpm.partition.units import human_seconds
from lightning_lwpm.tuning.choose import Choice

__all__ = ["considered", "show_plan"]


def show_plan(choice: Choice) -> None:
    """Print the plan as a table; warn where devices stay without a stage.

    Args:
        choice: The plan, and what else was considered.
    """
    plan = choice.plan
    Console().print(plan.table())
    if len(choice.considered) > 1:
        Console().print(considered(choice), style="dim")
    stages = len(plan.stages)
    if stages < plan.num_ranks:
        warnings.warn(
            f"the model calls only {stages} layer(s) that can be set apart, so {plan.num_ranks - stages} of "
            f"{plan.num_ranks} devices have no stage and stay idle. Use `devices={stages}`.",
            stacklevel=2,
        )


def considered(choice: Choice) -> str:
    """What other numbers of micro-batches would have taken."""
    times = ", ".join(f"{count}: {human_seconds(seconds)}" for count, seconds in choice.considered.items())
    return f"expected time of a batch by number of micro-batches: {times}"
