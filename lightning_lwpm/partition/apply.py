"""Applies a plan to a model: which stage runs which module and holds which parameter."""

from torch import nn

from lightning_lwpm.partition.plan import PartitionPlan
from lightning_lwpm.partition.probe import Probe
from lightning_lwpm.staging.layout import Layout, units_of

__all__ = ["make_layout"]


def make_layout(root: nn.Module, probe: Probe, plan: PartitionPlan) -> Layout:
    """The layout of ``root`` under ``plan``.

    Args:
        root: The model that was probed, or one of the same structure.
        probe: What was seen.
        plan: The stages.
    """
    stage_of = [plan.stage_of[call.name, call.occurrence] for call in probe.timeline.calls]

    def stages(positions: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sorted({stage_of[position] for position in positions}))

    return Layout(
        num_stages=len(plan.stages),
        units=tuple(units_of(root, probe.spans, stage_of)),
        parameters={name: stages(where) for name, where in probe.parameters.items()},
        buffers={name: stages(where) for name, where in probe.buffers.items()},
    )
