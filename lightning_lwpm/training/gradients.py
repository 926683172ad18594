"""Gradients between the schedule, which makes them early, and Lightning, which wants them in ``backward``.

Lightning calls ``training_step``, then ``zero_grad``, then ``backward``; the schedule runs inside ``training_step``.
Fresh gradients are therefore set aside by swapping pointers, and handed over in ``backward``.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lwpm.pipeline.mailbox import Mailbox
from lightning_lwpm.staging.placeholder import is_placeholder

__all__ = ["Stash", "clip_by_norm"]


class Stash:
    """The fresh gradients of one batch.

    Args:
        parameters: The parameters held here.
        shared: Those that other stages hold too: their gradients are summed over stages after the schedule.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], shared: Iterable[nn.Parameter] = ()) -> None:
        self.parameters, self.shared = list(parameters), list(shared)
        self._before: list[tuple[nn.Parameter, Tensor | None]] = []
        self._fresh: list[tuple[nn.Parameter, Tensor | None]] = []

    def begin(self, zeroed: bool) -> None:
        """Before the schedule.

        Args:
            zeroed: Whether ``zero_grad`` follows. If not, the schedule accumulates into the gradients that are there,
                in the order of one device; only shared ones need to be fresh.
        """
        aside = self.parameters if zeroed else self.shared
        self._before = [(parameter, parameter.grad) for parameter in aside]
        for parameter in aside:
            parameter.grad = None

    def end(self) -> None:
        """After the schedule: put the fresh gradients aside."""
        self._fresh = [(parameter, parameter.grad) for parameter, _ in self._before]
        for parameter, grad in self._before:
            parameter.grad = grad
        self._before = []

    def hand_over(self) -> None:
        """In ``backward``: the fresh gradients join what is there."""
        for parameter, fresh in self._fresh:
            if fresh is None:
                continue
            parameter.grad = fresh if parameter.grad is None else parameter.grad.add_(fresh)
        self._fresh = []


@torch.no_grad()
def clip_by_norm(mailbox: Mailbox, key: Any, parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Clip by the norm over all stages, in the very order of operations of ``torch.nn.utils.clip_grad_norm_``.

    Each rank gives the norm of each gradient it holds; all ranks then reduce them in the order of the parameters, so
    the total has the bits of one device, and a parameter that several stages hold counts once.

    Args:
        mailbox: Carries one number a parameter.
        key: Names this exchange.
        parameters: The optimizer's parameters, the same list on all ranks; placeholders for those held elsewhere.
        max_norm: The norm to clip to.

    Returns:
        The norm before clipping.
    """
    held = list(parameters)
    mine = {
        index: torch.nn.utils.get_total_norm([parameter.grad]).cpu()
        for index, parameter in enumerate(held)
        if parameter.grad is not None and not is_placeholder(parameter)
    }
    norms: dict[int, Tensor] = {}
    for part in mailbox.gather(("norms", key), mine, "the gradient norms of all ranks"):
        norms.update(part)
    if not norms:
        return torch.tensor(0.0)
    total = torch.linalg.vector_norm(torch.stack([norms[index] for index in sorted(norms)]))
    torch.nn.utils.clip_grads_with_norm_([p for p in held if p.grad is not None], max_norm, total)
    return total
