"""``lwpm timeline``: schedules without a model."""

import json
from pathlib import Path

import pytest

from lightning_lwpm.cli import main
from lightning_lwpm.pipeline.tablefile import load_csv


def test_schedules_are_drawn_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "schedules.svg"
    names = ["1f1b", "interleaved_1f1b", "zbv"]
    assert main(["timeline", "--schedule", *names, "--stages", "4", "--microbatches", "8", "-o", str(path)]) == 0
    told = capsys.readouterr().out
    picture = path.read_text()
    for name, makespan, bubble in zip(names, ("33", "28.5", "25.5"), ("27%", "16%", "6%"), strict=True):
        assert name in told and makespan in told
        assert f"{name}: {makespan} units, bubble {bubble}" in picture


def test_times_and_stages_are_heeded(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    options = ["--stages", "2", "--microbatches", "1", "--virtual-stages", "4", "--forward", "8", "--backward", "16"]
    options += ["--weight", "4", "--latency", "0.5"]
    assert main(["timeline", "--schedule", "zb1p", *options, "-o", str(path)]) == 0
    events = json.loads(path.read_text())["traceEvents"]
    slices = {event["name"]: event for event in events if event["ph"] == "X"}
    milliseconds = {name: slices[name]["dur"] / 1e3 for name in ("0F0", "7I0", "7W0")}
    assert milliseconds == pytest.approx({"0F0": 2.0, "7I0": 3.0, "7W0": 1.0})
    assert slices["1F0"]["ts"] / 1e3 == pytest.approx(2.5)


def test_tables_are_written_for_each_schedule(tmp_path: Path) -> None:
    assert main(["timeline", "--schedule", "1f1b", "--stages", "2", "--csv", str(tmp_path / "one.csv")]) == 0
    assert main(["timeline", "--schedule", "gpipe", "1f1b", "--stages", "2", "--csv", str(tmp_path / "many.csv")]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["many-1f1b.csv", "many-gpipe.csv", "one.csv"]
    table = load_csv(tmp_path / "one.csv")
    assert [len(row) for row in table] == [16, 16] and table == load_csv(tmp_path / "many-1f1b.csv")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--schedule", "1fb1"], "did you mean '1f1b'"),
        (["--stages", "0"], "--stages 0"),
        (["--microbatches", "0"], "num_microbatches=0"),
        (["--virtual-stages", "0"], "--virtual-stages 0"),
        (["--weight", "3"], "--weight 3: it is the part of the backward pass"),
        (["--latency", "-1"], "--latency -1"),
        (["-o", "picture.pdf"], "ends in .svg or .png"),
    ],
)
def test_what_cannot_be_used_is_told_in_one_line(
    options: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["timeline", *options]) == 1
    assert told in " ".join(capsys.readouterr().err.split())
