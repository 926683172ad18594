"""Pictures of timelines: every size can be drawn, numbers stand where they fit, and waits tell what they are for."""

import time
from xml.etree import ElementTree

import pytest
from timeline.test_spans import spans_of

from lightning_lwpm.errors import ConfigurationError
from lightning_lwpm.pipeline.schedule import place
from lightning_lwpm.timeline.draw import draw_timeline
from lightning_lwpm.timeline.spans import Panel
from lightning_lwpm.timeline.write import check_path


def panel_of(name, ranks, count, latency=0.0, title="Planned"):
    spans, _, _ = spans_of(name, ranks, count, latency)
    each = 2 if name in ("interleaved_1f1b", "zbv") else 1
    return Panel(title, tuple(spans), tuple(place(each * ranks, ranks, "v" if name == "zbv" else "loop")), ranks)


def texts(path):
    """All texts of an SVG."""
    root = ElementTree.parse(path).getroot()
    return ["".join(node.itertext()) for node in root.iter("{http://www.w3.org/2000/svg}text")]


def test_a_picture_tells_ranks_numbers_and_reasons(tmp_path):
    path = tmp_path / "new" / "timeline.svg"
    panels = [panel_of("1f1b", 3, 4, title="Planned: a"), panel_of("zbv", 3, 4, title="Measured: b")]
    draw_timeline(panels, path, "units")
    told = texts(path)
    for text in ("Planned: a", "Measured: b", "rank 2, stage 0", "rank 0, stages 0, 5", "units", "wait for gradient"):
        assert text in told
    assert told.count("3") >= 2 * 3 * 2  # the number of the last micro-batch, forward and backward, on each rank
    assert "stage 1" in told  # what a wait is for
    again = tmp_path / "again.svg"
    draw_timeline(panels, again, "units")
    assert again.read_bytes() == path.read_bytes()


def test_seconds_are_shown_in_a_handy_unit(tmp_path):
    spans = tuple(span.moved(0.0) for span in panel_of("1f1b", 2, 2).spans)
    small = tuple(type(s)(**{**vars(s), "begin": s.begin / 1e3, "end": s.end / 1e3}) for s in spans)
    draw_timeline([Panel("Measured", small, (1, 0), 2)], tmp_path / "t.svg")
    assert "ms" in texts(tmp_path / "t.svg")


def test_a_rank_without_a_stage_has_an_empty_row(tmp_path):
    panel = panel_of("1f1b", 2, 2)
    draw_timeline([Panel("few", panel.spans, panel.ranks, 3)], tmp_path / "t.svg")
    assert "rank 2, no stage" in texts(tmp_path / "t.svg")


@pytest.mark.parametrize(("ranks", "count"), [(1, 1), (16, 1), (1, 128), (16, 128)])
def test_every_size_is_drawn_in_seconds(tmp_path, ranks, count):
    panel = panel_of("1f1b", ranks, count)
    begun = time.perf_counter()
    draw_timeline([panel], tmp_path / "t.png", "units")
    assert (tmp_path / "t.png").stat().st_size > 1000
    assert time.perf_counter() - begun < 30


def test_nothing_measured_is_no_error(tmp_path):
    draw_timeline([Panel("nothing", (), (0,), 1)], tmp_path / "t.png")


def test_a_path_is_checked_before_anything_runs():
    with pytest.raises(ConfigurationError, match=r"timeline='t\.pdf': name a file that ends in \.svg or \.png"):
        check_path("t.pdf", "timeline=")
    check_path("trace.json", "timeline=")
