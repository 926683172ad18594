"""Line-ups: which schedules come into question, and where their stages lie."""

import pytest
from tuning.steps import look, probe_of

from lightning_lwpm.pipeline.schedule import POLICIES
from lightning_lwpm.tuning.choose import choose
from lightning_lwpm.tuning.lineup import Lineup, lineups
from lightning_lwpm.tuning.predict import table_of
from lightning_lwpm.tuning.wish import Wish


@pytest.mark.parametrize(
    ("wish", "expected"),
    [
        (Wish(schedule="1f1b"), Lineup("1f1b", (1, 0))),
        (Wish(schedule="interleaved_1f1b"), Lineup("interleaved_1f1b", (1, 0, 1, 0))),
        (Wish(schedule="interleaved_1f1b", virtual_stages=3), Lineup("interleaved_1f1b", (1, 0, 1, 0, 1, 0))),
        (Wish(schedule="zb1p"), Lineup("zb1p", (1, 0))),
        (Wish(schedule="zbv"), Lineup("zbv", (0, 1, 1, 0))),
        (Wish(["a", "b", "c"], schedule="gpipe"), Lineup("gpipe", (1, 0, 1, 0))),
        (Wish(["a"], schedule="1f1b"), Lineup("1f1b", (1, 0))),
    ],
)
def test_a_named_schedule_has_one_line_up(wish: Wish, expected: Lineup) -> None:
    assert lineups(wish, 2, 100) == [expected]


def test_everything_comes_into_question_simple_things_first() -> None:
    found = lineups(Wish(), 4, 100)
    assert found[0] == Lineup("1f1b", (3, 2, 1, 0))
    assert {lineup.schedule for lineup in found} == set(POLICIES)


def test_few_layers_and_one_stage_a_rank_leave_fewer_schedules() -> None:
    for wish, places in ((Wish(), 3), (Wish(virtual_stages=1), 100)):
        assert {lineup.schedule for lineup in lineups(wish, 2, places)} == {"1f1b", "gpipe", "zb1p"}
    assert lineups(Wish(schedule="1f1b"), 4, 3)[0].ranks == (2, 1, 0)
    assert lineups(Wish(), 4, 100, train=False) == [Lineup("", (3, 2, 1, 0))]


def test_what_can_be_put_off_fills_the_bubble() -> None:
    """Four even stages whose weight gradients are half of the backward pass: with them ranks wait for little."""
    seen = look(1, [1.0] * 8, weight=1.0)
    told = {}
    for schedule in ("1f1b", "zb1p", "zbv", "auto"):
        plan = choose([seen], probe_of(seen), 4, 8, Wish(num_microbatches=8, schedule=schedule)).plan
        assert plan.prediction is not None
        told[schedule] = plan.prediction.step_seconds
        assert table_of(plan, plan.prediction.schedule)(8) == table_of(plan, plan.prediction.schedule)(8)
    assert told["1f1b"] == pytest.approx((8 + 3) * 6)
    assert told["zbv"] < told["zb1p"] < told["1f1b"]
    assert told["auto"] <= told["zbv"]
