"""The torch functions that a staged step treats in a way of their own."""

import torch

__all__ = ["BACKWARD", "HOOKS", "RANDOM", "VALUES"]

# torch functions of which the result is another at each call: run by one stage, remote on all later ones
RANDOM = frozenset(
    getattr(namespace, name)
    for namespace, names in (
        (torch, "rand randn randint randperm rand_like randn_like randint_like bernoulli multinomial normal poisson"),
        (torch, "dropout alpha_dropout feature_dropout native_dropout rrelu"),
        (torch.nn.functional, "dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout rrelu gumbel_softmax"),
        (torch.Tensor, "normal_ uniform_ bernoulli_ random_ exponential_ log_normal_ cauchy_ geometric_ bernoulli multinomial"),
    )
    for name in names.split()
    if hasattr(namespace, name)
)  # fmt: skip

# torch functions that return Python values: a remote argument is fetched, so that every rank takes the same path
VALUES = frozenset(
    [
        *(
            getattr(torch.Tensor, name)
            for name in [
                "__bool__",
                "item",
                "__int__",
                "__float__",
                "__complex__",
                "__index__",
                "tolist",
                "numpy",
                "__contains__",
                "equal",
                "allclose",
                "is_nonzero",
                "__format__",
                "__array__",
                "__reversed__",
                "cpu_",
                "all_",
            ]
            if hasattr(torch.Tensor, name)
        ),
        torch.equal,
        torch.allclose,
        torch.is_nonzero,
    ]
)

HOOKS = frozenset(
    [torch.Tensor.register_hook, torch.Tensor.retain_grad, torch.Tensor.register_post_accumulate_grad_hook]
)
BACKWARD = frozenset([torch.autograd.grad, torch.autograd.backward, torch.Tensor.backward])
