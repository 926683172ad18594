"""What a whole step, which every rank runs in turns, has of the other ranks, and they of it."""

from typing import NamedTuple, Protocol

from torch import Tensor

from lightning_lwpm.staging.record import Key, Record
from lightning_lwpm.staging.remote import Meta, Name, Remote

__all__ = ["Made", "Others"]


class Made(NamedTuple):
    """A tensor that a call of this rank returned or changed."""

    tensor: Tensor
    name: Name
    segment: int
    version: int


class Others(Protocol):
    """What a whole step asks of the other ranks."""

    def record(self, stage: int, key: Key) -> Record:
        """What the call ``key`` in the present segment of another stage returned."""

    def value(self, remote: Remote) -> Tensor:
        """The data of a remote tensor, joined to the graph of the present segment."""

    def know(self, name: Name, value: Tensor, meta: Meta) -> None:
        """The data of a tensor of another stage is here."""

    def joined(self, made: Made) -> Tensor:
        """A tensor of an earlier segment of this rank, joined to the graph of the present one."""

    def turn(self, stage: int) -> None:
        """End the present segment, and begin one of a stage."""

    def backward(self, loss: Tensor, gradient: Tensor | None, retain_graph: bool) -> None:
        """Run the backward pass through all segments."""
