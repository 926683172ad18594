"""Each stage of a rank has a version of its own of what steps change."""

from collections import deque
from typing import Any

import torch
from torch import nn

from lightning_lwpm.staging.layout import Layout, Unit
from lightning_lwpm.staging.placeholder import is_placeholder
from lightning_lwpm.staging.versions import Versions


class Meter:
    """An object of the user's own."""

    def __init__(self) -> None:
        self.total, self.steps = 0, [0]


class Model(nn.Module):
    """Of two stages; ``first`` and ``second`` lie in one each."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
        self.register_buffer("common", torch.zeros(2))
        self.seen = 0
        self.notes: dict[str, Any] = {"sums": [], "flags": set(), "latest": deque(maxlen=2)}
        self.memory = [torch.zeros(2)]
        self.meter = Meter()


NAMES = ("running_mean", "running_var", "num_batches_tracked")


def versions(model: Model, stages: tuple[int, ...] = (0, 1)) -> Versions:
    buffers = {f"{m}.{b}": (s,) for s, m in enumerate(("first", "second")) for b in NAMES}
    return Versions(model, Layout(2, (Unit("first", (0,)), Unit("second", (1,))), {}, buffers), stages)


def change(model: Model) -> None:
    """What a step does between layers."""
    model.seen += 1
    model.notes["sums"].append(model.seen)
    model.notes["flags"].add(model.seen)
    model.notes["latest"].append(model.seen)
    model.notes.setdefault("new", []).append(model.seen)
    model.memory[0].add_(1)
    model.common += 1
    model.meter.total += model.seen
    model.meter.steps.append(model.seen)


def test_stages_change_versions_of_their_own() -> None:
    model = Model()
    sums, common = model.notes["sums"], model.common
    kept = versions(model)
    for batch in range(2):
        with kept.batch():
            for stage in (0, 0, 1, 0, 1):
                seen = model.seen
                with kept.of(stage):
                    change(model)
                assert model.seen == seen
        assert model.seen == 2 * (batch + 1)  # the latest stage has run twice
    assert model.notes == {"sums": [1, 2, 3, 4], "flags": {1, 2, 3, 4}, "latest": deque([3, 4]), "new": [1, 2, 3, 4]}
    assert (model.meter.total, model.meter.steps) == (10, [0, 1, 2, 3, 4])
    assert model.memory[0].tolist() == model.common.tolist() == [4, 4]
    assert model.notes["sums"] is sums and model.common is common  # the same objects


def test_a_stage_sees_what_it_has_changed() -> None:
    model = Model()
    kept = versions(model)
    with kept.batch():
        for expected in range(3):
            with kept.of(0):
                assert model.seen == len(model.notes["sums"]) == int(model.common[0]) == expected
                assert model.memory[0].tolist() == [expected, expected]
                change(model)
        with kept.of(1):
            assert model.seen == len(model.notes["sums"]) == int(model.common[0]) == 0


def test_buffers_of_another_stage_are_as_far_away_as_on_another_rank() -> None:
    model = Model()
    kept = versions(model)
    mean = model.first.running_mean
    with kept.batch():
        with kept.of(0):
            assert model.first.running_mean is mean
            assert is_placeholder(model.second.running_mean)
            model.first(torch.ones(3, 2))
        with kept.of(1):
            assert is_placeholder(model.first.running_mean)
    assert model.first.running_mean is mean and mean is not None and mean.tolist() != [0, 0]


def test_after_an_exception_all_is_as_it_was() -> None:
    model = Model()
    kept = versions(model)
    try:
        with kept.batch(), kept.of(0):
            change(model)
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert model.seen == 0 and model.notes["sums"] == [] and model.common.tolist() == [0, 0]


def test_one_stage_needs_no_versions() -> None:
    model = Model()
    kept = versions(model, (1,))
    with kept.batch(), kept.of(1):
        change(model)
        assert not is_placeholder(model.first.running_mean)
    assert model.seen == 1
