"""The torch functions that a staged step treats in a way of their own."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lightning_lwpm.staging.tree import tensors

__all__ = ["ASKING", "BACKWARD", "HOOKS", "RANDOM", "VALUES", "written"]


def _named(namespace: Any, names: str) -> set[Any]:
    """Those of the functions that this version of torch has."""
    return {getattr(namespace, name) for name in names.split() if hasattr(namespace, name)}


RANDOM = frozenset(
    _named(torch, "rand randn randint randperm rand_like randn_like randint_like bernoulli multinomial normal poisson")
    | _named(torch, "dropout alpha_dropout feature_dropout native_dropout rrelu")
    | _named(functional, "dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout rrelu")
    | _named(functional, "gumbel_softmax")
    | _named(Tensor, "normal_ uniform_ bernoulli_ random_ exponential_ log_normal_ cauchy_ geometric_")
    | _named(Tensor, "bernoulli multinomial")
)
"""Of which the result is another at each call: run by one stage, remote on all later ones."""

VALUES = frozenset(
    _named(Tensor, "__bool__ item __int__ __float__ __complex__ __index__ tolist numpy __contains__ equal allclose")
    | _named(Tensor, "is_nonzero __format__ __array__ __reversed__")
    | {torch.equal, torch.allclose, torch.is_nonzero}
)
"""That return Python values: a remote argument is fetched, so that every rank takes the same path."""

HOOKS = frozenset(_named(Tensor, "register_hook retain_grad register_post_accumulate_grad_hook"))
"""That ask to be told of gradients: the stage that made the tensor tells."""

BACKWARD = frozenset([torch.autograd.backward, Tensor.backward])
"""That need the whole graph in one place, and leave gradients in ``.grad``."""

ASKING = frozenset([Tensor.requires_grad_, Tensor.requires_grad.__set__])  # type: ignore[attr-defined]
"""That ask for the gradient of a tensor."""


def written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The tensors that an operator writes, by its schema, which does not tell of batch normalisation.

    Args:
        func: The operator, as a dispatch mode sees it.
        args: Its arguments.
        kwargs: Those by name.
    """
    if not func._schema.is_mutable:
        return []
    found = []
    for number, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found += tensors(args[number] if number < len(args) else kwargs.get(argument.name))
    return found
