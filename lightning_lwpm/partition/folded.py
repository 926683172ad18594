"""A step that calls its layers again and again, folded so that each layer has one place, and so one rank.

::

    calls       G.0  G.1  D.0  D.1 | D.0  D.1  G.0  G.1  D.0  D.1        a step with two backward passes
    folded      G.0  G.1  D.0  D.1                                       each with the costs of all its calls
"""

from collections.abc import Mapping
from dataclasses import replace

from lightning_lwpm.partition.describe import Probe
from lightning_lwpm.partition.timeline import Timeline

__all__ = ["folded"]


def folded(seen: Probe) -> Probe:
    """What a step has shown, with one call of each layer, in the order of the first calls.

    No stage begins between uses of weights that the step changes itself, or of a buffer, or between layers that
    ``torch.autograd.grad`` goes through.

    Args:
        seen: What was seen.
    """
    timeline = seen.timeline
    first = {call.name: i for i, call in reversed(list(enumerate(timeline.calls)))}
    order = sorted(first, key=first.__getitem__)
    place = {name: i for i, name in enumerate(order)}
    at = [place[call.name] for call in timeline.calls]
    calls = []
    for name in order:
        own = [call for call in timeline.calls if call.name == name]
        sums = {
            what: sum(getattr(call, what) for call in own)
            for what in ("flops", "bytes_moved", "parameter_bytes", "parameters", "kept_bytes", "again_bytes")
        }
        calls.append(replace(own[0], **sums))

    def placed(uses: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        return {name: tuple(sorted({at[position] for position in where})) for name, where in uses.items()}

    parameters, buffers = placed(seen.parameters), placed(seen.buffers)
    allowed = [timeline.allowed[first[name]] for name in order]
    ways = tuple(
        (site, (min(at[first : last + 1]), max(at[first : last + 1]))) for site, (first, last) in seen.derivations
    )
    bound = [where for name, where in parameters.items() if name in seen.written]
    for where in [*bound, *buffers.values(), *(places for _, places in ways)]:
        for position in range(where[0] + 1, where[-1] + 1):
            allowed[position] = False
    spans = {
        name: tuple(span and (min(at[span[0] : span[1] + 1]), max(at[span[0] : span[1] + 1])) for span in calls_of)
        for name, calls_of in seen.spans.items()
    }
    alive = tuple(timeline.boundary_bytes[first[name]] for name in order)
    return replace(
        seen,
        timeline=Timeline(tuple(calls), alive, tuple(allowed)),
        spans=spans,  # type: ignore[arg-type]
        parameters=parameters,
        buffers=buffers,
        segments=(),
        derivations=ways,
    )
