"""What it costs a rank to pass over the layers of other stages: GPT-2 of transformers, one process, no transfers.

    python -m examples.benchmarks.ghost_calls --stages 4

Every stage is run once for real and what its calls returned is kept; then each later stage runs the step against that,
up to its own first layer, many times. Its own layers are timed forward and backward, to compare.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lightning_lwpm.partition.apply import make_layout
from lightning_lwpm.partition.plan import make_plan
from lightning_lwpm.partition.probe import probe
from lightning_lwpm.staging.intercept import Interception
from lightning_lwpm.staging.layout import Layout
from lightning_lwpm.staging.record import Key, Record, Trace
from lightning_lwpm.staging.remote import Name, Remote
from lightning_lwpm.staging.step import StagedStep


class Recorded:
    """Answers for earlier stages from what they returned before."""

    def __init__(self) -> None:
        self.traces: dict[int, Trace] = {}
        self.values: dict[Name, Tensor] = {}

    def record(self, stage: int, key: Key) -> Record:
        return self.traces[stage][key]

    def value(self, remote: Remote) -> Tensor:
        value = self.values[remote.label]
        return value.detach().requires_grad_() if value.requires_grad else value


class Timed(StagedStep):
    """Adds up the time of the calls passed over, for layers and for functions between them."""

    def begin(self) -> "Timed":
        self.seconds = {"layer": 0.0, "glue": 0.0}
        self.count = {"layer": 0, "glue": 0}
        return self

    def call(self, *args: Any) -> Any:
        start = time.perf_counter()
        out = super().call(*args)
        self._note("layer", start)
        return out

    def _function(self, *args: Any) -> Any:
        start = time.perf_counter()
        out = super()._function(*args)
        self._note("glue", start)
        return out

    def _note(self, kind: str, start: float) -> None:
        self.seconds[kind] += time.perf_counter() - start
        self.count[kind] += 1


def stage_of_its_own(layout: Layout, stage: int) -> Layout:
    """The layout with all layers from ``stage`` on one stage later, so that the step ends where they begin."""
    units = [replace(u, stages=tuple(s + (s >= stage) for s in u.stages)) for u in layout.units]
    return replace(layout, units=tuple(units))


def run(
    kind: type[StagedStep], model: nn.Module, layout: Layout, stage: int, last: bool, peers: Any, forward: Any
) -> Any:
    """One run of the step for a stage."""
    interception = Interception([(unit, model.get_submodule(unit.name)) for unit in layout.units])
    step = kind(stage, last, interception, peers, torch.device("cpu"))
    with interception.batch():
        return (step.begin() if isinstance(step, Timed) else step), step.run(forward)


def measure(model: nn.Module, forward: Callable[[], Any], stages: int, repeat: int) -> list[dict[str, float]]:
    """One row a stage."""
    seen = probe(model, forward)
    layout = make_layout(model, seen, make_plan(seen.timeline, stages, "auto", range(stages)))
    peers = Recorded()
    rows = []
    for stage in range(stages):
        rows.append(passing(model, stage_of_its_own(layout, stage), stage, peers, forward, repeat))
        start = time.perf_counter()
        step, loss = run(StagedStep, model, layout, stage, stage == stages - 1, peers, forward)
        if loss is not None:
            loss.backward()
        else:
            peers.traces[stage] = step.trace
            peers.values.update(step.reach.tensors)
            made = step.reach.tensors.values()
            last = [tensor for tensor in made if tensor.grad_fn is not None and tensor.dim() == 3][-1]
            last.backward(torch.ones_like(last))
            peers.values = {
                name: value.detach().requires_grad_(value.requires_grad) for name, value in peers.values.items()
            }
        rows[-1]["step"] = time.perf_counter() - start - rows[-1]["passing"]
    return rows


def passing(
    model: nn.Module, layout: Layout, stage: int, peers: Recorded, forward: Any, repeat: int
) -> dict[str, float]:
    """The time before the stage's own first layer: in all, by layer and by function."""
    totals, layers, glue = [], [], []
    gc.collect()
    for _ in range(repeat):
        start = time.perf_counter()
        run(StagedStep, model, layout, stage, False, peers, forward)
        totals.append(time.perf_counter() - start)
        step, _ = run(Timed, model, layout, stage, False, peers, forward)
        layers.append(step.seconds["layer"] / max(step.count["layer"], 1))
        glue.append(step.seconds["glue"] / max(step.count["glue"], 1))
    return {
        "passing": statistics.median(totals),
        "layers": step.count["layer"],
        "layer": statistics.median(layers),
        "functions": step.count["glue"],
        "function": statistics.median(glue),
    }


def table(rows: list[dict[str, float]]) -> Table:
    """The rows, for people."""
    out = Table(title="passing over the layers of earlier stages")
    for name in ("stage", "layers", "us each", "functions", "us each", "all, ms", "own, ms", "share"):
        out.add_column(name, justify="right")
    for stage, row in enumerate(rows):
        out.add_row(
            str(stage),
            f"{row['layers']:.0f}",
            f"{row['layer'] * 1e6:.0f}" if row["layers"] else "-",
            f"{row['functions']:.0f}",
            f"{row['function'] * 1e6:.0f}" if row["functions"] else "-",
            f"{row['passing'] * 1e3:.2f}",
            f"{row['step'] * 1e3:.0f}",
            f"{row['passing'] / (row['passing'] + row['step']):.2%}",
        )
    return out


def main() -> None:
    """Parse arguments and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--samples", type=int, default=2, help="of a micro-batch")
    parser.add_argument("--length", type=int, default=1024, help="tokens a sample")
    parser.add_argument("--repeat", type=int, default=50)
    arguments = parser.parse_args()

    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_layer=arguments.layers, n_embd=arguments.width, n_positions=arguments.length, tie_word_embeddings=False
    )
    model = GPT2LMHeadModel(config).train()
    tokens = torch.randint(0, config.vocab_size, (arguments.samples, arguments.length))
    rows = measure(model, lambda: model(input_ids=tokens, labels=tokens).loss, arguments.stages, arguments.repeat)
    Console().print(table(rows))


if __name__ == "__main__":
    main()
