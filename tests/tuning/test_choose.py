"""The choice: of micro-batches, schedule and partition, within what the user fixed and what devices hold."""

import math
import re
from dataclasses import replace
from typing import Any

import pytest
from tuning.steps import KIB, look, probe_of

from lightning_lwpm.errors import ConfigurationError
from lightning_lwpm.partition.costs import Link
from lightning_lwpm.partition.plan import PartitionPlan
from lightning_lwpm.tuning.choose import Choice, candidates, choose
from lightning_lwpm.tuning.sized import Look
from lightning_lwpm.tuning.wish import Wish

SLOW_LINK = Link(latency=1.0, bytes_per_second=1e15)


def pick(looks: list[Look], ranks: int, samples: int | None, train: bool = True, **wish: Any) -> Choice:
    return choose(looks, probe_of(looks[0]), ranks, samples, Wish(**{"virtual_stages": 1, **wish}), train)


def even(samples: float, layers: int = 4, link: Link | None = None, **bytes_of: int) -> Look:
    """Layers that take a second for each sample."""
    return look(samples, [samples] * layers, link, **bytes_of)


def names(plan: PartitionPlan) -> list[str]:
    return [stage.begins for stage in plan.stages[1:]]


def needs(choice: Choice) -> float:
    return max(sum(stage.memory.values()) for stage in choice.plan.stages)


# -- numbers of micro-batches ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "stages", "samples", "expected"),
    [
        ("auto", 2, 100, [2, 4, 8, 16, 32]),
        ("auto", 3, 10, [3, 6, 10]),
        ("auto", 4, 3, [3]),
        ("auto", 1, 100, [1]),
        ("auto", 4, None, [1]),
        (8, 2, 100, [8]),
        (8, 2, 5, [5]),
        (8, 2, None, [8]),
    ],
)
def test_candidates(wanted: Any, stages: int, samples: int | None, expected: list[int]) -> None:
    assert candidates(wanted, stages, samples) == expected


@pytest.mark.parametrize(("samples", "expected"), [(100, [2, 4, 8, 16, 32]), (9, [2, 4]), (3, [1]), (1, [1])])
def test_micro_batches_of_two_samples_at_least(samples: int, expected: list[int]) -> None:
    assert candidates("auto", 2, samples, 2) == expected


def test_more_micro_batches_where_they_pay() -> None:
    """Without any overhead the bubble alone counts; the least number that comes near the best is taken."""
    choice = pick([even(4)], 2, 64)
    assert list(choice.considered) == [2, 4, 8, 16, 32]
    seconds = list(choice.considered.values())
    assert seconds == sorted(seconds, reverse=True)
    best = min(seconds)
    told = choice.plan.prediction
    assert told is not None and told.num_microbatches == min(
        n for n, s in choice.considered.items() if s <= best * 1.03
    )
    assert told.step_seconds == choice.considered[told.num_microbatches]
    assert choice.look.samples == 64 / told.num_microbatches


def test_fewer_micro_batches_where_each_costs() -> None:
    """A call that takes as long however few samples it has."""
    fixed = [look(n, [1.0] * 4) for n in (1, 32)]
    told = pick(fixed, 2, 64).plan.prediction
    assert told is not None and told.num_microbatches == 2


def test_equal_costs_give_the_fewest() -> None:
    """Neither work nor links: all numbers are as good."""
    told = pick([look(1, [0.0] * 4)], 2, 64).plan.prediction
    assert told is not None and (told.num_microbatches, told.schedule) == (2, "1f1b")


def test_a_slow_link_wants_another_schedule() -> None:
    """1F1B waits for a gradient in turn with each activation; with much latency GPipe is faster."""
    fast, slow = (pick([even(1, 4, link)], 4, 16, num_microbatches=16).plan.prediction for link in (None, SLOW_LINK))
    assert fast is not None and fast.schedule == "1f1b", "where equal, the one that holds least"
    assert slow is not None and slow.schedule == "gpipe"


# -- what the user fixed -----------------------------------------------------------------------------------------


def test_what_is_fixed_stays() -> None:
    uneven = look(1, [1.0, 1.0, 1.0, 9.0])
    choice = pick([uneven], 2, 16, partition=["l1"], num_microbatches=5, schedule="gpipe")
    told = choice.plan.prediction
    assert told is not None and (told.num_microbatches, told.schedule) == (5, "gpipe")
    assert names(choice.plan) == ["l1"] and list(choice.considered) == [5]
    left = pick([uneven], 2, 16)
    assert names(left.plan) == ["l3"]
    assert left.plan.prediction is not None and left.plan.prediction.step_seconds < told.step_seconds


def test_a_partition_that_cannot_be_made_is_refused_with_its_reason() -> None:
    with pytest.raises(ConfigurationError, match="the step calls no layer 'l9'"):
        pick([even(1)], 2, 16, partition=["l9"])


def test_evaluation_has_one_micro_batch_and_no_prediction() -> None:
    choice = pick([even(4, kept=KIB)], 2, 64, train=False, num_microbatches=8, limits=(math.inf,) * 2)
    assert choice.plan.prediction is None and choice.look.samples == 4
    assert len(choice.plan.stages) == 2
    assert all(stage.memory["activations"] == 0 for stage in choice.plan.stages)


def test_a_model_with_fewer_layers_than_ranks() -> None:
    choice = pick([even(4, 2)], 4, 16)
    assert len(choice.plan.stages) == 2 and choice.plan.num_ranks == 4
    assert list(choice.considered) == [2, 4, 8, 16]


# -- memory ------------------------------------------------------------------------------------------------------


def test_limits_move_the_cut() -> None:
    """The best balance does not fit rank 0's device, which is smaller; rank 0 holds the last stage."""
    seen = even(1, 4, weights=KIB)
    free = pick([seen], 2, 8)
    assert names(free.plan) == ["l2"]
    tight = pick([seen], 2, 8, limits=(math.inf, 4.5 * KIB))
    assert names(tight.plan) == ["l1"] and tight.plan.stages[1].rank == 0
    assert sum(tight.plan.stages[0].memory.values()) <= 4.5 * KIB


def test_little_memory_takes_a_schedule_that_holds_less() -> None:
    """With a slow link GPipe is faster, but holds all micro-batches; one made to measure holds what fits."""
    seen = even(1, 4, SLOW_LINK, kept=KIB)
    wish = {"num_microbatches": 16}
    free = pick([seen], 4, 16, **wish)
    tight = pick([seen], 4, 16, limits=(8 * KIB,) * 4, **wish)
    assert free.plan.prediction is not None and free.plan.prediction.schedule == "gpipe"
    assert tight.plan.prediction is not None and tight.plan.prediction.schedule == "auto"
    least = pick([seen], 4, 16, limits=(8 * KIB,) * 4, schedule="1f1b", **wish)
    assert tight.plan.prediction.step_seconds < least.plan.prediction.step_seconds  # type: ignore[union-attr]
    assert needs(tight) <= 8 * KIB < needs(free)


def test_little_memory_takes_smaller_micro_batches() -> None:
    """Where calls cost the same for any size, few micro-batches are best, but hold more at once."""
    looks = [look(n, [1.0] * 4, kept=n * KIB) for n in (1, 32)]
    wish = {"limits": (17 * KIB,) * 2}
    free, tight = pick(looks, 2, 64), pick(looks, 2, 64, **wish)
    assert free.plan.prediction is not None and tight.plan.prediction is not None
    assert tight.plan.prediction.num_microbatches > free.plan.prediction.num_microbatches
    assert needs(tight) <= 17 * KIB < needs(free)
    assert 2 not in tight.considered


def test_optimizer_state_counts() -> None:
    seen = even(1, 2, weights=KIB)
    plain, adam = (pick([seen], 2, 8, state_factor=factor) for factor in (0.0, 2.0))
    assert plain.plan.stages[0].memory["weights"] == 2 * KIB
    assert adam.plan.stages[0].memory["weights"] == 4 * KIB


def refused(looks: list[Look], ranks: int, samples: int | None, train: bool = True, **wish: Any) -> str:
    with pytest.raises(ConfigurationError) as caught:
        pick(looks, ranks, samples, train, **wish)
    return str(caught.value)


def named(text: str, kind: str) -> tuple[str, ...]:
    """The value of a change that the text says would fit."""
    line = next(line for line in text.splitlines() if line.startswith("it would fit with"))
    return tuple(re.findall(rf"{kind}='?(\w+)", line))


def test_refusal_names_more_micro_batches_that_fit() -> None:
    seen = [even(4, 4, kept=KIB)]
    wish = {"limits": (5 * KIB,) * 2, "schedule": "1f1b"}
    text = refused(seen, 2, 64, num_microbatches=4, **wish)
    (count,) = named(text, "num_microbatches")
    assert needs(pick(seen, 2, 64, num_microbatches=int(count), **wish)) <= 5 * KIB
    refused(seen, 2, 64, num_microbatches=int(count) // 2, **wish)
    assert "stage 0 (l0) needs 8.0 KiB: activations of 2 micro-batches 8.0 KiB; its device has 5.0 KiB, too" in text
    assert (
        "stage 1 (l1 … l3) needs 12.0 KiB: activations of 1 micro-batch 12.0 KiB; its device has 5.0 KiB, too" in text
    )


def test_refusal_names_the_schedule_that_fits() -> None:
    seen = [even(1, 4, kept=KIB)]
    wish = {"limits": (8 * KIB,) * 4, "num_microbatches": 16}
    text = refused(seen, 4, 16, schedule="gpipe", **wish)
    assert named(text, "schedule") == ("1f1b",)
    assert needs(pick(seen, 4, 16, schedule="1f1b", **wish)) <= 8 * KIB


@pytest.mark.parametrize("fixed", [{}, {"num_microbatches": 4}, {"schedule": "gpipe"}])
def test_refusal_names_a_number_of_devices_that_fits(fixed: dict[str, Any]) -> None:
    seen = [even(1, 12, weights=KIB, kept=64)]
    text = refused(seen, 2, 16, limits=(9 * KIB,) * 2, **fixed)
    (devices,) = named(text, "devices")
    choice = pick(seen, int(devices), 16, limits=(9 * KIB,) * int(devices), **fixed)
    assert needs(choice) <= 9 * KIB
    if int(devices) > 3:
        refused(seen, int(devices) - 1, 16, limits=(9 * KIB,) * (int(devices) - 1), **fixed)


def test_refusal_that_knows_no_way() -> None:
    """One layer that no device holds, in one sample."""
    text = refused([even(1, 2, weights=KIB)], 2, 8, limits=(KIB,) * 2)
    assert "it would fit with" not in text
    assert "it would not fit with" in text and "use devices with more memory, or a smaller model or batch" in text


def test_refusal_in_evaluation_is_not_about_training() -> None:
    text = refused([even(4, 4, weights=KIB, boundary=64)], 2, 64, train=False, limits=(3 * KIB,) * 2)
    assert "micro-batches" not in text.replace("of 1 micro-batch", "") and "schedule" not in text
    (devices,) = named(text, "devices")
    pick([even(4, 4, weights=KIB, boundary=64)], int(devices), 64, train=False, limits=(3 * KIB,) * int(devices))


def test_one_device_too_small() -> None:
    """Of different devices the largest may do; what is named counts on the smallest."""
    seen = [even(1, 4, weights=KIB)]
    assert pick(seen, 2, 8, limits=(64 * KIB, 3.5 * KIB)).plan.cuts == [1]
    assert "3.5 KiB" in refused(seen, 2, 8, limits=(3.5 * KIB, 3.5 * KIB))


def test_considered_are_what_planning_each_number_alone_gives() -> None:
    looks = [even(2, 5, Link(0.01, 1e4), boundary=64), replace(even(8, 5, boundary=256))]
    choice = pick(looks, 3, 24)
    for count, seconds in choice.considered.items():
        alone = pick(looks, 3, 24, num_microbatches=count).plan.prediction
        assert alone is not None and alone.step_seconds == seconds
