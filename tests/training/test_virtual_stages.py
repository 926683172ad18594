"""Several stages on a rank: every schedule gives the numbers of one device, with all that Lightning does around it."""

from typing import Any

import pytest
from training.modules import Classifier
from training.runs import Runs, same
from training.test_checkpoints import Saved
from training.test_matrix import clipping, groups_and_scheduler, two_loaders
from training.test_planning import short
from training.test_planning import train as train_long


@pytest.mark.parametrize(
    ("world", "options"),
    [
        (2, {"schedule": "interleaved_1f1b"}),
        (2, {"schedule": "interleaved_1f1b", "virtual_stages": 3}),
        (3, {"schedule": "interleaved_1f1b"}),
        (2, {"schedule": "1f1b", "virtual_stages": 2}),
        (2, {"schedule": "auto", "virtual_stages": 2}),
        (2, {"schedule": "zb1p"}),
        (3, {"schedule": "zb1p"}),
        (2, {"schedule": "zbv"}),
        (3, {"schedule": "zbv"}),
    ],
    ids=str,
)
@pytest.mark.parametrize("scenario", [clipping, groups_and_scheduler, two_loaders], ids=lambda s: s.__name__)
def test_numbers_of_one_device(runs: Runs, scenario: Any, world: int, options: dict[str, Any]) -> None:
    one = runs.one(scenario, 4)
    for rank, found in enumerate(runs.on(world, scenario, 4, **options)):
        same({**one, "rows": [] if rank else one["rows"]}, found, f"rank {rank}")


def test_stages_are_spread_in_turn(runs: Runs) -> None:
    for plan in (found["plan"] for found in runs.on(2, short, 4, schedule="interleaved_1f1b")):
        assert plan.ranks == (1, 0, 1, 0)
    named = {"partition": ["blocks.0", "blocks.2", "head"], "schedule": "gpipe"}
    assert runs.on(2, short, 4, **named)[0]["plan"].ranks == (1, 0, 1, 0)


def test_layers_that_move_between_several_stages_change_no_number(runs: Runs) -> None:
    one = runs.one(train_long, 4)
    cuts = ["blocks.0.0", "blocks.3.0", "head"]
    many = runs.on(2, train_long, 4, partition=cuts, schedule="interleaved_1f1b", repartition_every_n_epochs=1)
    assert many[0]["cuts"][0] == cuts and many[0]["cuts"][1] != cuts
    for rank, found in enumerate(many):
        same(one["weights"], found["weights"], f"rank {rank}")


def test_resume_with_another_number_of_stages(runs: Runs) -> None:
    """What one run would have computed without a break."""
    half, end = (str(runs.folder / f"several-{name}.ckpt") for name in ("half", "end"))
    whole = runs.on(0, Saved(Classifier, end, None, 4))[0]
    runs.on(2, Saved(Classifier, half), schedule="interleaved_1f1b")
    for rank, found in enumerate(runs.on(3, Saved(Classifier, end, half, 4), virtual_stages=2)):
        same(whole, found, f"rank {rank}")
