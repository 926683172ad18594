"""What happens before the model is partitioned: looks at the step, costs, the choice of a plan, and the layout."""

import socket
import warnings
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn

from lightning_lwpm.errors import ConfigurationError
from lightning_lwpm.partition.apply import make_layout
from lightning_lwpm.partition.costs import Costs, Link, estimate
from lightning_lwpm.partition.folded import folded
from lightning_lwpm.partition.plan import PartitionPlan
from lightning_lwpm.partition.probe import Probe
from lightning_lwpm.pipeline.mailbox import Mailbox
from lightning_lwpm.pipeline.transport import Transport
from lightning_lwpm.report import show_plan
from lightning_lwpm.staging.layout import Layout
from lightning_lwpm.staging.sites import quoted
from lightning_lwpm.training.data import Feed
from lightning_lwpm.training.looking import STEPS, Onlooker
from lightning_lwpm.tuning.cache import CostCache, environment
from lightning_lwpm.tuning.choose import Choice, candidates, choose
from lightning_lwpm.tuning.link import measure_link
from lightning_lwpm.tuning.profile import profile
from lightning_lwpm.tuning.review import Review, StageTimes, review
from lightning_lwpm.tuning.sized import Look
from lightning_lwpm.tuning.wish import Wish

__all__ = ["Planner"]


class Planner:
    """Makes the layout of each run; what is known of a module is kept for its next run.

    Args:
        mailbox: The control connections.
        transport: The data connections; ``None`` with one process.
        device: This rank's device.
        costs: "measured" or "estimated".

    Attributes:
        plan: The latest plan.
        whole: Whether every rank runs the user's whole step, in turns: asked for, or as no pipeline can run it.
    """

    def __init__(
        self,
        mailbox: Mailbox,
        transport: Transport | None,
        device: torch.device,
        costs: Literal["measured", "estimated"] = "measured",
    ) -> None:
        self.mailbox, self.transport, self.device, self.costs = mailbox, transport, device, costs
        self.plan: PartitionPlan | None = None
        self.whole = False
        self._known: _Known | None = None
        self._choice: Choice | None = None  # on rank 0
        self._turn = 0

    def layout(self, trainer: Trainer, module: LightningModule, feed: Feed, wish: Wish) -> Layout:
        """Look at the step on rank 0, and make the same layout on every rank.

        Args:
            trainer: Runs the step.
            module: The whole module.
            feed: Reads the first batch.
            wish: What the user asked for.
        """
        if self.mailbox.world == 1:
            return _whole(module)
        fitting = trainer.state.fn == TrainerFn.FITTING
        wish = self._shared("wish", wish.resolved() if self.mailbox.rank == 0 else None, "what was asked for")
        wish = wish.in_turns() if wish.whole else wish  # a plan's file may have said so
        name, reads = STEPS[trainer.state.fn], self.mailbox.rank == 0  # type: ignore[index]
        first = Onlooker(trainer, module, feed, name, self.device, reads)
        known = self._recall(module, fitting)
        if known is None:
            known = self._learn(first, wish, [self.mailbox.world])
            if known is None:  # there is no batch, so nothing will run
                return _whole(module)
            self._known = known
        wish = wish.in_turns() if known.wish.whole else wish
        self.whole = wish.whole
        if _unseen(module, known.seen):
            validates = fitting and trainer.enable_validation
            other = Onlooker(trainer, module, feed, "validation_step", self.device, first.reads) if validates else first
            if other.name not in known.steps:
                known.steps.add(other.name)
                seen = self._ask(other, 1, wish.whole)[0]
                known.seen = _extended(module, known.seen, seen) if seen is not None else known.seen
        choice = None
        if self.mailbox.rank == 0:
            choice = choose(known.looks, known.seen, self.mailbox.world, known.samples, wish, fitting)
        plan = self._shared("plan", choice.plan if choice is not None else None, "the plan")
        if fitting and choice is not None and plan != self.plan:
            show_plan(choice)
        self.plan, self._choice, known.wish = plan, choice, wish
        return make_layout(module, known.seen, plan)

    def plan_of(self, module: nn.Module) -> PartitionPlan | None:
        """The latest plan, if it is one for this very module."""
        return self.plan if self._known is not None and self._known.module() is module else None

    def survey(
        self, trainer: Trainer, module: LightningModule, feed: Feed, wish: Wish, devices: Sequence[int]
    ) -> dict[int, Choice | ConfigurationError]:
        """What would be chosen for several numbers of devices, or why nothing can be.

        Args:
            trainer: Runs the step.
            module: The whole module.
            feed: Reads the first batch.
            wish: What the user asked for; devices hold as much as this one.
            devices: Their numbers.

        Raises:
            ConfigurationError: if there is no batch to look at.
        """
        first = Onlooker(trainer, module, feed, STEPS[trainer.state.fn], self.device, reads=True)  # type: ignore[index]
        known = self._learn(first, wish, devices)
        if known is None:
            raise ConfigurationError("the data loader gives no batch, so there is nothing to look at")
        found: dict[int, Choice | ConfigurationError] = {}
        for number in devices:
            wanted = replace(known.wish, limits=wish.limits[:1] * number)
            try:
                found[number] = choose(known.looks, known.seen, number, known.samples, wanted, first.train)
            except ConfigurationError as error:
                found[number] = error
        return found

    def review(self, measured: Sequence[StageTimes | None]) -> Review | None:
        """Compare the plan with what its stages have measured.

        Args:
            measured: By stage; ``None`` of one that has measured nothing yet.
        """
        known, choice = self._known, self._choice
        if known is None or choice is None:
            return None
        times = [stage for stage in measured if stage is not None]
        if len(times) < len(choice.plan.stages):
            return None
        return review(choice.look, known.seen, choice.plan, self.mailbox.world, known.wish, times)

    def revised(self, measured: Sequence[StageTimes | None]) -> Layout | None:
        """The layout of a better partition, by what the stages have measured; all ranks take part.

        Returns:
            ``None`` where no partition is over 5 % faster than the one that runs.
        """
        found = self.review(measured) if self.mailbox.rank == 0 else None
        better = found.better if found is not None and found.worth_telling else None
        better = self._shared("revision", better, "a better plan")
        if better is None:
            return None
        if found is not None and self._choice is not None:
            self._choice = Choice(better, replace(self._choice.look, costs=found.costs))
            show_plan(self._choice)
        self.plan = better
        assert self._known is not None
        module = self._known.module()
        assert module is not None
        return make_layout(module, self._known.seen, better)

    def _learn(self, first: Onlooker, wish: Wish, devices: Sequence[int]) -> "_Known | None":
        """Look at the step, at two sizes of micro-batch where their number is left open; learn what it costs."""
        samples = self._shared("samples", first.samples if first.reads else None, "the size of a batch")
        wanted, least = wish.num_microbatches, wish.least_samples
        few, many = (candidates(wanted, of(devices), samples, least) for of in (min, max))
        seen: Probe | None = None
        looks: list[Look] = []
        for wished in dict.fromkeys([few[len(few) // 2], many[-1]] if first.train else [1]):
            probe, why, count = self._ask(first, wished, wish.whole, wanted == "auto")
            if probe is None:
                return None
            if why:
                return self._learn(first, _without_pipeline(wish, why, self.mailbox.rank == 0), devices)
            if count < wished:  # the step does not run on parts of a batch
                looks, seen, samples = [], None, 1
            looks.append(Look((samples or 1) / count, probe.timeline, self._costs_of(first, probe, wish.whole)))
            seen = seen or replace(probe, segments=())
            if count < wished:
                break
        assert seen is not None
        if first.reads:
            _tell_of_derivations(first.name, seen, max(devices))
        return _Known(weakref.ref(first.module), _form(first.module), {first.name}, seen, looks, samples, wish)

    def _ask(
        self, onlooker: Onlooker, count: int, whole: bool, may_be_whole: bool = False
    ) -> tuple[Probe | None, str, int]:
        """Rank 0 looks; the others hear what it saw, but for the segments.

        Returns:
            That, why no pipeline can run it, if so, and at how many micro-batches it looked.
        """
        seen = None
        if onlooker.reads:
            seen, count = onlooker.look(count, may_be_whole)
        if seen is not None and whole:
            seen = folded(seen)  # layers may come in any order, and again: each weight is on one rank
        why = "" if whole else onlooker.unfit
        told = replace(seen, segments=()) if seen is not None else None
        told, why, count = self._shared(onlooker.name, (told, why, count), f"the description of `{onlooker.name}`")
        return seen if onlooker.reads else told, why, count

    def _costs_of(self, onlooker: Onlooker, seen: Probe, whole: bool) -> Costs:
        if self.costs == "estimated" or whole:
            return estimate(seen.timeline)
        cache = CostCache(environment(self.device, type(onlooker.trainer.precision_plugin).__name__))
        link = self._link(cache)
        self._turn += 1
        return profile(
            self.mailbox,
            ("plan", self._turn),
            seen if onlooker.reads else None,
            onlooker.module,
            self.device,
            onlooker.train,
            onlooker.context,
            cache,
            link,
        )

    def _link(self, cache: CostCache) -> Link:
        """What the connections of these ranks cost, measured in their first run."""
        if self.transport is None:
            return Link()
        self._turn += 1
        hosts = self.mailbox.gather(("hosts", self._turn), socket.gethostname(), "the hosts of all ranks")
        name = f"{type(self.transport).__name__} {' '.join(hosts)}"
        known = self._shared("link", cache.read_link(name) if self.mailbox.rank == 0 else None, "what links cost")
        if known is None:
            known = measure_link(self.mailbox, self.transport, ("plan", self._turn))
            if self.mailbox.rank == 0:
                cache.write_link(name, known)
        return cast(Link, known)

    def _shared(self, name: str, value: Any, what: str) -> Any:
        self._turn += 1
        return self.mailbox.broadcast(("plan", name, self._turn), value, what=what)

    def _recall(self, module: nn.Module, fitting: bool) -> "_Known | None":
        """What is known of this very module; a step of training shows more than one of evaluation."""
        known = self._known
        if known is None or known.module() is not module or known.form != _form(module):
            return None
        return None if fitting and "training_step" not in known.steps else known


@dataclass
class _Known:
    """What has been seen of a module.

    Attributes:
        module: The module.
        form: What it was made of.
        steps: The steps that were looked at.
        seen: What they showed.
        looks: The first of them at one or two sizes of micro-batch, with its costs.
        samples: Samples of a batch.
        wish: What the user asked for.
    """

    module: weakref.ref[nn.Module]
    form: Any
    steps: set[str]
    seen: Probe
    looks: Sequence[Look]
    samples: int | None
    wish: Wish


def _tell_of_derivations(name: str, seen: Probe, ranks: int) -> None:
    """Say where gradients inside a step leave too few places for stages to begin."""
    places = sum(seen.timeline.allowed[1:])
    if not seen.derivations or places + 1 >= ranks:
        return
    site, (first, last) = max(seen.derivations, key=lambda derivation: derivation[1][1] - derivation[1][0])
    if first < last:
        left = f"{places + 1} stages are possible" if places else "all layers are in one stage"
        warnings.warn(
            f"`{name}` takes gradients inside itself, {quoted(site)}: the layers between both ends of that call are in "
            f"one stage. So {left}, and other devices stay idle.",
            stacklevel=2,
        )


def _without_pipeline(wish: Wish, why: str, tells: bool) -> Wish:
    """What is done instead of what was asked for, as no pipeline can run the step.

    Raises:
        ConfigurationError: where the user has named a schedule.
    """
    if wish.schedule != "auto":
        raise ConfigurationError(
            f"schedule={wish.schedule!r}: {why}, which no pipeline can run. Pass schedule='sequential' (every rank "
            "runs the whole step and they take turns: it saves memory, not time), or change the step."
        )
    if tells:
        warnings.warn(
            f"{why}, which no pipeline can run. So every rank runs the whole step and they take turns, as with "
            'schedule="sequential": the numbers are those of one device; it saves memory, not time.',
            stacklevel=2,
        )
    return wish.in_turns()


def _form(module: nn.Module) -> Any:
    return [(name, tuple(p.shape), p.requires_grad) for name, p in module.named_parameters()]


def _unseen(module: nn.Module, seen: Probe) -> set[str]:
    """The modules with parameters that no step has called, such as a layer that only evaluation uses."""
    return {name for name, m in module.named_modules() if name and m._parameters and name not in seen.spans}


def _extended(module: nn.Module, seen: Probe, other: Probe) -> Probe:
    """``seen``, and layers that only another step calls: they go to the stage of the layer called before them."""
    unseen = _unseen(module, seen)
    positions = {call.name: position for position, call in enumerate(seen.timeline.calls)}
    parameters, buffers, latest = dict(seen.parameters), dict(seen.buffers), 0
    for call in other.timeline.calls:
        latest = positions.get(call.name, latest)
        if call.name in unseen:
            for found, theirs in ((parameters, other.parameters), (buffers, other.buffers)):
                inside = [name for name in theirs if name.startswith(f"{call.name}.")]
                found.update(dict.fromkeys(inside, (latest,)))
    return replace(seen, parameters=parameters, buffers=buffers)


def _whole(module: nn.Module) -> Layout:
    """Everything in one stage."""
    return Layout(1, (), dict.fromkeys([name for name, _ in module.named_parameters()], (0,)))
