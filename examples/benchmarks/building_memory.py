"""Peak of host memory of each rank up to the first step, over what the process had before, built whole or lazily.

python examples/benchmarks/building_memory.py --layers 64 --ranks 2 4
"""

import argparse
import resource
from typing import Any

from ranks import run


def peak(rank: int, world: int, args: Any, lazily: bool) -> float:
    """Train one batch by plain SGD; returns the growth of the peak of resident memory, in MiB."""
    import lightning as L
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    from lightning_lwpm import LWPMStrategy

    class Stack(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.Sequential(
                *(torch.nn.Linear(args.width, args.width, bias=False) for _ in range(args.layers))
            )

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int:
            self.seen = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            return -1  # gradients are another matter

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.layers(batch[0]).mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    trainer = L.Trainer(
        accelerator="cpu",
        devices=world,
        strategy=LWPMStrategy(num_microbatches=2, costs="estimated"),
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if lazily:
        with trainer.init_module():
            module = Stack()
    else:
        module = Stack()
    trainer.fit(module, DataLoader(TensorDataset(torch.ones(4, args.width)), batch_size=4))
    return float(module.seen - before) / 1024


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    args = parser.parse_args()

    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"MiB a rank, weights of {args.layers * args.width**2 * 4 / 2**20:.0f} MiB")
    for column in ("ranks", "built whole", "built under trainer.init_module()"):
        table.add_column(column, justify="right")
    for world in args.ranks:
        cells = [", ".join(f"{found:.0f}" for found in run(world, peak, args, lazily)) for lazily in (False, True)]
        table.add_row(str(world), *cells)
    Console().print(table)


if __name__ == "__main__":
    main()
