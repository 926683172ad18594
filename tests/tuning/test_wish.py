"""What the user asked for, put together from arguments, plans and files."""

from pathlib import Path

import pytest

from lightning_lwpm.errors import ConfigurationError
from lightning_lwpm.partition.plan import PartitionPlan, Prediction, StagePlan
from lightning_lwpm.tuning.lineup import Lineup, lineups
from lightning_lwpm.tuning.wish import Wish

STAGES = tuple(
    StagePlan(i, 1 - i, calls, 1, 4, 0.5, 0) for i, calls in enumerate([(("a", 0), ("b", 0)), (("a", 1), ("c", 0))])
)
TOLD = PartitionPlan(STAGES, 2, Prediction(6, "gpipe", 1.0, 0.1))
UNTOLD = PartitionPlan(STAGES, 2)


@pytest.mark.parametrize("partition", ["auto", ["a@1"], []])
def test_layers_and_auto_stay(partition: str | list[str]) -> None:
    wish = Wish(partition)
    assert wish.resolved() is wish


@pytest.mark.parametrize("as_file", [False, True])
def test_a_plan_says_what_is_open(as_file: bool, tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    TOLD.save(path)
    wish = Wish(str(path) if as_file else TOLD, limits=(1.0, 2.0), state_factor=2.0).resolved()
    assert wish == Wish(["a@1"], 6, "gpipe", (1.0, 2.0), 2.0)


@pytest.mark.parametrize("as_file", [False, True])
def test_the_users_own_words_come_first(as_file: bool, tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    TOLD.save(path)
    given = str(path) if as_file else TOLD
    assert Wish(given, 3, "auto").resolved() == Wish(["a@1"], 3, "gpipe")
    assert Wish(given, "auto", "1f1b").resolved() == Wish(["a@1"], 6, "1f1b")


@pytest.mark.parametrize("as_file", [False, True])
def test_stages_stay_on_their_ranks(as_file: bool, tmp_path: Path) -> None:
    stages = tuple(StagePlan(i, rank, ((f"l{i}", 0),), 1, 4, 0.5, 0) for i, rank in enumerate((0, 1, 1, 0)))
    plan, path = PartitionPlan(stages, 2, Prediction(6, "zb1p", 1.0, 0.1)), tmp_path / "plan.yaml"
    plan.save(path)
    wish = Wish(str(path) if as_file else plan).resolved()
    assert wish == Wish(["l1", "l2", "l3"], 6, "zb1p", ranks=(0, 1, 1, 0))
    assert lineups(wish, 2, 10) == [Lineup("zb1p", (0, 1, 1, 0))]


def test_a_plan_that_expects_nothing_leaves_the_rest_open(tmp_path: Path) -> None:
    assert Wish(UNTOLD).resolved() == Wish(["a@1"])
    path = tmp_path / "cuts.yaml"
    path.write_text("- a@1\n")
    assert Wish(str(path)).resolved() == Wish(["a@1"])


def test_a_plan_of_one_stage() -> None:
    assert Wish(PartitionPlan(STAGES[:1], 1)).resolved().partition == []


def test_a_file_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"no plan file .*nowhere\.yaml"):
        Wish(str(tmp_path / "nowhere.yaml")).resolved()
