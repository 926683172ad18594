"""What each rank stores: parameters, gradients and optimizer state, measured on the tensors that hold memory.

    python examples/benchmarks/memory.py
    python examples/benchmarks/memory.py --ranks 1 4 --corrections none look_ahead+discount prediction stash

With corrections: of asynchronous training, also what they keep.
"""

import argparse
import itertools
from typing import Any

from ranks import run


def held(rank: int, world: int, args: Any, correction: str | None = None) -> dict[str, int]:
    """Train some steps, exactly or with a correction; returns the bytes this rank holds."""
    import lightning as L
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    from examples.models.gpt import CharGPT
    from lightning_lwpm import LWPMStrategy

    found: dict[str, int] = {}

    class Scale(L.Callback):
        def on_before_zero_grad(self, trainer: Any, module: Any, optimizer: Any) -> None:
            def real(tensors: Any) -> int:
                return sum(t.untyped_storage().nbytes() for t in tensors if type(t.detach()) is torch.Tensor)

            states = [t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
            found.update(
                parameters=real(module.parameters()),
                gradients=real(p.grad for p in module.parameters() if p.grad is not None),
                optimizer=real(states),
                correction=real(correction_of(trainer)),
            )

        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            self.on_before_zero_grad(trainer, module, trainer.optimizers[0])

    def correction_of(trainer: Any) -> Any:
        overlap = trainer.strategy._overlap
        return overlap.correction.kept() if overlap is not None and overlap.correction is not None else ()

    options = {"schedule": "1f1b"} if correction is None else {"schedule": "async", "staleness_correction": correction}
    model = CharGPT(vocab_size=256, block_size=args.context, n_layer=args.layers, n_head=8, n_embd=args.width)
    tokens = torch.randint(0, 256, (32, args.context + 1))
    loader = DataLoader(TensorDataset(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()), batch_size=8)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=world,
        strategy=LWPMStrategy(num_microbatches=4, **options),
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Scale()],
    )
    trainer.fit(model, loader)
    return found


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--corrections", nargs="*", default=[], help="of asynchronous training, to measure beside")
    args = parser.parse_args()

    from rich.console import Console
    from rich.table import Table

    table = Table(title="MiB held by each rank")
    parts = ("parameters", "gradients", "optimizer", "correction")
    for column in ("training", "ranks", "rank", *parts, "sum", "of one device"):
        table.add_column(column, justify="right")
    whole = 0
    for correction, world in itertools.product((None, *args.corrections), args.ranks):
        if correction is not None and world == 1:
            continue
        for rank, found in enumerate(run(world, held, args, correction)):
            total = sum(found.values())
            whole = whole or total
            cells = [f"{found[key] / 2**20:.1f}" for key in parts]
            name = "exact" if correction is None else correction
            table.add_row(name, str(world), str(rank), *cells, f"{total / 2**20:.1f}", f"{total / whole:.0%}")
        table.add_section()
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
