"""Writes timelines as what their file is named: a picture (.svg, .png), or a trace (.json)."""

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

from lightning_lwpm.errors import ConfigurationError
from lightning_lwpm.timeline.draw import draw_timeline
from lightning_lwpm.timeline.spans import Panel
from lightning_lwpm.timeline.trace import save_trace

__all__ = ["check_path", "write_timeline"]

_SECONDS = {"s": 1.0}
"""Seconds of a unit of time; units without a length are shown as milliseconds in traces."""


def check_path(path: str | os.PathLike[str], option: str) -> None:
    """See whether a timeline can be written to a path, before anything is run.

    Args:
        path: Where to.
        option: What the user wrote, up to the path: ``"timeline="``.

    Raises:
        ConfigurationError: If the suffix is unknown, or matplotlib, which it needs, is not installed.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in (".svg", ".png", ".json"):
        raise ConfigurationError(
            f"{option}{os.fspath(path)!r}: name a file that ends in .svg or .png (a picture), or in .json (a trace for "
            "Perfetto)"
        )
    if suffix != ".json" and importlib.util.find_spec("matplotlib") is None:
        raise ConfigurationError(
            f"{option}{os.fspath(path)!r}: pictures need matplotlib; install it with: "
            'pip install "lightning-lwpm[examples]", or name a file that ends in .json (a trace for Perfetto)'
        )


def write_timeline(panels: Sequence[Panel], path: str | os.PathLike[str], unit: str = "s") -> None:
    """Write a timeline.

    Args:
        panels: What to write.
        path: Where to; its suffix says in which format. Folders that are missing are made.
        unit: Of the spans' times: ``"s"``, or any other word.

    Raises:
        ConfigurationError: If the suffix is none of ``.svg``, ``.png`` and ``.json``, or matplotlib is not installed.
    """
    check_path(path, "")
    if Path(path).suffix.lower() == ".json":
        save_trace(panels, path, _SECONDS.get(unit, 1e-3))
    else:
        draw_timeline(panels, path, unit)
