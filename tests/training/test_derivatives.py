"""Gradients inside a step (``torch.autograd.grad``): all layers that they go through are in one stage."""

import warnings
from typing import Any

import lightning as L
import pytest
import torch
from pool import WorkerError
from torch import nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset
from training.runs import Runs, metrics, same, weights


def net(inner: int, outer: int, depth: int = 2) -> nn.Sequential:
    """A smooth network."""
    blocks = [layer for _ in range(depth) for layer in (nn.Linear(8, 8), nn.Tanh())]
    return nn.Sequential(nn.Linear(inner, 8), nn.Tanh(), *blocks, nn.Linear(8, outer))


def slope(output: torch.Tensor, *inputs: torch.Tensor) -> Any:
    found = torch.autograd.grad(output, inputs, torch.ones_like(output), create_graph=True)
    return found[0] if len(found) == 1 else found


class Base(L.LightningModule):
    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)


class Informed(Base):
    """A physics-informed network: second derivatives by its inputs, and a boundary."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net(2, 1)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, t = batch[0][:, :1].requires_grad_(), batch[0][:, 1:2].requires_grad_()
        start = torch.cat([x.detach(), torch.zeros_like(t)], 1)
        u, first = self.net(torch.cat([torch.cat([x, t], 1), start])).chunk(2)
        u_x, u_t = slope(u, x, t)
        u_xx = slope(u_x, x)
        loss = (u_t + u * u_x - 0.1 * u_xx).square().mean()
        loss = loss + (first + torch.sin(x.detach())).square().mean()
        self.log("loss", loss)
        return loss


class Forces(Base):
    """Energies and forces in the midst of layers: stages can begin before and after."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds = nn.Embedding(5, 8)
        self.mixed = net(8, 8)
        self.energy = net(9, 1)
        self.readout = net(2, 1)

    def energies(self, kinds: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        distance = (places - places.mean(-1, keepdim=True)).norm(dim=-1, keepdim=True)
        return self.energy(torch.cat([self.mixed(self.kinds(kinds)), distance], 1))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        places, kinds = batch
        energy = self.energies(kinds, places.requires_grad_())
        forces = -torch.autograd.grad(energy.sum(), places, create_graph=True)[0]
        out = self.readout(torch.cat([energy, forces.norm(dim=-1, keepdim=True)], 1))
        loss = out.square().mean() + (forces - 0.1).square().mean() + (energy - 1).square().mean()
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        places, kinds = batch
        with torch.enable_grad():
            energy = self.energies(kinds, places.requires_grad_())
            forces = -torch.autograd.grad(energy.sum(), places)[0]
        out = self.readout(torch.cat([energy, forces.norm(dim=-1, keepdim=True)], 1))
        self.log("val", out.sum() + forces.square().sum())


class Hidden(Base):
    """By what an earlier stage has made; with a frozen beginning, of which the gradient is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.trunk, self.energy, self.tail = net(600, 8), net(8, 8), net(8, 1), net(16, 1)
        self.frozen.requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        first = self.frozen(batch[0])
        first.requires_grad = True
        h = self.trunk(first)
        energy = self.energy(h + 0.1 * first)
        (by_h,) = torch.autograd.grad([energy.sum()], [h], create_graph=True)
        (again,) = torch.autograd.grad(by_h.square().sum(), h, retain_graph=True)
        loss = self.tail(torch.cat([h, by_h + again], 1)).square().mean() + energy.mean()
        self.log("loss", loss)
        return loss


class Adapted(Base):
    """Inner steps on the weights of the last layers, as MAML and ANIL make them; then the first ones once more."""

    def __init__(self, by_hand: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = not by_hand
        self.trunk, self.head = net(600, 8), net(8, 2)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        support, query = batch[0].chunk(2)
        h, fast = self.trunk(support), dict(self.head.named_parameters())
        for _ in range(2):
            inner = functional_call(self.head, fast, (h,)).square().mean()
            found = torch.autograd.grad(inner, list(fast.values()), create_graph=True)
            fast = {name: w - 0.1 * g for (name, w), g in zip(fast.items(), found, strict=True)}
        loss = (functional_call(self.head, fast, (self.trunk(query),)) - 1).square().mean()
        self.log("loss", loss)
        if not self.automatic_optimization:
            self.optimizers().zero_grad()
            self.manual_backward(loss)
            self.optimizers().step()
        return loss


class Langevin(Base):
    """An energy model: samples follow the slope of the energy before the loss is taken; a penalty of detached ones."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.energy = net(600, 8), net(8, 1)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        h = self.encoder(batch[0])
        z, copy = torch.zeros_like(h).requires_grad_(), h.detach().requires_grad_()
        for _ in range(3):
            (g,) = torch.autograd.grad(self.energy(z).sum(), z, create_graph=True)
            z = z - 0.1 * g
        (by_copy,) = torch.autograd.grad(self.energy(copy).sum(), copy, create_graph=True)
        loss = self.energy(h).mean() - self.energy(z.detach()).mean() + (z - h).square().mean()
        loss = loss + by_copy.norm(dim=1).mean()
        self.log("loss", loss)
        return loss


class After(Base):
    """By hand, and a backward pass comes before the gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.first, self.second = net(600, 4), net(4, 1)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        h = self.first(batch[0]).detach().requires_grad_()
        out = self.second(h)
        self.manual_backward(out.mean(), retain_graph=True)
        (by_h,) = torch.autograd.grad(out.sum(), h, create_graph=True, allow_unused=True)
        self.manual_backward(by_h.square().mean())


class Functional(Base):
    """By the functions of ``torch.autograd.functional``, which call layers by themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.energy, self.tail = net(600, 8), net(8, 1), net(8, 1)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        h = self.encoder(batch[0])
        rows = torch.autograd.functional.jacobian(lambda z: self.energy(z).sum(0), h, create_graph=True)[0]
        summed = lambda z: self.tail(z).sum()  # noqa: E731
        _, product = torch.autograd.functional.hvp(summed, rows, torch.ones_like(rows), create_graph=True)
        loss = product.square().mean() + (rows - 1).square().mean()
        self.log("loss", loss)
        return loss


class Critic(Base):
    """A Wasserstein GAN with a gradient penalty; one by the samples themselves (R1) in every third batch."""

    def __init__(self, penalty: int = 0) -> None:
        super().__init__()
        self.automatic_optimization, self.penalty = False, penalty
        self.generator, self.critic = net(4, 6), net(6, 1, 5)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        first, second = self.optimizers()
        real = batch[0][:, :6].clone()
        fake = self.generator(torch.randn(len(real), 4, device=self.device)).detach()
        loss = self.critic(fake).mean() - self.critic(real).mean()
        if not self.penalty:
            share = torch.rand(len(real), 1, device=self.device)
            between = (share * real + (1 - share) * fake).requires_grad_()
            (by_it,) = torch.autograd.grad(self.critic(between).sum(), between, create_graph=True)
            loss = loss + 10 * ((by_it.norm(dim=1) - 1) ** 2).mean()
        elif batch_idx % 3 == self.penalty:
            (by_it,) = torch.autograd.grad(self.critic(real.requires_grad_()).sum(), real, create_graph=True)
            loss = loss + by_it.square().sum(1).mean()
        second.zero_grad()
        self.manual_backward(loss)
        second.step()
        loss = -self.critic(self.generator(torch.randn(len(real), 4, device=self.device))).mean()
        first.zero_grad()
        self.manual_backward(loss)
        first.step()
        self.log("loss", loss)

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(part.parameters(), 0.01) for part in (self.generator, self.critic)]


class Evaluated(Base):
    """Takes gradients in evaluation only: adapts all weights to a part of the batch, and asks what inputs matter."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net(600, 2)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.net(batch[0]).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        support, query = batch[0].chunk(2)
        self.log("before", self.net(query).square().mean())
        with torch.enable_grad():
            slow = dict(self.net.named_parameters())
            inner = functional_call(self.net, slow, (support,)).square().mean()
            found = torch.autograd.grad(inner, list(slow.values()), create_graph=True)
            fast = {name: w - 0.1 * g for (name, w), g in zip(slow.items(), found, strict=True)}
            self.log("after", functional_call(self.net, fast, (query,)).square().mean())

    def predict_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        with torch.enable_grad():
            x = batch[0].clone().requires_grad_()
            return torch.autograd.grad(self.net(x)[:, 0].sum(), x)[0]


class Seldom(Base):
    """A penalty that the first batch does not show."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net(600, 1)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x = batch[0].clone()
        out = self.net(x.requires_grad_())
        loss = out.square().mean()
        if batch_idx % 2:
            (by_x,) = torch.autograd.grad(out.sum(), x, create_graph=True)
            loss = loss + by_x.square().sum()
        return loss


class Functions(Hidden):
    """Functions of ``torch.func``, which want no hooks on saved tensors."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        h = self.trunk(self.frozen(batch[0]))
        return torch.func.grad(lambda z: self.energy(z).sum())(h).square().mean()


def loader(kind: Any) -> Any:
    generator = torch.Generator().manual_seed(3)
    if issubclass(kind, Forces):  # places are so large that they go only where they are used
        places = torch.randn(24, 600, generator=generator)
        return DataLoader(TensorDataset(places, torch.randint(5, (24,), generator=generator)), 8)
    return DataLoader(TensorDataset(torch.randn(24, 2 if kind is Informed else 600, generator=generator)), 8)


class Fit:
    """Trains one of the modules; runs are told apart by its name."""

    def __init__(self, kind: Any, *args: Any) -> None:
        self.kind, self.args = kind, args
        self.__name__ = self.__qualname__ = f"{kind.__name__}{args}"

    def __call__(self, kwargs: dict[str, Any]) -> Any:
        L.seed_everything(5)
        module = self.kind(*self.args)
        trainer = L.Trainer(**kwargs | {"max_epochs": 2, "inference_mode": False})
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.fit(module, loader(self.kind), loader(self.kind) if self.kind is Forces else None)
        plan = getattr(trainer.strategy, "plan", None)
        cuts = [stage.begins for stage in plan.stages[1:]] if plan is not None else None
        told = [str(warning.message) for warning in caught if "takes gradients inside itself" in str(warning.message)]
        return {"weights": weights(module), "metrics": metrics(trainer)}, cuts, told


ENERGY = ["trunk.0", "tail.0"]


@pytest.mark.parametrize(
    ("fit", "world", "cuts", "options"),
    [
        (Fit(Informed), 2, [], {}),
        (Fit(Forces), 3, ["readout.0", "readout.2"], {"activation_checkpointing": "layer"}),
        (Fit(Hidden), 3, ENERGY, {"partition": ENERGY, "activation_checkpointing": "stage"}),
        (Fit(Adapted), 2, ["head.0"], {"partition": ["head.0"], "num_microbatches": 1}),
        (Fit(Adapted, True), 2, ["head.0"], {"partition": ["head.0"], "num_microbatches": 1}),
        (Fit(Langevin), 2, ["energy.0"], {"partition": ["energy.0"], "schedule": "zb1p"}),
        (Fit(Functional), 3, ["energy.0", "tail.0"], {"partition": ["energy.0", "tail.0"]}),
        (Fit(Critic), 2, ["critic.0"], {"num_microbatches": 1}),
        (Fit(Critic), 3, ["generator.2", "critic.0"], {"num_microbatches": 1}),
        (Fit(Critic, 1), 2, ["critic.0"], {"partition": ["critic.0"], "num_microbatches": 1}),
    ],
    ids=lambda value: value.__name__ if isinstance(value, Fit) else None,
)
def test_numbers_of_one_device(runs: Runs, fit: Fit, world: int, cuts: list[str], options: dict[str, Any]) -> None:
    options = {"num_microbatches": 2, **options}
    expected, *_ = runs.one(fit, options["num_microbatches"])
    results = runs.on(world, fit, **options)
    assert results[0][1] == cuts
    for found, *_ in results:
        same(expected, found)
    told = results[0][2]
    if cuts:
        assert not told
    else:
        assert len(told) == 1
        assert "`found = torch.autograd.grad(output, inputs," in told[0]
        assert "all layers are in one stage" in told[0]


@pytest.mark.parametrize(
    ("fit", "options"), [(Fit(Seldom), {}), (Fit(Critic, 1), {"partition": ["critic.4"]})], ids=["automatic", "by hand"]
)
def test_what_only_later_batches_do(runs: Runs, fit: Fit, options: dict[str, Any]) -> None:
    with pytest.raises(WorkerError, match=r"`\(by_.*have to be in one stage.*Name layers in `partition") as error:
        runs.on(2, fit, **options)
    assert str(error.value).count("PipelineError: ") >= 2  # one for each rank


def test_a_backward_pass_between_both_ends(runs: Runs) -> None:
    with pytest.raises(WorkerError, match=r"`\(by_h,\) = .*take gradients before `manual_backward`"):
        runs.on(2, Fit(After))


def test_functions_of_torch_func_are_refused(runs: Runs) -> None:
    with pytest.raises(WorkerError, match=r"`return torch.func.grad.*Use `torch.autograd.grad"):
        runs.on(2, Fit(Functions))


def evaluated(kwargs: dict[str, Any]) -> Any:
    L.seed_everything(5)
    module = Evaluated()
    trainer = L.Trainer(**kwargs | {"max_epochs": 2, "inference_mode": False})
    trainer.fit(module, loader(Evaluated), loader(Evaluated))
    found = weights(module), metrics(trainer), trainer.validate(module, loader(Evaluated), verbose=False)
    predicted = trainer.predict(module, loader(Evaluated))
    return found, torch.cat(predicted) if trainer.is_global_zero else None


def test_steps_of_evaluation(runs: Runs) -> None:
    expected, predicted = runs.one(evaluated)
    results = runs.on(3, evaluated)
    same(predicted, results[0][1])
    for found, _ in results:
        same(expected, found)
