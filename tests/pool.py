"""A pool of worker processes that lives as long as the test session: starting Python and torch costs seconds."""

import faulthandler
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any

import cloudpickle


class WorkerError(AssertionError):
    """A test function failed in a worker; holds the traceback of each rank."""


_PRELOADED = ["torch", "lightning", "torchmetrics", "lightning_lwpm"]
"""What a server imports once: each worker is a fork of it, so that those ended by a failure are replaced at once."""

_START_SECONDS = 120.0  # several processes import on two cores


def _worker(connection: Any, log: str) -> None:
    stream = open(log, "w")  # noqa: SIM115  # lives as long as the process
    faulthandler.register(signal.SIGUSR1, file=stream, all_threads=True)
    os.dup2(stream.fileno(), 2)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    import torch

    import lightning_lwpm  # noqa: F401  # so that no test's time limit pays for the imports

    torch.set_num_threads(1)
    connection.send_bytes(b"ready")
    while True:
        try:
            task = connection.recv_bytes()
        except EOFError:  # the session has ended
            os._exit(0)
        rank, world, port, function, args = cloudpickle.loads(task)
        os.environ.update(
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
            WORLD_SIZE=str(world),
            LOCAL_RANK=str(rank),
            RANK=str(rank),
            NODE_RANK="0",
        )
        try:
            result: tuple[bool, Any] = (True, function(rank, world, *args))
        except BaseException as error:
            result = (False, (type(error).__name__, str(error), traceback.format_exc()))
        try:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
        except Exception:
            traceback.print_exc()
        connection.send_bytes(cloudpickle.dumps(result))


class Pool:
    """Worker processes that run a function on several ranks.

    Args:
        size: Number of workers.
    """

    def __init__(self, size: int = 4) -> None:
        self.size = size
        self.workers: list[Any] = []

    def run(self, world: int, function: Callable[..., Any], *args: Any, timeout: float = 90.0) -> list[Any]:
        """``function(rank, world, *args)`` on ``world`` ranks; returns their results.

        Raises:
            WorkerError: if it fails anywhere, or does not end in time: then with what each rank was doing.
        """
        outcomes = self.outcomes(world, function, *args, timeout=timeout)
        failed = [f"rank {rank}:\n{value[2]}" for rank, (ok, value) in enumerate(outcomes) if not ok]
        if failed:
            raise WorkerError("\n\n".join(failed))
        return [value for _, value in outcomes]

    def outcomes(
        self, world: int, function: Callable[..., Any], *args: Any, timeout: float = 90.0, keep: bool = False
    ) -> list[tuple[bool, Any]]:
        """Like :meth:`run`, with failures as results: ``(False, (error type, message, traceback))``.

        With ``keep``, the processes that live on after a failure are used again; it is up to ``function`` to leave them
        in order.
        """
        self._start(world)
        port = _free_port()
        for rank in range(world):
            task = cloudpickle.dumps((rank, world, port, function, args))
            self.workers[rank][1].send_bytes(task)
        deadline = time.monotonic() + timeout
        outcomes: list[tuple[bool, Any]] = []
        for rank in range(world):
            process, connection, log = self.workers[rank]
            try:
                if not connection.poll(max(0.1, deadline - time.monotonic())):
                    raise WorkerError(f"not done in {timeout} s. {self._who_waits(world)}")
                outcomes.append((True, None))
                outcomes[rank] = cloudpickle.loads(connection.recv_bytes())
            except WorkerError:
                self.close()
                raise
            except (EOFError, OSError):
                process.join(5)
                with open(log) as stream:
                    outcomes[rank:] = [(False, ("Died", f"exit code {process.exitcode}", stream.read()[-4000:]))]
        if not keep and not all(ok for ok, _ in outcomes):
            self.close()  # whatever a failure left behind goes with the processes
        return outcomes

    def close(self) -> None:
        """End all workers."""
        while self.workers:
            self._end(0)

    def _end(self, index: int) -> None:
        process, connection, log = self.workers.pop(index)
        connection.close()
        process.kill()
        process.join()
        os.unlink(log)

    def _start(self, world: int) -> None:
        for index in reversed(range(len(self.workers))):
            if not self.workers[index][0].is_alive():
                self._end(index)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOADED)
        started = len(self.workers)
        while len(self.workers) < max(world, min(2, self.size)):
            here, there = context.Pipe()
            log = tempfile.mkstemp(prefix="lwpm-worker-")[1]
            process = context.Process(target=_worker, args=(there, log))
            process.start()
            there.close()
            self.workers.append((process, here, log))
        for _, connection, log in self.workers[started:]:
            if not connection.poll(_START_SECONDS):
                raise WorkerError(f"a worker did not start; its log is {log}")
            connection.recv_bytes()

    def _who_waits(self, world: int) -> str:
        texts = []
        for rank in range(world):
            process, _, log = self.workers[rank]
            if process.is_alive():
                os.kill(process.pid, signal.SIGUSR1)
                time.sleep(0.3)
            with open(log) as stream:
                texts.append(f"--- rank {rank}:\n{stream.read()[-6000:]}")
        return "\n".join(texts)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
