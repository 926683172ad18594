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

_BOX, _LOWEST = 0.84, 0.62
"""Of a row: the height of the first stage's boxes, and the part of it that the last stage's of a rank have."""

_SIZE, _LETTER = 6.5, 0.62
"""Points of the numbers in boxes, and the width of a digit as a part of it."""


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


def _draw_panel(axes: "Axes", panel: Panel, scale: float, inches: float) -> None:
    """One panel.

    Args:
        axes: Where to.
        panel: What to draw.
        scale: The spans' unit of time, in that of the axis: divides their times.
        inches: Of a unit of time of the spans.
    """
    levels, rows = _levels(panel.ranks), _rows(panel)
    for kind in KINDS:
        spans = [span for span in panel.spans if span.kind == kind]
        # one collection for all boxes of a height in a row: pictures of many thousand boxes stay quick
        groups: dict[tuple[int, float], list[Span]] = {}
        for span in spans:
            groups.setdefault((rows[span.rank], levels.get(span.stage, 1.0) if kind in COMPUTE else 1.0), []).append(
                span
            )
        for (row, level), boxes in groups.items():
            bars = [(span.begin / scale, span.seconds / scale) for span in boxes]
            edges: dict[str, Any] = {"edgecolor": "white", "linewidth": min(0.6, 5 * _median(boxes) * inches)}
            look: dict[str, Any] = {"facecolors": _COLOURS[kind], **(edges if kind in COMPUTE else {"linewidth": 0.0})}
            axes.broken_barh(bars, _extent(row, level), zorder=1 if kind == "wait" else 2, **look)
        if kind == "wait":
            _underline(axes, spans, rows, scale)
    for span in longest_pieces(panel.spans).values():
        ink = "white" if span.kind in _DARK else _INK
        _write(axes, span, str(span.microbatch), rows[span.rank], levels.get(span.stage, 1.0), scale, inches, ink)
    for span in panel.spans:
        if span.kind == "wait":
            text = f"stage {span.stage}" if span.name in ("activation", "gradient") else span.name
            _write(axes, span, text, rows[span.rank], 1.0, scale, inches, _REASONS[span.name])
    axes.set_ylim(panel.num_ranks - 0.45, -0.55)
    axes.set_yticks(list(rows.values()), [_row_name(rank, panel.ranks) for rank in rows])
    axes.tick_params(axis="y", length=0, labelsize=7)
    axes.tick_params(axis="x", length=2, labelsize=7, labelbottom=True)
    axes.grid(False)
    axes.spines["left"].set_visible(False)
    axes.spines["bottom"].set_color("#b0b0b0")
    axes.set_title(panel.title)


def _write(
    axes: "Axes", span: Span, text: str, row: int, level: float, scale: float, inches: float, colour: str
) -> None:
    """Write into a box, if there is room."""
    if span.seconds * inches > (len(text) + 0.5) * _SIZE * _LETTER / 72:
        low, high = _extent(row, level)
        middle = (span.begin + span.end) / 2 / scale
        axes.text(middle, low + high / 2, text, ha="center", va="center_baseline", fontsize=_SIZE, color=colour)


def _underline(axes: "Axes", waits: Sequence[Span], rows: Mapping[int, int], scale: float) -> None:
    """A line at the foot of each wait, in the colour of what it waits for."""
    for name, colour in _REASONS.items():
        for rank in {span.rank for span in waits if span.name == name}:
            bars = [(s.begin / scale, s.seconds / scale) for s in waits if (s.name, s.rank) == (name, rank)]
            axes.broken_barh(bars, _extent(rows[rank], 0.12), facecolors=colour, linewidth=0.0, zorder=2)


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


def _median(spans: Sequence[Span]) -> float:
    return sorted(span.seconds for span in spans)[len(spans) // 2]


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
