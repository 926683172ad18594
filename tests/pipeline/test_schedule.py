"""The scheduler makes the classical tables, and every table is complete, ordered and within its cap."""

from itertools import chain, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_lwpm.errors import ConfigurationError
from lightning_lwpm.pipeline.policies import Pipeline, unlimited
from lightning_lwpm.pipeline.schedule import (
    ONE_F_ONE_B,
    POLICIES,
    Action,
    Policy,
    build,
    forward_only,
    list_schedule,
    place,
    unit,
)
from lightning_lwpm.pipeline.simulate import bound, kept_by_ranks, rendezvous, simulate

SIZES = [(p, m) for p in range(1, 9) for m in range(1, 9)]


def staircase(table, placement):
    """Draw a table at unit costs: a line a rank, rank 0 last, four characters a time unit; a B takes two units."""
    starts = simulate(table, placement).starts
    lines = []
    for actions in reversed(table):
        line = ""
        for action in actions:
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
    assert staircase(build("gpipe", 3, 4, 3), place(3)) == drawing(expected)


def test_1f1b():
    expected = """
        0F0 0F1 0F2                 0B0---- 0F3 0B1----     0B2----     0B3----
            1F0 1F1         1B0---- 1F2 1B1---- 1F3 1B2----     1B3----
                2F0 2B0---- 2F1 2B1---- 2F2 2B2---- 2F3 2B3----
    """
    assert staircase(build("1f1b", 3, 4, 3), place(3)) == drawing(expected)


def test_1f1b_with_fewer_micro_batches_than_stages():
    expected = """
        0F0 0F1                                 0B0----     0B1----
            1F0 1F1                     1B0----     1B1----
                2F0 2F1         2B0----     2B1----
                    3F0 3B0---- 3F1 3B1----
    """
    assert staircase(build("1f1b", 4, 2, 4), place(4)) == drawing(expected)


def test_one_stage():
    assert staircase(build("1f1b", 1, 2, 1), place(1)) == ["0F0 0B0---- 0F1 0B1----"]
    assert staircase(build("gpipe", 1, 2, 1), place(1)) == ["0F0 0F1 0B0---- 0B1----"]


def test_forward_only():
    expected = """
        0F0 0F1 0F2
            1F0 1F1 1F2
    """
    assert staircase(forward_only(2, 3, 2), place(2)) == drawing(expected)


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


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
@pytest.mark.parametrize(("p", "m"), SIZES)
def test_tables_are_complete_ordered_and_within_their_cap(name, p, m):
    table = build(name, p, m, p)
    assert sorted(chain(*table)) == sorted(Action(k, s, i) for k in "FB" for s in range(p) for i in range(m))
    for stage, rank in enumerate(place(p)):
        assert {action.stage for action in table[rank]} == {stage}
        for kind in "FB":
            assert [i for k, _, i in table[rank] if k == kind] == list(range(m))
    result = simulate(table, place(p))
    caps = POLICIES[name].caps(Pipeline(p, m, tuple(place(p))))
    assert all(held <= min(m, cap) for held, cap in zip(result.peak_in_flight, caps.stage, strict=True))


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
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


def test_interleaved():
    expected = """
        0F0 0F1 2F0 2F1         2B0----     2B1---- 0B0---- 0B1----
            1F0 1F1 3F0 3B0---- 3F1 3B1---- 1B0---- 1B1----
    """
    assert staircase(build("interleaved_1f1b", 4, 2, 2), place(4, 2)) == drawing(expected)


def test_zb1p():
    expected = """
        0F0 0F1 0F2         0B0---- 0F3 0B1---- 0B2---- 0B3----
            1F0 1F1     1I0 1F2 1I1 1W0 1F3 1I2 1W1 1I3 1W2 1W3
                2F0 2I0 2F1 2I1 2F2 2I2 2W0 2F3 2I3 2W1 2W2 2W3
    """
    assert staircase(build("zb1p", 3, 4, 3), place(3)) == drawing(expected)


def test_zbv():
    expected = """
            1F0 2F0 1F1 2F1 2I0 2W0 1I0 1W0 1F2 2F2 2I1 1I1 2I2 1I2 2W1 1W1 2W2 1W2
        0F0 0F1 0F2 3F0 3I0 3W0 3F1 3I1 3W1 0B0---- 3F2 3I2 0B1---- 0I2 3W2 0W2
    """
    assert staircase(build("zbv", 4, 3, 2), place(4, 2, "v")) == drawing(expected)


@pytest.mark.parametrize("p", range(1, 9))
@pytest.mark.parametrize("name", ["interleaved_1f1b", "zb1p", "zbv"])
def test_several_stages_a_rank(name, p):
    """Complete, ordered, within the caps, free of deadlock, as long as published, and never longer than 1f1b."""
    policy = POLICIES[name]
    for v, m in product([2] if name == "zbv" else range(1, 9), range(1, 9)):
        table, placement = build(name, p * v, m, p), place(p * v, p, "v" if name == "zbv" else "loop")
        assert_complete_and_ordered(table, policy, placement, m)
        assert_within_caps(table, policy, placement, m)
        rendezvous(table, placement)
        makespan, least = simulate(table, placement).makespan, bound(table, placement)
        work, one_f_one_b = 3 * v * m, 3 * v * (m + p - 1)
        assert least <= makespan <= one_f_one_b
        if name == "interleaved_1f1b" and m >= p:  # bubble: (p-1)(F+B) of a stage that is a v-th of 1f1b's
            assert makespan == least == work + 3 * (p - 1)
        if (name == "zb1p" and m >= p) or (name == "zbv" and m >= 2 * p - 1):  # bubble: (p-1)(F+I-W)
            assert makespan == least == work + (p - 1)


def test_zb1p_keeps_no_more_than_1f1b():
    for p, m in SIZES:
        kept = [kept_by_ranks(build(name, p, m, p), [1] * p) for name in ("zb1p", "1f1b")]
        assert max(kept[0]) == max(kept[1]) == min(p, m)


@pytest.mark.parametrize(("p", "m"), [(2, 8), (4, 16), (8, 32)])
def test_zbv_at_uneven_costs(p, m):
    """No more than a twentieth above the bound where an I takes longer than a W, as with attention."""
    table, placement = build("zbv", 2 * p, m, p), place(2 * p, p, "v")
    costs = {"F": 1.0, "B": 1.9, "I": 1.15, "W": 0.75}
    makespan = simulate(table, placement, lambda action: costs[action.kind], 0.02).makespan
    assert makespan <= 1.05 * bound(table, placement, lambda action: costs[action.kind], 0.02)


def in_parts(table, policy):
    """A table that splits every backward pass, where its schedule may split any."""
    split = "I" in policy.prefer
    parts = {"B": "IW"} if split else {}
    return [[Action(kind, a.stage, a.microbatch) for a in row for kind in parts.get(a.kind, a.kind)] for row in table]


def assert_complete_and_ordered(table, policy, placement, m):
    table = in_parts(table, policy)
    num_stages = len(placement)
    wanted = {Action(k, s, i) for k in policy.prefer for s in range(num_stages) for i in range(m)}
    assert sum(map(len, table)) == len(wanted) and wanted == set(chain(*table))
    for rank, actions in enumerate(table):
        upcoming = dict.fromkeys(product(policy.prefer, range(num_stages)), 0)
        for kind, stage, microbatch in actions:
            assert placement[stage] == rank
            assert microbatch == upcoming[kind, stage]
            upcoming[kind, stage] += 1


def assert_within_caps(table, policy, placement, m):
    caps = policy.caps(Pipeline(len(placement), m, tuple(placement)))
    in_flight = simulate(table, placement).peak_in_flight
    assert all(held <= cap for held, cap in zip(in_flight, caps.stage, strict=True))
    assert all(k <= cap for k, cap in zip(kept_by_ranks(table, [1] * len(placement)), caps.kept, strict=True))


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_any_costs_latency_and_placement(data):
    policy = POLICIES[data.draw(st.sampled_from(sorted(POLICIES)), "schedule")]
    placement = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=10), "placement")
    m = data.draw(st.integers(1, 10), "micro-batches")
    times = data.draw(st.lists(st.sampled_from([0.0, 0.5, 1.0, 3.0]), min_size=4, max_size=4), "times")
    slow = data.draw(st.integers(0, len(placement) - 1), "slow stage")
    latency = data.draw(st.sampled_from([0.0, 0.3, 2.0]), "latency")

    def costs(action):
        return times["FBIW".index(action.kind)] * (3 if action.stage == slow else 1)

    table = list_schedule(policy, len(placement), m, placement, costs, latency)
    assert_complete_and_ordered(table, policy, placement, m)
    assert_within_caps(table, policy, placement, m)
    rendezvous(table, placement)
    least = bound(table, placement, costs, latency)
    assert simulate(table, placement, costs, latency).makespan >= least - 1e-9


def test_a_stage_that_comes_again_on_the_same_rank():
    # A module that is called at the beginning and at the end; rank 2 has nothing to do.
    table = build("1f1b", 3, 2, 3, placement=[0, 1, 0])
    assert [len(actions) for actions in table] == [8, 4, 0]
    assert str(table[0]) == "[0F0, 0F1, 2F0, 2B0, 2F1, 2B1, 0B0, 0B1]"


def test_placement():
    assert place(6, 3) == [2, 1, 0, 2, 1, 0] and place(5, 2) == [0, 1, 0, 1, 0]
    assert place(6, 3, "v") == [0, 1, 2, 2, 1, 0] and place(4, 1, "v") == [0, 0, 0, 0]
    with pytest.raises(ConfigurationError, match="style='w'"):
        place(4, 2, "w")
    with pytest.raises(ConfigurationError, match=r"placement=\[0, 2\]: give each of 2 stages a rank from 0 to 1"):
        build("1f1b", 2, 2, 2, placement=[0, 2])


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
