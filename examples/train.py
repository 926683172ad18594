"""Trains and tests whatever the configuration names: `python examples/train.py experiment=language_model`."""

import os
import sys
from pathlib import Path

import hydra
import lightning as L
import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
# A script's own folder is on the path, its parent is not: the configuration names `examples.models.gpt.CharGPT`.
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))


def train(cfg: DictConfig) -> dict[str, float]:
    """Fits and tests the configured model.

    Returns:
        What was logged last, from training, validation and test, on every rank.
    """
    import lightning_lwpm  # noqa: F401  registers the strategy names, for `trainer.strategy=lwpm` in place of a group

    if cfg.threads is not None:
        # Also in the environment, for processes that the strategy starts without running this function.
        os.environ["OMP_NUM_THREADS"] = str(cfg.threads)
        torch.set_num_threads(cfg.threads)
    L.seed_everything(cfg.seed, workers=True)

    data: L.LightningDataModule = hydra.utils.instantiate(cfg.data)
    model: L.LightningModule = hydra.utils.instantiate(cfg.model)
    trainer: L.Trainer = hydra.utils.instantiate(cfg.trainer)

    trainer.fit(model, datamodule=data)
    metrics = dict(trainer.callback_metrics)  # the test starts with an empty one
    trainer.test(model, datamodule=data, verbose=False)
    metrics |= trainer.callback_metrics

    results = {name: float(value) for name, value in metrics.items()}
    if trainer.is_global_zero:
        Console().print(summary(trainer, results))
    return results


def summary(trainer: L.Trainer, results: dict[str, float]) -> Table:
    """Says in a few lines how the run went."""
    table = Table("", type(trainer.lightning_module).__name__, title="Summary", show_edge=False)
    table.add_row("strategy", type(trainer.strategy).__name__)
    table.add_row("processes", str(trainer.world_size))
    for name, value in results.items():
        if name.startswith("test/"):
            table.add_row(name.replace("/", " "), f"{value:.4f}")
    table.add_row("training time", f"{results['train/seconds']:.1f} s")
    for name, value in results.items():
        if name.endswith("_per_second"):
            unit = name.removeprefix("train/").removesuffix("_per_second")
            table.add_row(f"{unit}/s", f"{value:,.0f}")
    return table


@hydra.main(version_base="1.3", config_path=str(ROOT / "conf"), config_name="train")
def main(cfg: DictConfig) -> None:
    """Entry point of the command line."""
    train(cfg)


if __name__ == "__main__":
    main()
