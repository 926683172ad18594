"""Runs a step under the pipeline's engine without Lightning, and the same on one device, to compare."""

import copy
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from simulated import use
from torch import nn

from lightning_lwpm.partition.apply import make_layout
from lightning_lwpm.partition.plan import make_plan
from lightning_lwpm.partition.probe import probe
from lightning_lwpm.pipeline.carrier import connect as carry_tensors
from lightning_lwpm.pipeline.engine import Engine
from lightning_lwpm.pipeline.mailbox import Mailbox
from lightning_lwpm.pipeline.postings import Postings
from lightning_lwpm.pipeline.schedule import Table
from lightning_lwpm.pipeline.schedule import place as place_stages
from lightning_lwpm.pipeline.transport import Transport
from lightning_lwpm.staging.batch import Batch
from lightning_lwpm.staging.layer_random import LayerRandom
from lightning_lwpm.staging.placement import place
from lightning_lwpm.staging.randomness import python_random, seed_python
from lightning_lwpm.staging.tree import map_tensors

Step = Callable[[nn.Module, Any], torch.Tensor]
Schedule = str | Callable[[int], Table]


def device_at(index: int) -> torch.device:
    """The CPU, or one of the devices that ``LWPM_TEST_DEVICE`` names."""
    kind = os.environ.get("LWPM_TEST_DEVICE")
    return use(kind, index) if kind else torch.device("cpu")


def carried(mailbox: Mailbox) -> Transport:
    """The connections for data of this rank."""
    device = device_at(mailbox.rank)
    return Transport(mailbox) if device.type == "cpu" else carry_tensors(mailbox, device)


def connect(
    rank: int, world: int, patience: float = 5.0, carry: Callable[[Mailbox], Transport] = carried
) -> tuple[Mailbox, Transport | None]:
    """The connections of one rank; ``carry`` makes those for data."""
    if world == 1:
        return Mailbox(0, 1, lambda value: [value]), None
    dist.init_process_group("gloo", rank=rank, world_size=world)

    def gather(value: Any) -> list[Any]:
        values: list[Any] = [None] * world
        dist.all_gather_object(values, value)
        return values

    mailbox = Mailbox(rank, world, gather, patience=patience)
    return mailbox, carry(mailbox)


def engine(
    rank: int,
    world: int,
    model: nn.Module,
    step: Step,
    sample: Any,
    partition: Any = "auto",
    schedule: Schedule = "1f1b",
    placement: Sequence[int] | None = None,
    checkpointing: str = "none",
    carry: Callable[[Mailbox], Transport] = carried,
    layers_draw: bool = False,
) -> Engine:
    """An engine for ``model`` over ``world`` ranks, which all build the same model.

    With a ``placement`` (the rank of each stage) there is a stage for each of its entries, as far as there are layers.
    """
    mailbox, transport = connect(rank, world, carry=carry)
    device = transport.device if transport is not None else device_at(0)
    seen = probe(model, lambda: step(model, sample))
    plan = make_plan(seen.timeline, len(placement or range(world)), partition, place_stages)
    layout = mailbox.broadcast("layout", make_layout(model, seen, plan))
    placement = placement[: layout.num_stages] if placement is not None else None
    random = LayerRandom(model, (), device) if layers_draw else None
    built = Engine(mailbox, transport, model, layout, device, schedule, 0, placement, checkpointing, random=random)
    place(model, lambda name: layout.parameters.get(name) or layout.buffers.get(name), built.stages)
    return built


def train_pipelined(
    rank: int,
    world: int,
    build: Callable[[], nn.Module],
    step: Step,
    batches: list[Any],
    num_microbatches: int = 4,
    schedule: Schedule = "1f1b",
    partition: Any = "auto",
    optimizer: Callable[[Any], torch.optim.Optimizer] | None = None,
    placement: Sequence[int] | None = None,
    checkpointing: str = "none",
    carry: Callable[[Mailbox], Transport] = carried,
    layers_draw: bool = False,
) -> dict[str, Any]:
    """Train over a pipeline; returns losses, the gradients and weights held here, and the layout."""
    torch.manual_seed(0)
    model = build()
    sample = Batch.of(batches[0], num_microbatches).microbatch(0, private=True)
    run = engine(rank, world, model, step, sample, partition, schedule, placement, checkpointing, carry, layers_draw)
    model.to(run.device)
    if run.device.type != "cpu":
        batches = map_tensors(lambda tensor: tensor.to(run.device), batches)
    optim = optimizer(model.parameters()) if optimizer else None
    start = {n: p.detach().clone() for n, p in model.named_parameters() if type(p.detach()) is torch.Tensor}
    losses: list[list[float]] = []
    gradients: list[dict[str, torch.Tensor]] = []
    for value in batches:
        batch = Batch.of(value, num_microbatches)
        weights = batch.weights
        if rank != 0:
            batch.leaves = batch.lean(set())  # large leaves are fetched where they are used
        whole = Batch.of(value, num_microbatches)
        for parameter in model.parameters():
            parameter.grad = None
        outputs = run.train(
            batch,
            lambda micro, _: step(model, micro),
            lambda out, i, weights=weights: (out * weights[i]).backward(),
            lambda index, whole=whole: whole.leaves[index],
        )
        losses.append([float(out.detach()) for out in outputs] if run.last else [])
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        if optim:
            optim.step()
    held = {n: p.detach().clone() for n, p in model.named_parameters() if type(p.detach()) is torch.Tensor}
    owned = {n for n, stages in run.layout.buffers.items() if set(run.stages) & set(stages)}
    buffers = {n: b.clone() for n, b in model.named_buffers() if type(b) is torch.Tensor}
    run.mailbox.gather("end", None)
    run.mailbox.close()
    found = {
        "start": start,
        "losses": losses,
        "gradients": gradients,
        "weights": held,
        "buffers": buffers,
        "own_buffers": owned,
        "layout": run.layout,
        "stage": run.stage,
        "stages": run.stages,
        "last": run.last,
    }
    return on_host(found)


def on_host(found: dict[str, Any]) -> dict[str, Any]:
    """Results with all tensors on the CPU."""
    return map_tensors(lambda tensor: tensor.cpu(), found)  # type: ignore[no-any-return]


@contextmanager
def delays(rank: int, wanted: dict[tuple[int, int], float] | int) -> Iterator[None]:
    """Sleep before actions: some seconds by rank and position, at their first time, or at random from a seed."""
    ahead, draw = Postings.ahead, random.Random(f"{wanted} {rank}")
    left = dict(wanted) if isinstance(wanted, dict) else None

    def slowly(postings: Postings, position: int) -> None:
        time.sleep(draw.choice([0.0, 0.001, 0.02]) * draw.random() if left is None else left.pop((rank, position), 0.0))
        ahead(postings, position)

    Postings.ahead = slowly  # type: ignore[method-assign]
    try:
        yield
    finally:
        Postings.ahead = ahead  # type: ignore[method-assign]


def train_delayed(rank: int, world: int, wanted: dict[tuple[int, int], float] | int, *arguments: Any) -> dict[str, Any]:
    """:func:`train_pipelined` with :func:`delays`."""
    with delays(rank, wanted):
        return train_pipelined(rank, world, *arguments)


def train_single(
    build: Callable[[], nn.Module],
    step: Step,
    batches: list[Any],
    num_microbatches: int = 4,
    optimizer: Callable[[Any], torch.optim.Optimizer] | None = None,
    device: str = "",
) -> dict[str, Any]:
    """The reference: one device that accumulates the same micro-batches."""
    device = device or str(device_at(0))
    torch.set_num_threads(1)  # as in the workers: the number of threads decides the order of sums
    torch.manual_seed(0)
    model = build().to(device)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    gradients: list[dict[str, torch.Tensor]] = []
    serial = 0
    optim = optimizer(model.parameters()) if optimizer else None
    losses = []
    for value in batches:
        batch = Batch.of(map_tensors(lambda tensor: tensor.to(device), copy.deepcopy(value)), num_microbatches)
        model.zero_grad()
        losses.append([])
        for i, weight in enumerate(batch.weights):
            with python_random():
                seed_python(torch.initial_seed(), serial)
                loss = step(model, batch.microbatch(i))
            serial += 1
            (loss * weight).backward()
            losses[-1].append(float(loss.detach()))
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        if optim:
            optim.step()
    found = {
        "start": start,
        "losses": losses,
        "gradients": gradients,
        "weights": {n: p.detach() for n, p in model.named_parameters()},
        "buffers": dict(model.named_buffers()),
    }
    return on_host(found)
