"""The one scheduler: whenever a rank is free, it takes the best of its actions that are ready."""

import heapq
from collections.abc import Sequence

from lightning_lwpm.errors import ConfigurationError
from lightning_lwpm.pipeline.action import Action, Costs, Latency, Table, delay, dependencies, unit
from lightning_lwpm.pipeline.policies import Pipeline, Policy


def list_schedule(
    policy: Policy,
    num_stages: int,
    num_microbatches: int,
    placement: Sequence[int],
    costs: Costs = unit,
    latency: Latency = 0.0,
) -> Table:
    """Make a table by greedy list scheduling: whenever a rank is free, it takes its best ready action.

    Ready means that what the action waits for has arrived, that the policy's caps admit it, and that the stage has
    done all earlier micro-batches of the same kind (so gradients are summed in the same order whatever the
    schedule). Best is what ``Policy.priority`` says.

    [Note: caps and standstill] Caps of stages are always safe: a stage that is full waits only for later stages,
    and the last one waits for nobody. A cap of a rank is not: the rank may fill up with micro-batches of an early
    stage and have no room for those that must pass its later one. It is safe where each rank keeps to one order of
    forward and one of backward passes, both the same for all ranks (by round, then along the pipeline), and the
    cap leaves room for a round of all its stages but the last and one micro-batch there. What is kept until
    W may be capped wherever that cap is no less than what the other caps admit, for a W waits only for its own rank.

    Args:
        policy: The schedule.
        num_stages: Number of stages.
        num_microbatches: Number of micro-batches.
        placement: The rank of each stage.
        costs: Seconds (or any unit of time) of each action.
        latency: Time that a result takes to another rank, in the same unit.

    Returns:
        The table, one list for each rank up to the highest in ``placement``.

    Raises:
        ConfigurationError: If the policy's caps lead to a standstill.
    """
    pipeline = Pipeline(num_stages, num_microbatches, tuple(placement))
    caps = policy.caps(pipeline)
    table: Table = [[] for _ in pipeline.stages_by_rank]
    whole = int(max(0, num_microbatches - policy.split_last)) if "I" in policy.prefer else 0
    done = {(kind, stage): whole if kind == "W" else 0 for kind in policy.prefer for stage in range(num_stages)}
    offers = [[(kind, s) for kind in policy.prefer for s in stages] for stages in pipeline.stages_by_rank]
    in_flight, kept = [0] * len(table), [0] * len(table)
    passed_back = "I" if "I" in policy.prefer else "B"
    ends: dict[Action, float] = {}
    free = [0.0] * len(table)

    def admitted(stage: int, microbatch: int, rank: int) -> bool:
        return (
            microbatch - done.get((passed_back, stage), microbatch) < caps.stage[stage]
            and in_flight[rank] < caps.rank[rank]
            and kept[rank] < caps.kept[rank]
        )

    def arrived(source: Action, rank: int, now: float) -> bool:
        if source not in ends:
            return False
        return now >= (ends[source] if placement[source.stage] == rank else ends[source] + delay(latency, source))

    def ready(action: Action, rank: int, now: float) -> bool:
        if action.kind == "F" and not admitted(action.stage, action.microbatch, rank):
            return False
        return all(arrived(source, rank, now) for source in dependencies(action, num_stages, ends))

    def upcoming_of(kind: str, stage: int) -> Action:
        microbatch = done[kind, stage]
        return Action("B" if kind == "I" and microbatch < whole else kind, stage, microbatch)

    def best(rank: int, now: float) -> Action | None:
        upcoming = (upcoming_of(kind, stage) for kind, stage in offers[rank])
        choices = [action for action in upcoming if action.microbatch < num_microbatches]
        forwards = any(action.kind == "F" for action in choices)
        choices.sort(key=lambda action: policy.priority(action, pipeline, forwards))
        if policy.in_order:
            choices = list({action.kind: action for action in reversed(choices)}.values())[::-1]
        return next((action for action in choices if ready(action, rank, now)), None)

    # Nothing changes for a rank but at the moments when it becomes free or a result arrives from elsewhere.
    moments = [(0.0, rank) for rank in range(len(table))]
    while moments:
        now, rank = heapq.heappop(moments)
        if free[rank] > now:
            continue
        action = best(rank, now)
        if action is None:
            continue
        table[rank].append(action)
        done[passed_back if action.kind in "BI" else action.kind, action.stage] += 1
        in_flight[rank] += (action.kind == "F") - (action.kind in "BI")
        kept[rank] += (action.kind == "F") - (action.kind in "BW")
        ends[action] = free[rank] = now + costs(action)
        heapq.heappush(moments, (ends[action], rank))
        onward = action.stage + (1 if action.kind == "F" else -1)
        if action.kind != "W" and 0 <= onward < num_stages and placement[onward] != rank:
            heapq.heappush(moments, (ends[action] + delay(latency, action), placement[onward]))

    if any(count < num_microbatches for count in done.values()):
        raise ConfigurationError(f"the schedule {policy.name!r} stalls under its caps: {caps}")
    return table


def without_needless(table: Table) -> Table:
    """Do those backward passes of stage 0 whole of which the W follows on the I: nobody waits for such an I."""
    rows: Table = []
    for actions in table:
        row: list[Action] = []
        for action in actions:
            if action.kind == "W" and action.stage == 0 and row and row[-1] == action._replace(kind="I"):
                row[-1] = action._replace(kind="B")
            else:
                row.append(action)
        rows.append(row)
    return rows
