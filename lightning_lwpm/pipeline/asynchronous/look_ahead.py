"""Look-ahead: the weights of all stages run ahead of themselves by the same number of steps."""

from collections.abc import Iterable

from torch import Tensor
from torch.optim import Optimizer

from lightning_lwpm.pipeline.asynchronous.delay import Delay
from lightning_lwpm.pipeline.asynchronous.error_feedback import ErrorFeedback

__all__ = ["LookAhead"]

SHARE = 4 / 9
"""Of the reach that would leave no momentum; with AdamW and b = 0.9, a reach of 4 was better than 6 and 8."""


class LookAhead(ErrorFeedback):
    """Error feedback with the same rho, ``reach``, at all stages, those that are not late among them.

    With a momentum u' = b u - c g the weights in use, v = w + rho u, take steps

        v' - v = u' + rho (u' - u) = nu u' - (1 - nu) c/(1-b) g,   nu = 1 - rho (1-b)/b

    so that a new gradient counts more, and its echo less: quasi-hyperbolic momentum (Ma and Yarats, arXiv 1810.06801).
    That takes back some of the lag of momentum, to which the lag of the pipeline adds, while the base weights w average
    over v. rho = b is Nesterov's momentum, rho = b/(1-b) leaves none. It pays without a delay, too, so that a run may
    end below the exact one. Any optimizer; without momentum it is ``ErrorFeedback``. Memory: one copy at every stage.

    Args:
        optimizer: The stage's optimizer.
        parameters: The weights of the stage that the optimizer trains.
        delay: How late gradients come at this stage. Nothing is done where there is one stage only.
        reach: Steps that weights run ahead; by default ``SHARE`` b/(1-b) of the largest b of a group.
    """

    name = "look_ahead"

    def __init__(
        self, optimizer: Optimizer, parameters: Iterable[Tensor], delay: Delay, reach: float | None = None
    ) -> None:
        super().__init__(optimizer, parameters, delay)
        if delay.num_stages > 1:
            momentum = _momentum(optimizer)
            self.rho = max(self.rho, SHARE * momentum / (1 - momentum)) if reach is None else reach


def _momentum(optimizer: Optimizer) -> float:
    """What is left of a gradient's share in updates after a step: 0.9 for AdamW's usual betas."""
    groups = optimizer.param_groups
    return max(float(group["betas"][0] if "betas" in group else group.get("momentum", 0.0)) for group in groups)
