"""What the race of schedules compares: copies split by hand are the models, and tables hold all work once."""

from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "benchmarks"


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts import each other as neighbours."""
    monkeypatch.syspath_prepend(str(FOLDER.parents[1]))
    monkeypatch.syspath_prepend(str(FOLDER))


@pytest.mark.parametrize("name", ["gpt", "resnet"])
@pytest.mark.parametrize("stages", [2, 4])
def test_split_copies_compute_the_same(name: str, stages: int) -> None:
    from split_models import CASES

    case = CASES[name]
    torch.manual_seed(0)
    model = case.build()
    parts = case.split(model, stages)
    inputs, targets = (whole[:2] for whole in case.batch())
    out = inputs
    for part in parts:
        out = part(out)
    assert len(parts) == stages
    assert torch.equal(case.loss(out, targets), case.loss(model(inputs), targets))
    assert sum(p.numel() for part in parts for p in part.parameters()) == sum(p.numel() for p in model.parameters())


def test_every_schedule_has_a_rival() -> None:
    from contenders import RACES
    from torch.distributed.pipelining import schedules

    from lightning_lwpm.pipeline.schedule import POLICIES

    assert {race.ours for race in RACES} == set(POLICIES)
    assert all(hasattr(schedules, race.theirs) for race in RACES)
    assert len({race.label for race in RACES}) == len(RACES)


def test_counts_follow_memory() -> None:
    from in_flight import Count

    count = Count()
    tensors = [torch.ones(3) for _ in range(4)]
    for tensor in tensors:
        count.follow(tensor)
    view = tensors[0][1:]
    tensor = None
    tensors.clear()
    assert (count.alive, count.peak) == (1, 4)
    del view
    assert (count.alive, count.peak) == (0, 4)
