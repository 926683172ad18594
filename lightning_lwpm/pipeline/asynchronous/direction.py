"""The next update of an optimizer, as far as its own state and the gradient so far foretell it."""

from typing import Any

from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from lightning_lwpm.errors import ConfigurationError

__all__ = ["check", "foretold"]


def check(optimizer: Optimizer, name: str) -> None:
    """See that ``foretold`` knows the optimizer.

    Raises:
        ConfigurationError: It is not SGD with momentum, Adam or AdamW.
    """
    plain = isinstance(optimizer, SGD) and not all(group["momentum"] for group in optimizer.param_groups)
    if plain or not isinstance(optimizer, SGD | Adam | AdamW):
        momentum = " without momentum" if plain else ""
        raise ConfigurationError(
            f"staleness_correction={name!r} predicts from the momentum of SGD, Adam or AdamW, and the optimizer is "
            f"{type(optimizer).__name__}{momentum}; choose 'error_feedback', which takes any optimizer."
        )


def foretold(
    state: dict[str, Any], group: dict[str, Any], rate: float | Tensor, gradient: Tensor | None = None, share: float = 0
) -> Tensor | None:
    """The optimizer's next update, but for weight decay; None before its first step.

    Of the next gradient g a part is known: the sum over a share of the micro-batches. For the rest the gradient is
    expected that leaves the momentum as it is: ``g = gradient + (1 - share) expected``. Then, at the given ``rate``,

        SGD    expected = v (1 - momentum) / (1 - dampening)
               v' = momentum v + (1 - dampening) g,   update = -rate v'
        Adam   expected = m_hat
               m' = b1 m + (1 - b1) g,   v' = b2 v + (1 - b2) g^2,   update = -rate m_hat' / (sqrt(v_hat') + eps)

    If nothing is known that is the last update once more. Sources: SpecTrain (arXiv 1809.02839), XPipe (arXiv
    1911.04610), PipeOptim (arXiv 2312.00839); the known part: "aggmsnag" of FTPipe (USENIX ATC 2021) for SGD.
    """
    if state.get("momentum_buffer") is not None:
        return _sgd(state["momentum_buffer"], group, rate, gradient, share)
    if "exp_avg" in state:
        return _adam(state, group, rate, gradient, share)
    return None


def _signed(gradient: Tensor, group: dict[str, Any]) -> Tensor:
    return -gradient if group["maximize"] else gradient


def _sgd(
    velocity: Tensor, group: dict[str, Any], rate: float | Tensor, gradient: Tensor | None, share: float
) -> Tensor:
    if gradient is not None:
        new, momentum = 1 - group["dampening"], group["momentum"]
        whole = _signed(gradient, group).add(velocity, alpha=(1 - share) * (1 - momentum) / new)
        velocity = (velocity * momentum).add_(whole, alpha=new)
        velocity = whole.add_(velocity, alpha=momentum) if group["nesterov"] else velocity
    return velocity * -rate


def _adam(
    state: dict[str, Any], group: dict[str, Any], rate: float | Tensor, gradient: Tensor | None, share: float
) -> Tensor:
    first, second = group["betas"]
    steps = float(state["step"])
    average, square = state["exp_avg"], state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
    if gradient is not None:
        whole = _signed(gradient, group).add(average, alpha=(1 - share) / (1 - first**steps))
        average = average.lerp(whole, 1 - first)
        square = (square * second).addcmul_(whole, whole, value=1 - second)
        steps += 1
    deviation = (square / (1 - second**steps)).sqrt_().add_(group["eps"])
    return (average * (-rate / (1 - first**steps))).div_(deviation)
