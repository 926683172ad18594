"""Hooks that every rank runs use all gradients and weights, and the model.

Functions of gradients and weights: see :mod:`~lightning_lwpm.training.reading`. Calls of layers: see
:mod:`~lightning_lwpm.training.running`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import chain
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor
from torch.nn.utils import get_total_norm

from lightning_lwpm.errors import ConfigurationError
from lightning_lwpm.pipeline.mailbox import Mailbox
from lightning_lwpm.staging.intercept import Interception
from lightning_lwpm.staging.layout import Unit
from lightning_lwpm.staging.placeholder import is_placeholder, placeholders_read
from lightning_lwpm.staging.placement import named_tensors
from lightning_lwpm.staging.tree import tensors
from lightning_lwpm.state.tree import Path, tell
from lightning_lwpm.training.course import Course, Setting
from lightning_lwpm.training.data import Feed
from lightning_lwpm.training.drawn import Drawn
from lightning_lwpm.training.gradients import GRAD, lent
from lightning_lwpm.training.kept import Kept
from lightning_lwpm.training.late import Late
from lightning_lwpm.training.lockstep import Lockstep
from lightning_lwpm.training.private import taking_norms
from lightning_lwpm.training.reading import ASKED, Reading
from lightning_lwpm.training.running import Running
from lightning_lwpm.training.weights import Holders

__all__ = ["Together"]

_ARGUMENT = "?argument "


class Together:
    """The gradients and weights in hooks that every rank runs.

    Args:
        mailbox: The control connections.
        module: The partitioned model.
        holders: Gives who holds what now.
        units: Gives the largest modules of which each lies in one stage now.
        feed: Gives the batches.
        kept: What the user keeps beside the model.
    """

    def __init__(
        self,
        mailbox: Mailbox,
        module: LightningModule,
        holders: Callable[[], Holders],
        units: Callable[[], Sequence[Unit]],
        feed: Feed,
        kept: Kept,
    ) -> None:
        self.mailbox, self.module, self.holders, self.units, self.feed = mailbox, module, holders, units, feed
        self.kept, self._drawn, self._course = kept, Drawn(feed.device), Course(module.trainer)
        self._reading: Reading | None = None
        self._late: Late | None = None
        self._turn = 0
        self._small: set[str] = set()
        self._held: dict[str, Tensor] = {}
        mailbox.handle(ASKED, self._give)

    @contextmanager
    def hook(self, what: str, arguments: Any = (), checkpoint: Any = None, late: bool = False) -> Iterator[None]:
        """Around a hook; the same on all ranks.

        Args:
            what: Names it, for people.
            arguments: What it is given, such as a batch, of which a rank may lack large parts.
            checkpoint: The one that it is given, which may have weights of other ranks in it.
            late: Whether to begin only where a rank needs it: see :mod:`~lightning_lwpm.training.late`.

        Raises:
            ConfigurationError: if some things are read on one rank only and their values are there no more.
        """
        if self._reading is not None or self._late is not None:  # a checkpoint is saved in a hook
            yield
            return
        self._turn += 1
        self._course.watch()
        try:
            with ExitStack() as stack:
                begin = partial(self._begin, stack, what, arguments, checkpoint)
                calls = Interception([(unit, self.module.get_submodule(unit.name)) for unit in self.units()])
                if not late:
                    reading, running = begin()
                    calls.step = running
                    with reading, calls.batch(), self._begun_by(lambda: (reading, running)):
                        yield
                else:
                    self._late = calls.step = Late(self.mailbox, self._turn, what, self.module, begin)
                    with self._late, calls.batch(), self._begun_by(self._late.together):
                        yield
                        if not self._late.needed(self._end()):
                            self._go_on(self._late.said)
                            return
                        reading, _ = self._late.together()
                self._go_on(reading.lockstep.end(self._end()))
        finally:
            if self._reading is not None:
                self._reading.close()
            self._reading, self._late, self._held = None, None, {}

    def _begin(self, stack: ExitStack, what: str, arguments: Any, checkpoint: Any) -> tuple[Reading, Running]:
        """Let functions read what is on any rank, for as long as a stack holds; all ranks have to come."""
        named = list(self.module.named_parameters())
        own = {name + GRAD: p.grad for name, p in named if p.grad is not None}
        self._held = {**dict(named_tensors(self.module)), **own}
        lacking = [name for name, p in named if p.grad is None and not is_placeholder(p)]
        real = self.mailbox.rank == 0
        leaves = {f"{_ARGUMENT}{i}": tensor for i, tensor in enumerate(tensors(arguments))}
        absent = [name for name, tensor in leaves.items() if is_placeholder(tensor)]
        here = lacking, absent, self.kept.lacking(checkpoint), self._drawn.here() if real else None
        there = self.mailbox.gather(("together", self._turn), here, f"all ranks to come to {what}")
        kept, holders = self._kept([frozenset(paths) for _, _, paths, _ in there], checkpoint)
        self._held |= kept
        self._held.update((name, leaves[name]) for names in there for name in names[1])
        gradients = stack.enter_context(lent(self.module, set().union(*(names[0] for names in there))))
        known = {**self._held, **gradients}
        lockstep = Lockstep(self.mailbox, self._turn, what)
        reading = Reading(lockstep, known, _with_arguments(holders), self._small, self._drawn)
        self._reading = reading
        running = Running(reading, self.module, self.holders())
        stack.enter_context(self._drawn.alike(there[0][3], real))
        stack.enter_context(taking_norms(get_total_norm))
        return reading, running

    @contextmanager
    def _begun_by(self, together: Callable[[], tuple[Reading, Running]]) -> Iterator[None]:
        """Let data be read and placeholders have values by what has begun, or begins then."""
        with (
            self.feed.read_aside(lambda read: _batches(together()[0], read)),
            placeholders_read(lambda tensor: together()[0].values(tensor)),
        ):
            yield

    @contextmanager
    def aside(self, changes: bool = False) -> Iterator[None]:
        """Around what the library itself does in a hook: it knows what other ranks hold.

        Args:
            changes: Whether it changes gradients or weights.
        """
        with ExitStack() as stack:
            if self._late is not None:
                stack.enter_context(self._late.aside())
            if self._reading is not None:
                if changes:
                    self._reading.lockstep.begin_changes()
                stack.enter_context(self._reading.aside())
            yield

    def _end(self) -> tuple[bool, dict[Setting, Any]]:
        """What this rank has to say at the end of a hook: whether the run is to stop, and what it has set of it."""
        return self.module.trainer.should_stop, self._course.changes() if self.mailbox.rank == 0 else {}

    def _go_on(self, ends: Mapping[int, tuple[bool, dict[Setting, Any]]]) -> None:
        """All ranks have run the hook: they stop where one of them does, and go on as rank 0 has set it."""
        trainer = self.module.trainer
        trainer.should_stop = trainer.should_stop or any(stop for stop, _ in ends.values())
        if 0 in ends:
            self._course.follow(ends[0][1])

    def _kept(self, lacking: Sequence[frozenset[Path]], checkpoint: Any) -> tuple[dict[str, Tensor], Holders]:
        """What is kept beside the model and not whole on every rank, by name, and who holds what, weights included."""
        weights = self.holders()
        paths = frozenset.union(*lacking)
        owners = {tell(path): [rank for rank, lacks in enumerate(lacking) if path not in lacks] for path in paths}
        kept = {tell(path): tensor for path, tensor in self.kept.at(paths, checkpoint).items() if owners[tell(path)]}
        return kept, lambda name: owners[name] if name in owners else weights(name)

    def _give(self, source: int, key: Any, name: str) -> None:
        """Answer a rank that is in the same hook, which this one has not left."""
        changed = self._reading is not None and self._reading.lockstep.changing
        self.mailbox.post(source, "values", key[0], None if changed else self._held[name].detach())


def _with_arguments(holders: Holders) -> Holders:
    """Rank 0 has all that hooks are given."""
    return lambda name: (0,) if name.startswith(_ARGUMENT) else holders(name)


def _batches(reading: Reading, read: Iterator[Any] | None) -> Iterator[Any]:
    """An iteration of a loader, on every rank what rank 0 reads; what it draws for that, all draw."""

    def told(give: Callable[[], list[Any]]) -> list[Any]:
        with reading.aside():
            found = reading.exchange((0,), "a batch", lambda: (give(), reading.drawn.here()))
        if found is None:
            raise ConfigurationError(
                f"{reading.lockstep.what} reads data on rank {reading.mailbox.rank} that rank 0 does not read. Read it "
                "on every rank, or on rank 0 alone, under `if trainer.is_global_zero`."
            )
        if read is None:
            reading.drawn.adopt(found[1])
        batches: list[Any] = found[0]
        return batches

    told(list)  # it has begun
    return chain.from_iterable(
        iter(lambda: told(lambda: [value for _, value in zip("1", read or (), strict=False)]), [])
    )
