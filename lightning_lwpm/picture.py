"""Pictures in one style, as PNG or SVG files, whatever the user has set up in matplotlib."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_lwpm.errors import ConfigurationError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["picture"]


@contextmanager
def picture(path: str | os.PathLike[str], width: float, height: float) -> Iterator["Figure"]:
    """A figure to draw on, which is then saved; what the user has set up in pyplot is left alone.

    Args:
        path: Where to; its suffix, ``.png`` or ``.svg``, says in which format. Folders that are missing are made.
        width: Inches.
        height: Inches.

    Raises:
        ConfigurationError: If the suffix is another one, or matplotlib is not installed.
    """
    path = Path(path)
    if path.suffix.lower() not in (".png", ".svg"):
        raise ConfigurationError(f"a picture cannot be written to {str(path)!r}; name a file that ends in .png or .svg")
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigurationError(
            'drawing a picture needs matplotlib; install it with: pip install "lightning-lwpm[examples]"'
        ) from error
    style: dict[Any, Any] = {
        "font.size": 8,
        "axes.titlesize": 9,
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "grid.color": "#e6e6e6",
        "figure.titlesize": 10,
        "text.parse_math": False,
        "svg.fonttype": "none",  # text stays text
        "svg.hashsalt": "lightning_lwpm",  # the same plan gives the same file
    }
    with matplotlib.rc_context():  # puts the user's own style back at the end
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(style)
        figure = Figure((width, height), layout="constrained")
        yield figure
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix.lower() == ".svg" else None)
