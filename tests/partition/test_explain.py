"""A model that does not fit is told by how much, and what would help."""

from dataclasses import replace
from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_lwpm.partition.explain import Alternative, closest, explain, fits
from lightning_lwpm.partition.memory import Memory
from lightning_lwpm.partition.merge import NothingFits, merge
from lightning_lwpm.partition.timeline import Flow

GIB = 1 << 30
LABELS = ["embedding", "h.0", "h.1", "head"]


def to_the_end(stage, num_stages):
    return num_stages - stage


@pytest.fixture
def memory():
    """Two stages of at most 8 GiB; the weights alone take 6 + 6."""
    weights = [((position,), 3 * GIB) for position in range(4)]
    flows = [Flow(position, (position + 1,), GIB) for position in range(3)]
    return Memory(weights, [2 * GIB] * 4, [0] * 4, lambda stage, num_stages: 4, flows, limits=8 * GIB)


def test_every_stage_is_set_against_its_device(memory):
    assert explain(memory, 2, [True] * 4, LABELS).splitlines() == [
        "the model does not fit its devices; the partition that comes closest is",
        "  stage 0 (embedding … h.0) needs 26.0 GiB: weights 6.0 GiB, activations of 4 micro-batches 16.0 GiB, "
        "sent 4.0 GiB; its device has 8.0 GiB, too little",
        "  stage 1 (h.1 … head) needs 26.0 GiB: weights 6.0 GiB, activations of 4 micro-batches 16.0 GiB, "
        "received 4.0 GiB; its device has 8.0 GiB, too little",
        "use devices with more memory, or a smaller model or batch",
    ]


def test_each_change_is_tried(memory):
    def microbatches():
        for count in (8, 16, 32, 64, 128):
            smaller = replace(memory.scaled(4 / count), in_flight=to_the_end)
            yield Alternative(f"num_microbatches={count} and schedule='1f1b'", smaller, 2)
            assert count < 64, "nothing beyond the first that fits is tried"

    schedule = Alternative("schedule='1f1b'", replace(memory, in_flight=to_the_end), 2)
    devices = [Alternative(f"{count} devices", memory, count) for count in (3, 4)]
    # of 8 GiB, stage 0 needs 6 + 2 * (4 + 1) / 8 with 32 micro-batches, but 6 + 2 * (4 + 1) / 4 with 16
    text = explain(memory, 2, [True] * 4, LABELS, [microbatches(), [schedule], devices])
    assert text.splitlines()[-2:] == [
        "it would fit with num_microbatches=32 and schedule='1f1b'",
        "it would not fit with schedule='1f1b', nor with 4 devices",
    ]


def test_the_smallest_number_of_devices_is_named():
    memory = Memory([((p,), 3 * GIB) for p in range(4)], [0] * 4, [0] * 4, to_the_end, limits=3 * GIB)
    text = explain(memory, 2, [True] * 4, LABELS, [[Alternative(f"{n} devices", memory, n) for n in (3, 4, 5)]])
    assert text.splitlines()[-1] == "it would fit with 4 devices"


def test_if_nothing_helps_it_says_so(memory):
    text = explain(memory, 2, [True] * 4, LABELS, [[Alternative("3 devices", memory, 3)], []])
    assert text.splitlines()[-2:] == [
        "it would not fit with 3 devices",
        "use devices with more memory, or a smaller model or batch",
    ]


def test_a_stage_that_fits_and_one_without_a_limit():
    memory = Memory([((0,), 4), ((1,), 4)], [0, 0], [0, 0], lambda stage, num_stages: 1, limits=[3, float("inf")])
    assert explain(memory, 2, [True] * 2, ["a", "b"]).splitlines()[1:3] == [
        "  stage 0 (a) needs 4 B: weights 4 B; its device has 3 B, too little",
        "  stage 1 (b) needs 4 B: weights 4 B; its device has no limit",
    ]


def test_only_what_must_exceed_exceeds():
    # the head is far too large for any device; the others fit, and are not left in a heap because of it
    memory = Memory([((p,), b) for p, b in enumerate([2, 2, 2, 2, 40])], [0] * 5, [0] * 5, to_the_end, limits=4)
    assert closest(memory, 3, [True] * 5) == [2, 4]


@st.composite
def instances(draw):
    n = draw(st.integers(1, 7))
    numbers = st.lists(st.integers(0, 9), min_size=n, max_size=n)
    parameters = draw(st.lists(st.tuples(st.tuples(st.integers(0, n - 1)), st.integers(0, 9)), max_size=6))
    limit = draw(st.sampled_from([4, 16, 32, 64]))
    memory = Memory(parameters, draw(numbers), draw(numbers), to_the_end, limits=limit)
    return memory, draw(st.lists(st.booleans(), min_size=n, max_size=n)), draw(st.integers(1, 4))


def load(memory, num_stages, spans):
    loads = [
        sum(memory.breakdown(stage, num_stages, *span).values()) / memory.limits for stage, span in enumerate(spans)
    ]
    return max(loads), sum(max(0, each - 1) for each in loads)


@given(instances())
def test_the_closest_equals_brute_force(instance):
    memory, allowed, num_stages = instance
    n = len(allowed)
    options = [i for i in range(1, n) if allowed[i]]
    num_stages = min(num_stages, len(options) + 1)
    all_loads = [
        load(memory, num_stages, list(pairwise([0, *cuts, n]))) for cuts in combinations(options, num_stages - 1)
    ]
    found = closest(memory, num_stages, allowed)
    assert load(memory, num_stages, list(pairwise([0, *found, n]))) == min(all_loads)
    assert fits(memory, num_stages, allowed) == (min(all_loads)[0] <= 1)


@given(instances())
def test_fits_agrees_with_merge(instance):
    memory, allowed, num_stages = instance
    ones = [1.0] * len(allowed)
    try:
        merge(ones, ones, allowed, num_stages, feasible=memory.feasible)
    except NothingFits:
        assert not fits(memory, num_stages, allowed)
    else:
        assert fits(memory, num_stages, allowed)
