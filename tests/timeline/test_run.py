"""A run with a timeline: what is in it, what is logged, and that no number of the training changes."""

import json
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from torch.utils.data import DataLoader
from training.modules import Classifier, Recorder, data
from training.runs import Runs, same, weights

from lightning_lwpm import ConfigurationError, LWPMStrategy
from lightning_lwpm.pipeline.schedule import Action, build


def fit(kwargs: dict[str, Any], batches: int = 16, **more: Any) -> dict[str, Any]:
    """A short training with a logger."""
    L.seed_everything(5)
    module, recorder = Classifier(), Recorder()
    options: dict[str, Any] = {"max_epochs": 1, "log_every_n_steps": 4, "gradient_clip_val": 0.5, **more}
    trainer = L.Trainer(**{**kwargs, **options, "logger": recorder})
    trainer.fit(module, DataLoader(data(8 * batches), 8))
    names = [type(callback).__name__ for callback in trainer.callbacks]
    plan = getattr(trainer.strategy, "plan", None)
    bubble = plan.prediction.bubble if plan is not None and plan.prediction is not None else None
    return {"weights": weights(module), "rows": recorder.rows, "callbacks": names, "predicted": bubble}


def one_epoch_of_five(kwargs: dict[str, Any]) -> dict[str, Any]:
    return fit(kwargs, batches=5, max_epochs=2)


def slices(path: Path) -> list[dict[str, Any]]:
    """The slices of the measured ranks of a trace."""
    events = json.loads(path.read_text())["traceEvents"]
    measured = {e["pid"] for e in events if e["name"] == "process_name" and e["args"]["name"].startswith("Measured")}
    return [event for event in events if event["ph"] == "X" and event["pid"] in measured]


def bubbles(rows: list[tuple[Any, dict[str, float]]]) -> dict[int, dict[str, float]]:
    return {step: row for step, row in rows if "lwpm/bubble" in row}


@pytest.mark.parametrize(("world", "schedule"), [(2, "zbv"), (3, "1f1b")])
def test_what_a_run_records(runs: Runs, tmp_path: Path, world: int, schedule: str) -> None:
    path = tmp_path / "new" / "trace.json"
    found = runs.on(world, fit, 4, schedule=schedule, costs="measured", timeline=str(path))
    spans = slices(path)
    assert {span["args"]["batch"] for span in spans} == {10, 11, 12}
    stages = 2 * world if schedule == "zbv" else world
    table = build(schedule, stages, 4, world)
    for batch in (10, 11, 12):
        done = {s["name"] for s in spans if s["tid"] == 0 and s["args"]["batch"] == batch}
        assert done == {str(action) for row in table for action in row} | {"data", "optimizer"}
    threads = defaultdict(list)
    for span in spans:
        threads[span["pid"]].append((span["ts"], span["ts"] + span["dur"]))
    assert len(threads) == world
    for times in threads.values():
        times.sort()
        assert all(a[1] <= b[0] + 1e-3 for a, b in pairwise(times)), "waits are no work"
    waits = {span["name"] for span in spans if span["tid"] == 1}
    assert waits - {"wait for data"} == {"wait for activation", "wait for gradient", "wait for optimizer"}
    assert all(span["args"]["waits for"] for span in spans if span["tid"] == 1)

    logged = bubbles(found[0]["rows"])
    assert sorted(logged) == [3, 7, 11, 15]
    for row in logged.values():
        assert 0.0 < row["lwpm/bubble"] < 1.0
        assert row["lwpm/bubble_predicted"] == pytest.approx(found[0]["predicted"])
    assert not any(bubbles(other["rows"]) for other in found[1:])
    assert not any("Recorder" in other["callbacks"] for other in found)


def test_a_timeline_changes_no_number(runs: Runs, tmp_path: Path) -> None:
    plain = runs.on(2, fit, 2)
    drawn = runs.on(2, fit, 2, timeline=str(tmp_path / "timeline.svg"))
    logged = runs.on(2, fit, 2, log_bubble=True)
    assert (tmp_path / "timeline.svg").stat().st_size > 1000
    for other in (drawn, logged):
        same(plain[0]["weights"], other[0]["weights"])
        rest = [row for row in other[0]["rows"] if "lwpm/bubble" not in row[1]]
        same(plain[0]["rows"], rest)
        assert len(bubbles(other[0]["rows"])) == 4
    assert not bubbles(plain[0]["rows"])


def test_a_short_epoch_gives_its_last_batches(runs: Runs, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    runs.on(2, one_epoch_of_five, 2, timeline=str(path))
    assert {span["args"]["batch"] for span in slices(path)} == {2, 3, 4}


def test_layers_that_move_are_recorded_where_they_go(runs: Runs, tmp_path: Path) -> None:
    def moving(kwargs: dict[str, Any]) -> dict[str, Any]:
        return fit(kwargs, batches=4, max_epochs=3, log_every_n_steps=1)

    path = tmp_path / "trace.json"
    found = runs.on(2, moving, 4, partition=["head"], repartition_every_n_epochs=1, timeline=str(path))
    assert sorted(bubbles(found[0]["rows"])) == list(range(12))
    assert {span["args"]["batch"] for span in slices(path)} == {1, 2, 3}


def test_one_process_has_a_timeline_too(runs: Runs, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    found = runs.on(1, fit, 2, timeline=str(path))
    assert {span["name"] for span in slices(path)} == {"0F0", "0B0", "0F1", "0B1", "data", "optimizer"}
    assert 0.0 <= bubbles(found[0]["rows"])[3]["lwpm/bubble"] < 1.0


def test_a_file_that_cannot_be_written_ends_no_training(runs: Runs, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    path = str(tmp_path / "taken" / "trace.json")

    def warned(kwargs: dict[str, Any]) -> list[str]:
        with pytest.warns(UserWarning) as caught:
            fit(kwargs)
        return [str(w.message) for w in caught]

    assert any(f"could not be written to {path!r}" in text for text in runs.on(1, warned, 2, timeline=path)[0])


def test_batches_that_overlap_are_planned_and_measured_in_the_middle(runs: Runs, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    runs.on(3, fit, 4, schedule="async", timeline=str(path))
    events = json.loads(path.read_text())["traceEvents"]
    titles = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    expected = {str(Action("B", 0, number)) for number in range(4)} | {str(Action("F", 0, n)) for n in range(2, 6)}
    for half in ("Planned", "Measured"):
        pids = {pid for pid, title in titles.items() if title.startswith(half)}
        for batch in (10, 11, 12):
            names = {e["name"] for e in events if e["ph"] == "X" and e["pid"] in pids and e["args"]["batch"] == batch}
            assert {name for name in names if name[:2] in ("0F", "0B")} == expected


@pytest.mark.parametrize(("options", "told"), [({"timeline": 3}, "timeline=3"), ({"timeline": "a.gif"}, "'a.gif'")])
def test_what_cannot_be_used_is_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigurationError, match=told):
        LWPMStrategy(**options)
