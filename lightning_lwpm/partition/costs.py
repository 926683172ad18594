"""How long a layer and a transfer take, estimated from counts where nothing has been timed.

Only ratios matter to a partition: constants ten times too large give the same cuts, as long as arithmetic, memory
and link keep their proportion. So one nominal machine stands for all.
"""

FLOPS_PER_SECOND = 50e9
"""Nominal arithmetic rate: 50 GFLOP/s, about one CPU core on float32 matrix products."""

MEMORY_BYTES_PER_SECOND = 10e9
"""Nominal rate at which element-wise operations write memory: 10 GB/s."""

LINK_BYTES_PER_SECOND = 2e9
"""Nominal rate between two ranks: 2 GB/s, gloo over loopback."""

BACKWARD_OVER_FORWARD = 2.0
"""A backward pass computes two products (input and weight gradient) for each one of the forward pass."""


def estimate_seconds(flops: float, bytes_moved: float, train: bool = True) -> float:
    """Estimate the time of a layer, as arithmetic time plus memory time.

    The roofline model (Williams et al., CACM 52(4), 2009) takes the larger of the two. The counts here belong to
    a whole layer, whose operations are bound by one or the other in turn, so the sum is the closer figure.

    Args:
        flops: Floating-point operations of the forward pass.
        bytes_moved: Bytes written by the forward pass.
        train: Whether to add the backward pass, counted as twice the forward pass.

    Returns:
        Seconds on the nominal machine.
    """
    forward = flops / FLOPS_PER_SECOND + bytes_moved / MEMORY_BYTES_PER_SECOND
    return forward * (1.0 + BACKWARD_OVER_FORWARD) if train else forward


def transfer_seconds(nbytes: float) -> float:
    """Estimate the time to move ``nbytes`` bytes one way between two ranks, in seconds."""
    return nbytes / LINK_BYTES_PER_SECOND
