"""The way of a user: ``python script.py``, whose Trainer starts the other process; nothing stays behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "script.py"


def _run(path: Path, *args: str, timeout: float = 60) -> tuple[int, str, float]:
    """Exit code, standard error and the time at which the last process of the script was gone."""
    tests = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": f"{tests.parent}{os.pathsep}{tests}"}
    with open(path / "err", "wb") as err, open(path / "out", "wb") as out:
        process = subprocess.Popen(
            [sys.executable, str(SCRIPT), *args],
            cwd=path,
            env=environment,
            stdout=out,
            stderr=err,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout)
            while _alive(process.pid):
                time.sleep(0.05)
                assert time.time() - _struck(path) < 20, "a process stays behind"
            end = time.time()
        finally:
            if _alive(process.pid):
                os.killpg(process.pid, signal.SIGKILL)
    return code, (path / "err").read_text(), end


def _alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def _struck(path: Path) -> float:
    return float((path / "clock").read_text()) if (path / "clock").exists() else time.time()


@pytest.mark.parametrize(
    ("place", "rank", "how", "message"),
    [
        ("forward", 0, "raise", "stage 1 (rank 0) failed in forward of micro-batch 1: ValueError: boom in forward"),
        ("backward", 1, "raise", "stage 0 (rank 1) failed in backward of micro-batch 1: ValueError: boom in backward"),
        ("forward", 1, "kill", "stage 0 (rank 1) died without a word"),
        ("step", 0, "exit", "stage 1 (rank 0) died without a word"),
        ("on_train_batch_start", 0, "both", "stage 1 (rank 0) failed: ValueError: boom in on_train_batch_start"),
    ],
)
def test_nothing_stays_behind(tmp_path: Path, place: str, rank: int, how: str, message: str) -> None:
    """In the last case rank 1 sleeps in the user's code, where it cannot hear."""
    code, err, end = _run(tmp_path, place, str(rank), how)
    seconds = end - _struck(tmp_path)
    print(f"{seconds:6.2f} s  {place} of rank {rank}: {how}")
    assert code != 0 and code != -signal.SIGABRT and code != -signal.SIGSEGV, err
    assert message in err, err
    assert "core dumped" not in err and "terminate called" not in err, err
    assert seconds < 15


def test_death_with_workers_of_a_data_loader(tmp_path: Path) -> None:
    """A forked worker inherits the sockets of rank 0, and must not keep them open when that dies."""
    code, err, end = _run(tmp_path, "forward", "0", "kill", "2")
    assert code == -signal.SIGKILL
    assert "stage 1 (rank 0) died without a word" in err, err
    assert end - _struck(tmp_path) < 15  # the workers themselves look for their parent every 5 s


def test_a_rank_that_leaves_while_others_go_on(tmp_path: Path) -> None:
    code, err, _ = _run(tmp_path, "leave", "1", "raise")
    assert code != 0
    assert "but stage 0 (rank 1) has come to the end of its program" in err, err


def test_a_normal_end(tmp_path: Path) -> None:
    """Rank 0 goes on alone for a while after training."""
    code, err, _ = _run(tmp_path, "after", "0", "raise")
    assert code == 0, err
    assert "lwpm]" not in err and "Error" not in err, err
    assert (tmp_path / "out").read_text().count("done") == 2
