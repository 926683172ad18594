"""Training without flushes, emulated in one process by the version formula: every pass uses the weights it would use."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_lwpm.pipeline.asynchronous.correction import Correction
from lightning_lwpm.pipeline.asynchronous.delay import Delay
from lightning_lwpm.pipeline.asynchronous.in_place import writable


@dataclass
class Piece:
    """Micro-batches ``start`` to ``stop`` of one batch, which one stage took forward at once."""

    start: int
    stop: int
    round: int
    input: Tensor
    output: Tensor


@dataclass
class Stage:
    """A stage and what trains it."""

    module: nn.Module
    optimizer: Optimizer
    scheduler: LRScheduler
    correction: Correction
    delay: Delay
    pieces: dict[int, list[Piece]] = field(default_factory=lambda: defaultdict(list))
    waiting: dict[int, Tensor] = field(default_factory=dict)
    done: int = 0


class Emulation:
    """Trains stages as steady-state 1F1B without flushes does, round by round.

    In round r every stage has version r. A stage with w micro-batches ahead takes forward those that it would take
    forward at that version, up to w of the next batch among them; then batch r goes backward; then all stages step.
    What a stage computes with the same weights for the same batch it computes at once, which needs a model that
    treats samples alike (no batch norm) unless ``apart``.

    Args:
        stages: The stages in order.
        num_microbatches: Micro-batches of a batch, of equal size.
        loss: Mean loss of (output of the last stage, target).
        exact_steps: So many first steps are exact: the pipeline is empty at each of them.
        apart: Compute every micro-batch by itself.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        num_microbatches: int,
        loss: Callable[[Tensor, Tensor], Tensor],
        exact_steps: int = 0,
        apart: bool = False,
    ) -> None:
        self.stages, self.m, self.loss = list(stages), num_microbatches, loss
        self.exact_steps, self.apart = exact_steps, apart

    def run(self, batches: Sequence[tuple[Tensor, Tensor]]) -> list[float]:
        """Train on the batches, and empty the pipeline at the end; the loss of each batch."""
        m, total = self.m, len(batches) * self.m
        parts = [[part.chunk(m) for part in batch] for batch in batches]
        self.losses = [0.0] * len(batches)
        for number in range(len(batches)):
            first = self.stages[0]
            entering = range(first.done, self._end(first.delay.ahead, number, total))
            inputs = {i: parts[i // m][0][i % m] for i in entering}
            for stage in self.stages:
                inputs = self._forward(stage, number, self._end(stage.delay.ahead, number, total), inputs, parts)
            gradients: dict[int, Tensor] = {}
            for stage in reversed(self.stages):
                gradients = self._backward(stage, number, gradients)
            for stage in self.stages:
                self._step(stage)
        return self.losses

    def _end(self, ahead: int, number: int, total: int) -> int:
        """The micro-batch up to which a stage has gone forward in a round."""
        return min((number + 1) * self.m + (ahead if number >= self.exact_steps else 0), total)

    def _cuts(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        size = 1 if self.apart else self.m
        while start < stop:
            end = min((start // size + 1) * size, stop)
            yield start, end
            start = end

    def _forward(
        self, stage: Stage, number: int, stop: int, inputs: dict[int, Tensor], parts: list[list[tuple[Tensor, ...]]]
    ) -> dict[int, Tensor]:
        outputs: dict[int, Tensor] = {}
        stage.waiting.update(inputs)
        for start, end in self._cuts(stage.done, stop):
            entry = torch.cat([stage.waiting.pop(i) for i in range(start, end)]).detach()
            entry.requires_grad_(entry.is_floating_point())
            batch = start // self.m
            with stage.correction.forward(batch - number):
                output = stage.module(entry)
            if stage is self.stages[-1]:
                target = torch.cat([parts[batch][1][i % self.m] for i in range(start, end)])
                output = self.loss(output, target) * ((end - start) / self.m)
                self.losses[batch] += output.item()
            else:
                outputs.update(zip(range(start, end), output.detach().chunk(end - start), strict=True))
            stage.pieces[batch].append(Piece(start, end, number, entry, output))
        stage.done = max(stage.done, stop)
        return outputs

    def _backward(self, stage: Stage, number: int, gradients: dict[int, Tensor]) -> dict[int, Tensor]:
        back: dict[int, Tensor] = {}
        for piece in stage.pieces.pop(number):
            indices = range(piece.start, piece.stop)
            gradient = torch.cat([gradients[i] for i in indices]) if gradients else None
            with stage.correction.backward(number - piece.round):
                piece.output.backward(gradient)
            if piece.input.grad is not None:
                back.update(zip(indices, piece.input.grad.chunk(len(indices)), strict=True))
        return back

    def _step(self, stage: Stage) -> None:
        stage.correction.before_step()
        with writable(stage.correction.parameters):
            stage.optimizer.step()
        stage.correction.after_step()
        stage.scheduler.step()
        stage.optimizer.zero_grad()

    @contextmanager
    def base(self) -> Iterator[None]:
        """Base weights at all stages."""
        with ExitStack() as stack:
            for stage in self.stages:
                stack.enter_context(stage.correction.base())
            yield
