"""The examples' configuration: every choice composes, and the main program runs."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import lightning as L
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

ROOT = Path(__file__).resolve().parents[2]
CONF = ROOT / "conf"
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
SHORT = ["trainer.max_epochs=1", "trainer.limit_train_batches=2", "trainer.limit_val_batches=1"]
SHORT += ["trainer.limit_test_batches=1", "trainer.enable_progress_bar=false", "trainer.enable_model_summary=false"]


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`train` sets the process's threads and seed; the other tests keep theirs."""
    monkeypatch.syspath_prepend(str(ROOT))
    # Set, so that they are put back: the program itself overwrites or adds them.
    for name in ("OMP_NUM_THREADS", "PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(name, os.environ.get(name, "1"))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    GlobalHydra.instance().clear()


def config(tmp_path: Path, *overrides: str) -> DictConfig:
    """Composes the main configuration as the command line would."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", [f"output_dir={tmp_path}", *overrides])


def test_there_are_experiments() -> None:
    assert {"digits", "language_model"} <= set(EXPERIMENTS)


@pytest.mark.parametrize("strategy", ["lwpm", "single"])
@pytest.mark.parametrize("trainer", ["cpu", "gpu"])
@pytest.mark.parametrize("choice", [[], *([f"experiment={name}"] for name in EXPERIMENTS)])
def test_every_choice_composes(choice: list[str], trainer: str, strategy: str, tmp_path: Path) -> None:
    cfg = config(tmp_path, f"trainer={trainer}", f"strategy={strategy}", *choice)

    resolved = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)

    assert resolved["trainer"]["accelerator"] == trainer
    assert resolved["trainer"]["devices"] == (2 if strategy == "lwpm" else 1)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_model_takes_what_data_gives(experiment: str, tmp_path: Path) -> None:
    cfg = config(tmp_path, f"experiment={experiment}", "data.batch_size=4")
    data: L.LightningDataModule = instantiate(cfg.data)
    model: L.LightningModule = instantiate(cfg.model)

    data.setup("fit")
    batch = next(iter(data.train_dataloader()))

    assert model(batch[0]).isfinite().all()
    assert 2e5 < sum(p.numel() for p in model.parameters()) < 1e6


@pytest.mark.parametrize(
    "experiment, unit, score", [("digits", "samples", "test/acc"), ("language_model", "tokens", "test/perplexity")]
)
def test_program_runs(
    experiment: str,
    unit: str,
    score: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from examples.train import main

    arguments = [f"experiment={experiment}", "strategy=single", f"hydra.run.dir={tmp_path}", *SHORT]
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    main()

    printed = capsys.readouterr().out
    assert "SingleDeviceStrategy" in printed
    assert f"{unit}/s" in printed
    assert score.replace("/", " ") in printed
    assert list(tmp_path.rglob("*.ckpt"))


def test_texts_are_split_by_position() -> None:
    from examples.data.topics import TopicsDataModule

    data = TopicsDataModule(block_size=16)
    data.setup("fit")

    inputs, targets = data.train.tensors
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert torch.equal(inputs[1:, 0], targets[:-1, -1])
    assert inputs.max() < 96
