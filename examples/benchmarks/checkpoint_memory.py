"""Peak host memory of saving and loading checkpoints, beside the bytes of weights and optimizer states.

    python examples/benchmarks/checkpoint_memory.py --layers 8 --width 1024 --devices 2

Memory is what the process has written for itself (`Private_Dirty` of `/proc/self/smaps_rollup`: nothing that is only
mapped from files), sampled while a checkpoint is written or read, above what it was before.
"""

import argparse
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lwpm import LWPMStrategy


class Stack(L.LightningModule):
    """Linear layers."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.layers(batch[0]).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters())


def private() -> float:
    """MiB that belong to this process alone."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty")) / 1024


def peak(run: Callable[[], object]) -> float:
    """MiB above those before, at most, while ``run`` runs."""
    done, before = threading.Event(), private()
    most = [before]

    def sample() -> None:
        while not done.wait(0.002):
            most[0] = max(most[0], private())

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        run()
    finally:
        done.set()
        thread.join()
    return most[0] - before


def main() -> None:
    """Train a step, then save and read both kinds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--devices", type=int, default=2)
    args = parser.parse_args()
    module = Stack(args.layers, args.width)
    size = 3 * sum(p.numel() * p.element_size() for p in module.parameters()) / 2**20
    strategy = LWPMStrategy(num_microbatches=2, costs="estimated", start_method="spawn")
    folder = tempfile.mkdtemp(prefix="lwpm-benchmark-")
    trainer = L.Trainer(
        accelerator="cpu",
        devices=args.devices,
        strategy=strategy,
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Measure(Path(folder), size)],
    )
    trainer.fit(module, DataLoader(TensorDataset(torch.randn(8, args.width)), 8))


class Measure(L.Callback):
    """Saves and reads in the middle of a run, when each rank holds its share."""

    def __init__(self, folder: Path, size: float) -> None:
        self.folder, self.size = folder, size

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        strategy: Any = trainer.strategy
        for kind in ("full", "sharded"):
            strategy.state_dict_type = kind
            path = self.folder / kind
            saving = peak(lambda path=path: trainer.save_checkpoint(path))  # type: ignore[misc]
            found: list[Any] = []
            reading = peak(lambda path=path, found=found: found.append(strategy.load_checkpoint(path)))  # type: ignore[misc]
            taking = peak(lambda found=found: strategy.load_optimizer_state_dict(found[0]))  # type: ignore[misc]
            print(
                f"rank {trainer.global_rank}, {kind}: {self.size:.0f} MiB in all; above its share: saving "
                f"{saving:.0f} MiB, reading {reading:.0f} MiB, optimizer states {taking:.0f} MiB",
                flush=True,
            )


if __name__ == "__main__":
    main()
