"""Runs one rank's row of a schedule's table: nothing here knows which schedule it is."""

import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lightning_lwpm.errors import LWPMError
from lightning_lwpm.pipeline.exchange import Exchange, Item
from lightning_lwpm.pipeline.mailbox import Mailbox
from lightning_lwpm.pipeline.schedule import Action
from lightning_lwpm.pipeline.times import Times
from lightning_lwpm.staging.layout import Unit
from lightning_lwpm.staging.randomness import TorchRandom, python_random
from lightning_lwpm.staging.step import StagedStep

__all__ = ["Executor"]


class Executor:
    """Executes the actions of one stage.

    Args:
        mailbox: Where failures are told and heard.
        exchange: The stage's dealings with the others; ``None`` where there is only one stage.
        stage: This rank's stage.
        num_stages: Number of stages.
        units: The units of the layout, with their modules.
        device: Where this stage computes.
        seed: Of Python's and NumPy's generators, alike on all ranks.
        times: Where the work of training is noted.
    """

    def __init__(
        self,
        mailbox: Mailbox,
        exchange: Exchange | None,
        stage: int,
        num_stages: int,
        units: Sequence[tuple[Unit, nn.Module]],
        device: torch.device,
        seed: int = 0,
        times: Times | None = None,
    ) -> None:
        self.mailbox, self.exchange, self.stage, self.device, self.seed = mailbox, exchange, stage, device, seed
        self.last = stage == num_stages - 1
        self.times = times or Times()
        self.num_stages = num_stages
        self.units = list(units)
        self.random = TorchRandom(seed, stage, device)
        self.step: StagedStep | None = None

    def run(
        self,
        actions: Sequence[Action],
        items: Sequence[Item],
        microbatch: Callable[[int], Any],
        forward: Callable[[Any, int], Any],
        backward: Callable[[int, Any], None] | None = None,
    ) -> list[Any]:
        """Execute actions in order.

        Args:
            actions: This rank's row of the table.
            items: The micro-batches, by number.
            microbatch: Makes a micro-batch, by number.
            forward: Runs the user's step on a micro-batch of a number.
            backward: On the last stage, runs the backward pass from what ``forward`` returned.

        Returns:
            What ``forward`` returned for each micro-batch; ``None`` where the step left before its end.

        Raises:
            PipelineError: if this or any other rank failed; the same message on every rank.
        """
        outputs: list[Any] = [None] * len(items)
        for position, action in enumerate(actions):
            with self.guarded(action):
                item = items[action.microbatch]
                began, waited = time.perf_counter(), self.mailbox.waited
                if action.kind == "F":
                    self._post_ahead(actions, position, items)
                    outputs[action.microbatch] = self._forward(item, microbatch, forward)
                else:
                    self._backward(item, outputs, backward)
                if item.grad:
                    self.times.add(action, began, time.perf_counter(), self.mailbox.waited - waited)
        return outputs

    def _post_ahead(self, actions: Sequence[Action], position: int, items: Sequence[Item]) -> None:
        """Post the receives of the next forwards, this one included, in the order in which they are sent."""
        if self.exchange is not None:
            ahead = [items[a.microbatch] for a in actions[position:] if a.kind == "F"]
            self.exchange.post(ahead[: 1 + self.exchange.lookahead])

    def _forward(self, item: Item, microbatch: Callable[[int], Any], forward: Callable[[Any, int], Any]) -> Any:
        number = item.microbatch
        if self.exchange is None:
            with python_random(self.seed, item.serial):
                return forward(microbatch(number), number)
        if not item.grad:
            self.exchange.wait_for_room(2 * self.num_stages + 2)
        peers = self.exchange.open(item)
        self.step = StagedStep(self.stage, self.last, self.units, peers, self.device)
        try:
            value = microbatch(number)
            with python_random(self.seed, item.serial), self.random.drawn():
                out = self.step.run(lambda: forward(value, number))
            self.exchange.publish(item, self.step)
        finally:
            self.step.close()
            self.step = None
        return out

    def _backward(self, item: Item, outputs: list[Any], backward: Callable[[int, Any], None] | None) -> None:
        if self.last:
            assert backward is not None
            backward(item.microbatch, outputs[item.microbatch])
        else:
            assert self.exchange is not None
            tensors, gradients = self.exchange.gradients(item)
            if tensors:
                torch.autograd.backward(tensors, gradients)
            del tensors, gradients
        if self.exchange is not None:
            self.exchange.return_gradients(item)

    @contextmanager
    def guarded(self, action: Action | str) -> Any:
        """Tell all ranks of a failure in the block, and raise it with the words that they hear."""
        try:
            yield
        except Exception as error:
            heard = self.mailbox.failure
            failure = self.mailbox.failed(action if isinstance(action, str) else _tell(action), error)
            if heard is not None and isinstance(error, LWPMError):
                raise
            raise failure from error


def _tell(action: Action) -> str:
    names = {"F": "forward", "B": "backward"}
    return f"{names.get(action.kind, action.kind)} of micro-batch {action.microbatch}"
