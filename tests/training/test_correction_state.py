"""Corrections' states go by name between any numbers of stages."""

import torch
from training.runs import same

from lightning_lwpm.training.correction_state import by_name, in_order, merged


def test_states_of_two_stages_become_those_of_three() -> None:
    a, b, c = (torch.full((2,), float(i)) for i in range(3))
    states = [
        by_name({"parts": [{"ahead": [a, b]}, {"done": 4}]}, ["a", "b"]),
        by_name({"parts": [{"ahead": [c]}, {"done": 4}]}, ["c"]),
    ]
    whole = merged(states)
    for name, tensor in (("a", a), ("b", b), ("c", c)):
        same({"parts": [{"ahead": [tensor]}, {"done": 4}]}, in_order(whole, [name]))


def test_what_is_missing_begins_anew() -> None:
    whole = merged([by_name({"ahead": [torch.ones(1)]}, ["a"]), by_name({"ahead": []}, ["b"])])
    assert in_order(whole, ["a", "b"]) == {"ahead": []}
    assert merged([]) is None
