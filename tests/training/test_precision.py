"""Precision plugins: the numbers of one device that accumulates the same micro-batches with the same plugin."""

from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader
from training.modules import Classifier, data, val_loader
from training.runs import Runs, metrics, same, weights


class Typed(Classifier):
    """Tensors of several types go from stage to stage, and some are made in the default type on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.linspace(-1, 1, 12))
        self.seen: set[str] = set()

    def configure_model(self) -> None:
        if not hasattr(self, "gain"):
            self.gain = nn.Parameter(torch.ones(12))  # in the type of the plugin

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask, order = x > 0, x.argsort(1)
        made = torch.zeros(len(x), 12, device=x.device)
        self.seen.add(str(made.dtype))
        h = self.inlet(x) * self.gain + made
        for block in self.blocks:
            h = h + block(h) * mask[:, :1] + self.shift
            with torch.autocast(h.device.type, enabled=False):
                h = nn.functional.layer_norm(h.float(), (12,)).to(h.dtype)
        return self.head(h) + order[:, :3].to(h.dtype)


def plugin(precision: str) -> dict[str, Any]:
    """Options of a trainer; on a CPU, Lightning itself knows no scaler."""
    if precision != "16-mixed":
        return {"precision": precision}
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}


class Fit:
    """A scenario with arguments; runs are told apart by its name."""

    def __init__(self, kind: type[L.LightningModule], precision: str, resume: str | None = None) -> None:
        self.kind, self.precision, self.resume = kind, precision, resume
        self.__name__ = self.__qualname__ = f"{kind.__name__}-{precision}"

    def __call__(self, kwargs: dict[str, Any]) -> Any:
        L.seed_everything(5)
        module = self.kind()
        more = {"max_epochs": 3 if self.resume else 2, "gradient_clip_val": 0.5, **plugin(self.precision)}
        trainer = L.Trainer(**kwargs | more)
        trainer.fit(module, DataLoader(data(36), 8), val_loader(), ckpt_path=self.resume)
        trainer.save_checkpoint(f"{kwargs['default_root_dir']}/last.ckpt")
        return weights(module), metrics(trainer), trainer.precision_plugin.state_dict(), sorted(module.seen)


@pytest.mark.parametrize(
    ("precision", "world", "options"),
    [
        ("bf16-mixed", 2, {"schedule": "zb1p"}),
        ("bf16-mixed", 3, {"activation_checkpointing": "layer"}),
        ("bf16-true", 2, {}),
        ("64-true", 3, {"activation_checkpointing": "stage"}),
        ("16-true", 2, {}),
        ("16-mixed", 2, {"activation_checkpointing": "layer"}),
        ("16-mixed", 3, {"schedule": "zb1p"}),
    ],
)
def test_numbers_of_one_device(runs: Runs, precision: str, world: int, options: dict[str, str]) -> None:
    expected = runs.one(Fit(Typed, precision), 2)
    for rank, found in enumerate(runs.on(world, Fit(Typed, precision), 2, **options)):
        same(expected[:3], found[:3], f"rank {rank}")
        assert set(found[3]) <= set(expected[3])


class Overflowing(Typed):
    """Now and then gradients overflow, of the first layer or of the last one only."""

    def on_after_backward(self) -> None:
        layers = {2: self.inlet, 5: self.head}
        layer = layers.get(self.trainer.fit_loop.total_batch_idx)
        if layer is not None and layer.weight.grad is not None:
            layer.weight.grad[0, 0] = float("inf")


class Fused(Overflowing):
    """The optimizer itself unscales gradients."""

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01, fused=True)

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        """Lightning does not clip gradients that are still scaled."""


@pytest.mark.parametrize("kind", [Overflowing, Fused])
@pytest.mark.parametrize("world", [2, 3])
def test_a_step_is_skipped_by_all_stages_or_by_none(runs: Runs, kind: Any, world: int) -> None:
    expected = runs.one(Fit(kind, "16-mixed"))
    assert expected[2]["_growth_tracker"] == 1  # overflows have been seen
    for rank, found in enumerate(runs.on(world, Fit(kind, "16-mixed"))):
        same(expected, found, f"rank {rank}")


@pytest.mark.parametrize("world", [2, 3])
def test_without_flushes_a_drain_at_every_step_is_the_exact_schedule(runs: Runs, world: int) -> None:
    expected = runs.on(world, Fit(Overflowing, "16-mixed"), 2, schedule="1f1b")
    options = {"schedule": "async", "drain_every_n_steps": 1, "staleness_correction": "none"}
    same(expected, runs.on(world, Fit(Overflowing, "16-mixed"), 2, **options))


@pytest.mark.parametrize("kind", [Overflowing, Fused])
def test_without_flushes_all_ranks_have_the_same_scale(runs: Runs, kind: Any) -> None:
    exact = runs.on(3, Fit(kind, "16-mixed"), 2)
    found = runs.on(3, Fit(kind, "16-mixed"), 2, schedule="async")
    for trained, logged, scaler, _ in found:
        same(found[0][2], scaler)
        # after each overflow lowered once; the first, of the first layer, counts a step later, when the scale has grown
        assert scaler["scale"] == 2 * exact[0][2]["scale"]
        assert all(torch.isfinite(weight).all() for weight in trained.values())
        assert logged["val/loss"] < 1.2 * exact[0][1]["val/loss"]


@pytest.mark.parametrize(("before", "after"), [(0, 2), (2, 0)])
def test_the_state_of_a_scaler_goes_from_one_device_to_several_and_back(runs: Runs, before: int, after: int) -> None:
    half = {world: f"scaler-{world}" for world in (before, after)}
    for world, folder in half.items():
        runs.on(world, Fit(Overflowing, "16-mixed"), folder=folder)
    states = [torch.load(runs.folder / folder / "last.ckpt")["MixedPrecision"] for folder in half.values()]
    same(*states)
    whole, resumed = (
        runs.on(after, Fit(Overflowing, "16-mixed", str(runs.folder / folder / "last.ckpt")))[0]
        for folder in reversed(half.values())
    )
    same(whole, resumed)
