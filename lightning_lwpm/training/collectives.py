"""``torch.distributed`` in the user's steps: the default process group is the data axis, which has one member.

::

    user's step                   outside, and in the library       in the user's step
    -------------------------     ------------------------------    ------------------
    dist.get_world_size()         ranks of the pipeline             1
    dist.all_gather(out, z)       waits for all ranks               out[0] is z

Only the rank with the last stage comes to the loss, so a collective over all ranks would wait for ever there. With one
member it gives the numbers of one device, as ``self.all_gather`` of a LightningModule does.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from lightning_lwpm.errors import ConfigurationError
from lightning_lwpm.pipeline.direct import OWN_GROUPS
from lightning_lwpm.training.metrics import never_synchronise
from lightning_lwpm.training.private import before_collectives

__all__ = ["data_axis", "separate"]

_members: "weakref.WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup]" = weakref.WeakKeyDictionary()


def separate() -> None:
    """The ranks of the process group that is there now are those of a pipeline, and no copies of a model."""
    world = dist.group.WORLD
    assert world is not None
    if world in _members:  # of a trainer before this one
        return
    alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    _members[world] = alone
    never_synchronise(world)
    never_synchronise(alone)


@contextmanager
def data_axis() -> Iterator[None]:
    """While code of the user runs that not all ranks come to, the default process group has one member.

    Raises:
        ConfigurationError: in the block, by a collective over a group of several ranks that the user has made.
    """
    world = dist.group.WORLD if dist.is_available() else None
    alone = _members.get(world) if world is not None else None
    if alone is None:  # one process, or within such a block already
        yield
        return
    dist.group.WORLD = alone  # type: ignore[misc]  # a property of the metaclass
    try:
        with before_collectives(_check):
            yield
    finally:
        dist.group.WORLD = world  # type: ignore[misc]


def _check(function: str, group: dist.ProcessGroup) -> None:
    if group.size() > 1 and group.group_desc != OWN_GROUPS:
        raise ConfigurationError(
            f"`torch.distributed.{function}` over a process group of {group.size()} ranks, in a step or in a hook that "
            "runs on rank 0 only: other ranks may never come there. Each rank has some of the layers, not some of the "
            "data. Leave `group` out (the default group has one member there), or use `self.all_gather(...)`."
        )
