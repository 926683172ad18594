"""A failure of one rank, wherever it happens, ends all of them within seconds, with the same words."""

import io
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from failure import faults
from failure.faults import Fault

from lightning_lwpm.pipeline.schedule import place

WORLD = 3
ENDS_WITHIN = 10.0

_STAGE = {rank: stage for stage, rank in enumerate(place(WORLD))}

IN_SCHEDULE = [
    Fault("forward", 2, 0),
    Fault("forward", 1, 2),
    Fault("forward", 0, 3),
    Fault("backward", 2, 1),
    Fault("backward", 1, 0),
    Fault("backward", 0, 3),
]
ELSEWHERE = [
    *(Fault("step", rank) for rank in range(WORLD)),
    *(Fault("on_train_batch_start", rank) for rank in range(WORLD)),
    *(Fault("configure_optimizers", rank) for rank in (0, 2)),
    *(Fault("setup", rank) for rank in (0, 1)),
    Fault("on_validation_epoch_end", 0),
    Fault("loader", 0),
]
DEATHS = [
    Fault("forward", 0, 2, "kill"),
    Fault("forward", 2, 0, "exit"),
    Fault("backward", 1, 1, "kill"),
    Fault("step", 2, 0, "exit"),
    Fault("on_train_batch_start", 1, 0, "exit"),
    Fault("setup", 0, 0, "kill"),
    Fault("loader", 0, 0, "kill"),
]


def _name(fault: Fault) -> str:
    return f"{fault.place}-{fault.microbatch}-rank{fault.rank}-{fault.how}"


@pytest.fixture(scope="module")
def times() -> Any:
    """Seconds from failure to the end of the last rank, printed at the end."""
    seconds: dict[str, float] = {}
    yield seconds
    print("\n" + "\n".join(f"{seconds[name]:6.2f} s  {name}" for name in seconds))


def _run(pool: Any, fault: Fault, path: Path, times: dict[str, float], **options: Any) -> list[Any]:
    fault = Fault(fault.place, fault.rank, fault.microbatch, fault.how, str(path / "clock"))
    outcomes = pool.outcomes(WORLD, _fit, fault, options, timeout=60, keep=True)
    assert (path / "clock").exists(), outcomes
    ends = [value["time"] if ok else time.time() for ok, value in outcomes]
    struck = float((path / "clock").read_text())
    times[_name(fault)] = max(ends) - struck
    assert times[_name(fault)] < ENDS_WITHIN, outcomes
    return outcomes


def _fit(rank: int, world: int, fault: Fault, options: Any) -> Any:
    return faults.fit(rank, world, fault, **options)


@pytest.mark.parametrize("fault", IN_SCHEDULE, ids=_name)
def test_exception_in_the_schedule(pool: Any, tmp_path: Path, times: Any, fault: Fault) -> None:
    outcomes = [value for _, value in _run(pool, fault, tmp_path, times)]
    texts = {outcome["text"] for outcome in outcomes}
    assert len(texts) == 1, texts
    text = texts.pop()
    stage = f"stage {_STAGE[fault.rank]} (rank {fault.rank})"
    first = f"{stage} failed in {fault.place} of micro-batch {fault.microbatch}: ValueError: boom in {fault.place}\n"
    assert text.startswith(first)
    assert "faults.py" in text and "in strike" in text  # the original traceback
    assert all(outcome["type"] == "PipelineError" for outcome in outcomes)


@pytest.mark.parametrize("fault", ELSEWHERE, ids=_name)
def test_exception_elsewhere(pool: Any, tmp_path: Path, times: Any, fault: Fault) -> None:
    for rank, (_, outcome) in enumerate(_run(pool, fault, tmp_path, times)):
        assert f"boom in {fault.place}" in outcome["text"], outcome
        if rank != fault.rank:
            assert outcome["type"] == "PipelineError"
            assert f"rank {fault.rank}" in outcome["text"].split("failed")[0]
            assert f"ValueError: boom in {fault.place}" in outcome["text"] and "in strike" in outcome["text"]


@pytest.mark.parametrize("fault", DEATHS, ids=_name)
def test_death(pool: Any, tmp_path: Path, times: Any, fault: Fault) -> None:
    for rank, (ok, outcome) in enumerate(_run(pool, fault, tmp_path, times)):
        if rank == fault.rank:
            assert not ok and outcome[1] == f"exit code {3 if fault.how == 'exit' else -9}"
        else:
            assert outcome["type"] == "PipelineError"
            assert f"rank {fault.rank}" in outcome["text"].split("died")[0], outcome
            assert "died without a word" in outcome["text"]


class _SlowEnd(L.Callback):
    """Keeps the failing rank busy after its failure."""

    def on_exception(self, trainer: Any, module: Any, exception: BaseException) -> None:
        if trainer.global_rank == 1:
            time.sleep(7)


def test_others_end_while_the_failing_rank_is_busy(pool: Any, tmp_path: Path) -> None:
    fault = Fault("on_train_batch_start", 1, clock=str(tmp_path / "clock"))
    outcomes = pool.run(WORLD, _fit, fault, {"callbacks": [_SlowEnd()]}, timeout=60)
    struck = float((tmp_path / "clock").read_text())
    for rank in (0, 2):
        assert outcomes[rank]["time"] - struck < 5
        assert "boom in on_train_batch_start" in outcomes[rank]["text"]


def test_a_rank_stuck_in_user_code_is_ended(pool: Any, tmp_path: Path, times: Any) -> None:
    """Rank 2 sleeps in the user's hook when rank 0 fails: it cannot hear, so its process is ended."""
    outcomes = pool.outcomes(WORLD, _fit_stuck, Fault("on_train_batch_start", 0), timeout=60, keep=True)
    assert "boom" in outcomes[0][1]["text"] and "boom" in outcomes[1][1]["text"]
    assert outcomes[2][1][:2] == ("Died", "exit code 1")
    assert "the main thread has not listened for 8 s" in outcomes[2][1][2] and "boom" in outcomes[2][1][2]


def _fit_stuck(rank: int, world: int, fault: Fault) -> Any:
    return faults.fit(rank, world, fault if rank != 2 else Fault("on_train_batch_start", 2, how="sleep"))


def test_a_long_wait_is_explained(pool: Any) -> None:
    """Stage 0 takes 4 seconds over a micro-batch; the others say what they wait for, at most once in 1.5 seconds."""
    said = pool.run(WORLD, _fit_listening, Fault("forward", 2, 2, "doze"), {"patience": 1.5})
    head = "[lwpm] stage 1 (rank 1) has waited"
    waits = [line for line in said[1] if line.startswith(head)]
    tail = "for the activation (output 0 of layer 'layers.1') of micro-batch 2 from stage 0 (rank 2)"
    assert [line[: len(head) + 4] for line in waits] == [f"{head} 2 s", f"{head} 3 s"], said
    assert all(tail in line for line in waits), said
    assert len(said[0]) == 2 and all("from stage 1 (rank 1)" in line for line in said[0]), said
    assert said[2] == []


def _fit_listening(rank: int, world: int, fault: Fault, options: Any) -> list[str]:
    stderr, sys.stderr = sys.stderr, io.StringIO()
    try:
        faults.fit(rank, world, fault, **options)
        return [line for line in sys.stderr.getvalue().splitlines() if line.startswith("[lwpm]")]
    finally:
        sys.stderr = stderr


def test_training_works_after_all_this(pool: Any) -> None:
    assert [outcome["text"] for outcome in pool.run(WORLD, _fit, Fault(), {})] == [""] * WORLD
