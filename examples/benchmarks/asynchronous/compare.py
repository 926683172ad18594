"""Validation loss of a character language model trained without flushes, by correction, stages and micro-batches.

    python examples/benchmarks/asynchronous/compare.py --out losses.json --steps 300 --stages 8 --microbatches 8 2
    python examples/benchmarks/asynchronous/compare.py --out losses.json --table      # what is there, nothing new

One thread, one run after another; each finished run is added to the file at once, and what is there is not run
again, so that a long comparison can be cut and continued. "exact" is training on one device.
"""

import argparse
import functools
import json
import time
from pathlib import Path
from typing import Any

import torch
from character_model import Text, loss, stages, validate
from emulation import Emulation

from lightning_lwpm.pipeline.asynchronous.correction import Correction
from lightning_lwpm.pipeline.asynchronous.registry import CORRECTIONS, correction

KEY = ("correction", "stages", "microbatches", "steps", "exact_steps", "seed")


def chosen(text: str) -> functools.partial[Correction]:
    """The correction of ``name`` or ``name:option=number,...``."""
    name, _, options = text.partition(":")
    pairs = (option.split("=") for option in options.split(",") if option)
    return functools.partial(correction(name), **{key: float(value) for key, value in pairs})


def train(text: Text, run: dict[str, Any]) -> dict[str, Any]:
    """Train once; the run with its losses."""
    name, count = ("none", 1) if run["correction"] == "exact" else (run["correction"], run["stages"])
    parts = stages(count, run["microbatches"], run["steps"], run["seed"], chosen(name))
    emulation = Emulation(parts, run["microbatches"], loss, run["exact_steps"])
    start = time.perf_counter()
    losses = emulation.run(text.batches(run["steps"], run["seed"] + 1000))
    with emulation.base():
        val = validate(parts, text)
    tail = losses[-20:]
    return {**run, "val": val, "train": sum(tail) / len(tail), "seconds": time.perf_counter() - start}


def table(results: list[dict[str, Any]]) -> None:
    """Print mean and spread over seeds, and the gap to exact."""
    from rich.console import Console
    from rich.table import Table

    view = Table(
        "steps", "stages", "micro-batches", "correction", "exact steps", "seeds", "val loss", "spread", "gap %"
    )
    exact = {(r["steps"], r["seed"]): r["val"] for r in results if r["correction"] == "exact"}
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault(tuple(result[key] for key in ("steps", *KEY[1:3], "correction", "exact_steps")), []).append(
            result
        )
    for key, members in sorted(groups.items()):
        losses = [member["val"] for member in members]
        gaps = [m["val"] / exact[m["steps"], m["seed"]] - 1 for m in members if (m["steps"], m["seed"]) in exact]
        gap = f"{100 * sum(gaps) / len(gaps):+.2f}" if gaps else "?"
        spread = max(losses) - min(losses)
        view.add_row(*map(str, key), str(len(losses)), f"{sum(losses) / len(losses):.4f}", f"{spread:.4f}", gap)
    Console(width=120).print(view)


def main() -> None:
    """Run what is not there yet, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file of results, read and added to")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--stages", type=int, nargs="+", default=[8])
    parser.add_argument("--microbatches", type=int, nargs="+", default=[8])
    parser.add_argument("--corrections", nargs="+", default=list(CORRECTIONS), help="name or name:option=number,...")
    parser.add_argument("--exact-steps", type=int, default=0, help="exact steps at the start")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--table", action="store_true", help="only print what is there")
    args = parser.parse_args()

    torch.set_num_threads(1)
    results = json.loads(args.out.read_text()) if args.out.exists() else []
    there = {tuple(result[key] for key in KEY) for result in results}
    exact = [("exact", 1, 1, args.steps, 0, seed) for seed in args.seeds]
    wanted = [
        (name, count, m, args.steps, args.exact_steps, seed)
        for seed in args.seeds
        for count in args.stages
        for m in args.microbatches
        for name in args.corrections
    ]
    text = Text()
    for key in () if args.table else (*exact, *wanted):
        if key in there:
            continue
        results.append(train(text, dict(zip(KEY, key, strict=True))))
        args.out.write_text(json.dumps(results, indent=1))
        print(
            {name: results[-1][name] for name in ("correction", "stages", "microbatches", "val", "seconds")}, flush=True
        )
    table(results)


if __name__ == "__main__":
    main()
