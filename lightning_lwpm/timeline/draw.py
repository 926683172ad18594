"""Draws timelines: a panel a schedule or a run, a row a rank, all on one axis of time.

::

    planned     stage 0 |0|1|2|...|      0      |      a box an action, numbered by its micro-batch
                stage 1     |0|   0   |1|...           later stages of a rank are lower boxes
    measured    stage 0 | 0|1 |2|..|      0     |      a wait: pale, underlined in the colour of what it waits for
                stage 1      |0|    0   |1|...
                        0         time ->
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightning_lwpm.picture import picture
from lightning_lwpm.timeline.spans import COMPUTE, KINDS, Panel, Span, longest_pieces

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_timeline"]

_COLOURS = {
    "F": "#b9d4ee",
    "B": "#e5a468",
    "I": "#e5a468",
    "W": "#5f9e74",
    "optimizer": "#6b5487",
    "data": "#c9b6d8",
    "wait": "#f3f3f3",
}
"""From light to dark: F, data, B, W, optimizer differ in grey, too."""

_REASONS = {
    "activation": "#4f86b8",
    "gradient": "#b5651d",
    "optimizer": "#6b5487",
    "data": "#9a7fb0",
    "other": "#8c8c8c",
}
_INK, _DARK = "#202020", ("W", "optimizer")

_WIDTH, _MARGIN, _ROW, _HEAD = (9.0, 18.0), 0.9, (0.42, 0.3), 0.42
"""Inches: least and greatest width; beside the rows; of one of few and of many rows; of a panel's title and axis."""

_FEW = 4
"""Up to so many ranks are few."""

_BOX, _LOWEST, _LINE = 0.84, 0.62, 0.12
"""Of a row the height of a whole box; of that the height of the last stage's boxes of a rank, and of a wait's line."""

_SIZE, _LETTER = 6.5, 0.62
"""Points of the numbers in boxes, and the width of a digit as a part of it."""


_MANY = 20_000
"""More boxes than so many go into a SVG file as an image: it would be tens of megabytes otherwise."""


def draw_timeline(panels: Sequence[Panel], path: str | os.PathLike[str], unit: str = "s") -> None:
    """Draw panels below each other.

    Args:
        panels: What to draw.
        path: Where to; its suffix, ``.png`` or ``.svg``, says in which format. Folders that are missing are made.
        unit: Of the spans' times: ``"s"``, which is shown in a handy unit, or any other word.

    Raises:
        ConfigurationError: If the suffix is another one, or matplotlib is not installed.
    """
    end = max((span.end for panel in panels for span in panel.spans), default=1.0) or 1.0
    width = min(max(_WIDTH[0], _MARGIN + _comfortable(panels, end)), _WIDTH[1])
    rows = [panel.num_ranks for panel in panels]
    height = sum(rows) * _ROW[max(rows) > _FEW] + len(panels) * _HEAD + 0.75
    with picture(path, width, height) as figure:
        figure.set_layout_engine("constrained", hspace=0.04, h_pad=0.03)
        axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=rows)[:, 0]
        scale, name = next(((s, n) for s, n in _UNITS if end >= s), _UNITS[-1]) if unit == "s" else (1.0, unit)
        for place, panel in zip(axes, panels, strict=True):
            _draw_panel(place, panel, scale, (width - _MARGIN) / end)
        axes[0].set_xlim(0, end / scale)
        axes[-1].set_xlabel(name)
        _legend(figure, panels)


_UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))


def _comfortable(panels: Sequence[Panel], end: float) -> float:
    """The inches in which the number of a typical action would fit."""
    seconds = sorted(span.seconds for panel in panels for span in panel.spans if span.kind in COMPUTE)
    digits = max((len(str(span.microbatch)) for panel in panels for span in panel.spans), default=1)
    typical = seconds[len(seconds) // 4] if seconds else end
    return (digits + 1.2) * _SIZE * _LETTER / 72 * end / typical if typical else _WIDTH[1]


@dataclass(frozen=True)
class _Sheet:
    """Where and how the boxes of a panel are drawn.

    Attributes:
        axes: Where to.
        rows: The row of each rank.
        levels: The height of the boxes of each stage, as a part of a row.
        scale: The unit of the axis, in that of the spans.
        inches: Of a unit of time of the spans.
        image: Whether boxes become an image in a SVG file.
    """

    axes: "Axes"
    rows: Mapping[int, int]
    levels: Mapping[int, float]
    scale: float
    inches: float
    image: bool

    def boxes(self, spans: Sequence[Span], row: int, level: float, colour: str, **look: Any) -> None:
        """Draw boxes of one row and height as one collection: pictures of many thousand boxes stay quick."""
        bars = [(span.begin / self.scale, span.seconds / self.scale) for span in spans]
        look = {"linewidth": 0.0, "zorder": 2, "rasterized": self.image, **look}
        self.axes.broken_barh(bars, _extent(row, level), facecolors=colour, **look)

    def write(self, span: Span, text: str, level: float, colour: str) -> None:
        """Write into a box, if there is room."""
        if span.seconds * self.inches > (len(text) + 0.5) * _SIZE * _LETTER / 72:
            low, height = _extent(self.rows[span.rank], level)
            place = (span.begin + span.end) / 2 / self.scale, low + height / 2
            self.axes.text(*place, text, ha="center", va="center_baseline", fontsize=_SIZE, color=colour)


def _draw_panel(axes: "Axes", panel: Panel, scale: float, inches: float) -> None:
    """One panel, on an axis of which a unit is ``scale`` units of its spans' time, and one of those so many inches."""
    rows = _rows(panel)
    sheet = _Sheet(axes, rows, _levels(panel.ranks), scale, inches, len(panel.spans) > _MANY)
    _draw_work(sheet, [span for span in panel.spans if span.kind != "wait"])
    _draw_waits(sheet, [span for span in panel.spans if span.kind == "wait"])
    axes.set_ylim(panel.num_ranks - 0.45, -0.55)
    axes.set_yticks(list(rows.values()), [_row_name(rank, panel.ranks) for rank in rows])
    axes.tick_params(axis="y", length=0, labelsize=7)
    axes.tick_params(axis="x", length=2, labelsize=7, labelbottom=True)
    axes.grid(False)
    axes.spines["left"].set_visible(False)
    axes.spines["bottom"].set_color("#b0b0b0")
    axes.set_title(panel.title)


def _draw_work(sheet: _Sheet, spans: Sequence[Span]) -> None:
    groups: dict[tuple[str, int, float], list[Span]] = {}
    for span in spans:
        level = sheet.levels[span.stage] if span.kind in COMPUTE else 1.0
        groups.setdefault((span.kind, sheet.rows[span.rank], level), []).append(span)
    for (kind, row, level), boxes in groups.items():
        typical = sorted(span.seconds for span in boxes)[len(boxes) // 2]
        line = {"edgecolor": "white", "linewidth": min(0.6, 5 * typical * sheet.inches)} if kind in COMPUTE else {}
        sheet.boxes(boxes, row, level, _COLOURS[kind], **line)
    for span in longest_pieces(spans).values():
        ink = "white" if span.kind in _DARK else _INK
        sheet.write(span, str(span.microbatch), sheet.levels[span.stage], ink)


def _draw_waits(sheet: _Sheet, spans: Sequence[Span]) -> None:
    """Waits, each with a line at its foot in the colour of what it waits for."""
    groups: dict[tuple[str, int], list[Span]] = {}
    for span in spans:
        groups.setdefault((span.name, sheet.rows[span.rank]), []).append(span)
        known = span.name in ("activation", "gradient") and span.stage >= 0
        sheet.write(span, f"stage {span.stage}" if known else span.name, 1.0, _REASONS[span.name])
    for (name, row), boxes in groups.items():
        sheet.boxes(boxes, row, 1.0, _COLOURS["wait"], zorder=1)
        sheet.boxes(boxes, row, _LINE, _REASONS[name])


def _extent(row: int, level: float) -> tuple[float, float]:
    """Top and height of a box: all boxes of a row stand on one line."""
    return row + _BOX / 2 - _BOX * level, _BOX * level


def _rows(panel: Panel) -> dict[int, int]:
    """The row of each rank: where the model begins is at the top, and ranks without a stage are at the bottom."""
    first = {rank: panel.ranks.index(rank) for rank in set(panel.ranks)}
    order = sorted(range(panel.num_ranks), key=lambda rank: first.get(rank, len(panel.ranks)))
    return {rank: row for row, rank in enumerate(order)}


def _levels(ranks: Sequence[int]) -> dict[int, float]:
    """For each stage, the height of its boxes: the first stage of a rank fills the row, later ones are lower."""
    levels = {}
    for rank in set(ranks):
        stages = [stage for stage, where in enumerate(ranks) if where == rank]
        for turn, stage in enumerate(stages):
            levels[stage] = 1.0 - (1.0 - _LOWEST) * turn / max(1, len(stages) - 1)
    return levels


def _row_name(rank: int, ranks: Sequence[int]) -> str:
    stages = [stage for stage, where in enumerate(ranks) if where == rank]
    if not stages:
        return f"rank {rank}, no stage"
    shown = ", ".join(map(str, stages)) if len(stages) <= 4 else f"{stages[0]}, {stages[1]} … {stages[-1]}"
    return f"rank {rank}, stage{'s' * (len(stages) > 1)} {shown}"


def _legend(figure: "Figure", panels: Sequence[Panel]) -> None:
    from matplotlib.patches import Patch

    spans = [span for panel in panels for span in panel.spans]
    kinds = {span.kind for span in spans}
    reasons = {span.name for span in spans if span.kind == "wait"}
    names: dict[str, list[str]] = {}
    for kind, name in KINDS.items():
        if kind in kinds:
            names.setdefault(_COLOURS[kind], []).append(name)
    handles = [Patch(facecolor=colour, label=" or ".join(same)) for colour, same in names.items()]
    handles += [Patch(facecolor=_REASONS[name], label=f"wait for {name}") for name in _REASONS if name in reasons]
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=6,
        frameon=False,
        fontsize=7,
        handlelength=1.2,
        columnspacing=1.4,
    )
