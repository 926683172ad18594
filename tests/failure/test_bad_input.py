"""Bad input: each gets an error of its own, on every rank, that quotes what was written and says what to change."""

import copy
from typing import Any

import lightning as L
import pytest
import torch
from pool import Pool
from torch import nn
from torch.utils.data import DataLoader, default_collate
from training.modules import Classifier, train_loader
from training.runs import run_here

from lightning_lwpm import ConfigurationError, LWPMStrategy


@pytest.mark.parametrize(
    ("option", "texts"),
    [
        ({"num_microbatches": 0}, ["num_microbatches=0", "at least 1"]),
        ({"num_microbatches": -2}, ["num_microbatches=-2", "positive"]),
        ({"num_microbatches": True}, ["num_microbatches=True"]),
        ({"num_microbatches": "many"}, ["num_microbatches='many'", '"auto"']),
        ({"schedule": "1f1"}, ["schedule='1f1'", "'gpipe', '1f1b'", "Did you mean '1f1b'?"]),
        ({"partition": "even"}, ["partition='even'", '"auto"']),
        ({"virtual_stages": 0}, ["virtual_stages=0", '"auto"']),
        ({"virtual_stages": "two"}, ["virtual_stages='two'", '"auto"']),
        (
            {"virtual_stages": 1, "schedule": "interleaved_1f1b"},
            ["virtual_stages=1", "at least 2", "'interleaved_1f1b'"],
        ),
        ({"num_microbatches": 4, "schedule": "sequential"}, ["num_microbatches=4", "'sequential'", "in turns"]),
        ({"virtual_stages": 2, "schedule": "sequential"}, ["virtual_stages=2", "'sequential'"]),
        ({"timeline": "t.svg", "schedule": "sequential"}, ["timeline='t.svg'", "'sequential'"]),
        ({"virtual_stages": 3, "schedule": "zbv"}, ["virtual_stages=3", "needs 2 stages", '"1f1b"']),
        ({"activation_checkpointing": "all"}, ["activation_checkpointing='all'", "'none', 'layer', 'stage'"]),
        ({"data_parallel_size": 2}, ["data_parallel_size=2", "not built yet"]),
        ({"state_dict_type": "whole"}, ["state_dict_type='whole'", "'full'", "'sharded'"]),
        ({"weights_after_run": "none"}, ["weights_after_run='none'", "'all_ranks'", "'rank_zero'"]),
        ({"async_checkpoint": True}, ["async_checkpoint=True", "state_dict_type='sharded'", "AsyncCheckpointIO"]),
        ({"process_group_backend": "mpi"}, ["process_group_backend='mpi'", "not known", "'nccl'", "'gloo'"]),
        ({"start_method": "thread"}, ["start_method='thread'", "'popen'"]),
        ({"schedule": ["1f1b"]}, ["schedule=['1f1b']", "is not known"]),
        ({"partition": "blocks.2"}, ["partition='blocks.2'", 'such as ["blocks.2"]']),
        ({"patience": -1}, ["patience=-1", "0 for never"]),
        ({"patience": "long"}, ["patience='long'"]),
    ],
)
def test_options(option: dict[str, Any], texts: list[str]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        LWPMStrategy(**option)
    assert all(text in str(caught.value) for text in texts), caught.value


class Empty(Classifier):
    def __init__(self) -> None:
        L.LightningModule.__init__(self)


class Manual(Classifier):
    """Manual optimization."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.manual_backward(self.loss(batch)[0])
        self.optimizers().step()


class ManualInPlace(Manual):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        hidden = self.inlet(batch[0])
        out = self.head(self.blocks[3](hidden))
        hidden += out.mean()
        self.manual_backward(hidden.mean())


class Sampled(Classifier):
    """Runs the model on its own output, in some batches only."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss, out, _ = self.loss(batch)
        return loss + self(out.repeat(1, 2)).mean() if batch_idx else loss


class Several(Classifier):
    def training_step(self, dataloader_iter: Any) -> torch.Tensor:
        return sum(self.loss(next(dataloader_iter)[0])[0] for _ in range(2))


class Backward(Classifier):
    def backward(self, loss: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        if loss > 0:
            raise ValueError("no gradients today")


class Hooking(Sampled):
    def on_fit_start(self) -> None:
        self.head.weight.register_hook(lambda gradient: gradient.clamp(-0.1, 0.1))


class ManualDetached(Manual):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.manual_backward(self.loss(batch)[0].detach())


class ManualFunction(Manual):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        torch.autograd.backward(self.loss(batch)[0])


class ManualRaises(Manual):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        if self.loss(batch)[0].item() < 100 and self.global_rank == 1:
            raise ValueError("on one rank only")
        self.head(self.inlet(batch[0]))


class Detached(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch)[0].detach()


class Constant(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.loss(batch)
        return torch.tensor(1.0)


class Number(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.loss(batch)
        return 3.5


class Two(Classifier):
    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.parameters(), lr=0.1), torch.optim.SGD(self.parameters(), lr=0.1)]


class Nothing(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return {"loss": None, "output": self.loss(batch)[1]}


class NoLayer(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None


class Again(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        out = self(x)
        if batch_idx == 1:
            out = self(x + out.mean())
        return nn.functional.cross_entropy(out, y)


class Lbfgs(Classifier):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters())


class ByNorm(torch.optim.SGD):
    """Looks at all gradients at once."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        norms = [float(p.grad.norm()) for p in self.param_groups[0]["params"] if p.grad is not None]
        self.param_groups[0]["lr"] = 1 / sum(norms)
        return loss


class AtOnce(Classifier):
    def configure_optimizers(self) -> Any:
        return ByNorm(self.parameters(), lr=0.1)


class Clipping(Classifier):
    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        torch.nn.utils.clip_grad_norm_(self.parameters(), 0.1)


class Copying(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch)[0] + copy.deepcopy(self.head)(torch.ones(1, 12)).sum()


class Failing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training and x.shape[0] == 3:
            raise ValueError("these three samples")
        return self.inner(x)


class Raises(Classifier):
    """Fails on the last stage, in the forward of a later batch."""

    def __init__(self) -> None:
        super().__init__()
        self.head = Failing()


class Unpicklable(Classifier):
    def loss(self, batch: Any) -> Any:
        return super().loss(batch["pair"])


def fit(kwargs: dict[str, Any], kind: type[Classifier], loader: Any = None, **more: Any) -> None:
    L.seed_everything(1)
    L.Trainer(**kwargs, max_epochs=1, **more).fit(kind(), loader or train_loader(22))


def unpicklable() -> DataLoader:
    items = [{"pair": pair, "hook": lambda: 0} for pair in train_loader(8).dataset]
    return DataLoader(
        items,
        4,
        collate_fn=lambda rows: {"pair": default_collate([row["pair"] for row in rows]), "hook": rows[0]["hook"]},
    )


IN_TURNS = {"schedule": "sequential", "num_microbatches": "auto"}
CASES: dict[str, tuple[Any, dict[str, Any], list[str]]] = {
    "unknown layer": (Classifier, {"partition": ["block.2"]}, ["block.2", "blocks.2"]),
    "no parameters": (Empty, {}, ["Empty", "no parameters"]),
    "manual without barriers": (Manual, {"schedule": "async"}, ["automatic_optimization=False", "'async'"]),
    "manual, in place": (ManualInPlace, {}, ["schedule='sequential'), make a new tensor"]),
    "manual, no gradient": (ManualDetached, {}, ["`manual_backward`", "`.detach()`"]),
    "manual, by a function": (ManualFunction, {}, ["`self.manual_backward(loss)`"]),
    "manual, an exception": (ManualRaises, {}, ["on one rank only"]),
    "sequential, no gradient": (Detached, IN_TURNS, ["`backward`", "`.detach()`"]),
    "sequential, a hook": (Hooking, IN_TURNS, ["`register_hook`", "several turns", "`on_after_backward`"]),
    "sequential, an exception": (Backward, IN_TURNS, ["failed in the backward pass: ValueError: no gradients today"]),
    "the model again in some batches": (Sampled, {}, ["called again after", "schedule='sequential'"]),
    "several batches": (Several, {"schedule": "1f1b"}, ["schedule='1f1b'", "several batches", "schedule='sequential'"]),
    "detached loss": (Detached, {}, ["does not depend on", "detach"]),
    "constant loss": (Constant, {}, ["does not depend on"]),
    "no loss": (Nothing, {}, ["`training_step` returned dict", "with the key 'loss'", "or None"]),
    "no layer": (NoLayer, {}, ["returned None for the first batches", "begin with a batch that is trained on"]),
    "layers again": (Again, {}, ["'inlet' of stage 0 was called again", "scheduled sampling", "let the first one"]),
    "a number as loss": (Number, {}, ["`training_step` returned float 3.5", "as a tensor"]),
    "two optimizers": (Two, {}, ["multiple optimizers"]),
    "too many layers": (
        Classifier,
        {"partition": ["blocks.1", "blocks.2"]},
        ["names 2 layer(s), but 2 rank(s) need 1"],
    ),
    "a copy of a layer": (Copying, {}, ["the step copies Linear", "`__init__` or `setup`"]),
    "LBFGS": (Lbfgs, {}, ["LBFGS", "AdamW"]),
    "an optimizer that looks at all": (AtOnce, {}, ["ByNorm", "all parameters at once", "AdamW"]),
    "norms without barriers": (Clipping, {"schedule": "async"}, ["clip_grad_norm_", "`gradient_clip_val`"]),
    "an exception in a layer": (
        Raises,
        {},
        ["stage 1 (rank 0)", "forward of micro-batch", "ValueError: these three samples", "in forward"],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_errors_on_every_rank(pool: Pool, tmp_path: Any, name: str) -> None:
    kind, options, texts = CASES[name]
    options = {"num_microbatches": 2, **options}

    def scenario(kwargs: dict[str, Any]) -> None:
        fit(kwargs, kind)

    outcomes = pool.outcomes(2, run_here, scenario, str(tmp_path), options, timeout=30, keep=True)
    for rank, (ok, error) in enumerate(outcomes):
        assert not ok, f"rank {rank} went on"
        assert error[0] in ("ConfigurationError", "PipelineError"), error
        assert all(text in error[1] for text in texts), f"rank {rank}: {error[1]}"


def test_names_out_of_order(pool: Pool, tmp_path: Any) -> None:
    options = {"partition": ["blocks.3", "blocks.1"]}
    outcomes = pool.outcomes(
        3, run_here, lambda kwargs: fit(kwargs, Classifier), str(tmp_path), options, timeout=30, keep=True
    )
    for ok, error in outcomes:
        assert not ok and error[0] == "ConfigurationError"
        assert "blocks.3" in error[1] and "blocks.1" in error[1] and "order" in error[1]


def test_what_cannot_be_sent(pool: Pool, tmp_path: Any) -> None:
    def scenario(kwargs: dict[str, Any]) -> None:
        fit(kwargs, Unpicklable, unpicklable())

    outcomes = pool.outcomes(2, run_here, scenario, str(tmp_path), {}, timeout=30, keep=True)
    assert not any(ok for ok, _ in outcomes)
    for _, error in outcomes:
        assert error[0] == "ConfigurationError"
        assert "a batch holds something that cannot be sent" in error[1] and "pickle" in error[1], error
        assert "`collate_fn`" in error[1]


class Small(L.LightningModule):
    """Two layers, for three devices."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 4), nn.Linear(4, 3)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = nn.functional.cross_entropy(self.last(torch.relu(self.first(batch[0]))), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_more_devices_than_layers(pool: Pool, tmp_path: Any) -> None:
    """The surplus device idles, with a warning; the numbers are those of one device."""

    def scenario(kwargs: dict[str, Any]) -> Any:
        import warnings

        L.seed_everything(1)
        module = Small()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer = L.Trainer(**kwargs, max_epochs=2)
            trainer.fit(module, train_loader(20))
        texts = [str(warning.message) for warning in caught]
        return (
            {n: p.detach().clone() for n, p in module.named_parameters()},
            texts,
            float(trainer.callback_metrics["loss"]),
        )

    expected = pool.run(1, run_here, scenario, str(tmp_path), None)[0]
    results = pool.run(3, run_here, scenario, str(tmp_path), {"num_microbatches": 1})
    for weights, _, loss in results:
        assert loss == expected[2]
        assert all(torch.equal(weights[name], expected[0][name]) for name in weights)
    assert any("idle" in text for text in results[0][1])
