"""What a forked child, such as a worker of a DataLoader, inherits from a rank: it closes sockets, and destroys nothing.

[Note: garbage in a forked child] The destructor of a process group joins the group's threads. A child has none of
them, and crashes in it (torch 2.13: ``pthread_join`` in ``~ProcessGroupGloo``). Most groups live as long as the
process; but one that a reference cycle keeps, such as that of a trainer that has ended, waits for the garbage
collector, and after a fork that may be the child's. So the child collects nothing that is older than itself.
"""

import gc
import os
import threading
from typing import Protocol
from weakref import WeakSet

__all__ = ["Inherited", "guard"]


class Inherited(Protocol):
    """Belongs to a rank, and comes into the hands of its forked children."""

    def let_go(self) -> None:
        """Called in a child: close what only the parent may use."""


def guard(owner: Inherited) -> None:
    """Let forked children leave alone what belongs to this process, as long as ``owner`` lives.

    Args:
        owner: Is told in each child.
    """
    _owners.add(owner)


class _Paused(threading.local):
    """Whether this thread, which is about to fork, has paused the garbage collector."""

    here = False


_owners: WeakSet[Inherited] = WeakSet()
_paused = _Paused()


def _before() -> None:
    # other hooks run in the child before ours, and might set off a collection
    if _owners and gc.isenabled():
        gc.disable()
        _paused.here = True


def _after() -> None:
    if _paused.here:
        gc.enable()
        _paused.here = False


def _in_child() -> None:
    if _owners:
        gc.freeze()  # see [Note: garbage in a forked child]
    for owner in list(_owners):
        owner.let_go()
    _after()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_parent=_after, after_in_child=_in_child)
