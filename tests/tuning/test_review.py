"""Predictions, what stages hold, and the advice after some steps."""

import math
from typing import Any

import pytest
from tuning.steps import KIB, look, probe_of

from lightning_lwpm.partition.costs import Link
from lightning_lwpm.partition.plan import PartitionPlan
from lightning_lwpm.pipeline.schedule import Action, build, place
from lightning_lwpm.pipeline.simulate import simulate
from lightning_lwpm.tuning.choose import Choice, choose
from lightning_lwpm.tuning.predict import SPLIT, in_flight, predict
from lightning_lwpm.tuning.review import Review, StageTimes, corrected, measured, review
from lightning_lwpm.tuning.sized import Look
from lightning_lwpm.tuning.wish import Wish

LINK = Link(0.125, 1e3)


def chosen(seen: Look, ranks: int = 2, **wish: Any) -> tuple[Choice, Wish]:
    wanted = Wish(**{"num_microbatches": 8, "virtual_stages": 1, **wish})
    return choose([seen], probe_of(seen), ranks, int(wanted.num_microbatches), wanted), wanted


def times(plan: PartitionPlan, *factors: float) -> list[StageTimes]:
    """What stages measure that are slower than expected by these factors."""
    return [
        StageTimes(stage.forward_seconds * factor, stage.backward_seconds * factor)
        for stage, factor in zip(plan.stages, factors, strict=True)
    ]


def reviewed(seen: Look, *factors: float, ranks: int = 2, **wish: Any) -> Review:
    choice, wanted = chosen(seen, ranks, **wish)
    return review(choice.look, probe_of(seen), choice.plan, ranks, wanted, times(choice.plan, *factors))


# -- predictions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
@pytest.mark.parametrize("stages", [1, 2, 3])
def test_a_prediction_is_a_simulation(schedule: str, stages: int) -> None:
    seen = look(1, [1.0, 2.0, 4.0], LINK, boundary=500)
    plan = chosen(seen, stages, schedule=schedule)[0].plan
    forward = [stage.forward_seconds for stage in plan.stages]

    def seconds(action: Action) -> float:
        return forward[action.stage] * (1 if action.kind == "F" else 2)

    run = simulate(build(schedule, stages, 8, stages), place(stages), seconds, 0.125 + 0.5)
    told = predict(plan, schedule, 8, measured=3)
    assert (told.step_seconds, told.bubble) == (pytest.approx(run.makespan), pytest.approx(run.bubble))
    assert (told.num_microbatches, told.schedule, told.measured) == (8, schedule, 3)
    assert told == plan.prediction


def test_a_prediction_counted_by_hand() -> None:
    """Two even stages, GPipe, two micro-batches: 3 forward and 3 backward slots, and the link twice."""
    plan = chosen(look(1, [1.0, 1.0], LINK, boundary=500), num_microbatches=2, schedule="gpipe")[0].plan
    assert plan.prediction is not None
    assert plan.prediction.step_seconds == pytest.approx(3 * 1 + 3 * 2 + 2 * 0.625)


@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_micro_batches_in_flight(stages: int, count: int) -> None:
    assert in_flight("gpipe", tuple(place(stages)), count) == (count,) * stages
    assert in_flight("1f1b", tuple(place(stages)), count) == tuple(
        min(count, stages - stage) for stage in range(stages)
    )


# -- review ------------------------------------------------------------------------------------------------------


def test_costs_follow_their_stages() -> None:
    seen = look(1, [1.0, 2.0, 3.0])
    plan = chosen(seen, partition=["l2"])[0].plan
    found = corrected(seen.costs, plan, [StageTimes(6.0, 3.0), StageTimes(3.0, 12.0)])
    assert [call.forward for call in found.calls] == [2, 4, 3]
    assert [call.backward for call in found.calls] == [1, 2, 12]
    assert found.measured == 3


def test_a_stage_without_a_backward_pass_stays() -> None:
    """Such as a frozen one: it has measured nothing, and nothing was expected."""
    seen = look(1, [1.0, 1.0])
    plan = chosen(seen, partition=["l1"])[0].plan
    assert corrected(seen.costs, plan, [StageTimes(0.0, 0.0), StageTimes(1.0, 2.0)]) == seen.costs


def test_as_expected_there_is_nothing_to_tell() -> None:
    found = reviewed(look(1, [1.0] * 8), 1.0, 1.0)
    assert not found.worth_telling and found.gain == pytest.approx(1)
    assert found.plan.cuts == found.better.cuts


def test_slower_everywhere_is_no_reason_to_move() -> None:
    found = reviewed(look(1, [1.0] * 8), 3.0, 3.0)
    assert not found.worth_telling
    assert found.plan.prediction is not None and found.plan.prediction.step_seconds == pytest.approx(
        3 * 8 * 12 + 3 * 12
    )


def test_a_slow_stage_gives_layers_away() -> None:
    """Layers of the second stage take three times as long: one of them belongs in the first."""
    found = reviewed(look(1, [1.0] * 8), 1.0, 3.0)
    assert found.plan.cuts == [4] and found.better.cuts == [5]
    assert found.worth_telling
    # per micro-batch: stages of 12 and 36 seconds now, of 21 (four layers of 3, one of 9) and 27 then
    assert found.gain == pytest.approx((8 * 36 + 12) / (8 * 27 + 21))
    text = found.text()
    assert "partition=['l5']" in text and "stage 1 36 s (expected 12 s)" in text
    assert f"{found.gain - 1:.0%} faster" in text and "repartition_every_n_epochs=1" in text


def test_what_is_told_is_told_once_moved() -> None:
    """With the corrected costs the better plan is the best one."""
    seen = look(1, [1.0] * 8)
    first = reviewed(seen, 1.0, 3.0)
    again = review(
        Look(1, seen.timeline, first.costs),
        probe_of(seen),
        first.better,
        2,
        Wish(num_microbatches=8),
        times(first.better, 1.0, 1.0),
    )
    assert not again.worth_telling and again.better.cuts == first.better.cuts


@pytest.mark.parametrize(("factor", "told"), [(1.04, False), (1.5, True)])
def test_below_a_twentieth_is_not_told(factor: float, told: bool) -> None:
    found = reviewed(look(1, [1.0] * 100), 1.0, factor)
    assert found.better.cuts != found.plan.cuts
    assert (found.gain > 1.05) == told == found.worth_telling


def test_the_users_own_partition_is_compared_with_the_best() -> None:
    found = reviewed(look(1, [1.0] * 4), 1.0, 1.0, partition=["l1"])
    assert found.plan.cuts == [1] and found.better.cuts == [2] and found.worth_telling


def test_the_number_of_micro_batches_and_the_schedule_are_kept() -> None:
    found = reviewed(look(1, [1.0] * 8), 1.0, 3.0, schedule="gpipe", num_microbatches=4)
    for plan in (found.plan, found.better):
        assert plan.prediction is not None
        assert (plan.prediction.num_microbatches, plan.prediction.schedule) == (4, "gpipe")


def test_a_better_partition_fits_its_devices() -> None:
    seen = look(1, [1.0] * 8, weights=KIB)
    found = reviewed(seen, 1.0, 3.0, limits=(math.inf, 11.5 * KIB))
    assert found.better.cuts == [5], "six layers, with a gradient at work, do not fit"


def test_a_partition_of_the_users_that_seemed_not_to_fit_is_left_alone() -> None:
    """It runs, whatever was expected; where nothing else fits there is nothing to advise."""
    seen = look(1, [1.0] * 8, weights=KIB)
    found = reviewed(seen, 1.0, 3.0, partition=["l4"], limits=(4 * KIB,) * 2)
    assert not found.worth_telling and found.better.cuts == found.plan.cuts == [4]


def test_a_model_with_fewer_layers_than_ranks() -> None:
    assert not reviewed(look(1, [1.0, 1.0]), 1.0, 5.0, ranks=4).worth_telling


@pytest.mark.parametrize(
    ("seconds", "backward"),
    [
        ((1.0, 2.0, None, None), 2.0),
        ((1.0, 2.0, 1.1, 1.02), 2.0),  # whole passes and passes in two parts
        ((1.0, None, 1.0 + SPLIT, 1.0 + SPLIT), 2.0),
    ],
)
def test_a_backward_pass_counts_once(seconds: tuple[float | None, ...], backward: float) -> None:
    assert measured(*seconds) == StageTimes(1.0, pytest.approx(backward))


@pytest.mark.parametrize("seconds", [(None, 2.0, None, None), (1.0, None, None, None)])
def test_a_stage_that_has_not_done_both_passes_has_no_times(seconds: tuple[float | None, ...]) -> None:
    assert measured(*seconds) is None
