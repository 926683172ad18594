"""The pipeline of one rank: schedule, executor and exchange put together, for whoever brings batches and a step."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lwpm.pipeline.exchange import Exchange, Item
from lightning_lwpm.pipeline.executor import Executor
from lightning_lwpm.pipeline.mailbox import Mailbox
from lightning_lwpm.pipeline.schedule import Action, build, forward_only, place
from lightning_lwpm.pipeline.shared import SharedGradients
from lightning_lwpm.pipeline.times import Times
from lightning_lwpm.pipeline.transport import Transport
from lightning_lwpm.staging.batch import Batch
from lightning_lwpm.staging.layout import Layout

__all__ = ["Engine"]


class Engine:
    """Trains and evaluates a model of which this rank runs one stage.

    Args:
        mailbox: The control connections.
        transport: The data connections; ``None`` with one rank.
        root: The model, with this rank's share of the weights.
        layout: The partition.
        device: This rank's device.
        schedule: Name of the schedule for training.
        serial: Number of the first micro-batch; what follows another engine on the same links counts on.

    Attributes:
        times: What this rank has measured of its own work.
        stage: This rank's stage; ``None`` where there are fewer stages than ranks and this rank has none.
    """

    def __init__(
        self,
        mailbox: Mailbox,
        transport: Transport | None,
        root: nn.Module,
        layout: Layout,
        device: torch.device,
        schedule: str = "1f1b",
        serial: int = 0,
    ) -> None:
        self.mailbox, self.layout, self.device, self.schedule = mailbox, layout, device, schedule
        self.ranks = place(layout.num_stages)
        self.stage = self.ranks.index(mailbox.rank) if mailbox.rank in self.ranks else None
        self.last = self.stage == layout.num_stages - 1
        mailbox.introduce(self.ranks)
        self.serial = serial
        self.times = Times()
        self._tables: dict[tuple[str, int], list[Any]] = {}
        seed = mailbox.broadcast("engine seed", torch.initial_seed(), what="the seed")
        self.executor: Executor | None = None
        self.shared: SharedGradients | None = None
        if self.stage is None:
            return
        exchange = None
        units: list[Any] = []
        if layout.num_stages > 1:
            assert transport is not None
            exchange = Exchange(mailbox, transport, self.stage, self.ranks, device)
            units = [(unit, root.get_submodule(unit.name)) for unit in layout.units]
            self.shared = SharedGradients(mailbox, transport, root, layout, self.stage, self.ranks)
        self.executor = Executor(
            mailbox, exchange, self.stage, layout.num_stages, units, device, seed + serial, self.times
        )

    def train(
        self,
        batch: Batch,
        forward: Callable[[Any, int], Any],
        backward: Callable[[Any, int], None],
        fetch: Callable[[int], Tensor] | None = None,
    ) -> list[Any]:
        """Forward and backward passes of all micro-batches; gradients are left in ``.grad``.

        Args:
            batch: The batch, split.
            forward: Runs the user's step on a micro-batch: ``forward(microbatch, number)``.
            backward: On the last stage, runs the backward pass of one output: ``backward(output, number)``.
            fetch: Fetches a whole leaf of the batch that this rank was not given.

        Returns:
            The outputs of ``forward`` on the last stage, ``None`` elsewhere.
        """
        return self._run(self.schedule, batch, forward, backward, fetch, "train")

    def evaluate(
        self,
        batch: Batch,
        forward: Callable[[Any, int], Any],
        fetch: Callable[[int], Tensor] | None = None,
        kind: str = "evaluate",
    ) -> list[Any]:
        """Forward passes only. A stage does not wait for later ones, so consecutive batches overlap."""
        return self._run("", batch, forward, None, fetch, kind)

    @property
    def record(self) -> list[tuple[Action, float, float]] | None:
        """Set it to a list to have every action of training added, with its begin and end: for a timeline's picture."""
        return self.times.record

    @record.setter
    def record(self, record: list[tuple[Action, float, float]] | None) -> None:
        self.times.record = record

    def row(self, schedule: str, count: int) -> Any:
        """This rank's actions for ``count`` micro-batches."""
        key = (schedule, count)
        if key not in self._tables:
            stages = self.layout.num_stages
            table = build(schedule, stages, count, stages) if schedule else forward_only(stages, count, stages)
            self._tables[key] = table[self.mailbox.rank] if self.stage is not None else []
        return self._tables[key]

    def _run(self, schedule: str, batch: Batch, forward: Any, backward: Any, fetch: Any, kind: str) -> list[Any]:
        count = len(batch)
        first = self.serial
        self.serial += count
        if self.executor is None:
            return [None] * count
        executor = self.executor

        def leaf(i: int) -> Callable[[int], Tensor]:
            def get(index: int) -> Tensor:
                if not isinstance(batch.leaves[index], Tensor):
                    assert fetch is not None
                    batch.leaves[index] = fetch(index)
                return batch.leaf(index, i)

            return get

        structure = (kind, batch.structure())
        items = [
            Item(first + i, i, structure, (kind, batch.signature(i)), backward is not None, leaf(i))
            for i in range(count)
        ]

        def microbatch(i: int) -> Any:
            return batch.microbatch(i, self.device, executor.step)

        done = (lambda i, out: backward(out, i)) if backward is not None else None
        outputs = executor.run(self.row(schedule, count), items, microbatch, forward, done)
        if backward is not None and self.shared is not None:
            with executor.guarded("the sum of shared gradients"):
                self.shared.sum()
        return outputs
