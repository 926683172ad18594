"""What to say when a model does not fit its devices: each change that is named has been tried."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from lightning_lwpm.errors import ConfigurationError
from lightning_lwpm.partition.cuts import label
from lightning_lwpm.partition.describe import Probe
from lightning_lwpm.partition.explain import Alternative, explain
from lightning_lwpm.tuning.lineup import Lineup, lineups
from lightning_lwpm.tuning.needs import memory_of, places_of
from lightning_lwpm.tuning.sized import Look, at
from lightning_lwpm.tuning.wish import Wish

__all__ = ["refusal"]

_MOST_DEVICES = 64


def refusal(
    looks: Sequence[Look], seen: Probe, num_ranks: int, samples: int | None, wish: Wish, count: int, lineup: Lineup
) -> ConfigurationError:
    """The error of a model that fits with no partition.

    Args:
        looks: The step at one or two sizes of micro-batch.
        seen: Where parameters are used.
        num_ranks: Number of ranks.
        samples: Samples of a batch.
        wish: What the user asked for.
        count: The number of micro-batches that was tried.
        lineup: The schedule that was tried, and where its stages would lie.
    """
    look = at(looks, (samples or 1) / count)
    timeline, stages = look.timeline, lineup.stages
    memory = memory_of(look, seen, lineup, count, wish)

    def more_microbatches() -> Iterator[Alternative]:
        more = count
        while samples is not None and more < samples:
            more = min(2 * more, samples)
            smaller = memory_of(at(looks, samples / more), seen, lineup, more, wish)
            yield Alternative(f"num_microbatches={more}", smaller, stages)

    def fewer_in_flight() -> Iterator[Alternative]:
        if lineup.schedule not in ("1f1b", ""):
            simple = lineups(replace(wish, schedule="1f1b"), num_ranks, places_of(look))[0]
            yield Alternative("schedule='1f1b'", memory_of(look, seen, simple, count, wish), simple.stages)

    def checkpointing() -> Iterator[Alternative]:
        # a layer that is computed again keeps what goes into it
        kept = [min(mine, taken) for mine, taken in zip(memory.kept, timeline.boundary_bytes, strict=True)]
        change = "activation checkpointing of every layer (`torch.utils.checkpoint` in the model)"
        yield Alternative(change, replace(memory, kept=kept), stages)

    def more_devices() -> Iterator[Alternative]:
        least = min(wish.limits)
        for devices in range(num_ranks + 1, _MOST_DEVICES + 1):
            larger = replace(wish, limits=(least,) * devices)
            wanted = lineups(
                replace(larger, schedule=lineup.schedule), devices, places_of(look), train=bool(lineup.schedule)
            )[0]
            yield Alternative(f"devices={devices}", memory_of(look, seen, wanted, count, larger), wanted.stages)

    labels = [label(call.name, call.occurrence) for call in timeline.calls]
    groups = more_microbatches(), fewer_in_flight(), checkpointing(), more_devices()
    return ConfigurationError(explain(memory, stages, timeline.allowed, labels, groups))
