"""The order in which a step calls its layers, and what lies between two calls.

::

    call        0          1          2          3
            embedding | h.0.attn | h.0.mlp  |   head
                      ^          ^          ^
    boundary_bytes    1          2          3        bytes alive at the cut just before call i
    allowed           1          2          3        may a stage begin at call i?
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerCall:
    """One call of one layer within a step.

    Args:
        name: Dotted module name, as in ``named_modules()``.
        occurrence: Counts the calls of this module within the step, from 0.
        flops: Floating-point operations of the forward pass.
        bytes_moved: Bytes that the operations of the forward pass write.
        parameter_bytes: Bytes of the parameters first used in this call.
        parameters: Number of (scalar) parameters first used in this call.
        kept_bytes: Bytes made in this call and kept for its backward pass, or that of a later call.
        passing_bytes: Bytes of the largest of what it takes and returns.
        recomputed: Whether the user has it computed again in the backward pass (``torch.utils.checkpoint``).
        again_bytes: Bytes that are kept for one micro-batch at a time, while its backward pass runs, because they are
            computed again.
    """

    name: str
    occurrence: int
    flops: float
    bytes_moved: float
    parameter_bytes: int
    parameters: int
    kept_bytes: int = 0
    passing_bytes: int = 0
    recomputed: bool = False
    again_bytes: int = 0


@dataclass(frozen=True)
class Flow:
    """A tensor that is used in later layer calls than the one that made it.

    Args:
        born: Position of the layer call in or after which it is made.
        uses: The later positions that use it, ascending.
        nbytes: Its bytes.
    """

    born: int
    uses: tuple[int, ...]
    nbytes: float


@dataclass(frozen=True)
class Timeline:
    """All layer calls of a step in execution order, with the cuts between them.

    Args:
        calls: The layer calls.
        boundary_bytes: ``boundary_bytes[i]`` are the bytes alive at the cut just before call ``i``, for one sample
            or micro-batch; as long as ``calls``, entry 0 (nothing lies before it) is unused and 0.
        allowed: ``allowed[i]`` says whether a stage may begin at call ``i``; as long as ``calls``.
        flows: The tensors that make up ``boundary_bytes``, as far as known: of a long skip, the stages between do not
            hold a copy.

    Raises:
        ValueError: If the three lengths differ.
    """

    calls: tuple[LayerCall, ...]
    boundary_bytes: tuple[int, ...]
    allowed: tuple[bool, ...]
    flows: tuple[Flow, ...] = ()

    def __post_init__(self) -> None:
        lengths = {len(self.calls), len(self.boundary_bytes), len(self.allowed)}
        if len(lengths) != 1:
            raise ValueError(
                f"a timeline of {len(self.calls)} calls needs as many entries in boundary_bytes and allowed, "
                f"got {len(self.boundary_bytes)} and {len(self.allowed)}"
            )
