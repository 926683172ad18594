"""Runs one rank's row of a schedule's table: nothing here knows which schedule it is."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from lightning_lwpm.pipeline.exchange import Exchange, Item
from lightning_lwpm.pipeline.lending import Lending
from lightning_lwpm.pipeline.mailbox import Mailbox
from lightning_lwpm.pipeline.postings import Postings
from lightning_lwpm.pipeline.schedule import Action
from lightning_lwpm.pipeline.times import Times
from lightning_lwpm.staging.deferral import Deferral
from lightning_lwpm.staging.ghost import Peers
from lightning_lwpm.staging.intercept import Interception
from lightning_lwpm.staging.layer_random import LayerRandom
from lightning_lwpm.staging.modes import Modes
from lightning_lwpm.staging.onward import EvaluatedStep
from lightning_lwpm.staging.randomness import TorchRandom, python_random, seed_python
from lightning_lwpm.staging.recompute import Recompute
from lightning_lwpm.staging.step import StagedStep
from lightning_lwpm.staging.versions import Versions

__all__ = ["Executor"]


class Executor:
    """Executes the actions of this rank's stages.

    Args:
        mailbox: Where failures are told and heard.
        exchanges: The dealings of each stage with the others; empty where there is only one stage.
        postings: The order of this rank's receives.
        num_stages: Number of stages.
        interception: Brings steps the calls of units; in place for the time of a batch.
        versions: What each stage has a version of its own of.
        device: Where these stages compute.
        seed: Of Python's and NumPy's generators, alike on all ranks.
        random: By stage of this rank, torch's random numbers.
        times: Where the work of training is noted.
        recompute: What is computed again in backward passes.
        lender: Brings weights of other ranks to steps of evaluation that need them.
        layers: Torch's random numbers where they are to depend on layers, and not on stages.

    Attributes:
        step: The run of the user's step that is under way.
        at_last: Whether it is, or was, one of the last stage, which runs to the loss.
        onward: Why the last stage has run the latest step of evaluation by itself, in words; "" if it has not.
        deferral: The weight gradients that a split backward pass has left for later.
    """

    def __init__(
        self,
        mailbox: Mailbox,
        exchanges: Mapping[int, Exchange],
        postings: Postings,
        num_stages: int,
        interception: Interception,
        versions: Versions,
        device: torch.device,
        seed: int,
        random: Mapping[int, TorchRandom],
        times: Times,
        recompute: Recompute,
        lender: Lending,
        layers: LayerRandom | None = None,
    ) -> None:
        self.mailbox, self.exchanges, self.postings = mailbox, exchanges, postings
        self.num_stages, self.interception, self.versions = num_stages, interception, versions
        self.device, self.seed, self.times, self.recompute = device, seed, times, recompute
        self.random, self.layers, self.lender = random, layers, lender
        self.modes = Modes(lender.root)
        # there weights are in the graph several times, and what is put off would be added up in another order
        self._derived = {stage for _, stage in lender.layout.derivations}
        self.step: StagedStep | None = None
        self.onward = ""
        self.at_last = False
        self.deferral = Deferral(lambda: self.step is not None and not self.step.inside)

    def run(
        self,
        actions: Sequence[Action],
        items: Mapping[int, Item],
        microbatch: Callable[[int, int], Any],
        forward: Callable[[Any, int], Any],
        backward: Callable[[int, Any], None] | None = None,
        around: Callable[[Action], AbstractContextManager[Any]] | None = None,
    ) -> dict[int, Any]:
        """Execute actions in order.

        Args:
            actions: This rank's row of the table.
            items: The micro-batches, by number.
            microbatch: Makes a micro-batch, by stage and number.
            forward: Runs the user's step on a micro-batch of a number.
            backward: On the last stage, runs the backward pass from what ``forward`` returned.
            around: The context of an action.

        Returns:
            What ``forward`` returned on the last stage, by micro-batch.

        Raises:
            PipelineError: if this or any other rank failed; the same message on every rank.
        """
        outputs: dict[int, Any] = {}
        split = {(stage, i) for kind, stage, i in actions if kind == "I" and stage not in self._derived}
        deferral = self.deferral.batch() if split else nullcontext()
        with deferral, python_random(), self.mailbox.guarded(lambda: self._tell(action)):
            for position, action in enumerate(actions):
                kind, stage, number = action
                item = items[number]
                began, waited = time.perf_counter(), self.mailbox.waited
                if kind != "W":  # which nothing has come about since
                    self.postings.ahead(position)
                with around(action) if around is not None else nullcontext():
                    if kind == "F":
                        with self.deferral.forward() if (stage, number) in split else nullcontext():
                            out = self._forward(stage, number, item, microbatch, forward)
                        if self.at_last:
                            outputs[number] = out
                    elif kind == "W":
                        self.times.ready()
                        self.deferral.weights((stage, number))
                    else:
                        part = self.deferral.inputs((stage, number)) if (stage, number) in split else nullcontext()
                        again = self.layers.recomputing() if self.layers is not None else nullcontext()
                        with self.versions.of(stage), part, again:
                            self._backward(stage, number, item, outputs, backward)
                if item.grad:
                    self.times.add(action, began, time.perf_counter(), self.mailbox.waited - waited)
        return outputs

    def _forward(
        self,
        stage: int,
        number: int,
        item: Item,
        microbatch: Callable[[int, int], Any],
        forward: Callable[[Any, int], Any],
    ) -> Any:
        self.at_last = stage == self.num_stages - 1
        if not self.exchanges:
            self.times.ready()
            seed_python(self.seed, item.serial)
            whole = lambda _: forward(microbatch(stage, number), number)  # noqa: E731
            with self._drawn(stage, item):
                return self.recompute.run(whole, None, self.at_last) if item.grad else whole(None)
        exchange = self.exchanges[stage]
        if not item.grad:
            exchange.wait_for_room(2 * self.num_stages + 2)
        peers, last = exchange.open(item), self.at_last
        self.times.ready()
        steps: list[StagedStep] = []

        def run(peers: Peers) -> Any:
            """The stage's part of the step; in its backward pass once more, if it is computed again."""
            before = self.step, self.at_last
            about = stage, last, self.interception, peers, self.device, self.layers, self.lender.layout.derivations
            step = StagedStep(*about) if item.grad else EvaluatedStep(self.lender, self.modes, *about)
            self.step, self.at_last = step, last
            steps.append(step)
            try:
                value = microbatch(stage, number)
                seed_python(self.seed, item.serial)
                return step.run(lambda: forward(value, number))
            finally:
                if len(steps) > 1:
                    step.close()
                self.step, self.at_last = before

        try:
            with self._drawn(stage, item), self.versions.of(stage):
                out = self.recompute.run(run, peers, last) if item.grad else run(peers)
            exchange.publish(item, steps[0])
        finally:
            for step in steps[:1]:
                step.close()
                self.onward = step.onward if isinstance(step, EvaluatedStep) else ""
            self.lender.end()
        return out

    def _drawn(self, stage: int, item: Item) -> AbstractContextManager[None]:
        """The time in which a stage draws random numbers for a micro-batch."""
        return self.random[stage].drawn() if self.layers is None else self.layers.drawn(self.seed, item.serial)

    def _backward(
        self,
        stage: int,
        number: int,
        item: Item,
        outputs: dict[int, Any],
        backward: Callable[[int, Any], None] | None,
    ) -> None:
        exchange = self.exchanges.get(stage)
        if stage == self.num_stages - 1:
            assert backward is not None
            self.times.ready()
            backward(number, outputs[number])
        else:
            assert exchange is not None
            tensors, gradients = exchange.gradients(item)
            self.times.ready()
            if tensors:
                torch.autograd.backward(tensors, gradients)
            del tensors, gradients
        if exchange is not None:
            exchange.return_gradients(item)

    def _tell(self, action: Action) -> str:
        names = {"F": "forward", "B": "backward", "I": "input gradients", "W": "weight gradients"}
        stage = f" in stage {action.stage}" if len(self.random) > 1 else ""
        return f"{names.get(action.kind, action.kind)} of micro-batch {action.microbatch}{stage}"
