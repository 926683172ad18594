"""What a stage holds of a micro-batch is let go of at once, not when Python next looks for cycles."""

import gc
import weakref

import torch

from lightning_lwpm.pipeline.flight import Arrival, join
from lightning_lwpm.staging.remote import Meta, Name


def test_a_received_tensor_does_not_outlive_its_backward_pass() -> None:
    received = torch.randn(10)
    meta = Meta.of(torch.randn(10, requires_grad=True))
    arrival = Arrival(Name("layer", 0, 0, 0), 0, received, meta, pulled=False)
    gc.disable()
    try:
        loss = (2 * join(arrival, grad=True)).sum()
        loss.backward()
        assert arrival.gradient is not None and arrival.gradient.tolist() == [2.0] * 10
        memory = [weakref.ref(tensor.untyped_storage()) for tensor in (received, arrival.gradient)]
        arrival.release()
        del arrival, received
        assert [reference() for reference in memory] == [None, None]  # though the loss, and so its graph, is still here
    finally:
        gc.enable()
