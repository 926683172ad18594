"""A failure is raised so that the user's own ``except`` around a run catches it on every rank, as on one device.

::

    a step raises Diverged     that rank           a PipelineError that is a Diverged too, caused by the original
                               every other rank    the same, where the process knows that class

Only classes that say something of their own: to be a ``ValueError`` or an ``OSError`` too, a failure could be taken for
something else on its way.
"""

import functools
import sys
from typing import Any

from lightning_lwpm.errors import ConfigurationError, LWPMError, PipelineError

__all__ = ["Reference", "find", "raised_like", "reference"]

Reference = tuple[str, str]
"""Module and name of a class of exceptions."""

_PLAIN = {object, BaseException, Exception, RuntimeError}


def raised_like(kind: type[BaseException]) -> type[LWPMError]:
    """What to raise for an exception of a kind."""
    if issubclass(kind, ConfigurationError):
        return ConfigurationError
    own = any(base.__module__ != "builtins" for base in kind.__mro__)
    if not own or issubclass(kind, LWPMError) or not issubclass(kind, Exception):
        return PipelineError
    if not all(base in _PLAIN for base in kind.__mro__ if base.__module__ == "builtins"):
        return PipelineError
    content: dict[str, Any] = {
        "__module__": PipelineError.__module__,
        "__doc__": PipelineError.__doc__,
        "__init__": Exception.__init__,
        "__str__": Exception.__str__,
        "__repr__": Exception.__repr__,
        "__reduce__": lambda self: (PipelineError, self.args),
        "kind": kind,
    }
    try:
        made = type("PipelineError", (PipelineError, kind), content)
        sound = str(made("words")) == "words"
    except Exception:  # a class that is made in a way of its own
        return PipelineError
    return made if sound else PipelineError


def reference(raised: type[LWPMError]) -> Reference:
    """Names what one rank raises, for the others."""
    kind = getattr(raised, "kind", raised)
    return kind.__module__, kind.__qualname__


def find(place: Reference) -> type[LWPMError]:
    """What to raise here, from its :func:`reference`."""
    module, name = place
    found = functools.reduce(lambda owner, part: getattr(owner, part, None), name.split("."), sys.modules.get(module))
    return raised_like(found) if isinstance(found, type) and issubclass(found, Exception) else PipelineError
