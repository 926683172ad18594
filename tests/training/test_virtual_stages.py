"""Several stages on a rank: every schedule gives the numbers of one device, with all that Lightning does around it."""

from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader
from training.modules import Classifier, data
from training.runs import Runs, same, weights
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
        (2, {"activation_checkpointing": "layer"}),
        (2, {"activation_checkpointing": "stage", "schedule": "gpipe"}),
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


class Siamese(Classifier):
    """A tower that is called twice, and a head for both."""

    def __init__(self) -> None:
        super().__init__(width=512)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.tower(x) * self.tower(-x))

    def tower(self, x: torch.Tensor) -> torch.Tensor:
        h = self.inlet(x)
        for block in self.blocks:
            h = h + block(h)
        return h


def siamese(kwargs: dict[str, Any]) -> Any:
    L.seed_everything(5)
    module = Siamese()
    L.Trainer(**kwargs, max_epochs=1).fit(module, DataLoader(data(192), 64))
    return {"weights": weights(module), "ranks": getattr(module.trainer.strategy, "plan", None)}


@pytest.mark.parametrize("schedule", ["1f1b", "zb1p"])
def test_a_module_called_again_gets_another_stage_on_its_rank(runs: Runs, schedule: str) -> None:
    """Its weights are held once; the parts of their gradients are summed in the order in which stages come to them."""
    one = runs.one(siamese, 4)
    for rank, found in enumerate(runs.on(2, siamese, 4, schedule=schedule)):
        assert found["ranks"].ranks == (1, 0, 1, 0)
        same(one["weights"], found["weights"], f"rank {rank}", tolerance=1e-5)


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
