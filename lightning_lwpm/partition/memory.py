"""What a stage needs on its device at its worst moment, in bytes, for every stage that could be cut.

::

    stage           received | h.1   h.2   h.3 | sent
    weights                    [1]   [2]   [3]          once, with gradients and optimizer state
    micro-batch 0      x       ...   ...   ...          what its backward pass will need,
    micro-batch 1      x       ...   ...   ...          for each micro-batch in flight
    at work                          [!]          y     the hungriest call, and one result on its way
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from lightning_lwpm.errors import ConfigurationError
from lightning_lwpm.partition.search import Array, Mask
from lightning_lwpm.partition.timeline import Flow

__all__ = ["Memory"]


@dataclass(frozen=True)
class Memory:
    r"""What stages need, and what their devices hold.

    A stage ``stage`` of the calls :math:`i, \dots, j-1` needs

    .. math:: parameters_{[i, j)} + \max\left(f \left(\sum_{k=i}^{j-1} kept_k + received_{[i, j)} + sent_{[i, j)}\right)
              + \max_{i \le k < j} transient_k, \; shared_{[i, j)}\right)

    where :math:`f` is the number of its micro-batches in flight: each holds what was received, and has room for the
    gradients of what was sent. Nothing is sent from the last call. When all are done, the gradients of weights that
    other stages use too are exchanged.

    Args:
        parameters: For each parameter the positions of the calls that use it, and the bytes of its values, gradient
            and optimizer state. It counts once in each stage that has any of the positions.
        kept: For each call the bytes of one micro-batch that it, and the functions after it, keep for backward.
        transient: For each call the most bytes that live only while it runs, forward or backward.
        shared: As ``parameters``, for those used by several calls: the bytes of one copy of the gradient. In the
            exchange a stage holds one for each use in other stages, and the sum.
        in_flight: From stage and number of stages to the most micro-batches between their forward and backward pass.
        flows: The tensors of one micro-batch that are used in later calls than the one that makes them.
        again: For each call the bytes that its stage holds of one micro-batch at a time, with those of all its calls:
            activations that are computed again. None by default.
        limits: Bytes of the device of each stage, or of every one; infinite for no limit.

    Raises:
        ValueError: If lengths differ, or bytes are negative or not finite.
        ConfigurationError: If a limit is not positive.
    """

    parameters: Sequence[tuple[tuple[int, ...], float]]
    kept: Sequence[float]
    transient: Sequence[float]
    in_flight: Callable[[int, int], int]
    flows: Sequence[Flow] = ()
    limits: Sequence[float] | float = math.inf
    shared: Sequence[tuple[tuple[int, ...], float]] = ()
    again: Sequence[float] = ()

    def __post_init__(self) -> None:
        if len(self.kept) != len(self.transient):
            raise ValueError(
                f"kept and transient need an entry for each layer call, got {len(self.kept)} and {len(self.transient)}"
            )
        weights = [nbytes for _, nbytes in self.parameters]
        for name in ("parameters", "kept", "transient"):
            for index, nbytes in enumerate(weights if name == "parameters" else getattr(self, name)):
                if not 0 <= nbytes < math.inf:
                    raise ValueError(f"{name}[{index}] takes {nbytes!r} bytes: it must be finite and not negative")
        for limit in self._limits:
            if not limit > 0:
                raise ConfigurationError(f"a device of {limit!r} bytes holds nothing; its limit must be positive")

    @property
    def limited(self) -> bool:
        """Whether any device has a limit; without one, everything fits."""
        return any(limit < math.inf for limit in self._limits)

    def limit(self, stage: int, num_stages: int) -> float:
        """Bytes of the device of a stage.

        Raises:
            ConfigurationError: If the limits belong to another number of stages.
        """
        if not isinstance(self.limits, Sequence):
            return self.limits
        if len(self.limits) != num_stages:
            raise ConfigurationError(f"there are limits for {len(self.limits)} stage(s), but {num_stages} stage(s)")
        return self.limits[stage]

    def need(self, stage: int, num_stages: int) -> Array:
        """Bytes that a stage needs by (begin, end), of shape (n + 1, n + 1); meaningless where end <= begin."""
        working = self._transient + self.in_flight(stage, num_stages) * self._each + self._again
        return self._weights + np.maximum(working, self._exchanged)

    def feasible(self, stage: int, num_stages: int) -> Mask:
        """Whether a stage of the calls from begin to before end fits its device, of shape (n + 1, n + 1)."""
        return np.triu(self.need(stage, num_stages) <= self.limit(stage, num_stages), k=1)

    def breakdown(self, stage: int, num_stages: int, begin: int, end: int) -> dict[str, float]:
        """What the calls from ``begin`` to before ``end`` need as a stage, by what it is for; the sum is the need."""
        flying = self.in_flight(stage, num_stages)
        inside = range(begin, end)
        working = {
            "activations": flying * sum(self.kept[begin:end]),
            "received": flying * float(self._received[begin, end]),
            "sent": flying * float(self._sent[begin, end]),
            "transient": max(self.transient[begin:end]),
        }
        if self.again:
            working["computed again"] = sum(self.again[begin:end])
        # the greater of the two moments counts: at work, or the exchange of shared gradients at the end
        exchange = max(0.0, float(self._exchanged[begin, end]) - sum(working.values()))
        weights = sum(nbytes for where, nbytes in self.parameters if any(at in inside for at in where))
        return {"weights": weights, **working, **({"exchange": exchange} if exchange else {})}

    def microbatch(self, begin: int, end: int) -> float:
        """Bytes that each micro-batch in flight adds to what the calls from ``begin`` to before ``end`` need."""
        return float(self._each[begin, end])

    def scaled(self, factor: float) -> "Memory":
        """The need with micro-batches of another size, as far as it grows in proportion to the size.

        Args:
            factor: The new size over the old one.
        """
        return replace(
            self,
            kept=[nbytes * factor for nbytes in self.kept],
            transient=[nbytes * factor for nbytes in self.transient],
            again=[nbytes * factor for nbytes in self.again],
            flows=[replace(flow, nbytes=flow.nbytes * factor) for flow in self.flows],
        )

    @property
    def _limits(self) -> Sequence[float]:
        return self.limits if isinstance(self.limits, Sequence) else [self.limits]

    @cached_property
    def _each(self) -> Array:
        """What every micro-batch in flight adds."""
        kept = np.concatenate([[0.0], np.cumsum(np.asarray(self.kept, dtype=float))])
        return kept[None, :] - kept[:, None] + self._received + self._sent

    @cached_property
    def _again(self) -> Array:
        """What is computed again between begin and end, for one micro-batch."""
        sums = np.concatenate([[0.0], np.cumsum(np.asarray(self.again or [0.0] * len(self.kept), dtype=float))])
        return sums[None, :] - sums[:, None]

    @cached_property
    def _received(self) -> Array:
        """Bytes of the tensors made before begin and used between begin and end."""
        sums = _Rectangles(len(self.kept))
        for flow in self.flows:
            before = flow.born
            for at in flow.uses:
                sums.add(before + 1, at, at + 1, len(self.kept), flow.nbytes)
                before = at
        return sums.total()

    @cached_property
    def _sent(self) -> Array:
        """Bytes of the tensors made between begin and end and used later."""
        sums = _Rectangles(len(self.kept))
        for flow in self.flows:
            sums.add(0, flow.born, flow.born + 1, flow.uses[-1], flow.nbytes)
        return sums.total()

    @cached_property
    def _transient(self) -> Array:
        """The hungriest call between begin and end."""
        n = len(self.kept)
        # transient[j - 1] at (i, j): the running maximum along j starts at j = i + 1
        return np.maximum.accumulate(np.triu(np.tile([0.0, *self.transient], (n + 1, 1)), k=1), axis=1)

    @cached_property
    def _exchanged(self) -> Array:
        """Bytes held while shared gradients are summed: of each its sum, and one of each use outside the stage."""
        n = len(self.kept)
        total = np.zeros((n + 1, n + 1))
        for where, nbytes in self.shared:
            uses = np.cumsum([0, *(position in where for position in range(n))])
            inside = uses[None, :] - uses[:, None]
            outside = uses[-1] - inside
            total += np.where((inside > 0) & (outside > 0), (1 + outside) * nbytes, 0.0)
        return total

    @cached_property
    def _weights(self) -> Array:
        """Bytes of the parameters that are used between begin and end, each counted once."""
        # A use is the first of its parameter in a stage that begins after the use before it, and not after this
        # one, and ends later.
        sums = _Rectangles(len(self.kept))
        for where, nbytes in self.parameters:
            before = -1
            for at in sorted(set(where)):
                sums.add(before + 1, at, at + 1, len(self.kept), nbytes)
                before = at
        return sums.total()


class _Rectangles:
    """Sums over rectangles of (begin, end), added up by their corners.

    Args:
        n: Number of calls; begin and end go from 0 to n.
    """

    def __init__(self, n: int) -> None:
        self.corners = np.zeros((n + 2, n + 2))

    def add(self, first_begin: int, last_begin: int, first_end: int, last_end: int, amount: float) -> None:
        """Add an amount to all stages with begin and end in these ranges, both ends included."""
        self.corners[first_begin, first_end] += amount
        self.corners[last_begin + 1, first_end] -= amount
        self.corners[first_begin, last_end + 1] -= amount
        self.corners[last_begin + 1, last_end + 1] += amount

    def total(self) -> Array:
        """The sums, of shape (n + 1, n + 1)."""
        return self.corners.cumsum(axis=0).cumsum(axis=1)[:-1, :-1]
