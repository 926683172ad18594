"""What a step keeps, and how long it takes, where activations are computed again."""

from dataclasses import replace

import pytest
from tuning.steps import KIB, look, probe_of

from lightning_lwpm.tuning.choose import choose
from lightning_lwpm.tuning.recomputed import look_at
from lightning_lwpm.tuning.sized import Look
from lightning_lwpm.tuning.wish import Wish


def blocks() -> Look:
    """Four blocks of two layers that keep 8 KiB each, between 1 KiB wide cuts; then a head."""
    seen = look(1, [1.0] * 9, kept=8 * KIB, boundary=KIB)
    names = [f"h.{i // 2}.{'ab'[i % 2]}" for i in range(8)] + ["head"]
    calls = tuple(replace(call, name=name) for call, name in zip(seen.timeline.calls, names, strict=True))
    return replace(seen, timeline=replace(seen.timeline, calls=calls))


def test_by_layers_the_inputs_of_blocks_are_kept() -> None:
    calls = look_at([blocks()], 1, Wish(activation_checkpointing="layer")).timeline.calls
    assert [call.kept_bytes // KIB for call in calls] == [0, 0, 1, 0, 1, 0, 1, 0, 8]
    assert [call.again_bytes // KIB for call in calls] == [16] * 8 + [0]


def test_by_stages_nothing_is_kept() -> None:
    calls = look_at([blocks()], 1, Wish(activation_checkpointing="stage")).timeline.calls
    assert all(call.kept_bytes == 0 and call.again_bytes == 8 * KIB for call in calls)


@pytest.mark.parametrize(("mode", "seconds"), [("none", 27.0), ("layer", 35.0), ("stage", 36.0)])
def test_a_forward_pass_more(mode: str, seconds: float) -> None:
    found = look_at([blocks()], 1, Wish(activation_checkpointing=mode))
    assert sum(found.costs.work) == pytest.approx(seconds)


def test_less_memory_is_needed() -> None:
    seen = blocks()
    needs = {}
    for mode in ("none", "layer", "stage"):
        wish = Wish(num_microbatches=8, schedule="gpipe", activation_checkpointing=mode)
        plan = choose([seen], probe_of(seen), 2, 8, wish).plan
        needs[mode] = sum(plan.stages[0].memory.values())
    assert needs == {"none": 264 * KIB, "layer": 32 * KIB, "stage": 40 * KIB}
