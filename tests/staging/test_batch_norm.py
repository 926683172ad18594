"""Running statistics of a whole batch from its micro-batches."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_lwpm.staging.batch_norm import DeferredBatchNorm


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("again", [False, True], ids=["", "computed again"])
def test_one_update_a_batch(momentum: float | None, again: bool) -> None:
    """Of uneven micro-batches; those computed again in the backward pass count once; evaluation changes nothing."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(3, momentum=momentum), nn.Conv2d(3, 2, 1))
    whole = copy.deepcopy(model)
    deferred = DeferredBatchNorm(model)
    for _ in range(3):
        batch = 5 + 2 * torch.randn(7, 3, 4, 4)
        whole(batch)
        with deferred.batch():
            for part in batch.split([3, 3, 1]):
                (checkpoint(model, part, use_reentrant=False) if again else model(part)).sum().backward()
        model.eval()
        with deferred.batch():
            model(batch)
        model.train()
    assert model[0].momentum == momentum and "forward" not in vars(model[0])
    torch.testing.assert_close(model.state_dict(), whole.state_dict())
