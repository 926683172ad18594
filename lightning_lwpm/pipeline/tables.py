"""What is read off a table without running it: whether it contradicts itself, and what it holds."""

from collections.abc import Sequence

from lightning_lwpm.errors import ConfigurationError, LWPMError
from lightning_lwpm.pipeline.action import Table


class Deadlock(LWPMError):
    """The table cannot run to its end; the message says who waits for whom."""


def check_table(table: Table, placement: Sequence[int]) -> None:
    """Raise if an action comes twice, or not on the rank of its stage.

    Raises:
        ConfigurationError: Naming the action and the rank.
    """
    seen = set()
    for rank, actions in enumerate(table):
        for action in actions:
            if not 0 <= action.stage < len(placement) or placement[action.stage] != rank:
                raise ConfigurationError(
                    f"rank {rank} runs {action}, but the ranks of the stages are {list(placement)}"
                )
            if action in seen:
                raise ConfigurationError(f"rank {rank} runs {action} twice")
            seen.add(action)


def held_by_stages(table: Table, num_stages: int, until: str) -> list[int]:
    """Count the most micro-batches that each stage holds at once.

    Args:
        table: The actions of each rank.
        num_stages: Number of stages.
        until: The kinds of action that end the holding: ``"BI"`` or ``"BW"``. A stage that has none of them
            (evaluation) holds one micro-batch while its forward pass runs.
    """
    peaks = [0] * num_stages
    for actions in table:
        ending = {stage for kind, stage, _ in actions if kind in until}
        held = [0] * num_stages
        for kind, stage, _ in actions:
            if kind == "F":
                peaks[stage] = max(peaks[stage], held[stage] + 1)
            held[stage] += (kind == "F" and stage in ending) - (kind in until)
    return peaks


def kept_by_ranks(table: Table, per_microbatch: Sequence[float]) -> list[float]:
    """Sum up what each rank keeps at most, over all its stages, from F to B or to W.

    Between I and W a stage keeps less than before I, as a rule: the inputs of its weights' layers and the gradients
    of their outputs. All of it is counted until W.

    Args:
        table: The actions of each rank.
        per_microbatch: For each stage, what it keeps of one micro-batch.
    """
    peaks = []
    for actions in table:
        kept = {stage: 0 for _, stage, _ in actions}
        peak = 0.0
        for kind, stage, _ in actions:
            kept[stage] += (kind == "F") - (kind in "BW")
            if kind == "F":
                peak = max(peak, sum(count * per_microbatch[stage] for stage, count in kept.items()))
        peaks.append(peak)
    return peaks
