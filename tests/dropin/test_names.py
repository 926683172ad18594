"""`strategy="lwpm"` works without an import, with both of Lightning's packages, and from LightningCLI."""

import ast
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.strategies import StrategyRegistry
from pool import Pool

import lightning_lwpm_autoload
from lightning_lwpm import LWPMStrategy
from lightning_lwpm_autoload import STRATEGIES, autoload

SCRIPT = Path(__file__).parent / "script.py"
ROOT = Path(__file__).resolve().parents[2]


def on_one_device(rank: int, world: int) -> Any:
    from dropin.script import train

    return train("lightning", devices=1)


def test_without_an_import(pool: Pool) -> None:
    """In a project that imports the other package, with the numbers of one device. It loads one of them only."""
    pytest.importorskip("pytorch_lightning")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), "pytorch_lightning"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    results = {line.removeprefix("RESULT ") for line in done.stdout.splitlines() if line.startswith("RESULT")}
    assert len(results) == 1, done.stdout  # of both ranks
    kind, loss, weights = ast.literal_eval(results.pop())
    ((_, expected_loss, expected),) = pool.run(1, on_one_device)
    assert kind == "pytorch_lightning_lwpm.strategy.LWPMStrategy"
    assert [loss, *weights] == pytest.approx([expected_loss, *expected], rel=1e-5, abs=1e-6)


def test_import_registers_every_name() -> None:
    for name, (_, options) in STRATEGIES.items():
        strategy = StrategyRegistry.get(name)
        assert type(strategy) is LWPMStrategy
        assert {key: getattr(strategy, key) for key in options} == options


def test_autoload_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    others = [finder for finder in sys.meta_path if finder is not lightning_lwpm_autoload._Finder]
    monkeypatch.setattr(sys, "meta_path", others[:])
    monkeypatch.setenv("LIGHTNING_LWPM_AUTOLOAD", "0")
    autoload()
    assert sys.meta_path == others
    monkeypatch.delenv("LIGHTNING_LWPM_AUTOLOAD")
    autoload()
    autoload()
    assert len(sys.meta_path) == len(others) + 1


CLASS_PATH = """
trainer:
  accelerator: cpu
  devices: 2
  strategy:
    class_path: lightning_lwpm.LWPMStrategy
    init_args:
      num_microbatches: 2
      partition: [layer.1]
      timeout: 0:10:00
"""


@pytest.mark.parametrize("way", ["name", "class", "file"])
def test_command_line_interface(
    way: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("jsonargparse")
    monkeypatch.setattr(sys, "argv", ["script.py"])
    from lightning.pytorch.cli import LightningCLI

    (tmp_path / "config.yaml").write_text(CLASS_PATH)
    settings = ["partition=[layer.1]", "num_microbatches=2", "timeout=0:10:00"]
    arguments = {
        "name": ["--trainer.strategy=lwpm"],
        "class": ["--trainer.strategy=lightning_lwpm.LWPMStrategy", *(f"--trainer.strategy.{s}" for s in settings)],
        "file": [f"--config={tmp_path / 'config.yaml'}"],
    }[way]
    arguments += ["--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.logger=false"]

    def cli(*more: str) -> LightningCLI:
        return LightningCLI(BoringModel, L.LightningDataModule, run=False, args=[*arguments, *more])

    strategy = cli().trainer.strategy
    assert type(strategy) is LWPMStrategy
    if way != "name":
        assert (strategy.partition, strategy.num_microbatches) == (["layer.1"], 2)
        assert strategy.timeout.total_seconds() == 600

    with pytest.raises(SystemExit):
        cli("--print_config")
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    arguments = [f"--config={tmp_path / 'printed.yaml'}"]
    again = cli().trainer.strategy
    assert (again.partition, again.num_microbatches) == (strategy.partition, strategy.num_microbatches)
