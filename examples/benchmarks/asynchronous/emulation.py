"""Training without flushes, emulated in one process: every pass uses the weights that the version formula says."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from lightning_lwpm.pipeline.asynchronous.correction import Correction
from lightning_lwpm.pipeline.asynchronous.delay import Delay
from lightning_lwpm.pipeline.asynchronous.in_place import writable
from lightning_lwpm.pipeline.asynchronous.told import late


@dataclass
class Piece:
    """Micro-batches ``start`` to ``stop`` of one batch, which one stage takes forward, and backward, at once."""

    start: int
    stop: int
    version: int
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
    inputs: dict[int, Tensor] = field(default_factory=dict)
    gradients: dict[int, Tensor | None] = field(default_factory=dict)
    pieces: dict[int, Piece] = field(default_factory=dict)
    forwards: int = 0
    backwards: int = 0


def staged(
    parts: Sequence[nn.Module],
    num_microbatches: int,
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
    factor: Callable[[int], float],
    correction: Callable[..., Correction],
) -> list[Stage]:
    """Stages of which each trains its part.

    Args:
        parts: The modules in order.
        num_microbatches: Micro-batches of a batch.
        optimizer: Makes the optimizer of some parameters.
        factor: Of the learning rate, by step.
        correction: What corrects each stage.
    """
    made = []
    for k, module in enumerate(parts):
        own, delay = optimizer(module.parameters()), Delay(k, len(parts), num_microbatches)
        corrected = correction(own, module.parameters(), delay)
        made.append(Stage(module, own, LambdaLR(own, factor), corrected, delay))
    return made


class Emulation:
    """Trains stages as steady-state 1F1B without flushes does, round by round.

    In round r every stage has version r. A stage with w micro-batches ahead takes forward those that it would take
    forward at that version, up to w of the next batch among them; batch r goes backward; then all stages step. What a
    stage computes with the same weights for the same batch it computes at once, forward passes first, unless ``apart``:
    then every micro-batch by itself, a forward and a backward pass by turns. That is needed where a model does not
    treat samples alike (batch norm), and by corrections that look at the gradient while it is summed.

    Args:
        stages: The stages in order.
        num_microbatches: Micro-batches of a batch, of equal size.
        loss: Mean loss of (output of the last stage, target).
        exact_steps: So many first steps are exact: the pipeline is empty at each of them.
        clip: Largest norm of the gradient, which stages know as ``pipeline.asynchronous.norms`` says; 0 for any.
        apart: Compute every micro-batch by itself.

    Attributes:
        errors: For each step the largest relative error of the norm by which a stage clips.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        num_microbatches: int,
        loss: Callable[[Tensor, Tensor], Tensor],
        exact_steps: int = 0,
        clip: float = 0.0,
        apart: bool = False,
    ) -> None:
        self.stages, self.m, self.loss = list(stages), num_microbatches, loss
        self.exact_steps, self.clip, self.apart = exact_steps, clip, apart
        self.errors: list[float] = []
        self._squares: list[list[float]] = []  # by step and stage

    def run(self, batches: Sequence[tuple[Tensor, Tensor]], after: Callable[[int], None] | None = None) -> list[float]:
        """Train on the batches, and empty the pipeline at the end; the loss of each batch.

        Args:
            batches: Inputs and targets.
            after: Called after each step, with the number of steps done.
        """
        inputs, targets = (
            [chunk for part in parts for chunk in part.chunk(self.m)] for parts in zip(*batches, strict=True)
        )
        self.losses, self.targets = [0.0] * len(batches), targets
        self.stages[0].inputs = dict(enumerate(inputs))
        self.stages[-1].gradients = dict.fromkeys(range(len(inputs)))
        for version in range(len(batches)):
            left = [list(self._actions(stage, version)) for stage in self.stages]
            while any(left):
                for number, actions in enumerate(left):
                    while actions and self._ready(number, *actions[0]):
                        kind, start, stop = actions.pop(0)
                        if kind == "F":
                            self._forward(number, version, start, stop)
                        else:
                            self._backward(number, version, start)
            if self.clip:
                self._clip(version)
            for stage in self.stages:
                stage.correction.late = version + 1 >= self.exact_steps
                self._step(stage)
            if after is not None:
                after(version + 1)
        return self.losses

    def _actions(self, stage: Stage, version: int) -> Iterator[tuple[str, int, int]]:
        """Passes of a stage at a version in order: kind, first micro-batch, micro-batch after the last."""
        ahead = stage.delay.ahead if version >= self.exact_steps else 0
        stop = min((version + 1) * self.m + ahead, len(self.targets))
        size = 1 if self.apart else self.m
        forwards = list(self._cuts(stage.forwards, stop, size))
        known = [(piece.start, piece.stop) for piece in stage.pieces.values()]
        batch = range(version * self.m, (version + 1) * self.m)
        passes = [("F", *cut) for cut in forwards] + [("B", *cut) for cut in known + forwards if cut[0] in batch]
        if self.apart:
            passes.sort(key=lambda action: (action[1] - ahead, 0) if action[0] == "F" else (action[1], 1))
        return iter(passes)

    @staticmethod
    def _cuts(start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
        while start < stop:
            end = min((start // size + 1) * size, stop)
            yield start, end
            start = end

    def _ready(self, number: int, kind: str, start: int, stop: int) -> bool:
        stage = self.stages[number]
        return stop - 1 in (stage.inputs if kind == "F" else stage.gradients)

    def _forward(self, number: int, version: int, start: int, stop: int) -> None:
        stage, batch = self.stages[number], start // self.m
        entry = torch.cat([stage.inputs.pop(i) for i in range(start, stop)]).detach()
        entry.requires_grad_(entry.is_floating_point())
        done = stage.backwards - version * self.m
        with stage.correction.forward(batch - version, done):
            output = stage.module(entry)
        if stage is self.stages[-1]:
            output = self.loss(output, torch.cat(self.targets[start:stop])) * ((stop - start) / self.m)
            self.losses[batch] += output.item()
        else:
            self.stages[number + 1].inputs.update(_split(output.detach(), start, stop))
        stage.pieces[start] = Piece(start, stop, version, entry, output)
        stage.forwards = stop

    def _backward(self, number: int, version: int, start: int) -> None:
        stage = self.stages[number]
        piece = stage.pieces.pop(start)
        gradients = [stage.gradients.pop(i) for i in range(piece.start, piece.stop)]
        with stage.correction.backward(version - piece.version):
            piece.output.backward(None if piece.output.dim() == 0 else torch.cat(gradients))
        if number:
            self.stages[number - 1].gradients.update(_split(piece.input.grad, piece.start, piece.stop))
        stage.backwards = piece.stop

    def _clip(self, version: int) -> None:
        """Clip the gradients of all stages, each by the norm that it knows."""
        held = [[p for p in stage.module.parameters() if p.grad is not None] for stage in self.stages]
        self._squares.append([float(nn.utils.get_total_norm([p.grad for p in own])) ** 2 for own in held])
        error, whole = 0.0, sum(self._squares[version])
        for k, own in enumerate(held):
            latest = [version - late(j, k, self.m) for j in range(len(held))]
            known = [step if step >= self.exact_steps else version for step in latest]
            total = sum(self._squares[step][j] for j, step in enumerate(known))
            nn.utils.clip_grads_with_norm_(own, self.clip, torch.tensor(total).sqrt())
            error = max(error, abs((total / whole) ** 0.5 - 1))
        self.errors.append(error)

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


def _split(tensor: Tensor, start: int, stop: int) -> Iterator[tuple[int, Tensor]]:
    """The part of each micro-batch."""
    return zip(range(start, stop), tensor.chunk(stop - start), strict=True)
