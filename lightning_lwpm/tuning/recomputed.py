"""A step of which activations are computed again in the backward pass: it keeps less, and takes a forward pass more."""

from collections.abc import Sequence
from dataclasses import replace

from lightning_lwpm.partition.timeline import LayerCall
from lightning_lwpm.tuning.sized import Look, at
from lightning_lwpm.tuning.wish import Wish

__all__ = ["look_at"]


def look_at(looks: Sequence[Look], samples: float, wish: Wish) -> Look:
    """The step with micro-batches of some size, as the user wants its activations kept.

    Args:
        looks: At one size, or at two.
        samples: The size wanted.
        wish: What the user asked for.
    """
    look, mode = at(looks, samples), wish.activation_checkpointing
    if mode == "none":
        return look
    calls, boundary = look.timeline.calls, look.timeline.boundary_bytes
    changed = []
    for position, call in enumerate(calls):
        if mode == "stage":
            changed.append(replace(call, kept_bytes=0, again_bytes=call.kept_bytes))
            continue
        block = _block(call)
        together = [other.kept_bytes for other in calls if block is not None and _block(other) == block]
        if not together:  # a single layer keeps what it keeps
            changed.append(call)
            continue
        first = position == 0 or _block(calls[position - 1]) != block
        kept = min(boundary[position], sum(together)) if first else 0
        changed.append(replace(call, kept_bytes=kept, again_bytes=sum(together)))
    costs = tuple(
        cost if call.recomputed or not after.again_bytes else replace(cost, backward=cost.backward + cost.forward)
        for call, after, cost in zip(calls, changed, look.costs.calls, strict=True)
    )
    return Look(look.samples, replace(look.timeline, calls=tuple(changed)), replace(look.costs, calls=costs))


def _block(call: LayerCall) -> tuple[str, int] | None:
    """The member of a list of modules in which a layer lies, if any: ``model.h.3`` for ``model.h.3.mlp.up``."""
    parts = call.name.split(".")
    for i, part in enumerate(parts[:-1]):
        if part.isdigit():
            return ".".join(parts[: i + 1]), call.occurrence
    return None
