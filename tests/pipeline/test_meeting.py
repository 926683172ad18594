"""Ranks of one host and of several meet, and train alike."""

import os
import socket
from typing import Any

import pytest
import torch
from harness import connect, train_pipelined, train_single
from pool import Pool
from torch import nn

from lightning_lwpm.errors import PipelineError
from lightning_lwpm.pipeline import mailbox, meeting


class Net(nn.Module):
    """A stage a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        return x


def step(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).square().mean()


def train(rank: int, world: int, hosts: list[str], batches: list[torch.Tensor]) -> tuple[Any, set[Any]]:
    """As on these hosts: the gradients, and the families of sockets."""
    meet, host, families = mailbox.meet, meeting.own_host, set()

    def looking(*args: Any) -> Any:
        peers = meet(*args)
        for connection in peers.values():
            with socket.fromfd(connection.fileno(), socket.AF_UNIX, socket.SOCK_STREAM) as view:
                families.add(view.getsockopt(socket.SOL_SOCKET, socket.SO_DOMAIN))
        return peers

    mailbox.meet, meeting.own_host = looking, lambda: (hosts[rank],)
    try:
        return train_pipelined(rank, world, Net, step, batches, 2)["gradients"], families
    finally:
        mailbox.meet, meeting.own_host = meet, host


@pytest.mark.parametrize(
    ("hosts", "family"), [(["a", "a", "a"], socket.AF_UNIX), (["a", "a", "b"], socket.AF_INET)], ids=["one", "two"]
)
def test_hosts(pool: Pool, hosts: list[str], family: int) -> None:
    torch.manual_seed(1)
    batches = [torch.randn(4, 16), torch.randn(4, 16)]
    expected = train_single(Net, step, batches, 2)["gradients"]
    for gradients, families in pool.run(3, train, hosts, batches, timeout=40):
        assert families == {family}
        for found, right in zip(gradients, expected, strict=True):
            assert found and all(torch.equal(gradient, right[name]) for name, gradient in found.items())


def bereft(rank: int, world: int, hosts: list[str]) -> str:
    """What rank 0 hears of the death of rank 1."""
    host, meeting.own_host = meeting.own_host, lambda: (hosts[rank],)
    try:
        mailbox, _ = connect(rank, world)
    finally:
        meeting.own_host = host
    mailbox.gather("all here", None)
    if rank == 1:
        os._exit(3)
    with pytest.raises(PipelineError) as caught:
        mailbox.take("never", None, "what never comes")
    return str(caught.value)


@pytest.mark.parametrize("hosts", [["a", "a"], ["a", "b"]], ids=["one", "two"])
def test_a_host_may_be_out_of_reach(pool: Pool, hosts: list[str]) -> None:
    (_, text), _ = pool.outcomes(2, bereft, hosts, keep=True, timeout=30)
    assert "rank 1 died without a word" in text
    assert ("its host" in text) == (hosts == ["a", "b"])
