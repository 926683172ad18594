"""A project laid out like lightning-hydra-template takes the strategy by configuration alone."""

import inspect
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import DictConfig

from hydra_plugins.lightning_lwpm import LWPMConf
from lightning_lwpm import LWPMStrategy

PROJECT = Path(__file__).parent / "project"
ROOT = Path(__file__).resolve().parents[2]
GIVEN_BY_LIGHTNING = {"accelerator", "parallel_devices", "cluster_environment", "checkpoint_io", "precision_plugin"}


@pytest.fixture(autouse=True)
def no_hydra_left() -> Iterator[None]:
    yield
    GlobalHydra.instance().clear()


def trainer(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(PROJECT / "configs"), version_base="1.3"):
        return compose("train", list(overrides)).trainer


def run(folder: Path, *overrides: str) -> "subprocess.CompletedProcess[str]":
    """The project's program, as a user starts it, with its logs in ``folder``."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PROJECT_ROOT": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(PROJECT / "src" / "train.py"), *overrides]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=200)


def test_schema_is_the_signature() -> None:
    """The plugin cannot import the strategy, because that imports torch: its copy of the options must be true."""
    options = {name: p.default for name, p in inspect.signature(LWPMStrategy).parameters.items()}
    schema = {field.name: field.default for field in fields(LWPMConf) if not field.name.startswith("_")}
    assert schema == {name: value for name, value in options.items() if name not in GIVEN_BY_LIGHTNING}


def test_plugin_is_light() -> None:
    code = "import hydra_plugins.lightning_lwpm, sys; sys.exit('torch' in sys.modules or 'lightning' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["trainer=lwpm"], {"schedule": "auto", "devices": 2, "accelerator": "auto"}),
        (["+trainer/strategy=lwpm"], {"schedule": "auto", "devices": 1}),
        (["trainer=ddp", "+trainer/strategy=lwpm"], {"schedule": "auto", "devices": 2}),
        (["trainer=ddp", "+trainer/strategy=lwpm_async"], {"schedule": "async", "devices": 2}),
        (["trainer=lwpm", "trainer/strategy=lwpm_async", "trainer.devices=3"], {"schedule": "async", "devices": 3}),
    ],
)
def test_choices(overrides: list[str], expected: dict[str, Any]) -> None:
    """On top of the project's own trainer, whose other settings stay."""
    cfg = trainer(*overrides, "trainer.strategy.partition=[second]")
    strategy = instantiate(cfg.strategy)
    assert type(strategy) is LWPMStrategy
    assert strategy.partition == ["second"] and type(strategy.partition) is list
    assert cfg._target_ == "lightning.pytorch.trainer.Trainer" and cfg.max_epochs == 1
    found = {name: strategy.schedule if name == "schedule" else cfg[name] for name in expected}
    assert found == expected


@pytest.mark.parametrize("wrong", ["patience=long", "num_microbatches=[2]", "microbatches=2"])
def test_wrong_settings_are_refused(wrong: str) -> None:
    with pytest.raises(HydraException, match=f"trainer.strategy.{wrong.split('=')[0]}"):
        trainer("trainer=lwpm", f"trainer.strategy.{wrong}")


def test_runs_and_sweeps(tmp_path: Path) -> None:
    """All ranks of a run share one folder. A sweep starts its jobs' processes without Hydra."""
    options = ["trainer=lwpm", "trainer.strategy.costs=estimated"]
    done = run(tmp_path, *options)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "logs/train/runs").iterdir()
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {"rank0.txt", "rank1.txt", "checkpoints/best.ckpt", ".hydra/config.yaml"} <= files
    weights = (folder / "rank0.txt").read_text()
    assert weights == (folder / "rank1.txt").read_text()

    sweep = run(tmp_path, *options, "trainer.strategy.start_method=spawn,popen", "--multirun")
    (folder,) = (tmp_path / "logs/train/multiruns").iterdir()
    assert (folder / "0" / "rank0.txt").read_text() == weights, sweep.stderr
    assert sweep.returncode != 0 and "one job of a Hydra sweep" in sweep.stderr, sweep.stderr
    assert not list((tmp_path / "logs/train/runs").iterdir())[1:], "a rank has a folder of its own"
