"""Optimization over several stages: hooks, clipping, unfreezing and optimizers, each with the numbers of one device."""

import functools
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, BaseFinetuning
from torch import nn
from torch.nn.utils import clip_grad_norm_
from training.modules import Classifier, train_loader, val_loader
from training.runs import Runs, metrics, same, weights

from lightning_lwpm.training.separable import is_separable


class Hooked(Classifier):
    """Overrides every hook around the optimizer, and notes their order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[Any] = []

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.names.append("batch start")

    def on_before_zero_grad(self, optimizer: Any) -> None:
        self.names.append(("before zero_grad", type(optimizer).__name__))

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        self.names.append(("zero_grad", epoch, batch_idx))
        optimizer.zero_grad(set_to_none=False)

    def on_before_backward(self, loss: torch.Tensor) -> None:
        self.names.append(("before backward", float(loss.detach())))

    def backward(self, loss: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        (2 * loss).backward(*args, **kwargs)

    def on_after_backward(self) -> None:
        self.names.append("after backward")

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.names.append(("before step", type(optimizer).__name__))

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        self.names.append(("clipping", gradient_clip_val, gradient_clip_algorithm))
        if self.trainer.current_epoch:
            self.clip_gradients(optimizer, gradient_clip_val=gradient_clip_val, gradient_clip_algorithm="norm")
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.clamp_(-0.05, 0.05)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        self.names.append(("step", epoch, batch_idx))
        warm = min(1.0, (self.trainer.global_step + 1) / 5)
        for group in optimizer.param_groups:
            group["lr"] = warm * 0.05
        if batch_idx == 3:  # a batch that counts for nothing
            optimizer_closure()
        else:
            optimizer.step(closure=optimizer_closure)

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        self.names.append(("scheduler", metric))
        scheduler.step()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        return [optimizer], [{"scheduler": scheduler, "interval": "step", "frequency": 2}]


class Twice(Classifier):
    """Evaluates its closure twice."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        optimizer_closure()
        optimizer.step(closure=optimizer_closure)


class Clipping(Classifier):
    """Clips with torch's own function, by its own rules."""

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        norm = torch.nn.utils.clip_grad_norm_(self.blocks.parameters(), 0.1, norm_type=3)
        self.log("norm", norm)
        if norm > 0.1:
            clip_grad_norm_(self.parameters(), max_norm=0.2, error_if_nonfinite=True)


class Frozen(Classifier):
    """Its optimizer begins with what is not frozen; layers join it later."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.ModuleList([self.inlet, self.blocks])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.02)


class Unfreezing(BaseFinetuning):
    def freeze_before_training(self, pl_module: L.LightningModule) -> None:
        self.freeze(pl_module.backbone)

    def finetune_function(self, pl_module: L.LightningModule, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.blocks[2:], optimizer)
        if epoch == 2:
            self.unfreeze_and_add_param_group([pl_module.inlet, *pl_module.blocks[:2]], optimizer, lr=0.001)


class Optimized(Classifier):
    """Trained by any optimizer, toggled in each step."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        self.make = make

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.toggle_optimizer(self.optimizers())
        out = super().training_step(batch, batch_idx)
        self.untoggle_optimizer(self.optimizers())
        return out

    def configure_optimizers(self) -> Any:
        return self.make(self)


class Scheduled(Classifier):
    """Several schedulers, of which one moves momenta too; batches that are left out; metrics that are gathered."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if self.current_epoch == 1 and batch[1].sum() > 8 else None

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().validation_step(batch, batch_idx)
        self.log("gathered", self.all_gather(loss).mean())
        return loss

    def configure_optimizers(self) -> Any:
        groups = [{"params": self.inlet.parameters()}, {"params": [*self.blocks.parameters(), *self.head.parameters()]}]
        optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9)
        schedulers = torch.optim.lr_scheduler
        cycle = schedulers.OneCycleLR(optimizer, [0.1, 0.2], int(self.trainer.estimated_stepping_batches))
        warm = schedulers.SequentialLR(
            optimizer, [schedulers.LinearLR(optimizer), schedulers.ExponentialLR(optimizer, 0.5)], [1]
        )
        return [optimizer], [{"scheduler": cycle, "interval": "step"}, {"scheduler": warm, "interval": "epoch"}]


class ByNorm(torch.optim.SGD):
    """Looks at all gradients at once, in the manner of LAMB."""

    __module__ = __name__

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)  # the gradients are there after the closure
        norms = [p.grad.norm() for group in self.param_groups for p in group["params"] if p.grad is not None]
        self.param_groups[0]["lr"] = 0.1 / (1 + float(torch.stack(norms).norm()))
        return loss


class PerTensor(torch.optim.Optimizer):
    """Looks at one gradient at a time; has settings of its own."""

    def __init__(self, params: Any, lr: float, power: float) -> None:
        super().__init__(params, {"lr": lr})
        self.power = power

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = torch.enable_grad()(closure)() if closure is not None else None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.add_(p.grad.sign() * p.grad.norm() ** self.power, alpha=-group["lr"])
        return loss


class Stateful(PerTensor):
    """Its state is there from the beginning, so that nothing is known of it."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        for p in self.param_groups[0]["params"]:
            self.state[p]["sum"] = torch.zeros_like(p)


MADE = {
    "fused AdamW": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, fused=True),
    "foreach SGD": lambda m: torch.optim.SGD(m.parameters(), lr=0.01, foreach=True, momentum=0.9, nesterov=True),
    "Adafactor": lambda m: torch.optim.Adafactor(m.parameters(), lr=0.01),
    "Muon": lambda m: torch.optim.Muon([p for p in m.parameters() if p.dim() == 2], lr=0.01),
    "Adagrad": lambda m: torch.optim.Adagrad(m.parameters(), lr=0.01, initial_accumulator_value=0.1),
    "of the user": lambda m: PerTensor(m.parameters(), 0.01, 0.5),
}
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "hooks": (Hooked, {"gradient_clip_val": 0.5}),
    "hooks, accumulating": (Hooked, {"gradient_clip_val": 0.5, "accumulate_grad_batches": 3}),
    "closure twice": (Twice, {}),
    "clipping by hand": (Clipping, {}),
    "unfreezing": (Frozen, {"callbacks": [Unfreezing()]}),
    "schedulers": (Scheduled, {}),
    "backbone": (Frozen, {"callbacks": [BackboneFinetuning(1, verbose=False)]}),
    **{name: (functools.partial(Optimized, make), {"max_epochs": 2}) for name, make in MADE.items()},
}


class Fit:
    """One of the cases; runs are told apart by its name."""

    def __init__(self, name: str) -> None:
        self.case, self.__name__, self.__qualname__ = CASES[name], name, name

    def __call__(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        L.seed_everything(5)
        make, more = self.case
        module = make()
        trainer = L.Trainer(**kwargs | {"max_epochs": 3} | more)
        trainer.fit(module, train_loader(36), val_loader())
        return {"weights": weights(module), "metrics": metrics(trainer), "names": getattr(module, "names", None)}


@pytest.mark.parametrize("name", CASES)
def test_numbers_of_one_device(runs: Runs, name: str) -> None:
    world, count = (2, 2) if list(CASES).index(name) % 2 else (3, 1)
    expected = runs.one(Fit(name), count)
    for rank, found in enumerate(runs.on(world, Fit(name), count)):
        same(expected, found, f"rank {rank}")


def test_optimizers_that_look_at_all_parameters_are_recognised() -> None:
    parameters = [nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(3)), nn.Parameter(torch.tensor(1.0))]
    assert is_separable(torch.optim.AdamW(parameters))
    assert is_separable(PerTensor(parameters, 0.1, 0.5))
    assert is_separable(ByNorm(parameters, 0.1)) is False
    assert is_separable(ByNorm(parameters[:1], 0.1))
    assert is_separable(Stateful(parameters, 0.1, 0.5)) is None
    scheduled = PerTensor(parameters, 0.1, 0.5)
    torch.optim.lr_scheduler.StepLR(scheduled, 1)
    parameters[0].grad = torch.ones(2, 3)
    assert is_separable(scheduled)
    assert torch.equal(parameters[0], torch.ones(2, 3)) and not scheduled.state
