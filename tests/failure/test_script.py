"""The way of a user: ``python script.py``, whose Trainer starts the other process; nothing stays behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parent / "script.py"


@dataclass(frozen=True)
class _Run:
    """How a script ended: exit code, what it wrote, and seconds from its failure to the end of its last process."""

    code: int
    out: str
    err: str
    seconds: float


def _run(path: Path, *args: str, timeout: float = 90) -> _Run:
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
            seconds = time.time() - _struck(path)
        finally:
            if _alive(process.pid):
                os.killpg(process.pid, signal.SIGKILL)
    return _Run(code, (path / "out").read_text(), (path / "err").read_text(), seconds)


def _alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def _struck(path: Path) -> float:
    return float((path / "clock").read_text()) if (path / "clock").exists() else time.time()


SCRIPTS = {
    "exception": ("backward", "1", "raise"),
    "death of the child": ("forward", "1", "kill"),
    "death of the main process": ("step", "0", "exit"),
    "deaf": ("on_train_batch_start", "0", "both"),
    "workers": ("forward", "0", "kill", "2"),
    "leave": ("leave", "1", "raise"),
    "normal": ("after", "0", "raise"),
}


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: Any) -> Iterator[dict[str, Any]]:
    """All runs, two at a time: each spends most of its time importing."""
    paths = {name: tmp_path_factory.mktemp("script") for name in SCRIPTS}
    with ThreadPoolExecutor(2) as executor:
        yield {name: executor.submit(_run, paths[name], *SCRIPTS[name]) for name in SCRIPTS}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("exception", "stage 0 (rank 1) failed in backward of micro-batch 1: ValueError: boom in backward"),
        ("death of the child", "stage 0 (rank 1) died without a word"),
        ("death of the main process", "stage 1 (rank 0) died without a word"),
        ("deaf", "stage 1 (rank 0) failed: ValueError: boom in on_train_batch_start"),
        ("workers", "stage 1 (rank 0) died without a word"),
    ],
)
def test_nothing_stays_behind(scripts: Any, name: str, message: str) -> None:
    """Deaf: rank 1 sleeps in the user's code. Workers: forked ones inherit sockets, and must not keep them open."""
    run = scripts[name].result()
    print(f"{run.seconds:6.2f} s  {name}: {SCRIPTS[name]}")
    assert run.code not in (0, -signal.SIGABRT, -signal.SIGSEGV), run.err
    assert "core dumped" not in run.err and "terminate called" not in run.err, run.err
    assert message in run.err, run.err
    assert run.seconds < 15


def test_a_rank_that_leaves_while_others_go_on(scripts: Any) -> None:
    run = scripts["leave"].result()
    assert run.code != 0
    assert "but stage 0 (rank 1) has come to the end of its program" in run.err, run.err


def test_a_normal_end(scripts: Any) -> None:
    """Rank 0 goes on alone for a while after training."""
    run = scripts["normal"].result()
    assert run.code == 0, run.err
    assert "[lwpm]" not in run.err and "Error" not in run.err, run.err
    assert run.out.count("done") == 2
