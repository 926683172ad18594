"""Speed of two ranks over one process: a GPT-like model, both sides measured alternately in one run.

    python examples/benchmarks/two_ranks.py

Two ranks with one thread each train beside one process with one thread. The bound of ``1f1b`` and ``gpipe`` for two
stages and m micro-batches is 2 m / (m + 1); of others it is put at 2.
"""

import argparse
import statistics
import time
from typing import Any

from ranks import run


def train(rank: int, world: int, microbatches: int, args: Any) -> list[float]:
    """Train for some steps; returns the seconds of each, from one batch's end to the next one's."""
    import lightning as L
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    from examples.models.gpt import CharGPT
    from lightning_lwpm import LWPMStrategy

    seconds: list[float] = []

    class Clock(L.Callback):
        last = 0.0

        def on_train_batch_end(self, *_: Any) -> None:
            now = time.perf_counter()
            seconds.append(now - self.last)
            self.last = now

    L.seed_everything(1, verbose=False)
    model = CharGPT(vocab_size=256, block_size=args.context, n_layer=args.layers, n_head=8, n_embd=args.width)
    tokens = torch.randint(0, 256, (args.batch * args.steps, args.context + 1))
    loader = DataLoader(TensorDataset(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()), batch_size=args.batch)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=world,
        strategy=LWPMStrategy(num_microbatches=microbatches, schedule=args.schedule),
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Clock()],
    )
    trainer.fit(model, loader)
    return seconds[args.warmup :]


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--microbatches", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--schedule", default="1f1b")
    parser.add_argument("--steps", type=int, default=14, help="batches a measurement")
    parser.add_argument("--warmup", type=int, default=4, help="of which not counted")
    parser.add_argument("--rounds", type=int, default=5, help="alternations of the two sides")
    args = parser.parse_args()

    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    table = Table(title=f"two ranks over one process, {args.schedule}: medians of {args.rounds} alternating rounds")
    for column in (
        "micro-batches",
        "one process, ms",
        "two ranks, ms",
        "speed-up",
        "lowest",
        "highest",
        "bound",
        "of it",
    ):
        table.add_column(column, justify="right")
    for microbatches in args.microbatches:
        one: list[float] = []
        two: list[float] = []
        ratios = []
        for _ in track(range(args.rounds), f"{microbatches} micro-batches"):
            first, second = run(1, train, microbatches, args)[0], run(2, train, microbatches, args)[0]
            one += first
            two += second
            ratios.append(statistics.median(first) / statistics.median(second))
        ratio = statistics.median(ratios)
        bound = 2 * microbatches / (microbatches + 1) if args.schedule in ("1f1b", "gpipe") else 2.0
        milliseconds = [f"{statistics.median(side) * 1e3:.0f}" for side in (one, two)]
        shown = [f"{value:.2f}" for value in (ratio, min(ratios), max(ratios), bound)]
        table.add_row(str(microbatches), *milliseconds, *shown, f"{ratio / bound:.0%}")
    Console().print(table)


if __name__ == "__main__":
    main()
