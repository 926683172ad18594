"""The next update that an optimizer's own state foretells."""

from typing import Any

from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from lightning_lwpm.errors import ConfigurationError

__all__ = ["check", "foretold"]


def check(optimizer: Optimizer) -> None:
    """See that ``foretold`` knows the optimizer.

    Raises:
        ConfigurationError: It is not SGD with momentum, Adam or AdamW.
    """
    plain = isinstance(optimizer, SGD) and not all(group["momentum"] for group in optimizer.param_groups)
    if plain or not isinstance(optimizer, SGD | Adam | AdamW):
        momentum = " without momentum" if plain else ""
        raise ConfigurationError(
            f"staleness_correction='momentum' predicts from the momentum of SGD, Adam or AdamW, and the optimizer is "
            f"{type(optimizer).__name__}{momentum}; choose 'error_feedback', which takes any optimizer."
        )


def foretold(state: dict[str, Any], group: dict[str, Any], rate: float | Tensor) -> Tensor | None:
    """The optimizer's next update if the next gradient is what momentum expects; None before its first step.

    The expected gradient leaves the momentum as it is, so that the update is, with learning rate ``rate``,

        SGD    -rate v
        Adam   -rate m_hat / (sqrt(v_hat) + eps)

    which is the last update, but for weight decay and, with Nesterov's momentum, for the newest gradient.
    Sources: SpecTrain (arXiv 1809.02839), XPipe (arXiv 1911.04610), PipeOptim (arXiv 2312.00839).
    """
    if state.get("momentum_buffer") is not None:
        return state["momentum_buffer"] * -rate
    if "exp_avg" in state:
        first, second = group["betas"]
        steps = float(state["step"])
        square = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
        deviation = (square / (1 - second**steps)).sqrt_().add_(group["eps"])
        return (state["exp_avg"] * (-rate / (1 - first**steps))).div_(deviation)
    return None
