"""Nested values come apart and together again, also on another rank."""

import pickle
from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Independent, Normal

from lightning_lwpm.staging.tree import flatten, map_tensors, portable, tensors, unflatten

Pair = namedtuple("Pair", "left right")

plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4)
leaf = plain | st.builds(torch.tensor, st.floats(-1, 1))
nested = st.recursive(
    leaf,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3)
        | st.builds(Pair, inner, inner)
        | st.builds(OrderedDict, st.dictionaries(st.text(max_size=3), inner, max_size=3))
    ),
    max_leaves=12,
)


def same(a: Any, b: Any) -> bool:
    """Equal, tensors being equal if they are the same object."""
    if isinstance(a, Tensor):
        return a is b
    if isinstance(a, dict):
        return type(a) is type(b) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return bool(a == b) and type(a) is type(b)


@given(nested)
def test_round_trip(value: Any) -> None:
    leaves: list[Tensor] = []
    assert same(unflatten(flatten(value, leaves), iter(leaves)), value)


@given(nested)
def test_specs_travel(value: Any) -> None:
    leaves: list[Tensor] = []
    spec = pickle.loads(pickle.dumps(portable(flatten(value, leaves))))
    assert same(unflatten(spec, iter(leaves)), value)


@given(nested)
def test_specs_of_equal_values_are_equal(value: Any) -> None:
    """A producer tells what changed: what did not must compare equal."""
    assert portable(flatten(value, [])) == portable(flatten(value, []))


@dataclass
class State:
    """A dataclass with a default that is not a tensor, and a value that its constructor does not know."""

    x: Tensor
    history: list[Tensor] = field(default_factory=list)
    name: str = "state"
    late: Any = field(default=None, init=False)


def test_dataclasses_are_copied_with_all_they_hold() -> None:
    state = State(torch.zeros(2), [torch.ones(1)], "kept")
    state.late = torch.ones(3)
    assert len(tensors(state)) == 3
    doubled = map_tensors(lambda tensor: tensor + 1, state)
    assert (doubled.name, doubled.x.tolist(), doubled.late.tolist()) == ("kept", [1, 1], [2, 2, 2])
    assert state.x.tolist() == [0, 0]
    spec = portable(flatten(state, []))
    assert spec[1][0].x is None, "the shell that is sent holds no tensors"


class Checked:
    """A field that checks what is set."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: Any, owner: type) -> Any:
        return instance.__dict__[self.name] if instance is not None else None

    def __set__(self, instance: Any, value: Any) -> None:
        assert value is None or value.dim() == 1
        instance.__dict__[self.name] = value


@dataclass
class Picky:
    """As the batches of some projects are."""

    x: Tensor = Checked()  # type: ignore[assignment]


def test_fields_that_check_what_is_set_take_placeholders() -> None:
    value = Picky(torch.zeros(2))
    spec = flatten(value, [])
    assert unflatten(spec, iter(["anything"])).x == "anything"
    assert value.x.tolist() == [0, 0]
    with pytest.raises(AttributeError):
        value.x = "anything"  # type: ignore[assignment]


def test_distributions() -> None:
    """A layer returned one, and to other ranks it was an object of an unknown class."""
    value = Independent(Normal(torch.zeros(2, 3), torch.ones(2, 3)), 1)
    leaves: list[Tensor] = []
    spec = pickle.loads(pickle.dumps(portable(flatten(value, leaves))))
    new = unflatten(spec, iter([leaf + 1 for leaf in leaves]))
    assert (new.mean.tolist(), new.event_shape) == ([[1.0] * 3] * 2, (3,))
    assert value.mean.tolist() == [[0.0] * 3] * 2


def test_mappings_with_their_own_class() -> None:
    value = UserDict(x=torch.zeros(1), n=3)
    new = map_tensors(lambda tensor: tensor + 1, value)
    assert isinstance(new, UserDict)
    assert (new["x"].item(), new["n"], value["x"].item()) == (1, 3, 0)


def test_what_transformers_returns() -> None:
    outputs = pytest.importorskip("transformers.modeling_outputs")
    value = outputs.CausalLMOutput(loss=torch.tensor(1.0), logits=torch.zeros(2))
    new = map_tensors(lambda tensor: tensor + 1, value)
    assert type(new) is type(value)
    assert new.loss.item() == 2
    assert new["logits"].tolist() == [1, 1]


class Thing:
    """Cannot be sent."""

    size = 3


def test_other_objects_stay_here_and_say_so_elsewhere() -> None:
    thing = Thing()
    leaves: list[Tensor] = []
    spec = flatten({"thing": thing, "x": torch.zeros(1)}, leaves)
    assert unflatten(spec, iter(leaves))["thing"] is thing
    elsewhere = unflatten(pickle.loads(pickle.dumps(portable(spec))), iter(leaves))["thing"]
    with pytest.raises(RuntimeError, match=r"'\.size' of an object of class 'Thing'"):
        elsewhere.size  # noqa: B018
