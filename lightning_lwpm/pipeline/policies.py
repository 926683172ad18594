"""What tells one schedule from another: which kinds of action it has, which it prefers, and how much it may hold."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lightning_lwpm.pipeline.action import Action


@dataclass(frozen=True)
class Pipeline:
    """What a schedule is made for.

    Args:
        num_stages: Number of stages.
        num_microbatches: Number of micro-batches.
        placement: The rank of each stage.
    """

    num_stages: int
    num_microbatches: int
    placement: tuple[int, ...]

    @property
    def num_ranks(self) -> int:
        """Number of ranks that have a stage."""
        return len(set(self.placement))

    @property
    def num_rounds(self) -> int:
        """Number of rounds: a rank takes a whole round through one of its stages before it turns to the next.

        A round has as many micro-batches as there are ranks, or more where they cannot be shared out so.
        """
        return max(1, self.num_microbatches // self.num_ranks)

    @property
    def round_size(self) -> int:
        """Number of micro-batches of the largest round; rounds differ by one at most."""
        return -(-self.num_microbatches // self.num_rounds)

    @property
    def stages_by_rank(self) -> list[list[int]]:
        """The stages of each rank up to the highest that has one, ascending."""
        stages: list[list[int]] = [[] for _ in range(max(self.placement) + 1)]
        for stage, rank in enumerate(self.placement):
            stages[rank].append(stage)
        return stages


class Caps(NamedTuple):
    """The most micro-batches that may be held, counted once for each stage that holds them; infinite for no cap.

    Args:
        stage: For each stage, from its F to its B, or to its I where the backward pass is split.
        rank: For each rank, over all its stages, from F to B or I.
        kept: For each rank, over all its stages, from F to B, or to W where the backward pass is split: until then
            activations are kept.
    """

    stage: Sequence[float]
    rank: Sequence[float]
    kept: Sequence[float]

    def deeper(self, extra: int, pipeline: Pipeline) -> "Caps":
        """Return the caps that let every stage hold ``extra`` micro-batches more."""
        more = [extra * len(stages) for stages in pipeline.stages_by_rank]
        return Caps(
            [cap + extra for cap in self.stage],
            [cap + add for cap, add in zip(self.rank, more, strict=True)],
            [cap + add for cap, add in zip(self.kept, more, strict=True)],
        )


def unlimited(pipeline: Pipeline) -> Caps:
    """Return caps that cap nothing."""
    ranks = [math.inf] * len(pipeline.stages_by_rank)
    return Caps([math.inf] * pipeline.num_stages, ranks, ranks)


@dataclass(frozen=True)
class Policy:
    """All that tells one schedule from another.

    Args:
        name: What the user writes.
        prefer: The kinds of action that the schedule has; a free rank takes the first of them that is ready.
        caps: How many micro-batches stages and ranks may hold.
        rounds: Whether a rank with several stages takes micro-batches in rounds (``Pipeline.num_rounds``), a whole
            round through each stage; otherwise one micro-batch.
        in_order: Whether a rank keeps to that order among actions of one kind, also where a later one is ready. Caps
            of a rank need it (see the note in ``scheduler``).
        weights_at_once: Whether W comes first as long as the rank has forward passes to do. What has a fixed turn
            is in time whatever the costs; a W that fills a gap of unit costs makes others wait if costs are uneven.
        split_last: Of how many of the last micro-batches the backward pass is split, if the schedule splits any.
        style: How stages are placed where nobody says it: ``"line"`` one stage a rank, ``"loop"``, or ``"v"``.
    """

    name: str
    prefer: tuple[str, ...]
    caps: Callable[[Pipeline], Caps] = unlimited
    rounds: bool = False
    in_order: bool = False
    weights_at_once: bool = False
    split_last: float = math.inf
    style: str = "line"

    def priority(self, action: Action, pipeline: Pipeline, forwards: bool = True) -> tuple[int, int, int, int]:
        """Return a number that is least for the best action: by kind, round, stage, micro-batch.

        Args:
            action: What might be done.
            pipeline: What the schedule is made for.
            forwards: Whether the rank has forward passes to do.
        """
        kind, stage, microbatch = action
        turn = microbatch * pipeline.num_rounds // pipeline.num_microbatches if self.rounds else microbatch
        if kind == "B" and "I" in self.prefer:
            kind = "I"
        first = -1 if kind == "W" and self.weights_at_once and forwards else self.prefer.index(kind)
        return first, turn, stage if kind == "F" else -stage, microbatch


def to_the_end(pipeline: Pipeline) -> Caps:
    """Let stage s hold as many micro-batches as there are stages from it to the end."""
    return unlimited(pipeline)._replace(stage=[pipeline.num_stages - stage for stage in range(pipeline.num_stages)])


def looped(pipeline: Pipeline, back: int = 2) -> Caps:
    """Let a rank hold what it has to until the first gradient comes back, and one micro-batch more.

    With v stages a rank and n stages after the rank's last one that is a round for each stage but the last, one
    micro-batch, and n. If v > 1 it is ``back`` times n: 2 where a B on the way back takes two units (Narayanan et
    al., arXiv 2104.04473; one more than Megatron's number of warm-up passes), 1 where an I takes one. If v = 1 it is
    the cap of ``1f1b``. If, on an irregular placement, the way to the end comes twice to one rank, the last stage
    before gets a round at least: that rank passes nothing back from its former stage before its latter one has done a
    round.
    """
    ranks: list[float] = []
    for stages in pipeline.stages_by_rank:
        onward = pipeline.placement[stages[-1] + 1 :] if stages else ()
        depth = 1 + len(onward) * (back if len(stages) > 1 else 1)
        if len(set(onward)) < len(onward):
            depth = max(depth, pipeline.round_size)
        ranks.append(max(0, len(stages) - 1) * pipeline.round_size + depth)
    return unlimited(pipeline)._replace(rank=ranks, kept=ranks)


def looped_evenly(pipeline: Pipeline) -> Caps:
    """As ``looped`` for split passes, but every rank may keep activations of as many as the rank that keeps most."""
    caps = looped(pipeline, back=1)
    return caps._replace(kept=[max(caps.kept)] * len(caps.kept))


def folded(pipeline: Pipeline) -> Caps:
    """Let the stages of the V's way down hold one less than there are stages to the end, those of its way up all.

    On a V of p ranks, each with 2 stages, every rank then holds up to 2p parts, as much as ``1f1b`` on rank p-1.
    """
    count = pipeline.num_stages
    stage = [max(1, count - s - (s < count // 2)) for s in range(count)]
    most = max(sum(stage[s] for s in stages) for stages in pipeline.stages_by_rank)
    caps = unlimited(pipeline)
    return caps._replace(stage=stage, kept=[most] * len(caps.kept))


# Both figures: three stages, four micro-batches, a backward pass (two columns) twice as long as a forward pass.
#
# gpipe (Huang et al., arXiv 1811.06965): forward passes first. Every stage holds all micro-batches.
#
#   stage 0  0F0 0F1 0F2 0F3                         0B0---- 0B1---- 0B2---- 0B3----
#   stage 1      1F0 1F1 1F2 1F3             1B0---- 1B1---- 1B2---- 1B3----
#   stage 2          2F0 2F1 2F2 2F3 2B0---- 2B1---- 2B2---- 2B3----
GPIPE = Policy("gpipe", prefer=("F", "B"))

# 1f1b (PipeDream-Flush: Narayanan et al., arXiv 2006.09503): a backward pass as soon as there is one. As long as
# gpipe, but stage s holds no more than (number of stages - s) micro-batches, however many there are.
#
#   stage 0  0F0 0F1 0F2                 0B0---- 0F3 0B1----     0B2----     0B3----
#   stage 1      1F0 1F1         1B0---- 1F2 1B1---- 1F3 1B2----     1B3----
#   stage 2          2F0 2B0---- 2F1 2B1---- 2F2 2B2---- 2F3 2B3----
ONE_F_ONE_B = Policy("1f1b", prefer=("B", "F"), caps=to_the_end)

# interleaved_1f1b (Narayanan et al., arXiv 2104.04473): v stages a rank, the bubble is a v-th of that of 1f1b.
# Two ranks, four stages, two micro-batches:
#
#   rank 1  0F0 0F1 2F0 2F1         2B0----     2B1---- 0B0---- 0B1----
#   rank 0      1F0 1F1 3F0 3B0---- 3F1 3B1---- 1B0---- 1B1----
INTERLEAVED = Policy("interleaved_1f1b", ("F", "B"), looped, rounds=True, in_order=True, style="loop")

# zb1p (ZB-H1: Qi et al., arXiv 2401.10241): gradients of weights fill what 1f1b leaves idle. No rank keeps more
# activations than the first stage of 1f1b. Stage 0 passes nothing back, and splits only what it defers. Three ranks,
# one stage each, four micro-batches:
#
#   rank 2  0F0 0F1 0F2         0B0---- 0F3 0B1---- 0B2---- 0B3----
#   rank 1      1F0 1F1     1I0 1F2 1I1 1W0 1F3 1I2 1W1 1I3 1W2 1W3
#   rank 0          2F0 2I0 2F1 2I1 2F2 2I2 2W0 2F3 2I3 2W1 2W2 2W3
ZB1P = Policy("zb1p", ("F", "I", "W"), looped_evenly, rounds=True, in_order=True, style="loop")

# zbv (ZB-V, same paper): two stages a rank, one on the way down and one on the way up; first and last stage on rank
# 0. If F, I and W take the same time and there are 2p-1 micro-batches or more, ranks wait only for the first
# micro-batch to come. Two ranks, three micro-batches:
#
#   rank 1      1F0 2F0 1F1 2F1 2I0 2W0 1I0 1W0 1F2 2F2 2I1 1I1 2I2 1I2 2W1 1W1 2W2 1W2
#   rank 0  0F0 0F1 0F2 3F0 3I0 3W0 3F1 3I1 3W1 0B0---- 3F2 3I2 0B1---- 0I2 3W2 0W2
ZBV = Policy("zbv", ("F", "I", "W"), folded, weights_at_once=True, style="v")

# Evaluation: no backward pass, nothing is held.
#
#   stage 0  0F0 0F1 0F2 0F3
#   stage 1      1F0 1F1 1F2 1F3
#   stage 2          2F0 2F1 2F2 2F3
FORWARD_ONLY = Policy("forward only", prefer=("F",))

POLICIES: dict[str, Policy] = {policy.name: policy for policy in (GPIPE, ONE_F_ONE_B, INTERLEAVED, ZB1P, ZBV)}
"""All schedules by name, but ``auto``, which is the best of them and of their variants."""
