"""What to say when a model does not fit its devices: each change that is named has been tried."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from lightning_lwpm.errors import ConfigurationError
from lightning_lwpm.partition.cuts import label
from lightning_lwpm.partition.describe import Probe
from lightning_lwpm.partition.explain import Alternative, explain
from lightning_lwpm.staging.recompute import MODES
from lightning_lwpm.tuning.lineup import Lineup, lineups
from lightning_lwpm.tuning.needs import memory_of, places_of
from lightning_lwpm.tuning.recomputed import look_at
from lightning_lwpm.tuning.sized import Look
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
    look = look_at(looks, (samples or 1) / count, wish)
    timeline, stages = look.timeline, lineup.stages
    memory = memory_of(look, seen, lineup, count, wish)

    def more_microbatches() -> Iterator[Alternative]:
        more = count
        while samples is not None and more < samples:
            more = min(2 * more, samples)
            smaller = memory_of(look_at(looks, samples / more, wish), seen, lineup, more, wish)
            yield Alternative(f"num_microbatches={more}", smaller, stages)

    def fewer_in_flight() -> Iterator[Alternative]:
        if lineup.schedule not in ("1f1b", ""):
            simple = lineups(replace(wish, schedule="1f1b"), num_ranks, places_of(look))[0]
            yield Alternative("schedule='1f1b'", memory_of(look, seen, simple, count, wish), simple.stages)

    def checkpointing() -> Iterator[Alternative]:
        modes = MODES[MODES.index(wish.activation_checkpointing) + 1 :] if lineup.schedule else ()
        for mode in modes:
            less = replace(wish, activation_checkpointing=mode)
            need = memory_of(look_at(looks, (samples or 1) / count, less), seen, lineup, count, less)
            yield Alternative(f"activation_checkpointing={mode!r}", need, stages)

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
