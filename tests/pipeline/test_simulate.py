"""Tables cost what is predicted, and never deadlock on a network that buffers nothing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_lwpm.errors import ConfigurationError
from lightning_lwpm.pipeline.schedule import Action, Policy, build, forward_only, list_schedule, place, unit
from lightning_lwpm.pipeline.simulate import (
    Deadlock,
    Message,
    adjacent,
    bound,
    channels,
    kept_by_ranks,
    rendezvous,
    simulate,
)


def table(*ranks):
    return [[Action.parse(word) for word in line.split()] for line in ranks]


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "forward only"])
@pytest.mark.parametrize("p", range(1, 9))
@pytest.mark.parametrize("lookahead", [1, 2, 8])
def test_no_deadlock_without_buffers(name, p, lookahead):
    long_skip = {(0, p - 1)} if p > 1 else set()
    every = {(s, t) for t in range(p) for s in range(t)}
    for m in range(1, 9):
        actions = forward_only(p, m, p + 1) if name == "forward only" else build(name, p, m, p + 1)
        for edges in (None, adjacent(p) | long_skip, every):
            rendezvous(actions, place(p), edges, lookahead)


@given(st.integers(2, 5), st.integers(1, 6), st.data())
def test_no_deadlock_for_any_costs_and_placement(p, m, data):
    num_ranks = data.draw(st.integers(1, p))
    placement = [*range(num_ranks), *data.draw(st.lists(st.integers(0, num_ranks - 1), min_size=p, max_size=p))][:p]
    seconds = data.draw(st.lists(st.sampled_from([0.5, 1.0, 3.0]), min_size=p, max_size=p))
    skips = data.draw(st.sets(st.sampled_from([(s, t) for t in range(p) for s in range(t)])))
    actions = list_schedule(Policy("any", ("B", "F")), p, m, placement, lambda a: seconds[a.stage], 0.25)
    rendezvous(actions, placement, adjacent(p) | skips)


def test_blocking_sends_deadlock_1f1b_but_not_gpipe():
    # In the steady state of 1f1b both neighbours send first, and neither receives: the reason why sends are lazy.
    with pytest.raises(Deadlock, match=r"rank 0 waits after 1B0 for rank 1 .*; rank 1 waits after 0F1 for rank 0"):
        rendezvous(build("1f1b", 2, 3, 2), place(2), lookahead=0)
    rendezvous(build("gpipe", 4, 3, 4), place(4), lookahead=0)


def test_a_cycle_of_receives_names_who_waits_for_whom():
    bad = table("1F0 1B0 1F1 1B1", "0F0 0B0 0B1 0F1")
    with pytest.raises(Deadlock, match=r"rank 0 waits in 1F1 to receive 0F1 from rank 1; rank 1 waits in 0B1 .*1B1"):
        rendezvous(bad, place(2))
    with pytest.raises(Deadlock, match="rank 0 waits in 1F1 for 0F1; rank 1 waits in 0B1 for 0F1 and 1B1"):
        simulate(bad, place(2))


def test_an_action_before_its_own_dependency_deadlocks():
    with pytest.raises(Deadlock, match="rank 0 waits in 0B0 for an action that its list has only later"):
        rendezvous(table("0B0 0F0"), [0])


def test_a_receive_that_nobody_sends():
    with pytest.raises(Deadlock, match="rank 0 waits in 1F1 for 0F1, never sent by rank 1"):
        rendezvous(table("1F0 1F1", "0F0"), place(2))


def test_a_send_that_nobody_receives():
    with pytest.raises(Deadlock, match="rank 1 sends 0F1 for 1F1, never received by rank 0"):
        rendezvous(table("1F0", "0F0 0F1"), place(2))


def test_kth_send_must_meet_kth_receive():
    swapped = table("1F1 1F0", "0F0 0F1")
    with pytest.raises(Deadlock, match=r"message 0 from rank 1 to rank 0 is 0F0 for 1F0, .* expects 0F1 for 1F1"):
        rendezvous(swapped, place(2), lookahead=0)
    rendezvous(swapped, place(2))  # posted in the sender's order, both arrive


@pytest.mark.parametrize("run", [simulate, rendezvous])
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (table("1F0", "0F0 0F0"), "rank 1 runs 0F0 twice"),
        (table("0F0", "1F0"), r"rank 0 runs 0F0, but the ranks of the stages are \[1, 0\]"),
        (table("2F0"), "rank 0 runs 2F0"),
    ],
)
def test_a_table_that_contradicts_itself(run, bad, message):
    with pytest.raises(ConfigurationError, match=message):
        run(bad, place(2))


def test_channels_follow_the_senders_order():
    pairs = channels(build("1f1b", 3, 2, 3), place(3), {(0, 1), (1, 2), (0, 2)})
    as_text = {pair: [f"{m.producer}>{m.consumer}" for m in messages] for pair, messages in pairs.items()}
    assert as_text == {
        (2, 1): ["0F0>1F0", "0F1>1F1"],
        (2, 0): ["0F0>2F0", "0F1>2F1"],
        (1, 0): ["1F0>2F0", "1F1>2F1"],
        (1, 2): ["1B0>0B0", "1B1>0B1"],
        (0, 2): ["2B0>0B0", "2B1>0B1"],
        (0, 1): ["2B0>1B0", "2B1>1B1"],
    }
    assert pairs[2, 1][0] == Message(Action("F", 0, 0), Action("F", 1, 0))


def test_stages_on_one_rank_send_nothing():
    assert channels(table("0F0 1F0 1B0 0B0"), [0, 0]) == {}


def test_simulation_of_a_small_table():
    result = simulate(build("1f1b", 2, 2, 3), place(2), unit, latency=0.5)
    assert result.starts[Action("F", 1, 0)] == 1.5
    assert result.starts[Action("B", 0, 0)] == 5.0
    assert result.makespan == 10.0
    assert result.busy == (6.0, 6.0, 0.0)
    assert result.bubble == pytest.approx(1 - 12 / 20)  # the third rank has no stage and does not count
    assert result.peak_in_flight == (2, 1)


def test_latency_may_depend_on_the_action():
    result = simulate(build("gpipe", 2, 1, 2), place(2), unit, lambda a: 3.0 if a.kind == "F" else 0.0)
    assert result.starts[Action("F", 1, 0)] == 4.0 and result.makespan == 9.0


def test_latency_costs_1f1b_more_than_gpipe():
    makespans = [simulate(build(name, 4, 16, 4), place(4), unit, 0.25).makespan for name in ("gpipe", "1f1b")]
    assert makespans[0] < makespans[1]


def test_split_backward_passes_keep_activations_until_w():
    result = simulate(table("1F0 1I0 1F1 1I1 1W0 1W1", "0F0 0F1 0I0 0I1 0W0 0W1"), place(2))
    assert result.peak_in_flight == (2, 1)
    assert result.peak_kept == (2, 2)


def test_what_a_rank_keeps_is_summed_over_its_stages():
    assert kept_by_ranks(table("0F0 1F0 1B0 0B0"), [3.0, 0.5]) == [3.5]
    assert kept_by_ranks(table("0F0 1F0", ""), [3.0, 0.5]) == [3.5, 0.0]


def test_gradients_of_inputs_are_sent_and_those_of_weights_are_not():
    pairs = channels(build("zb1p", 2, 2, 2), place(2))
    assert [f"{m.producer}>{m.consumer}" for m in pairs[0, 1]] == ["1I0>0B0", "1I1>0B1"]


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
def test_the_bound_is_reached_where_stages_are_even(name):
    for p, m in [(1, 3), (3, 1), (4, 2), (4, 8)]:
        assert bound(build(name, p, m, p), place(p)) == (m + p - 1) * 3


def test_bound_by_hand():
    # Rank 0 has the slow stage 1: 1 + 0.5 until its first action, 2 * (4 + 4), 0.5 + 2 back.
    slow = build("gpipe", 2, 2, 2)
    assert bound(slow, place(2), lambda a: 4.0 if a.stage == 1 else unit(a), 0.5) == 1.5 + 16 + 2.5
    # One micro-batch: its way there and back. Split: the last weights' gradient on top.
    assert bound(build("gpipe", 3, 1, 3), place(3), latency=1.0) == 3 * 3 + 4
    assert bound(build("zb1p", 3, 1, 3), place(3)) == 7
    assert bound([[], []], []) == 0.0
    assert bound(forward_only(2, 3, 2), place(2)) == 4


def test_evaluation_holds_one_micro_batch():
    assert simulate(forward_only(2, 5, 2), place(2)).peak_in_flight == (1, 1)


def test_an_empty_table():
    assert simulate([[], []], []).makespan == 0.0
    rendezvous([[], []], [])
