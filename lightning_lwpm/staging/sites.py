"""Where in the user's code a function is called: the same in the step that is looked at first and in all others."""

import linecache
import os
import sys
from collections.abc import Callable, Iterator
from traceback import walk_tb
from types import CodeType, FrameType
from typing import Any, TypeVar

__all__ = ["Site", "quoted", "raised_at", "site", "step_runner"]

Site = tuple[tuple[str, int], ...]
"""File and line of a call, of the call of the function around it, and so on up to the step."""

_LIBRARIES = frozenset(
    ["torch", "lightning", "pytorch_lightning", "lightning_fabric", "lightning_lwpm", "contextlib", "functools"]
)
_RUNNERS: set[CodeType] = set()

_F = TypeVar("_F", bound=Callable[..., Any])


def step_runner(function: _F) -> _F:
    """Mark a function that runs the user's step: what called it is no part of a site."""
    _RUNNERS.add(function.__code__)
    return function


def site() -> Site:
    """The lines of the user's code that are being run, the innermost first."""
    return tuple((frame.f_code.co_filename, frame.f_lineno) for frame in _frames())


def quoted(place: Site) -> str:
    """A call as the user wrote it, for people: its line, and where that is."""
    if not place:
        return "a call"
    name, number = place[0]
    text = linecache.getline(name, number).strip()
    return f"`{text}` ({os.path.basename(name)}, line {number})"


def raised_at(error: BaseException) -> Site:
    """The innermost line of the user's code in which an error has come up."""
    places = [(frame.f_code.co_filename, number) for frame, number in walk_tb(error.__traceback__) if _is_users(frame)]
    return tuple(places[-1:])


def _is_users(frame: FrameType) -> bool:
    return frame.f_globals.get("__name__", "").partition(".")[0] not in _LIBRARIES


def _frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code not in _RUNNERS:
        if _is_users(frame):
            yield frame
        frame = frame.f_back
