"""Hands out the weights of rank 0 at the start of a run, and gathers the trained ones at its end."""

from collections.abc import Iterable, Sequence

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lwpm.pipeline.mailbox import Mailbox
from lightning_lwpm.pipeline.schedule import place as place_stages
from lightning_lwpm.staging.layout import Layout
from lightning_lwpm.staging.placement import named_tensors, place

__all__ = ["copies", "gather", "hand_out"]


def hand_out(mailbox: Mailbox, key: int, module: nn.Module, layout: Layout, optimizers: Sequence[Optimizer]) -> None:
    """Rank 0's weights are everybody's; each rank keeps its share, in the module and in the optimizers.

    Processes that were started apart have drawn different initial weights, unless the user seeded them.

    Args:
        mailbox: The control connections.
        key: Names this exchange; the same on all ranks.
        module: The whole model.
        layout: The partition.
        optimizers: Optimizers that hold the model's parameters.
    """
    ranks = place_stages(layout.num_stages)

    def stages(name: str) -> tuple[int, ...] | None:
        return layout.parameters.get(name) or layout.buffers.get(name)

    if mailbox.rank == 0:
        for name, tensor in named_tensors(module):
            where = stages(name)
            targets = range(mailbox.world) if where is None else [ranks[stage] for stage in where]
            for target in targets:
                if target != 0:
                    mailbox.post(target, "weight", (key, name), tensor.detach())

    def fetch(name: str, tensor: Tensor) -> Tensor:
        if mailbox.rank == 0:
            return tensor
        return mailbox.take("weight", (key, name), f"the weights '{name}' from rank 0")

    replaced = place(module, stages, ranks.index(mailbox.rank) if mailbox.rank in ranks else None, fetch)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["params"] = [replaced.get(id(parameter), parameter) for parameter in group["params"]]
        for old in [parameter for parameter in optimizer.state if id(parameter) in replaced]:
            optimizer.state[replaced[id(old)]] = optimizer.state.pop(old)


def copies(module: nn.Module, holders: Iterable[object]) -> list[nn.Module]:
    """The copies of the model that callbacks keep (averages of the weights), which are partitioned like the model.

    Args:
        module: The model.
        holders: The callbacks, in the same order on all ranks.
    """
    form = _form(module)
    found = []
    for holder in holders:
        for value in vars(holder).values():
            for candidate in (value, getattr(value, "module", None)):
                if isinstance(candidate, nn.Module) and candidate is not module and _form(candidate) == form:
                    found.append(candidate)
                    break
    return found


def _form(module: nn.Module) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, tuple(tensor.shape)) for name, tensor in named_tensors(module)]


def gather(mailbox: Mailbox, key: int, module: nn.Module, layout: Layout) -> None:
    """Give every process the whole trained model, so that the code after ``fit`` works as on one device.

    Args:
        mailbox: The control connections.
        key: Names this exchange; the same on all ranks.
        module: The model, partitioned.
        layout: The partition.
    """
    ranks = place_stages(layout.num_stages)
    owners = {name: ranks[where[-1]] for name, where in [*layout.parameters.items(), *layout.buffers.items()]}
    for name, tensor in named_tensors(module):
        if owners.get(name) == mailbox.rank:
            mailbox.post_all("weight", (key, name), tensor.detach())

    def fetch(name: str, tensor: Tensor) -> Tensor:
        if name not in owners or owners[name] == mailbox.rank:
            return tensor
        return mailbox.take("weight", (key, name), f"the weights '{name}' from rank {owners[name]}")

    place(module, lambda name: None, None, fetch)
