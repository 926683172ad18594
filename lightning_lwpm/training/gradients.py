"""Gradients between the schedule, which makes them early, and Lightning, which wants them in ``backward``.

Lightning calls ``training_step``, then ``zero_grad``, then ``backward``; the schedule runs inside ``training_step``.
Fresh gradients are therefore set aside by swapping pointers, and handed over in ``backward``.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from lightning_lwpm.errors import ConfigurationError
from lightning_lwpm.pipeline.hosted import hosted
from lightning_lwpm.pipeline.mailbox import Mailbox
from lightning_lwpm.staging.placeholder import is_placeholder, placeholder_like

__all__ = ["GRAD", "Stash", "clip_by_norm", "lent", "norm_over_stages"]

GRAD = ".grad"
"""After the name of a parameter: its gradient."""


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


@contextmanager
def lent(module: nn.Module, lacking: Collection[str] = ()) -> Iterator[dict[str, Tensor]]:
    """Let there be placeholders for the gradients of other ranks.

    Args:
        module: The partitioned model.
        lacking: Names of parameters that have no gradient where they are.

    Yields:
        The placeholders by name, with :data:`GRAD` after it.
    """
    named = dict(module.named_parameters())
    taken = {name: p for name, p in named.items() if p.requires_grad and is_placeholder(p) and name not in lacking}
    for parameter in taken.values():
        parameter.grad = placeholder_like(parameter.detach())
    try:
        yield {name + GRAD: p.grad for name, p in taken.items() if p.grad is not None}
    finally:
        for parameter in taken.values():
            parameter.grad = None


@torch.no_grad()
def clip_by_norm(mailbox: Mailbox, key: Any, parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Clip by the norm over all stages, in the very order of operations of ``torch.nn.utils.clip_grad_norm_``.

    Args:
        mailbox: Carries one number a parameter.
        key: Names this exchange.
        parameters: The optimizer's parameters, the same list on all ranks; placeholders for those held elsewhere.
        max_norm: The norm to clip to.

    Returns:
        The norm before clipping.
    """
    held = list(parameters)
    total = _total_norm(mailbox, key, {i: p.grad for i, p in _with_gradients(held)}, 2.0)
    torch.nn.utils.clip_grads_with_norm_([p for p in held if p.grad is not None], max_norm, total)
    return total


def norm_over_stages(
    mailbox: Mailbox, key: Callable[[], Any], parameters: Callable[[], Iterable[nn.Parameter]]
) -> Callable[..., Tensor]:
    """What stands in for ``torch.nn.utils.get_total_norm`` where the user's code clips by itself, on every rank.

    Args:
        mailbox: Carries one number a parameter.
        key: Names each exchange.
        parameters: Gives those of the model, in the same order on all ranks.
    """

    @torch.no_grad()
    def total_norm(tensors: Any, norm_type: float = 2.0, error_if_nonfinite: bool = False, *_: Any, **__: Any) -> Any:
        given = [tensors] if isinstance(tensors, Tensor) else list(tensors)
        numbers = {id(parameter.grad): i for i, parameter in _with_gradients(parameters())}
        if any(id(tensor) not in numbers for tensor in given):
            raise ConfigurationError(
                "a norm is asked for of tensors that are not the gradients of parameters of the model (in "
                "`torch.nn.utils.clip_grad_norm_`), so it cannot be taken over all stages. Give it the parameters."
            )
        total = _total_norm(mailbox, key(), {numbers[id(tensor)]: tensor for tensor in given}, float(norm_type))
        if error_if_nonfinite and not total.isfinite():
            raise RuntimeError(f"the norm of order {norm_type} of the gradients of all stages is {float(total)}")
        return total

    return total_norm


def _with_gradients(parameters: Iterable[nn.Parameter]) -> Iterator[tuple[int, nn.Parameter]]:
    """The parameters of which this rank has gradients, by number."""
    for i, parameter in enumerate(parameters):
        if parameter.grad is not None and not is_placeholder(parameter):
            yield i, parameter


def _total_norm(mailbox: Mailbox, key: Any, gradients: Mapping[int, Tensor | None], norm_type: float) -> Tensor:
    """The norm over all stages.

    Each rank gives the norm of each gradient it holds; all ranks then reduce them in the order of the parameters, so
    the total has the bits of one device, and a parameter that several stages hold counts once.
    """
    here = {i: get_total_norm([gradient], norm_type) for i, gradient in gradients.items() if gradient is not None}
    mine = dict(zip(here, hosted(list(here.values())), strict=True))
    norms: dict[int, Tensor] = {}
    for part in mailbox.gather(("norms", key), mine, "the gradient norms of all ranks"):
        norms.update(part)
    if not norms:
        return torch.tensor(0.0)
    device = next((gradient.device for gradient in gradients.values() if gradient is not None), torch.device("cpu"))
    return torch.linalg.vector_norm(torch.stack([norms[i] for i in sorted(norms)]).to(device), norm_type)
