"""Applies a plan to a model: which stage runs which module and holds which parameter."""

from dataclasses import replace

from torch import nn

from lightning_lwpm.partition.plan import PartitionPlan
from lightning_lwpm.partition.probe import Probe
from lightning_lwpm.staging.layout import Layout, Unit, units_of

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

    parameters = {name: stages(where) for name, where in probe.parameters.items()}
    buffers = {name: stages(where) for name, where in probe.buffers.items()}
    return Layout(
        num_stages=len(plan.stages),
        units=tuple(
            _with_attributes(u, probe) for u in units_of(root, probe.spans, stage_of, parameters, buffers, probe.hooked)
        ),
        parameters=parameters,
        buffers=buffers,
        ranks=plan.ranks,
        derivations=frozenset((site, stage_of[first]) for site, (first, _) in probe.derivations),
    )


def _with_attributes(unit: Unit, probe: Probe) -> Unit:
    """The unit with the attributes in which modules inside it were seen to store tensors."""
    inside = [(name, key) for name, key in probe.attributes if name == unit.name or name.startswith(unit.name + ".")]
    return replace(unit, attributes=tuple((name[len(unit.name) + 1 :], key) for name, key in inside))
