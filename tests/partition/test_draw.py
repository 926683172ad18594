"""Pictures of plans tell what the plan says, leave the user's matplotlib alone, and never lose a label."""

import itertools
import math
import sys
from dataclasses import replace
from xml.etree import ElementTree

import matplotlib
import pytest
from matplotlib import pyplot

from lightning_lwpm.errors import ConfigurationError
from lightning_lwpm.partition.draw import draw_plan, draw_plans
from lightning_lwpm.partition.plan import PartitionPlan, Prediction, StagePlan


def plan_of(stages, ranks=None, memory=True, measured=5, prefix="model.h"):
    """A plan of stages that are alike, but for the last, which takes twice as long."""
    held = {"weights": 300.0 * 2**20, "activations": 100.0 * 2**20} if memory else {}
    made = []
    for s in range(stages):
        seconds = 0.02 if s == stages - 1 else 0.01
        calls = tuple((f"{prefix}.{s}.{leaf}", 0) for leaf in ("ln", "mlp"))
        onward = 4 << 20 if s < stages - 1 else 0
        rank = (stages - 1 - s) % (ranks or stages)
        made.append(StagePlan(s, rank, calls, 1000, 4000, 1 / stages, onward, seconds, 2 * seconds, held))
    told = Prediction(8, "1f1b", 0.24 + 0.1 / stages, (stages - 1) / (stages + 7), measured)
    return PartitionPlan(tuple(made), ranks or stages, told)


def texts(path):
    """All text of an SVG, in one string."""
    root = ElementTree.parse(path).getroot()
    return " | ".join("".join(node.itertext()) for node in root.iter("{http://www.w3.org/2000/svg}text"))


def test_a_picture_tells_what_the_plan_says(tmp_path):
    draw_plan(plan_of(3), tmp_path / "new" / "plan.svg")
    told = texts(tmp_path / "new" / "plan.svg")
    for text in (
        "3 stages on 3 devices, 8 micro-batches, 1f1b: expected 273 ms a batch, bubble 20%",
        "Time of one micro-batch: the slowest stage takes 1.50 times the mean",
        "forward",
        "backward",
        "mean",
        "60.0",
        "Memory at the worst moment",
        "weights",
        "activations",
        "400",
        "Sent onward between stages, for one micro-batch",
        "4.00",
        "MiB",
        "model.h.1",
        "rank 2",
        "(2 calls)",
    ):
        assert text in told, text
    assert "FLOPs" not in told and "limit" not in told


def test_png(tmp_path):
    draw_plan(plan_of(2), str(tmp_path / "plan.PNG"))
    assert (tmp_path / "plan.PNG").read_bytes().startswith(b"\x89PNG")


def test_the_same_plan_gives_the_same_file(tmp_path):
    for name in ("a.svg", "b.svg"):
        draw_plan(plan_of(2), tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


@pytest.mark.parametrize(
    ("limits", "ranks", "expected"),
    [
        ([2**29] * 4, 4, "limit of the device"),
        ([2**29, math.inf, 2**30, math.inf], 4, "limit of the device"),
        ([2**29] * 2, 2, "limit of the device for all its stages"),
        ([8 * 2**30] * 4, 4, "Memory at the worst moment; a device holds 8.0 GiB"),
        ([8 * 2**30, *[9 * 2**30] * 3], 4, "; a device holds 8.0 GiB to 9.0 GiB"),
    ],
)
def test_what_devices_hold(tmp_path, limits, ranks, expected):
    draw_plan(plan_of(4, ranks), tmp_path / "plan.svg", limits)
    assert any(text.endswith(expected) for text in texts(tmp_path / "plan.svg").split(" | "))


def test_no_limit_is_no_line(tmp_path):
    draw_plan(plan_of(2), tmp_path / "plan.svg", [math.inf] * 2)
    assert "limit" not in texts(tmp_path / "plan.svg") and "device holds" not in texts(tmp_path / "plan.svg")


def test_what_is_not_known_is_said(tmp_path):
    draw_plan(plan_of(2, memory=False, measured=0), tmp_path / "plan.svg")
    told = texts(tmp_path / "plan.svg")
    assert "estimated from FLOPs" in told and "Memory: parameters only, the rest is not known" in told
    draw_plan(replace(plan_of(2), prediction=None), tmp_path / "plan.svg")
    assert "2 stages on 2 devices" in texts(tmp_path / "plan.svg").split(" | ")


def test_one_stage_and_no_time_at_all(tmp_path):
    plan = plan_of(1, memory=False)
    idle = replace(plan.stages[0], forward_seconds=0.0, backward_seconds=0.0, parameter_bytes=0)
    draw_plan(replace(plan, stages=(idle,), num_ranks=2), tmp_path / "plan.svg")
    told = texts(tmp_path / "plan.svg")
    assert "1 stage on 2 devices" in told and "One stage sends nothing onward" in told and "times the mean" not in told


@pytest.mark.parametrize("stages", [2, 8, 24, 64])
@pytest.mark.parametrize("prefix", ["h", "model.encoder.a_rather_long_name.layers"])
def test_labels_neither_overlap_nor_leave_the_picture(tmp_path, monkeypatch, stages, prefix):
    figures = []
    plain = matplotlib.figure.Figure.savefig
    monkeypatch.setattr(
        matplotlib.figure.Figure, "savefig", lambda self, *a, **k: (figures.append(self), plain(self, *a, **k))
    )
    draw_plan(plan_of(stages, prefix=prefix), tmp_path / "plan.png")
    (figure,) = figures
    figure.set_dpi(150)  # measured as it was saved
    figure.draw_without_rendering()
    for axes in figure.axes:
        ticks = [label.get_window_extent() for label in axes.get_xticklabels()]
        level = [note for note in axes.texts if note.get_rotation() == 0 and note.get_text() != "stage"]
        notes = [note.get_window_extent() for note in level]
        for boxes in (ticks, notes):
            assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
        for note in axes.texts:
            box = note.get_window_extent()
            assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1, note.get_text()
    slanted = [note for note in figure.axes[-1].texts if note.get_rotation() == 45]
    if slanted:  # lines of text that are turned by 45 degrees stand apart by 0.7 of the distance of their bars
        places = [figure.axes[-1].transData.transform(note.xy)[0] for note in slanted]
        line = slanted[0].get_fontsize() * figure.dpi / 72
        assert min(b - a for a, b in itertools.pairwise(places)) * math.sqrt(0.5) > line
    for axes in figure.axes:
        assert axes.title.get_window_extent().x1 <= figure.bbox.x1


def test_several_numbers_of_devices(tmp_path):
    draw_plans({4: plan_of(4), 1: plan_of(1), 2: plan_of(2)}, tmp_path / "plans.svg")
    told = texts(tmp_path / "plans.svg")
    one = 0.24 + 0.1
    for text in (
        "Expected by number of devices (one device: 340 ms a batch)",
        "Time of a batch, without the optimizer",
        "Speed-up over one device (dashed: ideal)",
        "Bubble: idle part of the devices' time",
        f"{one / (0.24 + 0.1 / 4):.2f}",
        "290",
        "27.3",
    ):
        assert text in told, text


def test_without_a_plan_for_one_device_its_time_is_all_work(tmp_path):
    draw_plans({2: plan_of(2, measured=0), 4: plan_of(4)}, tmp_path / "plans.svg")
    told = texts(tmp_path / "plans.svg")
    assert "one device: 720 ms a batch), estimated from FLOPs" in told  # 8 x (30 + 60) ms
    assert f"{0.72 / 0.29:.2f}" in told


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (
            lambda folder: draw_plan(plan_of(2), folder / "plan.jpg"),
            r"plan.jpg'; name a file that ends in .png or .svg",
        ),
        (lambda folder: draw_plan(plan_of(2), folder / "plan"), r"ends in .png or .svg"),
        (lambda folder: draw_plans({2: plan_of(2)}, folder / "plan.pdf"), r"ends in .png or .svg"),
        (lambda folder: draw_plan(plan_of(2), folder / "plan.png", [1.0]), r"limits=\[1.0\]: the plan has 2 rank"),
        (lambda folder: draw_plans({}, folder / "plan.png"), r"plans={}"),
        (lambda folder: draw_plans({2: PartitionPlan(plan_of(2).stages, 2)}, folder / "p.png"), r"plan for 2 device"),
    ],
)
def test_bad_input_is_quoted(tmp_path, draw, message):
    with pytest.raises(ConfigurationError, match=message):
        draw(tmp_path)
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigurationError, match=r'pip install "lightning-lwpm\[examples\]"'):
        draw_plan(plan_of(2), tmp_path / "plan.png")


def test_the_users_matplotlib_is_left_alone(tmp_path):
    with matplotlib.rc_context({"font.size": 31.0, "text.color": "white", "axes.facecolor": "black"}):
        before = dict(matplotlib.rcParams)
        draw_plan(plan_of(2), tmp_path / "styled.svg")
        assert dict(matplotlib.rcParams) == before
    draw_plan(plan_of(2), tmp_path / "plain.svg")
    assert (tmp_path / "styled.svg").read_bytes() == (tmp_path / "plain.svg").read_bytes()


def test_pyplot_knows_of_no_figure_and_keeps_its_backend(tmp_path):
    backend, figures = pyplot.get_backend(), pyplot.get_fignums()
    draw_plan(plan_of(2), tmp_path / "plan.png")
    draw_plans({2: plan_of(2)}, tmp_path / "plans.png")
    assert (pyplot.get_backend(), pyplot.get_fignums()) == (backend, figures)
