"""Weights that several stages use (tied embeddings, modules called again): each holds a copy, gradients are summed.

One device adds the uses of a weight within a micro-batch first and micro-batches after; here each stage adds its own
uses over all micro-batches first. The sum has the same terms in another order: equal but for rounding, and the very
same bits with one micro-batch in which each stage uses the weight once.
"""

from collections.abc import Sequence

import torch
from torch import nn

from lightning_lwpm.pipeline.mailbox import Mailbox
from lightning_lwpm.pipeline.transport import Transport
from lightning_lwpm.pipeline.wire import from_wire, to_wire
from lightning_lwpm.staging.layout import Layout
from lightning_lwpm.staging.remote import Meta

__all__ = ["SharedGradients"]


class SharedGradients:
    """The shared parameters of one stage.

    Args:
        mailbox: Tells who has a gradient at all.
        transport: Carries the gradients.
        root: The model.
        layout: Says which parameters several stages hold.
        stage: This rank's stage.
        ranks: The rank of each stage.
    """

    def __init__(
        self,
        mailbox: Mailbox,
        transport: Transport,
        root: nn.Module,
        layout: Layout,
        stage: int,
        ranks: Sequence[int],
    ) -> None:
        self.mailbox, self.transport, self.stage, self.ranks = mailbox, transport, stage, ranks
        named = dict(root.named_parameters())
        self.parameters = [(n, named[n], s) for n, s in layout.shared.items() if stage in s]
        self.partners = sorted({other for _, _, stages in self.parameters for other in stages} - {stage})
        self._round = 0

    def sum(self) -> None:
        """Replace the gradient of each shared parameter by the sum over its stages, latest stage first."""
        if not self.parameters:
            return
        self._round += 1
        mine = {name for name, parameter, _ in self.parameters if parameter.grad is not None}
        for other in self.partners:
            self.mailbox.post(self.ranks[other], "shared", (self._round, self.stage), mine)
        have = {self.stage: mine}
        for other in self.partners:
            what = f"the shared gradients of stage {other} (rank {self.ranks[other]})"
            have[other] = self.mailbox.take("shared", (self._round, other), what)
        receives = {}
        for name, parameter, stages in self.parameters:
            for other in stages:
                if other == self.stage:
                    continue
                direction = "up" if other > self.stage else "down"
                if name in have[other]:
                    receives[name, other] = self.transport.receive(
                        direction, self.ranks[other], parameter.numel(), parameter.dtype
                    )
                if name in mine:
                    assert parameter.grad is not None
                    direction = "up" if other < self.stage else "down"
                    self.transport.send(direction, self.ranks[other], to_wire(parameter.grad.contiguous()).clone())
        for name, parameter, stages in self.parameters:
            total: torch.Tensor | None = None
            for other in sorted(stages, reverse=True):
                if name not in have[other]:
                    continue
                if other == self.stage:
                    part = parameter.grad
                else:
                    flat = receives[name, other].wait(f"the gradient of shared '{name}' from stage {other}")
                    part = from_wire(flat, Meta.of(parameter.detach().contiguous()), parameter.device)
                total = part if total is None else total + part  # type: ignore[operator]
            if total is not None:
                parameter.grad = total if total is not parameter.grad else total.clone()
