"""Trains what the configuration names, as lightning-hydra-template does."""

import os
import sys
from pathlib import Path

import hydra
import lightning as L
from hydra.utils import instantiate
from omegaconf import DictConfig

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("PROJECT_ROOT", str(ROOT))


@hydra.main(version_base="1.3", config_path="../configs", config_name="train.yaml")
def main(cfg: DictConfig) -> None:
    L.seed_everything(cfg.seed, workers=True)
    data: L.LightningDataModule = instantiate(cfg.data)
    model: L.LightningModule = instantiate(cfg.model)
    trainer: L.Trainer = instantiate(cfg.trainer, callbacks=[instantiate(c) for c in cfg.callbacks.values()])
    trainer.fit(model, datamodule=data)
    weights = [float(p.double().sum()) for p in model.parameters()]
    (Path(cfg.paths.output_dir) / f"rank{trainer.global_rank}.txt").write_text(str(weights))


if __name__ == "__main__":
    main()
