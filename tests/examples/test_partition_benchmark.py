"""What the benchmark of the partition computes from what it measures: exact bytes, ratios of stages."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "benchmarks"


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts import each other as neighbours."""
    monkeypatch.syspath_prepend(str(FOLDER.parents[1]))
    monkeypatch.syspath_prepend(str(FOLDER))


def test_live_bytes_are_exact() -> None:
    from live_bytes import LiveBytes

    model = nn.Sequential(nn.Linear(300, 200, bias=False), nn.ReLU(), nn.Linear(200, 100, bias=False))
    x = torch.randn(50, 300)
    with LiveBytes() as counter:
        view = x.view(-1)
        assert counter.live == 0  # memory from before
        y = model(x)
        assert counter.live == 4 * 50 * (200 + 100)  # ReLU keeps its result, not what it was given
        gradient = torch.ones_like(y)
        y.backward(gradient)
        del y, gradient, view
        assert counter.live == 4 * (300 * 200 + 200 * 100)  # the gradients
        model.zero_grad()
        assert counter.live == 0
        large = torch.empty(1 << 20, dtype=torch.uint8)
        del large
    assert counter.peak == 1 << 20


def row(**changes: Any) -> Any:
    from partition import Row

    values: dict[str, Any] = {
        "model": "gpt2",
        "stages": 3,
        "method": "ours",
        "cuts": ["a", "b"],
        "bytes_cut": 1,
        "predicted": [[1.0, 2.0], [0.9, 1.8], [0.5, 0.0]],
        "measured": [[1.0, 2.0], [1.0, 2.6], [0.1, 0.1]],
        "possible": 1.0,
    }
    return Row(**values | changes)


def test_ratios_of_stages() -> None:
    found = row()
    assert found.evenness == pytest.approx(3.6 / (6.8 / 3))
    assert found.of_slowest == pytest.approx(2.7 / 3.6)
    assert found.worst == pytest.approx(2.7 / 3.6)  # the last stage is wrong by more, but too small to matter


def test_table_compares_with_the_best_other() -> None:
    from partition import table_of
    from rich.console import Console

    slower = row(method="layers", measured=[[1.0, 3.0], [1.0, 2.0], [0.1, 0.1]])
    console = Console(width=200, record=True)
    console.print(table_of("model", [row(), slower]))
    assert "0.90" in console.export_text()  # 3.6 s over 4 s
