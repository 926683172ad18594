"""From a recorded run of the step to its timeline, and to what each layer call uses."""

import bisect
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from lightning_lwpm.partition.record import Call, Counter, Recorder
from lightning_lwpm.partition.segment import Segment, cut
from lightning_lwpm.partition.timeline import Flow, LayerCall, Timeline
from lightning_lwpm.staging.sites import Site

__all__ = ["Probe", "describe"]


@dataclass(frozen=True)
class Probe:
    """What a run of the step has shown. Positions count the layer calls.

    Attributes:
        timeline: The layer calls, with their costs.
        spans: Module name -> for each of its calls, the first and last position inside it (``None``: no layer call).
        parameters: Parameter name -> the positions that use it.
        buffers: The same for buffers that belong to a layer or were changed; others are constants, kept everywhere.
        attributes: Module name and attribute name of plain tensors that the step stored on modules.
        hooked: Modules with forward hooks that do something with what they are given.
        sizes: Parameter or buffer name -> its bytes, and the bytes of its gradient (0 if it has none).
        segments: The layer calls as they can be run by themselves, one each.
        written: The parameters that the step itself changes.
        derivations: Calls of ``torch.autograd.grad``: where they are in the user's code, and the first and the last
            position between their inputs and outputs, which are in one stage.
    """

    timeline: Timeline
    spans: dict[str, tuple[tuple[int, int] | None, ...]]
    parameters: dict[str, tuple[int, ...]]
    buffers: dict[str, tuple[int, ...]]
    attributes: tuple[tuple[str, str], ...] = ()
    hooked: tuple[str, ...] = ()
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)
    segments: tuple[Segment, ...] = ()
    written: tuple[str, ...] = ()
    derivations: tuple[tuple[Site, tuple[int, int]], ...] = ()


def describe(
    root: nn.Module, recorder: Recorder, counter: Counter, changed: set[str], prepared: Collection[str] = ()
) -> Probe:
    """Describe a run.

    Args:
        root: The model.
        recorder: Has followed the run; it has seen at least one layer.
        counter: Has counted its work.
        changed: The buffers that it changed.
        prepared: Modules with a forward pre-hook that acts: it may use weights, and belongs to the layer before.
    """
    layers = _Layers([call for call in recorder.calls if not call.has_inner])
    uses = _uses(root, recorder, layers, prepared)
    parameters = _with_neighbours([name for name, _ in root.named_parameters()], uses)
    buffers = _owned_buffers(root, recorder, layers, uses, changed)
    flows = _flows(recorder, layers)
    derivations = [(d.site, (layers.made_at(d.first), layers.at(d.time))) for d in recorder.derivations]
    timeline = Timeline(
        _layer_calls(root, recorder, layers, parameters, counter),
        _bytes_alive(flows, len(layers.calls)),
        _allowed(
            recorder,
            layers,
            [
                *(where for name, where in buffers.items() if name in changed),
                *(where for name, where in parameters.items() if name in recorder.written),
                *(where for _, where in derivations),
            ],
        ),
        flows,
    )
    tensors = [*root.named_parameters(), *root.named_buffers()]
    return Probe(
        timeline,
        _spans(recorder.calls, layers),
        parameters,
        buffers,
        sizes={n: (_bytes(t), _bytes(t) if t.requires_grad else 0) for n, t in tensors},
        segments=tuple(cut(root, recorder.operations, layers.at, len(layers.calls))),
        written=tuple(name for name in parameters if name in recorder.written),
        derivations=tuple(derivations),
    )


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


class _Layers:
    """The layer calls, in order; a time belongs to the latest one begun."""

    def __init__(self, calls: list[Call]) -> None:
        self.calls = calls
        self.starts = [call.start for call in calls]
        self.moments = [call.moment for call in calls]

    def at(self, time: int) -> int:
        """The position that a time belongs to."""
        return max(bisect.bisect_right(self.starts, time) - 1, 0)

    def made_at(self, moment: int) -> int:
        """The position at which a node of autograd's graph was made."""
        return max(bisect.bisect_right(self.moments, moment) - 1, 0)

    def inside(self, time: int) -> bool:
        """Whether a time lies within a layer, not in the glue after it."""
        call = self.calls[self.at(time)]
        return call.start <= time <= call.end

    def sums(self, by_time: Mapping[int, float]) -> list[float]:
        """Amounts by position."""
        out = [0.0] * len(self.calls)
        for time, amount in by_time.items():
            out[self.at(time)] += amount
        return out


def _uses(root: nn.Module, recorder: Recorder, layers: _Layers, prepared: Collection[str]) -> dict[str, set[int]]:
    """The positions that use each parameter and buffer: by a function, by a hook before, or as part of the layer."""
    uses: dict[str, set[int]] = defaultdict(set)
    for name, times in recorder.used.items():
        uses[name].update(map(layers.at, times))
    names = {id(t): n for n, t in [*root.named_parameters(), *root.named_buffers()]}
    for position, call in enumerate(layers.calls):
        module = root.get_submodule(call.name)
        first = position - 1 if position and call.name in prepared else position
        for tensor in [*module.parameters(), *module.buffers()]:
            uses[names[id(tensor)]].update(range(first, position + 1))
    return uses


def _with_neighbours(names: Iterable[str], uses: Mapping[str, set[int]]) -> dict[str, tuple[int, ...]]:
    """The positions of each parameter; one that the step never touched stays with the one before it."""
    last = 0
    found: dict[str, tuple[int, ...]] = {}
    for name in names:
        found[name] = tuple(sorted(uses.get(name, ()))) or (last,)
        last = found[name][0]
    return found


def _owned_buffers(
    root: nn.Module, recorder: Recorder, layers: _Layers, uses: Mapping[str, set[int]], changed: set[str]
) -> dict[str, tuple[int, ...]]:
    """The buffers that belong to layers, or that the step changes. A constant that glue reads is kept everywhere."""
    names = {id(b): n for n, b in root.named_buffers()}
    in_layers = {names[id(b)] for call in layers.calls for b in root.get_submodule(call.name).buffers()}
    glue = {n for n in names.values() if any(not layers.inside(time) for time in recorder.used.get(n, ()))}
    owned = changed | (in_layers - glue)
    return {n: tuple(sorted(uses[n])) for n in names.values() if n in owned and uses.get(n)}


def _spans(calls: Iterable[Call], layers: _Layers) -> dict[str, tuple[tuple[int, int] | None, ...]]:
    """For each call of each module, the first and last layer call inside it."""
    spans: dict[str, list[tuple[int, int] | None]] = defaultdict(list)
    for call in calls:
        around = range(layers.at(call.start), layers.at(call.end) + 1)
        inside = [p for p in around if call.start <= layers.starts[p] < call.end]
        spans[call.name].append((inside[0], inside[-1]) if inside else None)
    return {name: tuple(found) for name, found in spans.items()}


def _allowed(recorder: Recorder, layers: _Layers, histories: Iterable[tuple[int, ...]]) -> tuple[bool, ...]:
    """Where a stage may begin."""
    allowed = [True] * len(layers.calls)
    for where in histories:  # of a running statistic, a mean of weights, a graph: it lies in one stage
        for position in range(where[0] + 1, where[-1] + 1):
            allowed[position] = False
    for region in recorder.regions:  # what is recomputed as a whole is computed as a whole
        for position, call in enumerate(layers.calls):
            if region.start < call.start <= region.end and (
                call.functions > region.functions or (position and layers.starts[position - 1] > region.start)
            ):
                allowed[position] = False
    for whole in recorder.wholes:  # a function, layers in it included, belongs to the layer before
        for position, call in enumerate(layers.calls):
            if whole.start < call.start <= whole.end:
                allowed[position] = False
    return tuple(allowed)


def _layer_calls(
    root: nn.Module,
    recorder: Recorder,
    layers: _Layers,
    parameters: Mapping[str, tuple[int, ...]],
    counter: Counter,
) -> tuple[LayerCall, ...]:
    sizes = {n: (p.numel(), _bytes(p)) for n, p in root.named_parameters()}
    first: dict[int, list[str]] = defaultdict(list)
    for name, where in parameters.items():
        first[where[0]].append(name)
    flops, moved, kept = layers.sums(counter.flops), layers.sums(counter.bytes), _kept(recorder, layers)
    passing = [0] * len(layers.calls)
    for operation in recorder.operations:
        at = layers.at(operation.time)
        passing[at] = max(passing[at], *(_bytes(t) for t in [*operation.inputs, *operation.outputs]), 0)
    occurrences: dict[str, int] = defaultdict(int)
    described = []
    for position, call in enumerate(layers.calls):
        described.append(
            LayerCall(
                name=call.name,
                occurrence=occurrences[call.name],
                flops=flops[position],
                bytes_moved=moved[position],
                parameter_bytes=sum(sizes[n][1] for n in first[position]),
                parameters=sum(sizes[n][0] for n in first[position]),
                kept_bytes=kept[position],
                passing_bytes=passing[position],
                recomputed=any(region.start < call.start <= region.end for region in recorder.regions),
            )
        )
        occurrences[call.name] += 1
    return tuple(described)


def _kept(recorder: Recorder, layers: _Layers) -> list[int]:
    """Bytes kept for the backward pass, by the position that made them; weights are counted apart."""
    kept = [0] * len(layers.calls)
    for key, (time, nbytes) in recorder.saved.items():
        kept[layers.at(recorder.born[key][0] if key in recorder.born else time)] += nbytes
    return kept


def _flows(recorder: Recorder, layers: _Layers) -> tuple[Flow, ...]:
    """The tensors that are used in a later layer call than the one that made them."""
    flows = []
    for key, (time, nbytes) in recorder.born.items():
        born = layers.at(time)
        uses = sorted({layers.at(read) for read in recorder.reads.get(key, ())} - {born})
        if uses:
            flows.append(Flow(born, tuple(uses), nbytes))
    return tuple(flows)


def _bytes_alive(flows: Iterable[Flow], count: int) -> tuple[int, ...]:
    """Bytes made before each position and used at it or later."""
    alive = [0] * count
    for flow in flows:
        for position in range(flow.born + 1, flow.uses[-1] + 1):
            alive[position] += int(flow.nbytes)
    return tuple(alive)
