"""The other ways to start processes: same numbers, a quiet end, and a model that can be used afterwards."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

SCRIPT = """
    import sys

    sys.path.insert(0, {tests!r})
    import lightning as L
    import torch

    import lightning_lwpm
    from training.modules import Classifier, train_loader, val_loader

    if __name__ == "__main__":
        torch.set_num_threads(1)
        L.seed_everything(2)
        module = Classifier()
        quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
        trainer = L.Trainer(accelerator="cpu", devices=2, strategy={strategy!r}, max_epochs=1, **quiet)
        trainer.fit(module, train_loader(), val_loader())
        result = float(trainer.callback_metrics["val/loss"]), module(torch.ones(1, 6)).tolist()
        sys.stdout.write("RESULT " + repr(result) + chr(10))  # in one go: ranks share the stream
        sys.stdout.flush()
"""


@pytest.fixture(scope="module")
def results() -> dict[str, str]:
    return {}


@pytest.mark.parametrize(
    ("strategy", "options"),
    [("lwpm", []), ("lwpm_spawn", []), ("lwpm_fork", []), pytest.param("lwpm", ["-i"], id="as in a notebook")],
)
def test_start_methods(tmp_path: Path, results: dict[str, str], strategy: str, options: list[str]) -> None:
    script = tmp_path / "script.py"
    tests = str(Path(__file__).parents[1])
    script.write_text(textwrap.dedent(SCRIPT).format(tests=tests, strategy=strategy))
    command = [sys.executable, *options, script]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "died" not in done.stderr
    lines = {line for line in done.stdout.splitlines() if line.startswith("RESULT")}
    assert len(lines) == 1, done.stdout  # of both processes, where both run the script
    results[strategy + str(options)] = lines.pop()
    assert len(set(results.values())) == 1
