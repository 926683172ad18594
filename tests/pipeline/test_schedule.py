"""The scheduler makes the classical tables, and every table is complete, ordered and within its cap."""

from itertools import chain

import pytest

from lightning_lwpm.errors import ConfigurationError
from lightning_lwpm.pipeline.policies import Pipeline, unlimited
from lightning_lwpm.pipeline.schedule import (
    ONE_F_ONE_B,
    SCHEDULES,
    Action,
    Policy,
    build,
    forward_only,
    list_schedule,
    place,
    unit,
)
from lightning_lwpm.pipeline.simulate import simulate

SIZES = [(p, m) for p in range(1, 9) for m in range(1, 9)]


def staircase(table, num_stages):
    """Draw a table at unit costs: a line a stage, four characters a time unit, one action (F) or two of them (B)."""
    starts = simulate(table, place(num_stages)).starts
    lines = []
    for stage in range(num_stages):
        line = ""
        for action in table[place(num_stages)[stage]]:
            line = line.ljust(int(starts[action]) * 4) + f"{action}" + ("---- " if action.kind == "B" else " ")
        lines.append(line.rstrip())
    return lines


def drawing(text):
    """The lines of a literal, without the common margin."""
    lines = text.strip("\n").splitlines()
    margin = min(len(line) - len(line.lstrip()) for line in lines if line.strip())
    return [line[margin:].rstrip() for line in lines if line.strip()]


def test_gpipe():
    expected = """
        0F0 0F1 0F2 0F3                         0B0---- 0B1---- 0B2---- 0B3----
            1F0 1F1 1F2 1F3             1B0---- 1B1---- 1B2---- 1B3----
                2F0 2F1 2F2 2F3 2B0---- 2B1---- 2B2---- 2B3----
    """
    assert staircase(build("gpipe", 3, 4, 3), 3) == drawing(expected)


def test_1f1b():
    expected = """
        0F0 0F1 0F2                 0B0---- 0F3 0B1----     0B2----     0B3----
            1F0 1F1         1B0---- 1F2 1B1---- 1F3 1B2----     1B3----
                2F0 2B0---- 2F1 2B1---- 2F2 2B2---- 2F3 2B3----
    """
    assert staircase(build("1f1b", 3, 4, 3), 3) == drawing(expected)


def test_1f1b_with_fewer_micro_batches_than_stages():
    expected = """
        0F0 0F1                                 0B0----     0B1----
            1F0 1F1                     1B0----     1B1----
                2F0 2F1         2B0----     2B1----
                    3F0 3B0---- 3F1 3B1----
    """
    assert staircase(build("1f1b", 4, 2, 4), 4) == drawing(expected)


def test_one_stage():
    assert staircase(build("1f1b", 1, 2, 1), 1) == ["0F0 0B0---- 0F1 0B1----"]
    assert staircase(build("gpipe", 1, 2, 1), 1) == ["0F0 0F1 0B0---- 0B1----"]


def test_forward_only():
    expected = """
        0F0 0F1 0F2
            1F0 1F1 1F2
    """
    assert staircase(forward_only(2, 3, 2), 2) == drawing(expected)


@pytest.mark.parametrize(("p", "m"), SIZES)
def test_tables_are_the_classical_ones(p, m):
    gpipe, one_f_one_b = build("gpipe", p, m, p), build("1f1b", p, m, p)
    for stage, rank in enumerate(place(p)):
        forward = [Action("F", stage, i) for i in range(m)]
        backward = [Action("B", stage, i) for i in range(m)]
        assert gpipe[rank] == forward + backward
        warm_up = min(m, p - 1 - stage)
        steady = [action for pair in zip(forward[warm_up:], backward, strict=False) for action in pair]
        assert one_f_one_b[rank] == forward[:warm_up] + steady + backward[m - warm_up :]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("p", "m"), SIZES)
def test_tables_are_complete_ordered_and_within_their_cap(name, p, m):
    table = build(name, p, m, p)
    assert sorted(chain(*table)) == sorted(Action(k, s, i) for k in "FB" for s in range(p) for i in range(m))
    for stage, rank in enumerate(place(p)):
        assert {action.stage for action in table[rank]} == {stage}
        for kind in "FB":
            assert [i for k, _, i in table[rank] if k == kind] == list(range(m))
    result = simulate(table, place(p))
    caps = SCHEDULES[name].caps(Pipeline(p, m, tuple(place(p))))
    assert all(held <= min(m, cap) for held, cap in zip(result.peak_in_flight, caps.stage, strict=True))


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("p", "m"), SIZES)
def test_makespan_is_that_of_the_formula(name, p, m):
    result = simulate(build(name, p, m, p), place(p))
    assert result.makespan == (m + p - 1) * 3
    assert result.bubble == pytest.approx((p - 1) / (m + p - 1))


@pytest.mark.parametrize("costs", [unit, lambda a: 0.0, lambda a: 0.3 + a.stage + 2 * (a.kind == "B")])
@pytest.mark.parametrize("latency", [0.0, 0.7, lambda a: 0.1 * a.stage])
def test_any_costs_give_a_complete_table(costs, latency):
    table = list_schedule(ONE_F_ONE_B, 4, 6, place(4), costs, latency)
    assert sum(map(len, table)) == 2 * 4 * 6
    result = simulate(table, place(4), costs, latency)
    assert all(held <= 4 - stage for stage, held in enumerate(result.peak_in_flight))


def test_several_stages_on_one_rank():
    placement = [1, 0, 1, 0]
    table = list_schedule(Policy("looped", prefer=("B", "F")), 4, 3, placement)
    assert sum(map(len, table)) == 2 * 4 * 3
    assert all(placement[action.stage] == rank for rank, actions in enumerate(table) for action in actions)
    simulate(table, placement)


def test_surplus_ranks_do_nothing():
    assert [len(actions) for actions in build("1f1b", 2, 3, 4)] == [6, 6, 0, 0]
    assert [len(actions) for actions in forward_only(2, 3, 4)] == [3, 3, 0, 0]


def test_notation():
    action = Action("F", 2, 3)
    assert str(action) == repr(action) == f"{action}" == "2F3"
    assert Action.parse("12B34") == Action("B", 12, 34)
    with pytest.raises(ConfigurationError, match="'F23' is no action"):
        Action.parse("F23")


def test_last_stage_is_on_rank_0():
    assert place(1) == [0] and place(4) == [3, 2, 1, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("1F1B", 2, 2, 2), "unknown schedule '1F1B'; did you mean '1f1b'"),
        (("gpip", 2, 2, 2), "did you mean 'gpipe'"),
        (("zzz", 2, 2, 2), r"unknown schedule 'zzz' \(known: 'auto', 'gpipe', '1f1b', "),
        (("gpipe", 2, 0, 2), "num_microbatches=0"),
        (("gpipe", 2, -3, 2), "num_microbatches=-3"),
        (("gpipe", 2, 2.5, 2), "num_microbatches=2.5"),
        (("gpipe", 3, 2, 2), "3 stages do not fit on 2 ranks"),
    ],
)
def test_bad_input_is_quoted(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        build(*arguments)


def test_a_cap_that_admits_nothing_is_an_error():
    shut = Policy("shut", ("B", "F"), lambda pipeline: unlimited(pipeline)._replace(stage=[0, 0]))
    with pytest.raises(ConfigurationError, match=r"'shut' stalls.*stage=\[0, 0\]"):
        list_schedule(shut, 2, 2, place(2))
