"""The processes of a run: how they start, meet, agree, and hear of each other's failures."""

import sys
import threading
from abc import ABC
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.util import Finalize
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.strategies.parallel import ParallelStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor
from typing_extensions import override

from lightning_lwpm.pipeline.carrier import connect
from lightning_lwpm.pipeline.mailbox import Mailbox
from lightning_lwpm.pipeline.transport import Transport
from lightning_lwpm.training.collectives import separate
from lightning_lwpm.training.launchers import ProcessLauncher, ScriptLauncher
from lightning_lwpm.training.private import init_connection
from lightning_lwpm.training.termination import OrderlyInterrupt

__all__ = ["ProcessesStrategy"]


class ProcessesStrategy(ParallelStrategy, ABC):
    """The part of the strategy that knows nothing of models.

    Attributes:
        start_method: How processes are started: by running the script again ("popen"; in a notebook "fork" in its
            place), or by ``multiprocessing``.
        timeout: Of the process groups.
        process_group_backend: How tensors travel between accelerators: "nccl", "gloo", or what can be used.
        patience: A wait longer than this many seconds is explained on standard error.
        transport: Carries tensors between ranks; ``None`` with one process.
        failed: Whether this rank has failed, or heard that another has.
    """

    start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen"
    timeout: timedelta
    process_group_backend: str | None = None
    patience: float
    transport: Transport | None = None
    failed: bool = False
    _mailbox: Mailbox | None = None
    _num_nodes: int = 1
    _turn: int = 0

    @property
    @override
    def root_device(self) -> torch.device:
        assert self.parallel_devices is not None
        return self.parallel_devices[self.local_rank]

    @property
    def num_nodes(self) -> int:
        """Number of hosts."""
        return self._num_nodes

    @num_nodes.setter
    def num_nodes(self, num_nodes: int) -> None:
        self._num_nodes = num_nodes

    @property
    def num_processes(self) -> int:
        """Number of processes on this host."""
        return len(self.parallel_devices) if self.parallel_devices is not None else 0

    @override
    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        if self.num_processes * self.num_nodes == 1:
            return
        interactive = hasattr(sys, "ps1") or bool(sys.flags.interactive)  # a notebook: there is no script to run again
        method = "fork" if interactive and self.start_method == "popen" else self.start_method
        if method != "popen":
            self._launcher = ProcessLauncher(self, start_method=method)
        else:  # also where processes are there already: it tells all of them when one fails
            self._launcher = ScriptLauncher(self.cluster_environment, self.num_processes, self.num_nodes)

    def set_world_ranks(self) -> None:
        """Tell the cluster environment this process's place; called by Lightning."""
        if self.cluster_environment is not None:
            self.cluster_environment.set_global_rank(self.node_rank * self.num_processes + self.local_rank)
            self.cluster_environment.set_world_size(self.num_nodes * self.num_processes)
            rank_zero_only.rank = self.cluster_environment.global_rank()  # type: ignore[attr-defined]

    @override
    def setup_environment(self) -> None:
        super().setup_environment()
        self.failed = False
        if self._mailbox is not None:
            self._mailbox.resting = False
            return
        if self.world_size == 1:
            self._mailbox = Mailbox(0, 1, lambda value: [value])
            return
        self.set_world_ranks()
        assert self.cluster_environment is not None
        init_connection(self.cluster_environment, "gloo", timeout=self.timeout)
        separate()
        self._mailbox, self.transport = self._connections()
        self._mailbox.patience, self._mailbox.resting = self.patience, False

    def _connections(self) -> tuple[Mailbox, Transport]:
        """Those of a strategy before this one, if they are at rest on all ranks; else new ones."""
        place = self.global_rank, self.world_size, self.root_device, threading.get_ident()
        key = (*place, self.process_group_backend, self.timeout)
        known = _connections.get(key)
        if all(_gather_once(known is not None and known[0].reusable)):
            assert known is not None
            return known
        mailbox = Mailbox(self.global_rank, self.world_size, _gather_once, self.patience)
        transport = connect(mailbox, self.root_device, self.process_group_backend, self.timeout)
        # not `atexit`, which processes started by `multiprocessing` leave out: their end would look like a death
        Finalize(None, transport.close, exitpriority=20)
        Finalize(None, mailbox.close, exitpriority=10)
        _connections[key] = mailbox, transport
        return mailbox, transport

    @property
    def mailbox(self) -> Mailbox:
        """The control connections; there once the environment has been set up."""
        assert self._mailbox is not None
        return self._mailbox

    @property
    def alone(self) -> bool:
        """Whether this is rank 0, in code that no other rank comes to: then its word is that of all."""
        return False

    def next_turn(self) -> int:
        """A number for an exchange in which all ranks take part."""
        self._turn += 1
        return self._turn

    @override
    def barrier(self, name: str | None = None) -> None:
        if self._mailbox is not None and self.world_size > 1 and not self.failed and not self.alone:
            self._mailbox.gather(("barrier", self.next_turn()), None, f"all ranks at '{name or 'barrier'}'")

    @override
    def broadcast(self, obj: Any, src: int = 0) -> Any:
        if self._mailbox is None or self.world_size == 1 or self.alone:
            return obj
        return self._mailbox.broadcast(self.next_turn(), obj, src)

    @override
    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        if self._mailbox is None or self.world_size == 1 or self.alone:
            return decision
        votes = self._mailbox.gather(("vote", self.next_turn()), bool(decision), "the decision of all ranks")
        return min(votes) if all else max(votes)

    @override
    def reduce(self, tensor: Tensor | Any, group: Any = None, reduce_op: Any = "mean") -> Tensor | Any:
        return tensor  # over the data axis, which has one member

    @override
    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        return tensor  # over the data axis, which has one member

    @override
    def on_exception(self, exception: BaseException) -> None:
        self.tell(exception)
        super().on_exception(exception)

    def tell(self, exception: BaseException) -> None:
        """Let every rank know of an exception that leaves Lightning's loop here."""
        if isinstance(exception, SIGTERMException | OrderlyInterrupt):
            return  # it leaves the loop of every rank: see ``termination``
        self.failed = True
        if self._mailbox is not None and self.world_size > 1:
            self._mailbox.failed("", exception)

    @contextmanager
    def told(self, what: str) -> Iterator[None]:
        """Tell all ranks of a failure in the block, so that none waits for this one."""
        try:
            with self.mailbox.guarded(lambda: what):
                yield
        except Exception:
            self.failed = True
            raise

    @override
    def teardown(self) -> None:
        if self._mailbox is not None:
            self._mailbox.resting = True
        super().teardown()


_connections: dict[Any, tuple[Mailbox, Transport]] = {}
"""The latest ones: a script may make many trainers, such as one for each fold, and each connection has threads."""


def _gather_once(value: Any) -> list[Any]:
    """One object from each rank, before there is a mailbox."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
