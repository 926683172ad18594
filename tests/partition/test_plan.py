"""A plan puts every layer call in one stage, obeys the user and says what it cannot do."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from lightning_lwpm.errors import ConfigurationError
from lightning_lwpm.partition.costs import Link, estimate_seconds
from lightning_lwpm.partition.plan import PartitionPlan, make_plan
from lightning_lwpm.partition.timeline import LayerCall, Timeline


def place(num_stages):
    return list(reversed(range(num_stages)))


def timeline(names, allowed=None, parameters=1000, boundary=2048):
    """One call of equal cost for each name; a name that comes again is called again, and has no new parameters."""
    calls = []
    for index, name in enumerate(names):
        k = names[:index].count(name)
        new = 0 if k else parameters
        calls.append(LayerCall(name, k, flops=1e6, bytes_moved=1e4, parameter_bytes=4 * new, parameters=new))
    n = len(names)
    return Timeline(tuple(calls), (0, *[boundary] * (n - 1)), tuple(allowed or [True] * n))


def gpt(num_blocks=4):
    blocks = (f"model.h.{i}.{leaf}" for i in range(num_blocks) for leaf in ("ln", "attn", "mlp"))
    return timeline(["model.wte", "model.wpe", *blocks, "model.ln_f", "lm_head"])


def rendered(plan):
    console = Console(width=120)
    with console.capture() as capture:
        console.print(plan.table())
    return capture.get()


@given(st.lists(st.booleans(), min_size=1, max_size=30), st.integers(1, 8))
def test_auto_puts_every_call_in_exactly_one_stage(allowed, num_ranks):
    line = timeline([f"layer{i}" for i in range(len(allowed))], allowed)
    plan = make_plan(line, num_ranks, "auto", place)
    flat = [call for stage in plan.stages for call in stage.calls]
    assert flat == [(call.name, call.occurrence) for call in line.calls]
    assert all(stage.calls for stage in plan.stages)
    assert len(plan.stages) == min(num_ranks, 1 + sum(allowed[1:]))
    assert all(allowed[cut] for cut in plan.cuts)
    assert plan.stages[-1].rank == 0
    assert sum(stage.share for stage in plan.stages) == pytest.approx(1)
    assert sum(stage.parameters for stage in plan.stages) == 1000 * len(allowed)
    assert [plan.stage_of[call] for call in flat] == sorted(plan.stage_of[call] for call in flat)


def test_names_may_be_layers_or_modules_around_them():
    plan = make_plan(gpt(), 3, ["model.h.1", "model.h.3.mlp"], place)
    assert plan.cuts == [5, 13]
    assert [stage.rank for stage in plan.stages] == [2, 1, 0]
    assert [stage.bytes_onward for stage in plan.stages] == [2048, 2048, 0]
    assert [stage.calls[0] for stage in plan.stages] == [
        ("model.wte", 0),
        ("model.h.1.ln", 0),
        ("model.h.3.mlp", 0),
    ]


def test_a_name_is_not_a_mere_prefix():
    plan = make_plan(timeline(["a", "h.10", "h.1.x", "h.1.y"]), 2, ["h.1"], place)
    assert plan.cuts == [2]


def test_one_rank_has_one_stage():
    for partition in ("auto", []):
        plan = make_plan(gpt(), 1, partition, place)
        assert plan.cuts == [] and [stage.rank for stage in plan.stages] == [0]


def test_a_layer_called_again_counts_its_occurrences():
    plan = make_plan(timeline(["a", "shared", "b", "shared"]), 2, ["b"], place)
    assert plan.stage_of == {("a", 0): 0, ("shared", 0): 0, ("b", 0): 1, ("shared", 1): 1}


def test_a_step_without_work_is_shared_by_calls():
    calls = tuple(LayerCall(f"l{i}", 0, 0, 0, 0, 0) for i in range(4))
    plan = make_plan(Timeline(calls, (0,) * 4, (True,) * 4), 2, ["l1"], place)
    assert [stage.share for stage in plan.stages] == [0.25, 0.75]


def test_placement_may_be_a_list():
    assert [stage.rank for stage in make_plan(gpt(), 2, "auto", [0, 1]).stages] == [0, 1]


def test_plan_survives_json():
    plan = make_plan(gpt(), 3, "auto", place)
    assert PartitionPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def test_table_shows_blocks_rather_than_leaves():
    text = rendered(make_plan(gpt(), 4, ["model.h.0", "model.h.2", "model.h.3.mlp"], place))
    assert "model.wte, model.wpe (2 calls)" in text
    assert "model.h.0, model.h.1 (6 calls)" in text
    assert "model.h.2 … model.h.3.attn (5 calls)" in text
    assert "model.h.3.mlp … lm_head (3 calls)" in text
    assert "2.0 K" in text and "2.0 KiB" in text and "12.5%" in text


def test_table_of_one_stage_names_whole_modules():
    assert "model, lm_head (16 calls)" in rendered(make_plan(gpt(), 1, "auto", place))


def test_table_shows_idle_ranks():
    text = rendered(make_plan(timeline(["only"]), 2, "auto", place))
    assert "only (1 call)" in text and "none" in text


@pytest.mark.parametrize(
    ("parameters", "boundary", "expected"),
    [(7, 100, ("7", "100 B")), (999_960, 1024, ("1.0 M", "1.0 KiB")), (3_200_000, 5 * 2**20, ("3.2 M", "5.0 MiB"))],
)
def test_table_scales_units(parameters, boundary, expected):
    text = rendered(make_plan(timeline(["a", "b"], parameters=parameters, boundary=boundary), 2, "auto", place))
    assert all(value in text for value in expected)


@pytest.mark.parametrize(
    ("num_ranks", "partition", "messages"),
    [
        (2, ["model.h.9"], ["calls no layer 'model.h.9'", "did you mean 'model.h."]),
        (2, ["h.2"], ["calls no layer 'h.2'", "did you mean 'model.h.2'"]),
        (2, ["zzz"], ["calls no layer 'zzz'", "it begins with 'model'"]),
        (2, ["model"], ["'model' is where the step begins"]),
        (2, ["model.wte"], ["'model.wte' is where the step begins"]),
        (3, ["model.h.3", "model.h.1"], ["not in the order", "write partition=['model.h.1', 'model.h.3']"]),
        (3, ["model.h.1"], ["names 1 layer(s), but 3 rank(s) need 2"]),
        (1, ["model.h.1"], ["names 1 layer(s), but 1 rank(s) need 0"]),
        (3, ["model.h.1", "model.h.1"], ["begin at the same place, 'model.h.1';"]),
        (3, ["model.h.1", "model.h.1.ln"], ["begin at the same place, 'model.h.1' and 'model.h.1.ln'"]),
        (2, "model.h.1", ["unknown partition='model.h.1'", "['model.h.1']"]),
        (0, "auto", ["num_ranks=0"]),
    ],
)
def test_what_the_user_wrote_is_quoted(num_ranks, partition, messages):
    with pytest.raises(ConfigurationError) as error:
        make_plan(gpt(), num_ranks, partition, place)
    assert all(message in str(error.value) for message in messages), str(error.value)


def test_a_forbidden_cut_names_the_nearest_allowed_ones():
    line = timeline(["a", "b.x", "b.y", "c.x"], allowed=[True, True, False, True])
    with pytest.raises(ConfigurationError, match=r"no stage can begin at 'b.y'; the nearest places are 'b', 'c'"):
        make_plan(line, 2, ["b.y"], place)
    line = timeline(["a", "b"], allowed=[True, False])
    with pytest.raises(ConfigurationError, match="nor anywhere else"):
        make_plan(line, 2, ["b"], place)


@pytest.mark.parametrize(
    ("placement", "message"),
    [([0], r"placement=\[0\] places 1 stage"), ([0, 2], "no rank 2 among 2")],
)
def test_bad_placement_is_quoted(placement, message):
    with pytest.raises(ConfigurationError, match=message):
        make_plan(gpt(), 2, "auto", placement)


def test_an_empty_timeline_cannot_be_partitioned():
    with pytest.raises(ConfigurationError, match="calls no layer"):
        make_plan(Timeline((), (), ()), 2, "auto", place)


def test_a_timeline_checks_its_lengths():
    with pytest.raises(ValueError, match=r"1 calls needs as many entries .* got 2 and 1"):
        Timeline((LayerCall("a", 0, 1, 1, 0, 0),), (0, 0), (True,))


def test_costs_on_the_nominal_machine():
    assert estimate_seconds(50e9, 10e9, train=False) == pytest.approx(2)
    assert estimate_seconds(50e9, 10e9) == pytest.approx(6)
    assert Link(latency=0.1).seconds(1e9) == pytest.approx(0.6)
