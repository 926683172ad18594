"""Validation loss of a character language model trained without flushes, by correction, stages and micro-batches.

    python examples/benchmarks/asynchronous/corrections.py --out losses.json --steps 300 --stages 8 --microbatches 8 2
    python examples/benchmarks/asynchronous/corrections.py --out losses.json --table      # what is there, nothing new

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

from lightning_lwpm.pipeline.asynchronous.combined import Combined
from lightning_lwpm.pipeline.asynchronous.correction import Correction
from lightning_lwpm.pipeline.asynchronous.registry import CORRECTIONS, DEFAULT, correction

KEY = ("correction", "stages", "microbatches", "steps", "exact_steps", "clip", "init", "seed")


def chosen(text: str) -> functools.partial[Correction]:
    """The correction of ``name`` or ``name:option=number,...``, or several joined by ``+``."""
    kinds = []
    for part in text.split("+"):
        name, _, options = part.partition(":")
        pairs = (option.split("=") for option in options.split(",") if option)
        kinds.append(functools.partial(correction(name), **{key: float(value) for key, value in pairs}))
    return kinds[0] if len(kinds) == 1 else functools.partial(Combined, kinds=kinds)


def train(text: Text, run: dict[str, Any]) -> dict[str, Any]:
    """Train once; the run with its losses."""
    name, count = ("none", 1) if run["correction"] == "exact" else (run["correction"], run["stages"])
    parts = stages(count, run["microbatches"], run["steps"], run["seed"], chosen(name), run["init"])
    emulation = Emulation(
        parts, run["microbatches"], loss, run["exact_steps"], clip=run["clip"], apart=name.startswith("anticipation")
    )
    start = time.perf_counter()
    losses = emulation.run(text.batches(run["steps"], run["seed"] + 1000))
    with emulation.base():
        val = validate(parts, text)
    size = max(1, len(losses) // 30)
    curve = [sum(losses[i : i + size]) / size for i in range(0, len(losses), size)]
    return {**run, "val": val, "curve": curve, "seconds": time.perf_counter() - start}


def table(results: list[dict[str, Any]]) -> None:
    """Print mean and spread over seeds, and the gap to exact."""
    from rich.console import Console
    from rich.table import Table

    settings = ("init", "clip", "steps", "stages", "microbatches", "correction", "exact_steps")
    rival = ("init", "clip", "steps", "seed")
    exact = {tuple(r[key] for key in rival): r["val"] for r in results if r["correction"] == "exact"}
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault(tuple(result[key] for key in settings), []).append(result)
    view = Table(*settings, "seeds", "val loss", "spread", "gap %")
    for key, members in sorted(groups.items()):
        losses = [member["val"] for member in members]
        gaps = [100 * (m["val"] / exact[tuple(m[name] for name in rival)] - 1) for m in members]
        mean, gap = sum(losses) / len(losses), sum(gaps) / len(gaps)
        view.add_row(*map(str, key), str(len(losses)), f"{mean:.4f}", f"{max(losses) - min(losses):.4f}", f"{gap:+.2f}")
    Console(width=140).print(view)


def main() -> None:
    """Run what is not there yet, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file of results, read and added to")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--stages", type=int, nargs="+", default=[8])
    parser.add_argument("--microbatches", type=int, nargs="+", default=[8])
    parser.add_argument(
        "--corrections",
        nargs="+",
        default=[*CORRECTIONS, DEFAULT],
        help="name or name:option=number,..., several joined by +",
    )
    parser.add_argument("--exact-steps", type=int, default=0, help="exact steps at the start")
    parser.add_argument("--clip", type=float, default=1.0, help="largest norm of each stage's gradient")
    parser.add_argument("--init", choices=["torch", "gpt"], default="torch", help="initial weights")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--table", action="store_true", help="only print what is there")
    args = parser.parse_args()

    torch.set_num_threads(1)
    results = json.loads(args.out.read_text()) if args.out.exists() else []
    there = {tuple(result[key] for key in KEY) for result in results}
    exact = [("exact", 1, 1, args.steps, 0, args.clip, args.init, seed) for seed in args.seeds]
    wanted = [
        (name, count, m, args.steps, args.exact_steps, args.clip, args.init, seed)
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
