"""Steps of evaluation that call layers of earlier stages again: generation, several passes through the model.

::

    stage 0     a b |                                  leaves, and goes on with the next batch
    stage 1         | c d |                            leaves
    stage 2               | e f   a b c d e f  a b ... goes on by itself: earlier layers run with weights that are lent

Until a step goes back, stages work as always, on consecutive batches at the same time. Then the last one, which all
tensors reach anyway, runs all layers, with the weights of others for as long as the step lasts. So nobody has to know
beforehand which step of which batch goes back. So it is where a step enables gradients: their graph is in one place.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call
from typing_extensions import override

from lightning_lwpm.errors import ConfigurationError
from lightning_lwpm.staging.beside import Attributes, Objects
from lightning_lwpm.staging.layout import Unit
from lightning_lwpm.staging.modes import Modes
from lightning_lwpm.staging.placeholder import Placeholder
from lightning_lwpm.staging.step import StagedStep
from lightning_lwpm.staging.tree import duplicate, map_tensors, tensors

__all__ = ["EvaluatedStep", "Lender", "with_weights"]


_DERIVES = "takes gradients (it enables them)"


class Lender(Protocol):
    """Brings weights of other ranks."""

    def weights(self, unit: str, module: nn.Module) -> dict[str, Tensor]:
        """The parameters and buffers of a module that are not here, by their names in it."""

    def values(self, placeholder: Tensor) -> Tensor:
        """The values of a parameter or buffer that is not here."""

    def stages(self, weight: Tensor) -> tuple[int, ...] | None:
        """The stages that hold a parameter; ``None`` if all do, or it is none."""


class EvaluatedStep(StagedStep):
    """One run of a step of evaluation on one batch, for one stage.

    Args:
        lender: Brings weights of other ranks.
        modes: Whether modules are in training mode.
        args: As for :class:`StagedStep`.

    Attributes:
        onward: Why the last stage goes on by itself, in words; "" before it does.
    """

    def __init__(self, lender: Lender, modes: Modes, *args: Any) -> None:
        super().__init__(*args)
        self.lender, self.modes, self.onward = lender, modes, ""
        self._followed = True  # whether autograd follows the step from its beginning
        self._kept: set[str] = set()  # layers of earlier stages that leave something on themselves

    @override
    def run(self, step: Callable[[], Any]) -> Any:
        self._followed = torch.is_grad_enabled()
        with self.modes.step(self.last):
            return super().run(step)

    @override
    def call(self, unit: Unit, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if unit.name in self._kept and (self.onward or unit.stages[0] < self.at):
            raise ConfigurationError(
                f"layer '{unit.name}' leaves something on itself (in an attribute or a buffer) for its next call in "
                "this step of evaluation, which runs the model several times: no other rank knows of it. Give it an "
                "object to keep that in (as a cache of keys and values), or pass schedule='sequential'."
            )
        return super().call(unit, module, partial(self._with_lent, unit, module, forward), args, kwargs)

    @override
    def _reach_stage(self, stage: int, unit: Unit) -> int:
        if not self.onward and stage >= self.at and not self._derives(stage):
            return super()._reach_stage(stage, unit)
        again = f"runs the model several times (it comes to layer '{unit.name}' again)"
        self._go_on(_DERIVES if self._derives(stage) else again)
        return self.stage

    def _derives(self, stage: int) -> bool:
        """Whether the step wants gradients (``torch.enable_grad()``) of what is not in the last stage."""
        return torch.is_grad_enabled() and not self._followed and not (self.last and stage == self.stage)

    def _go_on(self, what: str) -> None:
        """Something of an earlier stage is used: the last stage goes on by itself, others leave."""
        if not self.last:
            self._leave()
        self.onward, self.at = self.onward or what, self.stage

    @override
    def _beside(self, unit: Unit, module: nn.Module, args: Any, kwargs: Any) -> Attributes:
        if self.last and self.at == self.stage:  # nobody asks
            return super()._beside(unit, module, args, kwargs)
        return Objects(unit, module, (args, kwargs), set(map(id, self.reach.tensors.values())))

    @override
    def _adopt(self, unit: Unit, beside: Attributes, values: Any) -> None:
        super()._adopt(unit, beside, values)
        if isinstance(beside, Objects) and beside.kept:
            self._kept.add(unit.name)

    @override
    def _local(self, tensor: Tensor) -> Tensor:
        if self.onward and type(tensor) is Placeholder:
            return self.lender.values(tensor)
        return super()._local(tensor)

    @override
    def _function(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        weights = [t for t in tensors((args, kwargs)) if isinstance(t, nn.Parameter | Placeholder)]
        if not self.onward and self._derives(self.at):
            self._go_on(_DERIVES)
        if weights and not self.onward:
            for weight in weights:
                stages = self.lender.stages(weight)
                if stages is not None and self.at not in stages:
                    self._go_on("runs the model several times (it comes to a parameter between layers again)")
                    break
        if self.onward and any(type(weight) is Placeholder for weight in weights):
            args, kwargs = map_tensors(self._local, (args, kwargs))
        return super()._function(func, types, args, kwargs)

    def _with_lent(self, unit: Unit, module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self.onward:
            return forward(*args, **kwargs)
        lent = self.lender.weights(unit.name, module)
        if not lent:
            return forward(*args, **kwargs)
        buffers = [(name, duplicate(lent[name])) for name, _ in module.named_buffers() if name in lent]
        out = with_weights(module, forward, lent)(*args, **kwargs)
        for name, before in buffers:
            if not torch.equal(before, lent[name]):
                raise ConfigurationError(
                    f"'{unit.name}.{name}' changes in a step of evaluation that runs the model several times (as "
                    "BatchNorm does in training mode): call `eval()` on that layer, run the model once, or pass "
                    "schedule='sequential'."
                )
        return out


def with_weights(module: nn.Module, forward: Callable[..., Any], weights: dict[str, Tensor]) -> Callable[..., Any]:
    """``forward`` of a module with other weights.

    Args:
        module: The module.
        forward: Its ``forward``, which may have been replaced there.
        weights: Parameters and buffers by name; the others stay.
    """
    named = {f"module.{name}": tensor for name, tensor in weights.items()}
    return lambda *args, **kwargs: functional_call(_Calling(module, forward), named, args, kwargs, tie_weights=False)


class _Calling(nn.Module):
    def __init__(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.module, self.run = module, forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args, **kwargs)
