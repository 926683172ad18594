"""The pipeline of one rank: schedule, executor and exchange put together, for whoever brings batches and a step."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lwpm.errors import ConfigurationError
from lightning_lwpm.pipeline.device_times import DeviceTimes
from lightning_lwpm.pipeline.exchange import Item, exchanges
from lightning_lwpm.pipeline.executor import Executor
from lightning_lwpm.pipeline.lending import Lending
from lightning_lwpm.pipeline.mailbox import Mailbox
from lightning_lwpm.pipeline.postings import Postings
from lightning_lwpm.pipeline.rendezvous import Message, channels
from lightning_lwpm.pipeline.schedule import Action, Table, build, forward_only, place
from lightning_lwpm.pipeline.shared import SharedGradients
from lightning_lwpm.pipeline.times import Record, Times
from lightning_lwpm.pipeline.transport import Transport
from lightning_lwpm.staging.batch import Batch
from lightning_lwpm.staging.batch_norm import DeferredBatchNorm
from lightning_lwpm.staging.compiled import CompiledUnits
from lightning_lwpm.staging.intercept import Interception
from lightning_lwpm.staging.layer_random import LayerRandom
from lightning_lwpm.staging.layout import Layout
from lightning_lwpm.staging.randomness import TorchRandom
from lightning_lwpm.staging.recompute import Recompute
from lightning_lwpm.staging.versions import Versions

__all__ = ["Engine"]


class Engine:
    """Trains and evaluates a model of which this rank runs some stages.

    Args:
        mailbox: The control connections.
        transport: The data connections; ``None`` with one rank.
        root: The model, with this rank's share of the weights.
        layout: The partition.
        device: This rank's device.
        schedule: Name of the schedule for training, or a function from the number of micro-batches to the table; the
            same on all ranks.
        serial: Number of the first micro-batch; what follows another engine on the same links counts on.
        placement: The rank of each stage; by default one stage a rank, the last one on rank 0.
        activation_checkpointing: What is computed again in backward passes; see ``staging.recompute``.
        continuous: Whether batches may overlap: see ``asynchronous.continuous``.
        random: Torch's random numbers where they are to depend on layers, and not on stages.
        deferred_batch_norm: Whether running statistics are those of whole batches: see ``staging.batch_norm``.

    Attributes:
        times: What this rank has measured of its own work.
        ranks: The rank of each stage.
        stages: The stages of this rank, ascending; none where there are fewer stages than ranks.
        stage: The first of them, or ``None``.
        last: Whether this rank runs the last stage.
        links: The (producer, consumer) pairs of stages between which tensors may travel.

    Raises:
        ConfigurationError: if the placement does not fit the stages and the ranks.
    """

    def __init__(
        self,
        mailbox: Mailbox,
        transport: Transport | None,
        root: nn.Module,
        layout: Layout,
        device: torch.device,
        schedule: str | Callable[[int], Table] = "1f1b",
        serial: int = 0,
        placement: Sequence[int] | None = None,
        activation_checkpointing: str = "none",
        continuous: bool = False,
        random: LayerRandom | None = None,
        deferred_batch_norm: bool = False,
    ) -> None:
        self.mailbox, self.layout, self.device, self.schedule = mailbox, layout, device, schedule
        self.root = root
        self.ranks = _ranks(placement, layout.num_stages, mailbox.world)
        self.stages = tuple(stage for stage, rank in enumerate(self.ranks) if rank == mailbox.rank)
        self.stage = self.stages[0] if self.stages else None
        self.last = layout.num_stages - 1 in self.stages
        self.links = [(producer, consumer) for consumer in range(layout.num_stages) for producer in range(consumer)]
        mailbox.introduce(self.ranks)
        self.serial = serial
        self.times = Times() if device.type == "cpu" else DeviceTimes(device)
        self.executor: Executor | None = None
        self.shared: SharedGradients | None = None
        self._tables: dict[tuple[bool, int], Table] = {}
        self._orders: dict[tuple[bool, int], dict[int, list[Message]]] = {}
        self._postings = Postings()
        self._versions = Versions(root, layout, self.stages)
        found = {}
        units: list[Any] = []
        if self.stages and layout.num_stages > 1:
            assert transport is not None
            found = exchanges(mailbox, transport, self._postings, self.stages, self.ranks, device)
            units = [(unit, root.get_submodule(unit.name)) for unit in layout.units]
            self.shared = SharedGradients(mailbox, None if continuous else transport, root, layout, self.ranks)
        self._compiled = CompiledUnits(root, [module for _, module in units])
        self._recompute = Recompute(activation_checkpointing, root, [unit for unit, _ in units], layout.num_stages - 1)
        # from here on every rank answers for this engine's stages, and nobody asks those of an engine before
        seed = mailbox.gather("engine", torch.initial_seed(), "all ranks to begin")[0]
        # whatever takes the place of layers for a batch, from the outside in
        self._around: list[Any] = [self._versions, self._compiled, self._recompute]
        if random is not None:
            self._around.insert(0, random)
        if deferred_batch_norm:
            self._around.insert(0, DeferredBatchNorm(root))
        interception = Interception(units)
        if units:
            self._around.append(interception)
        if self.stages:
            self.executor = Executor(
                mailbox,
                found,
                self._postings,
                layout.num_stages,
                interception,
                self._versions,
                device,
                seed,
                {stage: TorchRandom(seed + serial, stage, device) for stage in self.stages},
                self.times,
                self._recompute,
                Lending(mailbox, root, layout, device),
                random,
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
        return self._run(batch, forward, backward, fetch, "train")

    def evaluate(
        self,
        batch: Batch,
        forward: Callable[[Any, int], Any],
        fetch: Callable[[int], Tensor] | None = None,
        kind: str = "evaluate",
    ) -> list[Any]:
        """Forward passes only. A stage does not wait for later ones, so consecutive batches overlap."""
        return self._run(batch, forward, None, fetch, kind)

    @property
    def record(self) -> Record | None:
        """Set it to a list to have every action of training added, with its begin and end: for a timeline's picture."""
        if self.times.record is not None:
            self.times.settle()
        return self.times.record

    @record.setter
    def record(self, record: Record | None) -> None:
        self.times.record = record

    @property
    def at_last(self) -> bool:
        """In a step: whether it is run for the last stage, to the loss."""
        return self.executor is not None and self.executor.at_last

    @property
    def summed(self) -> frozenset[str]:
        """The parameters held here of which the gradient is summed over ranks after the schedule."""
        return self.shared.names if self.shared is not None else frozenset()

    def row(self, count: int, training: bool = True) -> list[Action]:
        """This rank's actions for ``count`` micro-batches."""
        table = self._table(count, training)
        return table[self.mailbox.rank] if self.mailbox.rank < len(table) else []

    def _table(self, count: int, training: bool) -> Table:
        key = (training, count)
        if key not in self._tables:
            stages, world = self.layout.num_stages, self.mailbox.world
            if not training:
                table = forward_only(stages, count, world, self.ranks)
            elif callable(self.schedule):
                table = self.schedule(count)
            else:
                table = build(self.schedule, stages, count, world, self.ranks)
            kinds = {action.kind for row in table for action in row} - set("FBIW")
            if kinds:
                raise ConfigurationError(
                    f"schedule={self.schedule!r} has actions {sorted(kinds)}, which cannot be run; use one of 'F', "
                    "'B', 'I' and 'W' only, such as '1f1b'"
                )
            self._tables[key] = table
        return self._tables[key]

    def _received(self, count: int, training: bool) -> dict[int, list[Message]]:
        """By rank, what it sends to this one, in order."""
        key = (training, count)
        if key not in self._orders:
            sent = channels(self._table(count, training), self.ranks, self.links)
            self._orders[key] = {source: sent[source, to] for source, to in sent if to == self.mailbox.rank}
        return self._orders[key]

    def _run(self, batch: Batch, forward: Any, backward: Any, fetch: Any, kind: str) -> list[Any]:
        count = len(batch)
        first = self.serial
        self.serial += count
        if self.executor is None:
            return [None] * count
        items = self.items(batch, first, kind, backward is not None, fetch)

        def microbatch(stage: int, i: int) -> Any:
            return self.microbatch(batch, stage, i)

        done = (lambda i, out: backward(out, i)) if backward is not None else None
        training = backward is not None
        row = self.row(count, training)
        outputs = self.execute(row, self._received(count, training), items, microbatch, forward, done)
        return [outputs.get(i) for i in range(count)]

    def items(
        self, batch: Batch, first: int, kind: str, grad: bool, fetch: Callable[[int], Tensor] | None
    ) -> dict[int, Item]:
        """A batch as the pipeline sees it, by number of the micro-batch.

        Args:
            batch: The batch, split.
            first: Serial number of its first micro-batch.
            kind: What is done with it; what one kind needs of other stages says nothing of another's.
            grad: Whether backward passes follow.
            fetch: Fetches a whole leaf of the batch that this rank was not given.
        """

        def leaf(i: int) -> Callable[[int], Tensor]:
            def get(index: int) -> Tensor:
                if not isinstance(batch.leaves[index], Tensor):
                    assert fetch is not None
                    batch.leaves[index] = fetch(index)
                return batch.leaf(index, i)

            return get

        structure = (kind, batch.structure())
        return {i: Item(first + i, i, structure, (kind, batch.signature(i)), grad, leaf(i)) for i in range(len(batch))}

    def microbatch(self, batch: Batch, stage: int, i: int) -> Any:
        """Micro-batch ``i`` of a batch, for a stage of this rank."""
        assert self.executor is not None
        # the latest stage of a rank may change the batch itself, unless it needs it once more as it was
        public = () if self._recompute.stages and not self.last else self.stages[-1:]
        return batch.microbatch(i, self.device, self.executor.step, private=stage not in public)

    def execute(
        self,
        row: Sequence[Action],
        messages: Mapping[int, Sequence[Message]],
        items: Mapping[int, Item],
        microbatch: Callable[[int, int], Any],
        forward: Callable[[Any, int], Any],
        backward: Callable[[int, Any], None] | None,
        around: Callable[[Action], AbstractContextManager[Any]] | None = None,
    ) -> dict[int, Any]:
        """Run some actions of this rank's stages, and sum shared gradients.

        Args:
            row: The actions, in order.
            messages: By rank, what it sends to this one for them, in order.
            items: Micro-batches by number.
            microbatch: See :meth:`Executor.run`, as for all that follow.
            forward: The same.
            backward: The same.
            around: The same.
        """
        assert self.executor is not None
        self._postings.begin(row, messages, items)
        with ExitStack() as stack:
            for part in self._around:
                if part is self._recompute and not torch.is_grad_enabled():
                    continue  # where a step of evaluation takes gradients, it has them at once
                stack.enter_context(part.batch())
            outputs = self.executor.run(row, items, microbatch, forward, backward, around)
        if backward is not None and self.shared is not None:
            with self.mailbox.guarded(lambda: "the sum of shared gradients"):
                self.shared.sum()
        return outputs

    def receive(self, sent: Mapping[int, Sequence[int]], items: Mapping[int, Item]) -> None:
        """Receive what earlier stages have sent for forward passes that this rank does not run.

        Args:
            sent: By stage, the numbers of their micro-batches.
            items: Micro-batches by number.
        """
        assert self.executor is not None and self.stage is not None
        messages = {
            self.ranks[producer]: [Message(Action("F", producer, i), Action("F", self.stage, i)) for i in numbers]
            for producer, numbers in sent.items()
        }
        self._postings.begin([], messages, items)
        for producer, numbers in sent.items():
            for number in numbers:
                self.executor.exchanges[self.stage].inbox.drop(producer, items[number])

    def forget(self, serial: int) -> None:
        """Let go of all that is held of micro-batches from a serial number on."""
        assert self.executor is not None
        for exchange in self.executor.exchanges.values():
            exchange.forget(serial)


def _ranks(placement: Sequence[int] | None, num_stages: int, world: int) -> list[int]:
    """The rank of each stage."""
    ranks = list(placement) if placement is not None else place(num_stages)
    if len(ranks) != num_stages:
        raise ConfigurationError(f"placement={ranks} places {len(ranks)} stage(s), but there are {num_stages}")
    if not all(0 <= rank < world for rank in ranks):
        raise ConfigurationError(f"placement={ranks}: ranks go from 0 to {world - 1}")
    return ranks
