"""Moves weights: from rank 0 to their stages at the start of a run, between stages, and together at its end."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import Metric

from lightning_lwpm.pipeline.mailbox import Mailbox
from lightning_lwpm.staging.layout import Layout
from lightning_lwpm.staging.placeholder import LEFT, is_placeholder
from lightning_lwpm.staging.placement import named_tensors, place
from lightning_lwpm.state.merge import merge_checkpoint
from lightning_lwpm.state.tree import replaced
from lightning_lwpm.training.stored import tell_stored

__all__ = ["Holders", "copies", "gather", "holders", "merged_copy", "move", "to_host"]

Holders = Callable[[str], Collection[int]]
"""From the name of a parameter or buffer to the ranks that hold its values."""


def to_host(module: nn.Module) -> None:
    """Bring what is elsewhere to the host, where the model is looked at whole; tensors stay the same objects."""
    for _, tensor in named_tensors(module):
        if tensor.device.type not in ("cpu", "meta"):
            tensor.data = tensor.data.cpu()
    for part in module.modules():
        if isinstance(part, Metric):
            part.to("cpu")


def holders(layout: Layout | None, world: int) -> Holders:
    """Who holds what under a layout; before there is one, rank 0's weights are everybody's.

    Processes that were started apart have drawn different initial weights, unless the user seeded them.
    """
    if layout is None:
        return lambda name: (0,)
    ranks = layout.ranks

    def of(name: str) -> Collection[int]:
        stages = layout.parameters.get(name) or layout.buffers.get(name)
        return range(world) if stages is None else {ranks[stage] for stage in stages}

    return of


def move(
    mailbox: Mailbox, key: int, module: nn.Module, before: Holders, after: Holders, optimizers: Sequence[Optimizer]
) -> None:
    """Bring weights to the ranks that are to hold them, and let go of the rest, in the module and in the optimizers.

    The first of those that hold a tensor now sends it, one tensor at a time, with what the optimizers keep of it.

    Args:
        mailbox: The control connections.
        key: Names this exchange; the same on all ranks.
        module: The model.
        before: Who holds what now.
        after: Who is to hold what.
        optimizers: Optimizers that hold the model's parameters.
    """
    _leave(module, "")
    rank = mailbox.rank
    states: dict[str, Any] = {}
    for name, tensor in named_tensors(module):
        owners, wanted = before(name), after(name)
        state = _state(optimizers, tensor)
        if rank == min(owners):
            for target in wanted:
                if target not in owners:
                    mailbox.post(target, "weight", (key, name), (tensor.detach(), state))
        elif rank in wanted and rank not in owners:
            states[name] = None

    def fetch(name: str, tensor: Tensor) -> Tensor:
        if name not in states:
            return tensor
        what = f"the weights '{name}' from rank {min(before(name))}"
        values, states[name] = mailbox.take("weight", (key, name), what)
        return values

    _tell(optimizers, place(module, lambda name: None if rank in after(name) else (), rank, fetch))
    named = dict(named_tensors(module))
    for name, state in states.items():
        if state is not None:
            number, entries = state
            device = named[name].device
            optimizers[number].state[named[name]] = move_data_to_device(entries, device)


def _tell(optimizers: Sequence[Optimizer], placed: Mapping[int, Tensor]) -> None:
    """Let optimizers hold the parameters that are in the places of others now."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["params"] = [placed.get(id(parameter), parameter) for parameter in group["params"]]
        for old in [parameter for parameter in optimizer.state if id(parameter) in placed]:
            new, state = placed[id(old)], optimizer.state.pop(old)
            if not is_placeholder(new):
                optimizer.state[new] = state


def _state(optimizers: Sequence[Optimizer], tensor: Tensor) -> tuple[int, dict[str, Any]] | None:
    """Which optimizer keeps something of a tensor, and what."""
    for number, optimizer in enumerate(optimizers):
        if tensor in optimizer.state:
            return number, optimizer.state[tensor]
    return None


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


def gather(
    mailbox: Mailbox,
    key: int,
    module: nn.Module,
    layout: Layout,
    everywhere: bool,
    optimizers: Sequence[Optimizer],
) -> None:
    """Give processes the whole trained model, so that the code after ``fit`` works as on one device.

    Args:
        mailbox: The control connections.
        key: Names this exchange; the same on all ranks.
        module: The model, partitioned.
        layout: The partition.
        everywhere: Whether all of them are to have it; otherwise rank 0 has, and the others keep their share.
        optimizers: Optimizers that hold the model's parameters; each keeps the states of its rank's share.
    """
    tell_stored(mailbox, key, module, layout)
    ranks = layout.ranks
    owners = {name: ranks[where[-1]] for name, where in [*layout.parameters.items(), *layout.buffers.items()]}
    for name, tensor in named_tensors(module):
        if owners.get(name) == mailbox.rank:
            if everywhere:
                mailbox.post_all("weight", (key, name), tensor.detach())
            elif mailbox.rank:
                mailbox.post(0, "weight", (key, name), tensor.detach())
    if not everywhere and mailbox.rank:
        _leave(module, LEFT)
        return

    def fetch(name: str, tensor: Tensor) -> Tensor:
        if name not in owners or owners[name] == mailbox.rank:
            return tensor
        return mailbox.take("weight", (key, name), f"the weights '{name}' from rank {owners[name]}")

    _tell(optimizers, place(module, lambda name: None, None, fetch))


def merged_copy(mailbox: Mailbox, key: int, module: nn.Module) -> nn.Module | None:
    """A copy of the model with all weights, in host memory, on rank 0; ``None`` elsewhere.

    Args:
        mailbox: The control connections.
        key: Names this exchange; the same on all ranks.
        module: The model, partitioned or not.
    """
    merged = merge_checkpoint(mailbox, key, {"weights": dict(named_tensors(module))})["weights"]
    if mailbox.rank:
        return None
    copied: nn.Module = replaced(module, lambda path, _: merged[path[0]].detach().to("cpu", copy=True))
    return copied.cpu()  # now metrics are, and it says so itself


def _leave(module: nn.Module, left: str) -> None:
    """Let placeholders know whether a run has left them behind; then they cannot be saved, nor used by mistake."""
    for _, tensor in named_tensors(module):
        if is_placeholder(tensor):
            tensor.left = left  # type: ignore[attr-defined]
