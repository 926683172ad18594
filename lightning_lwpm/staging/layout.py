"""Where every layer call, parameter and buffer of a model lives: the partition, applied to the module tree."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

from torch import nn

from lightning_lwpm.staging.sites import Site

__all__ = ["Layout", "Unit", "units_of"]


@dataclass(frozen=True)
class Unit:
    """A module whose every call lies in one stage: the largest such subtrees are ghosted, run or left as a whole.

    Attributes:
        name: Dotted name in the root module.
        stages: The stage of its first, second, ... call.
        attributes: Where its modules store tensors beside returning them: (path below the unit, attribute name).
    """

    name: str
    stages: tuple[int, ...]
    attributes: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Layout:
    """The partition of a model over stages.

    Attributes:
        num_stages: Number of stages that hold layers.
        units: The largest modules that lie in one stage a call.
        parameters: Parameter name -> the stages that use it, ascending. Shared parameters have several.
        buffers: The same for the buffers that belong to one stage only; all other buffers are kept everywhere.
        ranks: The rank of each stage.
        derivations: Calls of ``torch.autograd.grad``, and the stage that has all layers between inputs and outputs.
    """

    num_stages: int
    units: tuple[Unit, ...]
    parameters: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    buffers: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    ranks: tuple[int, ...] = (0,)
    derivations: frozenset[tuple[Site, int]] = frozenset()

    @property
    def shared(self) -> dict[str, tuple[int, ...]]:
        """The parameters that several stages hold: their gradients are summed."""
        return {name: stages for name, stages in self.parameters.items() if len(stages) > 1}


def units_of(
    root: nn.Module,
    spans: Mapping[str, tuple[tuple[int, int] | None, ...]],
    stage_of: list[int],
    parameters: Mapping[str, tuple[int, ...]],
    buffers: Mapping[str, tuple[int, ...]],
    hooked: Collection[str] = (),
) -> Iterator[Unit]:
    """Find the largest modules of which every call lies in one stage, with what it uses.

    What a module does before its first layer belongs to the layer before: a weight that it uses there may lie in an
    earlier stage, and then only the layers inside the module are units.

    A module that has not been called yet (a layer left out at random, another branch) lies where its parameters do.

    Args:
        root: The model.
        spans: Module name -> for each of its calls, the first and last layer call (position in the timeline) made
            inside it; ``None`` where it made none.
        stage_of: The stage of each position of the timeline.
        parameters: The stages of each parameter.
        buffers: The same for the buffers that belong to one stage only.
        hooked: Modules with forward hooks that act: they are not hidden inside a unit.
    """
    names = {id(t): name for name, t in [*root.named_parameters(), *root.named_buffers()]}
    homes_of = {**buffers, **parameters}
    callers: dict[int, set[str]] = {}
    for name, calls in spans.items():
        for span in calls:
            for position in range(span[0], span[1] + 1) if span else ():
                callers.setdefault(position, set()).add(name)
    seen: set[int] = set()

    def visit(name: str, module: nn.Module) -> Iterator[Unit]:
        if id(module) in seen:
            return
        seen.add(id(module))
        calls = spans.get(name, ())
        stages = {stage_of[span[0]] for span in calls if span}
        hiding = any(other.startswith(f"{name}.") for other in hooked)
        if (
            name
            and calls
            and not hiding
            and all(span is not None and stage_of[span[0]] == stage_of[span[1]] for span in calls)
            and all(
                stages.issubset(homes_of.get(names[id(t)], stages)) for t in [*module.parameters(), *module.buffers()]
            )
        ):
            inside = {p for span in calls if span for p in range(span[0], span[1] + 1)}
            below = [n for n, child in module.named_modules(prefix=name) if n != name and n in spans]
            # a child that something else calls too cannot disappear inside this unit
            if all(p in inside for n in below for span in spans[n] if span for p in range(span[0], span[1] + 1)):
                yield Unit(name, tuple(stage_of[span[0]] for span in calls if span))
                return
        if name and not hiding and not any(n in spans for n, _ in module.named_modules(prefix=name)):
            homes = {parameters[names[id(p)]] for p in module.parameters()}
            if len(homes) == 1:
                yield Unit(name, homes.pop()[:1])
                return
        for child_name, child in module.named_children():
            yield from visit(f"{name}.{child_name}" if name else child_name, child)

    yield from visit("", root)
