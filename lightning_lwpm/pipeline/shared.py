"""Weights that several stages use (tied embeddings, modules called again): each holds a copy, gradients are summed.

Stages of one rank hold the same tensor, and add up in its ``.grad`` by themselves; ranks sum what they have afterwards.

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
    """The parameters that this rank shares with others.

    Args:
        mailbox: Tells who has a gradient at all.
        transport: Carries the gradients; ``None`` where the mailbox does, as no order of messages is given: other
            stages are ahead by some micro-batches.
        root: The model.
        layout: Says which parameters several stages hold.
        ranks: The rank of each stage.

    Attributes:
        names: Of these parameters.
    """

    def __init__(
        self, mailbox: Mailbox, transport: Transport | None, root: nn.Module, layout: Layout, ranks: Sequence[int]
    ) -> None:
        self.mailbox, self.transport, self.rank = mailbox, transport, mailbox.rank
        named = dict(root.named_parameters())
        # each rank by the latest of its stages that uses the weight, which is where its gradient begins
        homes = {
            name: [ranks[stage] for stage in sorted(stages, reverse=True)] for name, stages in layout.shared.items()
        }
        holders = {name: list(dict.fromkeys(found)) for name, found in homes.items()}
        self.parameters = [(n, named[n], h) for n, h in holders.items() if self.rank in h and len(h) > 1]
        self.names = frozenset(name for name, _, _ in self.parameters)
        self.partners = sorted({other for _, _, found in self.parameters for other in found} - {self.rank})
        self._round = 0

    def sum(self) -> None:
        """Replace the gradient of each shared parameter by the sum over its ranks, latest stage first."""
        if not self.parameters:
            return
        self._round += 1
        mine = {name for name, parameter, _ in self.parameters if parameter.grad is not None}
        for other in self.partners:
            self.mailbox.post(other, "shared", (self._round, self.rank), mine)
        have = {self.rank: mine}
        for other in self.partners:
            what = f"the shared gradients of {self.mailbox.names[other]}"
            have[other] = self.mailbox.take("shared", (self._round, other), what)
        receives = {}
        for name, parameter, holders in self.parameters:
            for other in holders:
                if other == self.rank:
                    continue
                if name in have[other] and self.transport is not None:
                    on_host = parameter.device.type == "cpu"
                    receives[name, other] = self.transport.receive(other, parameter.numel(), parameter.dtype, on_host)
                if name in mine:
                    assert parameter.grad is not None
                    # as it is: from here on nothing writes into this gradient, the sum is another tensor
                    self._send(other, name, to_wire(parameter.grad.contiguous()))
        for name, parameter, holders in self.parameters:
            total: torch.Tensor | None = None
            parts = 0
            for other in holders:
                if name not in have[other]:
                    continue
                if other == self.rank:
                    part = parameter.grad
                else:
                    what = f"the gradient of shared '{name}' from {self.mailbox.names[other]}"
                    flat = (
                        receives.pop((name, other)).wait(what)
                        if self.transport is not None
                        else self.mailbox.take("shared-gradient", (self._round, name, other), what)
                    )
                    part = from_wire(flat, Meta.of(parameter.detach().contiguous()), parameter.device)
                if total is None:
                    total = part
                elif parts == 1:  # a gradient that is being sent is not written into
                    total = total + part  # type: ignore[operator]
                else:
                    total.add_(part)  # type: ignore[arg-type]
                parts += 1
            if total is not None:
                parameter.grad = total if total is not parameter.grad else total.clone()

    def _send(self, other: int, name: str, flat: torch.Tensor) -> None:
        if self.transport is not None:
            self.transport.send(other, flat)
        else:
            self.mailbox.post(other, "shared-gradient", (self._round, name, self.rank), flat)
