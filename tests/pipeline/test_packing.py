"""Tensors in messages arrive as they were: values, type, shape and memory layout."""

import pickle

import pytest
import torch
from torch import Tensor, nn

from lightning_lwpm.pipeline.packing import packed

X = torch.arange(48.0)


@pytest.mark.parametrize(
    "tensor",
    [
        X.view(6, 8).t(),
        X.view(1, 4, 3, 4).to(memory_format=torch.channels_last),
        X.view(2, 4, 6).permute(2, 0, 1),
        X.bfloat16().requires_grad_(),
        X.bool(),
        torch.tensor(3),
        torch.empty(0, 5),
        nn.Parameter(X.view(6, 8).t()),
    ],
    ids=str,
)
def test_round_trip(tensor: Tensor) -> None:
    found = pickle.loads(packed({"it": tensor}))["it"]
    assert torch.equal(found, tensor)
    assert (found.dtype, found.stride(), found.requires_grad) == (tensor.dtype, tensor.stride(), tensor.requires_grad)
    assert type(found) is type(tensor)


@pytest.mark.parametrize("tensor", [X.view(6, 8)[:, ::2], X[:1].expand(5, 3)])
def test_only_what_a_view_shows_is_sent(tensor: Tensor) -> None:
    found = pickle.loads(packed(tensor))
    assert torch.equal(found, tensor)
    assert found.untyped_storage().nbytes() == tensor.numel() * 4
