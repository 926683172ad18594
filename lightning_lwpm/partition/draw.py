"""Pictures of plans: what each stage costs, holds and sends; and what more devices would bring.

::

    time     |  F+B   F+B   F+B       mean as a line
    memory   |  parts parts parts     what the device holds as a line
    sent     |     bytes bytes        between the stages
                0     1     2
"""

import math
import os
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from lightning_lwpm.errors import ConfigurationError
from lightning_lwpm.partition.plan import PartitionPlan
from lightning_lwpm.partition.units import counted, human_bytes, human_seconds
from lightning_lwpm.picture import picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.container import BarContainer

__all__ = ["draw_plan", "draw_plans"]

_FORWARD, _BACKWARD, _SENT = "#8fb8de", "#f2b880", "#9a9a9a"
_PARTS = ("#7f9fbf", "#e3b4a0", "#a9c5a0", "#cdb5d6", "#dfd3a0", "#b8b8b8")
_LINE, _LIMIT = "#404040", "#c0392b"
_SECONDS = ((1e-6, "µs"), (1e-3, "ms"), (1.0, "s"))
_BYTES = tuple((1024.0**power, unit) for power, unit in enumerate(("B", "KiB", "MiB", "GiB", "TiB")))

_FEW = 24
"""Up to so many bars have their value written above them."""

_WIDEST, _MARGIN, _LETTER = 16.0, 2.2, 0.066
"""Inches: of the widest picture, beside the bars (axis and legend), and of a letter of a layer's name."""

_NAME = 44
"""Slanted names of layers that are longer than so many characters lose their middle."""

_FAR = 3.0
"""A limit above so many times the highest bar is told in words: as a line it would press the bars flat."""


def draw_plan(plan: PartitionPlan, path: str | os.PathLike[str], limits: Sequence[float] | None = None) -> None:
    """Draw a plan's stages: their times, their memory, and what they send onward.

    Args:
        plan: The plan.
        path: Where to; its suffix, ``.png`` or ``.svg``, says in which format. Folders that are missing are made.
        limits: Bytes that each rank's device holds; infinite where there is no limit.

    Raises:
        ConfigurationError: If the suffix is another one, there are not as many limits as ranks, or matplotlib is not
            installed.
    """
    if limits is not None and len(limits) != plan.num_ranks:
        raise ConfigurationError(f"limits={limits!r}: the plan has {plan.num_ranks} rank(s); give one limit for each")
    stages = len(plan.stages)
    names = list(plan.layers())
    # Level and on several lines where the widest picture has room for it, else slanted.
    lines = [name.replace(" … ", " …\n").replace(", ", ",\n").replace(" (", "\n(") for name in names]
    longest = max(len(line) for name in lines for line in name.split("\n"))
    width = _MARGIN + stages * max(0.9, longest * _LETTER)
    level = width <= _WIDEST
    if not level:
        width = min(_MARGIN + 1.0 + 0.4 * stages, _WIDEST)
    with picture(path, max(width, 8.0), 8.0) as figure:
        figure.suptitle(_headline(plan), x=0.01, ha="left")
        time, memory, sent = figure.subplots(3, 1, sharex=True, height_ratios=(3, 3, 2))
        _draw_time(time, plan)
        _draw_memory(memory, plan, limits)
        _draw_sent(sent, plan)
        for axes in (time, memory, sent):
            axes.set_xticks(range(stages), [str(stage.index) for stage in plan.stages])
            axes.tick_params(axis="x", labelbottom=True, length=0)
            _note(axes, "stage", (0, 0), (-5, -4), xycoords="axes fraction", ha="right", fontsize=8)
        sent.set_xlim(-0.6, stages - 0.4)
        for stage, name, folded in zip(plan.stages, names, lines, strict=True):
            text = f"rank {stage.rank}\n{folded}" if level else f"{_shortened(name)}, rank {stage.rank}"
            turned: dict[str, Any] = {"ha": "center"} if level else {"ha": "right", "rotation": 45}
            _note(sent, text, (stage.index, 0), (0, -16), xycoords=sent.get_xaxis_transform(), **turned)


def draw_plans(plans: Mapping[int, PartitionPlan], path: str | os.PathLike[str]) -> None:
    """Draw what is expected of several numbers of devices: time of a batch, speed-up over one device, and bubble.

    The speed-up is :math:`T_1 / T_p`. Where there is no plan for one device, :math:`T_1 = m \\sum_s (F_s + B_s)` of the
    plan with the fewest: all its work on one device.

    Args:
        plans: Number of devices -> plan, with its prediction.
        path: Where to; its suffix, ``.png`` or ``.svg``, says in which format. Folders that are missing are made.

    Raises:
        ConfigurationError: If there is no plan or one without a prediction, the suffix is another one, or matplotlib
            is not installed.
    """
    if not plans:
        raise ConfigurationError("plans={}: there is nothing to draw; make a plan for at least one number of devices")
    told = {}
    for devices in sorted(plans):
        prediction = plans[devices].prediction
        if prediction is None:
            raise ConfigurationError(
                f"the plan for {devices} device(s) has no prediction; choose schedule and micro-batches for it first"
            )
        told[devices] = prediction
    fewest = min(told)
    work = sum(stage.forward_seconds + stage.backward_seconds for stage in plans[fewest].stages)
    one = told[1].step_seconds if 1 in told else told[fewest].num_microbatches * work
    seconds = [prediction.step_seconds for prediction in told.values()]
    speedups = [one / step if step else 0.0 for step in seconds]
    bubbles = [100 * prediction.bubble for prediction in told.values()]
    with picture(path, max(10.5, 2.7 * len(told)), 3.4) as figure:
        measured = all(prediction.measured for prediction in told.values())
        source = "" if measured else ", estimated from FLOPs"
        figure.suptitle(
            f"Expected by number of devices (one device: {human_seconds(one)} a batch){source}", x=0.01, ha="left"
        )
        time, speed, idle = figure.subplots(1, 3)
        scale, unit = _scale(max(seconds), _SECONDS)
        _draw_numbers(time, told, [step / scale for step in seconds], _FORWARD)
        _finish(time, "Time of a batch, without the optimizer", unit, max(seconds) / scale)
        _draw_numbers(speed, told, speedups, _BACKWARD)
        for place, devices in enumerate(told):
            speed.plot([place - 0.42, place + 0.42], [devices] * 2, color=_LINE, linewidth=1, linestyle="--")
        _finish(speed, "Speed-up over one device (dashed: ideal)", "", max(*told, *speedups))
        _draw_numbers(idle, told, bubbles, _SENT)
        _finish(idle, "Bubble: idle part of the devices' time", "%", max(bubbles))


def _draw_numbers(axes: "Axes", devices: Collection[int], values: Sequence[float], colour: str) -> None:
    """One bar for each number of devices."""
    axes.bar(range(len(devices)), values, 0.7, color=colour)
    _write_values(axes, values)
    axes.set_xticks(range(len(devices)), [str(number) for number in devices])
    axes.tick_params(axis="x", length=0)
    axes.set_xlabel("devices")


def _draw_time(axes: "Axes", plan: PartitionPlan) -> None:
    forward = [stage.forward_seconds for stage in plan.stages]
    backward = [stage.backward_seconds for stage in plan.stages]
    totals = [f + b for f, b in zip(forward, backward, strict=True)]
    mean = sum(totals) / len(totals)
    scale, unit = _scale(max(totals), _SECONDS)
    _stack(axes, {"forward": forward, "backward": backward}, scale, (_FORWARD, _BACKWARD))
    axes.axhline(mean / scale, color=_LINE, linewidth=1, linestyle="--", label="mean")
    balance = f": the slowest stage takes {max(totals) / mean:.2f} times the mean" if mean and len(totals) > 1 else ""
    _finish(axes, f"Time of one micro-batch{balance}", unit, max(totals) / scale)
    _legend(axes)


def _draw_memory(axes: "Axes", plan: PartitionPlan, limits: Sequence[float] | None) -> None:
    known = any(stage.memory for stage in plan.stages)
    held = [stage.memory if known else {"parameters": stage.parameter_bytes} for stage in plan.stages]
    parts = {part: [one.get(part, 0.0) for one in held] for part in dict.fromkeys(part for one in held for part in one)}
    totals = [sum(one.values()) for one in held]
    title = "Memory at the worst moment" if known else "Memory: parameters only, the rest is not known"
    room = [limits[stage.rank] if limits is not None else math.inf for stage in plan.stages]
    finite = [limit for limit in room if math.isfinite(limit)]
    shown = [limit for limit in finite if limit <= _FAR * max(totals)]
    top = max([*totals, *shown])
    scale, unit = _scale(top, _BYTES)
    _stack(axes, parts, scale, _PARTS)
    shared = " for all its stages" if len({stage.rank for stage in plan.stages}) < len(plan.stages) else ""
    if shown:
        for place, limit in enumerate(room):
            if limit in shown:
                axes.plot([place - 0.5, place + 0.5], [limit / scale] * 2, color=_LIMIT, linewidth=1.4)
        axes.plot([], [], color=_LIMIT, linewidth=1.4, label=f"limit of the device{shared}")
    elif finite:
        least, most = human_bytes(min(finite)), human_bytes(max(finite))
        title += f"; a device holds {least if least == most else f'{least} to {most}'}{shared}"
    _finish(axes, title, unit, top / scale)
    _legend(axes)


def _draw_sent(axes: "Axes", plan: PartitionPlan) -> None:
    # What crosses a boundary belongs to neither of its stages, so the bars stand between them.
    sent = [stage.bytes_onward for stage in plan.stages[:-1]]
    top = max(sent, default=0)
    scale, unit = _scale(top, _BYTES)
    heights = [nbytes / scale for nbytes in sent]
    axes.bar([place + 0.5 for place in range(len(sent))], heights, 0.36, color=_SENT)
    _write_values(axes, heights)
    title = "Sent onward between stages, for one micro-batch" if sent else "One stage sends nothing onward"
    _finish(axes, title, unit, top / scale)


def _stack(axes: "Axes", parts: Mapping[str, Sequence[float]], scale: float, colours: Sequence[str]) -> None:
    """Draw one bar for each stage, its parts one upon the other, with what they add up to above it."""
    base = [0.0] * max(map(len, parts.values()))
    for index, (part, values) in enumerate(parts.items()):
        heights = [value / scale for value in values]
        axes.bar(range(len(base)), heights, 0.72, bottom=base, color=colours[index % len(colours)], label=part)
        base = [b + h for b, h in zip(base, heights, strict=True)]
    _write_values(axes, base)


def _finish(axes: "Axes", title: str, unit: str, top: float) -> None:
    """Title and unit, and room for a number above the highest bar."""
    axes.set_title(title)
    axes.set_ylabel(unit)
    axes.set_ylim(0, 1.15 * top or 1.0)


def _legend(axes: "Axes") -> None:
    # Beside the bars, where it can cover none of them; in the order in which the parts lie upon each other.
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, reverse=True)


def _write_values(axes: "Axes", values: Sequence[float]) -> None:
    """Write the values above the bars that were drawn last, in the unit of the axis, on white where a line crosses."""
    if 0 < len(values) <= _FEW:
        white = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
        bars = cast("BarContainer", axes.containers[-1])
        axes.bar_label(bars, [_figure(value) for value in values], padding=2.5, fontsize=7, bbox=white)


def _note(axes: "Axes", text: str, place: tuple[float, float], offset: tuple[float, float], **more: Any) -> None:
    """Write below a place; the layout of the figure leaves room for it."""
    look = {"textcoords": "offset points", "va": "top", "rotation_mode": "anchor", "fontsize": 7, **more}
    axes.annotate(text, place, offset, **look)


def _figure(value: float) -> str:
    """Three digits, or all before the point; never as 1.02e+03."""
    decimals = sum(value < limit for limit in (99.95, 9.995, 0.9995)) if value else 0
    return f"{value:.{decimals}f}"


def _shortened(name: str) -> str:
    half = (_NAME - 1) // 2
    return name if len(name) <= _NAME else f"{name[:half]}…{name[-half:]}"


def _headline(plan: PartitionPlan) -> str:
    told = plan.prediction
    text = f"{counted(len(plan.stages), 'stage', 'stages')} on {counted(plan.num_ranks, 'device', 'devices')}"
    if told is None:
        return text
    source = "" if told.measured else ", estimated from FLOPs"
    schedule = f", {told.schedule}" if told.schedule else ""
    return (
        f"{text}, {counted(told.num_microbatches, 'micro-batch', 'micro-batches')}{schedule}: "
        f"expected {human_seconds(told.step_seconds)} a batch, bubble {told.bubble:.0%}{source}"
    )


def _scale(top: float, units: Sequence[tuple[float, str]]) -> tuple[float, str]:
    """The largest unit of which the highest bar has at least one."""
    return next(((scale, unit) for scale, unit in reversed(units) if scale <= top), units[0])
