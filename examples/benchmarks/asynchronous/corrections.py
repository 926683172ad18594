"""What is learned without flushes, by correction, stages and micro-batches, against training on one device.

    python examples/benchmarks/asynchronous/corrections.py --out losses.json --steps 300 --stages 8 --microbatches 8 2
    python examples/benchmarks/asynchronous/corrections.py --out losses.json --model digits --steps 600
    python examples/benchmarks/asynchronous/corrections.py --out losses.json --table      # what is there, nothing new

A character language model's validation loss, or a residual network's test error. One thread, one run after another;
each finished run is added to the file at once, and what is there is not run again, so that a long comparison can be cut
and continued. "exact" is training on one device; where batch norm sees micro-batches, with the same ones.
"""

import argparse
import functools
import importlib
import itertools
import json
import time
from pathlib import Path
from typing import Any

import torch
from emulation import Emulation

from lightning_lwpm.pipeline.asynchronous.combined import Combined
from lightning_lwpm.pipeline.asynchronous.correction import Correction
from lightning_lwpm.pipeline.asynchronous.registry import CORRECTIONS, DEFAULT, correction

MODELS = {"characters": "character_model", "digits": "digits_model"}

KEY = ("model", "correction", "stages", "microbatches", "steps", "exact_steps", "clip", "init", "seed")


def chosen(text: str) -> functools.partial[Correction]:
    """The correction of ``name`` or ``name:option=number,...``, or several joined by ``+``."""
    kinds = []
    for part in text.split("+"):
        name, _, options = part.partition(":")
        pairs = (option.split("=") for option in options.split(",") if option)
        kinds.append(functools.partial(correction(name), **{key: float(value) for key, value in pairs}))
    return kinds[0] if len(kinds) == 1 else functools.partial(Combined, kinds=kinds)


def train(run: dict[str, Any], every: int) -> dict[str, Any]:
    """Train once; the run with what came of it.

    Returns:
        Also ``score`` at the end and ``scores`` after every so many steps, the ``curve`` of training losses in 30
        parts, what corrections ``kept`` at most, as a part of the weights of their stage, by how much the norm was
        ``off`` by which stages clip (the mean over steps of the largest relative error), and ``seconds``.
    """
    task = importlib.import_module(MODELS[run["model"]])
    name, count = ("none", 1) if run["correction"] == "exact" else (run["correction"], run["stages"])
    parts = task.stages(count, run["microbatches"], run["steps"], run["seed"], chosen(name), run["init"])
    apart = name.startswith("anticipation") or not task.ALIKE
    emulation = Emulation(parts, run["microbatches"], task.loss, run["exact_steps"], clip=run["clip"], apart=apart)
    data, scores, kept = task.Data(), [], 0.0

    def after(step: int) -> None:
        nonlocal kept
        for part in parts:
            weights = sum(p.numel() for p in part.module.parameters())
            kept = max(kept, sum(tensor.numel() for tensor in part.correction.kept()) / weights)
        if step % every == 0:
            with emulation.base():
                scores.append(task.score(parts, data))

    start = time.perf_counter()
    losses = emulation.run(data.batches(run["steps"], run["seed"] + 1000), after)
    with emulation.base():
        score = task.score(parts, data)
    size = max(1, len(losses) // 30)
    curve = [sum(losses[i : i + size]) / size for i in range(0, len(losses), size)]
    off = sum(emulation.errors) / max(1, len(emulation.errors))
    told = {"score": score, "scores": scores, "every": every, "curve": curve, "kept": kept, "off": off}
    return {**run, **told, "seconds": time.perf_counter() - start}


def rival(run: dict[str, Any]) -> tuple[Any, ...]:
    """The exact run that a run is compared with."""
    alike = importlib.import_module(MODELS[run["model"]]).ALIKE
    count = 1 if alike else run["microbatches"]
    return (run["model"], "exact", 1, count, run["steps"], 0, run["clip"], run["init"], run["seed"])


def table(results: list[dict[str, Any]]) -> None:
    """Print mean and spread over seeds, and the gap to exact."""
    from rich.console import Console
    from rich.table import Table

    exact = {tuple(r[key] for key in KEY): r["score"] for r in results if r["correction"] == "exact"}
    for model, module in MODELS.items():
        alike = importlib.import_module(module).ALIKE
        groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
        for run in (run for run in results if run["model"] == model):
            groups.setdefault(tuple(run[key] for key in KEY[1:-1]), []).append(run)
        if not groups:
            continue
        score = importlib.import_module(module).SCORE
        view = Table(
            *KEY[1:-1], "kept", "norm off, %", "seeds", score, "spread", "gap %" if alike else "gap", title=model
        )
        for key, members in sorted(groups.items(), key=lambda item: (item[0][3], item[0][1], item[0][2], item[0])):
            scores = [member["score"] for member in members]
            rivals = [exact[rival(member)] for member in members]
            gaps = [100 * (a / b - 1) if alike else a - b for a, b in zip(scores, rivals, strict=True)]
            spread = f"{max(scores) - min(scores):.4f}"
            kept = f"{max(member['kept'] for member in members):.2f}"
            mean = f"{sum(scores) / len(scores):.4f}"
            off = f"{100 * sum(member.get('off', 0.0) for member in members) / len(members):.1f}"
            view.add_row(*map(str, key), kept, off, str(len(scores)), mean, spread, f"{sum(gaps) / len(gaps):+.2f}")
        Console(width=160).print(view)


def main() -> None:
    """Run what is not there yet, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file of results, read and added to")
    parser.add_argument("--model", choices=MODELS, default="characters")
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
    parser.add_argument("--clip", type=float, default=1.0, help="largest norm of the gradient")
    parser.add_argument("--init", choices=["torch", "gpt"], default="torch", help="initial weights")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--every", type=int, default=50, help="score after so many steps, beside the end")
    parser.add_argument("--table", action="store_true", help="only print what is there")
    args = parser.parse_args()

    torch.set_num_threads(1)
    results = json.loads(args.out.read_text()) if args.out.exists() else []
    there = {tuple(result[key] for key in KEY) for result in results}
    wanted = []
    for seed, count, m, name in itertools.product(args.seeds, args.stages, args.microbatches, args.corrections):
        values = (args.model, name, count, m, args.steps, args.exact_steps, args.clip, args.init, seed)
        run = dict(zip(KEY, values, strict=True))
        wanted += [dict(zip(KEY, rival(run), strict=True)), run]
    for run in () if args.table else wanted:
        if tuple(run.values()) in there:
            continue
        results.append(train(run, args.every))
        there.add(tuple(run.values()))
        args.out.write_text(json.dumps(results, indent=1))
        told = ("model", "correction", "stages", "microbatches", "score", "seconds")
        print({name: results[-1][name] for name in told}, flush=True)
    table(results)


if __name__ == "__main__":
    main()
