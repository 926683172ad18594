"""Runs the same Lightning code on one device and under the strategy on several ranks, to compare."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from pool import Pool
from simulated import NAME, use
from simulated.accelerator import Simulated

from lightning_lwpm import LWPMStrategy
from lightning_lwpm.staging.tree import map_tensors

Scenario = Callable[[dict[str, Any]], Any]


def run_here(
    rank: int, world: int, scenario: Scenario, folder: str, options: dict[str, Any] | None, kind: str = "cpu"
) -> Any:
    """Run a scenario in a worker; ``options`` of the strategy, or ``None`` for stock Lightning."""
    strategy: Any = "auto" if options is None else LWPMStrategy(**{"patience": 5, "costs": "estimated", **options})
    kwargs = {
        "accelerator": "cpu",
        "devices": world,
        "strategy": strategy,
        "default_root_dir": folder,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    if kind == NAME:
        use(NAME, rank)
        kwargs["accelerator"] = Simulated()
        if options is None:
            kwargs["strategy"] = SingleDeviceStrategy(f"{NAME}:0")
    try:
        return to_host(scenario(kwargs))
    finally:
        if options is not None and strategy._mailbox is not None:
            strategy._mailbox.close()


def to_host(result: Any) -> Any:
    """What a scenario found, with tensors on the CPU."""
    return map_tensors(lambda tensor: tensor.cpu(), result)


def stock(kwargs: dict[str, Any]) -> bool:
    """Whether a scenario runs on one device without this strategy."""
    return not isinstance(kwargs["strategy"], LWPMStrategy)


class Runs:
    """Runs scenarios; what one device gave is kept for the next comparison.

    Args:
        pool: The workers.
        kind: The type of their devices, by default as ``LWPM_TEST_DEVICE`` says.
    """

    def __init__(self, pool: Pool, kind: str = os.environ.get("LWPM_TEST_DEVICE", "cpu")) -> None:
        self.pool, self.kind = pool, kind
        self.folder = Path(tempfile.mkdtemp(prefix="lwpm-runs-"))
        self._known: dict[Any, Any] = {}

    def on(self, world: int, scenario: Scenario, num_microbatches: int = 1, folder: str = "", **options: Any) -> Any:
        """The results of all ranks; with ``world=0`` the result of stock Lightning on one device."""
        name = folder or f"{getattr(scenario, '__name__', 'scenario')}-{world}-{num_microbatches}-{len(self._known)}"
        path = self.folder / name
        path.mkdir(exist_ok=True)
        options = {"num_microbatches": num_microbatches, **options}
        arguments = (scenario, str(path), options if world else None, self.kind)
        return self.pool.run(max(1, world), run_here, *arguments, timeout=60 if self.kind == "cpu" else 240)

    def one(self, scenario: Scenario, num_microbatches: int = 1, **options: Any) -> Any:
        """One device: stock Lightning, or this strategy where it is to accumulate the same micro-batches."""
        key = (scenario.__module__, scenario.__qualname__, num_microbatches)
        if key not in self._known:
            world = 0 if num_microbatches == 1 else 1
            self._known[key] = self.on(world, scenario, num_microbatches, **options)[0]
        return self._known[key]

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


@pytest.fixture(scope="session")
def runs(pool: Pool) -> Iterator[Runs]:
    """Runs scenarios in this session's workers."""
    made = Runs(pool)
    yield made
    made.close()


def same(expected: Any, found: Any, where: str = "", tolerance: float = 0.0) -> None:
    """Fail where ``found`` differs from ``expected``, naming the place; tensors must have the same bits.

    Args:
        expected: Any structure of dicts, sequences, tensors and plain values.
        found: What is compared with it.
        where: Path, for the message.
        tolerance: Relative difference allowed in floating-point tensors and floats.
    """
    if isinstance(expected, torch.Tensor):
        assert isinstance(found, torch.Tensor), f"{where}: {type(found)} in the place of a tensor"
        assert (expected.shape, expected.dtype) == (found.shape, found.dtype), f"{where}: {expected} != {found}"
        if tolerance and expected.is_floating_point():
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, msg=lambda m: f"{where}: {m}")
        else:
            assert torch.equal(expected, found), f"{where}: {expected} != {found}"
    elif isinstance(expected, dict):
        assert isinstance(found, dict), f"{where}: {found} in the place of a dict"
        assert list(expected) == list(found), f"{where}: keys {list(expected)} != {list(found)}"
        for key in expected:
            same(expected[key], found[key], f"{where}[{key!r}]", tolerance)
    elif isinstance(expected, list | tuple):
        assert len(expected) == len(found), f"{where}: {expected} != {found}"
        for i, (a, b) in enumerate(zip(expected, found, strict=True)):
            same(a, b, f"{where}[{i}]", tolerance)
    elif isinstance(expected, float) and tolerance:
        assert found == pytest.approx(expected, rel=tolerance, abs=tolerance), where
    else:
        assert expected == found, f"{where}: {expected!r} != {found!r}"


def weights(module: L.LightningModule) -> dict[str, torch.Tensor]:
    """A copy of all weights and buffers."""
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def metrics(trainer: L.Trainer) -> dict[str, float]:
    """What callbacks see, in an order of its own."""
    return {name: float(value) for name, value in sorted(trainer.callback_metrics.items())}
