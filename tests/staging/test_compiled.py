"""Which units are compiled, by what, and when."""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lwpm.staging.compiled import AsWritten, CompiledUnits

runs: list[str] = []
"""Which of the backends below has run a graph."""


def backend(name: str) -> Callable[..., Any]:
    """A backend that runs graphs as they are, and notes it."""

    def compile_graph(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            runs.append(name)
            return graph.forward(*args)

        return run

    return compile_graph


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()
    runs.clear()


class Decorated(nn.Linear):
    """Its ``forward`` is compiled."""

    forward = torch.compile(nn.Linear.forward, backend=backend("decorated"))


def found(root: nn.Module, *units: nn.Module) -> list[bool]:
    """Whether a compiled ``forward`` has been made for each unit."""
    made = CompiledUnits(root, units).forwards
    return [unit in made for unit in units]


def test_nothing_is_compiled_in_a_plain_model() -> None:
    root = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    assert found(root, *root) == [False, False]


def test_units_of_a_compiled_model_are_compiled_by_its_compiler() -> None:
    inner = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    root = nn.Sequential(torch.compile(inner, backend=backend("a")), nn.Linear(2, 2))
    assert found(root, inner[0], inner[1], root[1]) == [True, True, False]
    with CompiledUnits(root, inner).batch():
        inner[0](torch.ones(1, 2))
    assert runs == ["a"]
    assert "forward" not in vars(inner[0])


def test_the_innermost_compiler_counts() -> None:
    inner = nn.Sequential(nn.Linear(2, 2))
    inner.compile(backend=backend("inner"))
    root = nn.Sequential(inner, nn.Linear(2, 2))
    root.compile(backend=backend("outer"))
    with CompiledUnits(root, [inner[0], root[1]]).batch():
        for unit in (inner[0], root[1]):
            unit(torch.ones(1, 2))
    assert runs == ["inner", "outer"]


def test_what_is_compiled_already_is_left_as_it_is() -> None:
    root = nn.Sequential(torch.compile(nn.Linear(2, 2), backend=backend("a")), Decorated(2, 2))
    assert found(root, *root) == [False, False]
    root.compile(backend=backend("outer"))
    assert found(root, *root) == [False, False]


def test_what_must_not_be_compiled_is_not() -> None:
    root = nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2))
    root[0].forward = torch.compiler.disable(root[0].forward)
    root.compile(backend=backend("a"))
    assert found(root, root[0][0], root[1]) == [False, True]


def test_a_layer_leaves_what_is_as_written() -> None:
    double = torch.compile(lambda x: x * 2, backend=backend("a"))
    plain = AsWritten()
    with plain:
        double(torch.ones(1))
        assert runs == []
        with plain.left():
            double(torch.ones(1))
        assert runs == ["a"]
        double(torch.ones(1))
    assert runs == ["a"]
    double(torch.ones(1))
    assert runs == ["a", "a"]


def test_the_users_own_stance_is_kept() -> None:
    """Who has switched the compiler off has it off inside layers too."""
    double = torch.compile(lambda x: x * 2, backend=backend("a"))
    with torch.compiler.set_stance("force_eager"):
        plain = AsWritten()
        with plain, plain.left():
            double(torch.ones(1))
    assert runs == []


def test_the_compiler_is_not_loaded_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch._dynamo")
    plain = AsWritten()
    with plain, plain.left():
        assert "torch._dynamo" not in sys.modules


def test_an_error_in_a_layer_puts_the_stance_back() -> None:
    def fails(x: Tensor) -> Tensor:
        raise ValueError

    double = torch.compile(lambda x: x * 2, backend=backend("a"))
    plain = AsWritten()
    with pytest.raises(ValueError), plain, plain.left():
        fails(torch.ones(1))
    double(torch.ones(1))
    assert runs == ["a"]
