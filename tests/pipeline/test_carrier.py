"""How tensors travel is chosen by the devices; a failure is heard whatever carries them."""

import socket
import threading
import time

import pytest
import torch
from harness import connect as connect_ranks
from harness import engine
from pool import Pool
from torch import nn

from lightning_lwpm.errors import ConfigurationError
from lightning_lwpm.pipeline.carrier import connect
from lightning_lwpm.pipeline.direct import Direct
from lightning_lwpm.pipeline.mailbox import Mailbox
from lightning_lwpm.pipeline.streams import Stream
from lightning_lwpm.pipeline.transport import Transport
from lightning_lwpm.staging.batch import Batch


def kinds(rank: int, world: int, backend: str | None) -> tuple[str, str]:
    """What is chosen on CPUs: the type of the transport, or the error."""
    mailbox, _ = connect_ranks(rank, world)
    try:
        transport = connect(mailbox, torch.device("cpu"), backend)
    except ConfigurationError as error:
        found = ("error", str(error))
    else:
        found = (type(transport).__name__, "")
        transport.close()
    mailbox.gather("end", None)
    mailbox.close()
    return found


def test_sockets_are_chosen_on_cpus(pool: Pool) -> None:
    assert pool.run(2, kinds, None) == pool.run(2, kinds, "gloo") == [("Transport", "")] * 2


def test_nccl_is_refused_on_cpus(pool: Pool) -> None:
    for kind, words in pool.run(2, kinds, "nccl"):
        assert kind == "error"
        assert "process_group_backend='nccl' cannot be used: not all ranks have CUDA and NCCL (here: cpu)" in words


def crash(rank: int, world: int) -> str:
    """Over process groups: rank 1 fails in its second batch."""
    steps: list[int] = []

    def step(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        steps.append(0)
        if rank == 1 and len(steps) > 5:
            raise ValueError("boom")
        return model(x).square().mean()

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    device, found = torch.device("cpu"), []

    def carry(mailbox: Mailbox) -> Transport:
        found.append(Direct(mailbox, device, "gloo"))
        return found[0]

    run = engine(rank, world, model, step, torch.randn(2, 4), ["1"], carry=carry)
    try:
        for _ in range(3):
            batch = Batch.of(torch.randn(8, 4), 4)
            run.train(batch, lambda micro, _: step(model, micro), lambda out, _: out.backward())
    except Exception as error:
        return str(error)
    finally:
        found[0].close()
    return "nothing"


def test_a_failure_is_heard_over_process_groups(pool: Pool) -> None:
    begin = time.monotonic()
    outcomes = pool.outcomes(2, crash)
    assert all(ok and "boom" in words for ok, words in outcomes), outcomes
    assert time.monotonic() - begin < 20


def test_what_is_not_ready_is_sent_in_its_turn_by_another_thread() -> None:
    here, there = socket.socketpair()
    stream, ready, waited_in = Stream(here, "there"), threading.Event(), []

    def wait() -> None:
        waited_in.append(threading.current_thread())
        ready.wait(10)

    stream.send(memoryview(b"first"), wait)
    stream.send(memoryview(b"second"))
    there.setblocking(False)
    with pytest.raises(BlockingIOError):
        there.recv(100)
    there.settimeout(10)
    ready.set()
    data = b""
    while len(data) < 2 * 8 + 11:
        data += there.recv(100)
    assert data == (5).to_bytes(8, "little") + b"first" + (6).to_bytes(8, "little") + b"second"
    assert waited_in != [threading.current_thread()]
    stream.finish(time.monotonic() + 1)
    stream.close()
    there.close()
