"""``lwpm plan``: plans without training, and one line for what the user can mend."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import lightning as L
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra

from lightning_lwpm.cli import main
from lightning_lwpm.partition.planfile import load_plan
from lightning_lwpm.tuning.wish import Wish

ROOT = Path(__file__).resolve().parents[2]
CPU = ["--accelerator", "cpu"]

PROJECT = '''
import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Net(L.LightningModule):
    def __init__(self, depth: int = 4, width: int = 16):
        super().__init__()
        self.save_hyperparameters()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(depth))

    def training_step(self, batch, batch_idx):
        (x,) = batch
        for block in self.blocks:
            x = block(x)
        return x.square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())


class Alone(Net):
    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.randn(64, 16)), 32)


class Data(L.LightningDataModule):
    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.randn(64, 16)), 32)


class Empty(L.LightningDataModule):
    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.randn(0, 16)), 32)


class Settings(Net):
    def __init__(self, depth: int):
        super().__init__(depth)


class Broken(Alone):
    def __init__(self):
        super().__init__()
        raise RuntimeError("a mistake of its own")


class Pure(L.LightningModule):
    """Calls no layer."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(16))

    def training_step(self, batch, batch_idx):
        return (batch[0] * self.weight).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


NUMBER = 5
'''


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The command belongs to a process of its own: threads, paths and seeds are put back."""
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(name, os.environ.get(name, "1"))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "path", list(sys.path))
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    yield
    torch.set_num_threads(threads)
    torch.set_rng_state(state)
    GlobalHydra.instance().clear()


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a project in it, from which the command is called."""
    (tmp_path / "lwpm_project.py").write_text(PROJECT)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("lwpm_project", None)


Capture = pytest.CaptureFixture[str]


def plan(*arguments: str, model: str = "Alone") -> int:
    """The exit status for a model of the project."""
    return main(["plan", "--model", f"lwpm_project:{model}", *CPU, *arguments])


def rows(text: str, title: str) -> list[list[str]]:
    """The cells of each row of a table."""
    lines = text[text.index(title) :].splitlines()
    end = next(i for i, line in enumerate(lines) if line.startswith("└"))
    return [[cell.strip() for cell in line.strip("│ ").split("│")] for line in lines[:end] if line.startswith("│")]


def refused(capsys: Capture, status: int) -> str:
    """What stands on standard error of a command that ended with status 1, without a traceback."""
    error = capsys.readouterr().err
    assert status == 1 and "Traceback" not in error
    return " ".join(error.split())


# -- plans -------------------------------------------------------------------------------------------------------


def test_the_repositorys_configuration_from_a_shell(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lightning_lwpm.cli", "plan", *CPU, "--config-dir", "conf", "--devices", "1", "2"]
    environ = {**os.environ, "COLUMNS": "200"}
    overrides = ["model.widths=[8, 16]", "model.blocks=1"]
    overrides += ["trainer.strategy.num_microbatches=4", "trainer.strategy.schedule=gpipe"]
    done = subprocess.run([*command, "--save", str(tmp_path / "p.yaml"), *overrides], cwd=ROOT, env=environ, **_TEXT)
    assert done.returncode == 0, done.stderr
    overview = rows(done.stdout, "expected of a batch, without the optimizer")
    assert [row[0] for row in overview] == ["1", "2"]
    assert [row[1:3] for row in overview] == [["4", "gpipe"], ["4", "gpipe"]]
    assert len(rows(done.stdout, "2 devices")) == 2
    assert load_plan(tmp_path / "p.yaml").num_microbatches == 4


_TEXT = {"text": True, "capture_output": True, "timeout": 120}


def test_a_module_with_its_own_loader(project: Path, capsys: Capture) -> None:
    assert plan("--devices", "1", "2", "4") == 0
    text = capsys.readouterr().out
    assert [len(rows(text, f"{n} device")) for n in (1, 2, 4)] == [1, 2, 4]
    overview = rows(text, "expected of a batch")
    assert [row[0] for row in overview] == ["1", "2", "4"]
    assert all(float(row[4]) <= int(row[0]) for row in overview), "no more speed-up than devices"


def test_a_data_module(project: Path, capsys: Capture) -> None:
    assert plan("--data", "lwpm_project:Data", "--devices", "2", model="Net") == 0
    assert len(rows(capsys.readouterr().out, "2 devices")) == 2


def test_a_checkpoint_says_what_the_model_is_made_of(project: Path, capsys: Capture) -> None:
    sys.path.insert(0, str(project))
    from lwpm_project import Alone

    trainer = L.Trainer(max_steps=1, accelerator="cpu", logger=False, enable_progress_bar=False, barebones=False)
    trainer.fit(Alone(depth=7))
    trainer.save_checkpoint(project / "last.ckpt")
    capsys.readouterr()
    assert plan("--checkpoint", "last.ckpt", "--devices", "2") == 0
    layers = " ".join(row[2] for row in rows(capsys.readouterr().out, "2 devices"))
    assert "blocks.6" in layers


def test_options_reach_the_plan(project: Path, capsys: Capture) -> None:
    assert plan("--devices", "2", "--microbatches", "8", "--schedule", "gpipe", "--precision", "bf16-mixed") == 0
    assert rows(capsys.readouterr().out, "expected of a batch")[0][1:3] == ["8", "gpipe"]


def test_a_saved_plan_can_be_given_back(project: Path, capsys: Capture) -> None:
    """That for the last number of devices; what it names are layers of the model."""
    assert plan("--devices", "2", "3", "--save", "plans/plan.yaml") == 0
    assert "partition='plans/plan.yaml'" in capsys.readouterr().out
    found = load_plan("plans/plan.yaml")
    assert found.devices == 3 and len(found.cuts) == 2
    assert set(found.cuts) <= {f"blocks.{i}.0" for i in range(4)}
    wish = Wish("plans/plan.yaml").resolved()
    assert (wish.partition, wish.num_microbatches) == (found.cuts, found.num_microbatches)


@pytest.mark.parametrize("name", ["plan.png", "plan.svg"])
def test_a_picture(project: Path, name: str) -> None:
    pytest.importorskip("matplotlib")
    assert plan("--devices", "2", "--draw", name) == 0
    begin = (project / name).read_bytes()[:200]
    assert begin.startswith(b"\x89PNG") or b"<svg" in begin or b"<?xml" in begin


def test_a_number_of_devices_that_is_too_small_is_told_beside_the_others(project: Path, capsys: Capture) -> None:
    """Four blocks of 1 KiB of weights, with gradients and AdamW 4.25 KiB each."""
    assert plan("--devices", "1", "4", "--device-memory", "12 KiB") == 0
    text = capsys.readouterr().out
    assert "1 devices: the model does not fit its devices" in text and "its device has 12.0 KiB" in text
    assert [row[0] for row in rows(text, "expected of a batch")] == ["4"]


# -- what the user can mend --------------------------------------------------------------------------------------


def test_nothing_fits(project: Path, capsys: Capture) -> None:
    status = plan("--devices", "1", "2", "--device-memory", "2 KiB")
    told = capsys.readouterr()
    assert status == 1 and "no plan fits any of these numbers of devices" in told.err
    assert told.out.count("its device has 2.0 KiB") == 1 + 2


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--devices", "0"], "--devices 0: numbers of devices are at least 1"),
        (["--microbatches", "many"], "num_microbatches='many'"),
        (["--microbatches=-2"], "num_microbatches='-2'"),
        (["--schedule", "1f2b"], "Did you mean '1f1b'?"),
        (["--device-memory", "much"], "device_memory='much'"),
        (["--checkpoint", "nowhere.ckpt"], "--checkpoint nowhere.ckpt"),
        (["--data", "lwpm_project:Empty"], "no batch"),
        (["--data", "lwpm_project:Nothing"], "--data lwpm_project:Nothing"),
        (["--devices", "2", "--save", "lwpm_project.py/plan.yaml"], "cannot be written"),
        (["--devices", "2", "--draw", "plan.doc"], "plan.doc"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_arguments_that_cannot_be_used(project: Path, capsys: Capture, arguments: list[str], expected: str) -> None:
    assert expected in refused(capsys, plan(*arguments, model="Alone" if "Empty" not in str(arguments) else "Net"))


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("nowhere:Net", "--model nowhere:Net: No module named 'nowhere'. Write package.module:Class."),
        ("lwpm_project:Nothing", "--model lwpm_project:Nothing"),
        ("Net", "--model Net"),
        ("lwpm_project:NUMBER", "--model lwpm_project:NUMBER"),
        ("json:JSONDecoder", "--model json:JSONDecoder"),
        ("lwpm_project:Settings", "--model lwpm_project:Settings"),
        ("lwpm_project:Pure", "no layer that has parameters"),
    ],
)
def test_models_that_cannot_be_used(project: Path, capsys: Capture, path: str, expected: str) -> None:
    data = ["--data", "lwpm_project:Data"]
    assert expected in refused(capsys, main(["plan", "--model", path, *data, *CPU, "--devices", "2"]))


def test_a_mistake_in_the_users_own_code_keeps_its_traceback(project: Path) -> None:
    with pytest.raises(RuntimeError, match="a mistake of its own"):
        plan("--devices", "2", model="Broken")


def test_neither_configuration_nor_class(capsys: Capture) -> None:
    assert "--config-dir conf" in refused(capsys, main(["plan"]))


def _configuration(folder: Path, text: str) -> list[str]:
    (folder / "train.yaml").write_text(text)
    return ["plan", "--devices", "2", "--config-dir", str(folder), *CPU]


CONFIGURATIONS: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    "no folder": (lambda folder: ["plan", "--config-dir", str(folder / "none")], "there is no such folder"),
    "no such name": (lambda folder: [*_configuration(folder, ""), "--config-name", "other"], "'other'"),
    "no model": (lambda folder: _configuration(folder, "net: 1\nrunner: 2\n"), "It has: net, runner"),
    "override of nothing": (lambda folder: [*_configuration(folder, "model: {}\n"), "depth=5"], "depth"),
    "class that is not there": (
        lambda folder: _configuration(folder, "model: {_target_: lwpm_project.Nothing}\n"),
        "lwpm_project.Nothing",
    ),
    "key that is not there": (
        lambda folder: _configuration(folder, "model: {_target_: lwpm_project.Alone, depth: '${size}'}\n"),
        "size",
    ),
}


@pytest.mark.parametrize("what", CONFIGURATIONS)
def test_configurations_that_cannot_be_used(project: Path, capsys: Capture, what: str) -> None:
    arguments, expected = CONFIGURATIONS[what]
    assert expected in refused(capsys, main(arguments(project)))


def test_a_configuration_of_another_project(project: Path, capsys: Capture) -> None:
    """With a data module under its other name, and a strategy of another kind."""
    text = """
model: {_target_: lwpm_project.Net, depth: 3}
datamodule: {_target_: lwpm_project.Data}
trainer: {strategy: ddp, devices: 4, max_epochs: 7}
"""
    assert main([*_configuration(project, text), "model.depth=5"]) == 0
    assert "blocks.4" in capsys.readouterr().out
