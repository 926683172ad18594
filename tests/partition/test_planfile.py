"""What is written can be read, edited and read back; what cannot be used is quoted."""

import os
import stat

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_lwpm.errors import ConfigurationError
from lightning_lwpm.partition.plan import PartitionPlan, Prediction, StagePlan, make_plan
from lightning_lwpm.partition.planfile import PlanFile, load_plan, save_plan
from lightning_lwpm.partition.timeline import LayerCall, Timeline


def plan_of(*stages, prediction=None, devices=None):
    """A plan whose stages hold the calls given."""
    made = tuple(
        StagePlan(s, len(stages) - 1 - s, tuple(calls), 1000, 4000, 1 / len(stages), 3 << 20, 0.0012345, 0.00251)
        for s, calls in enumerate(stages)
    )
    return PartitionPlan(made, devices or len(stages), prediction)


THREE = plan_of(
    [("wte", 0), ("tower", 0)],
    [("transformer.h.3.ln_1", 0)],
    [("tower", 1), ("head", 0)],
    prediction=Prediction(8, "1f1b", 0.0345678, 0.123456, measured=4),
)


def written(tmp_path, text):
    path = tmp_path / "plan.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_file_is_read_by_people_and_by_programs(tmp_path):
    path = tmp_path / "new" / "folder" / "plan.yaml"
    save_plan(THREE, path)
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# A partition plan")
    assert "Only cuts, num_microbatches, schedule and ranks are read back" in text
    assert "cuts:\n- transformer.h.3.ln_1\n- tower@1\n" in text
    assert "num_microbatches: 8\nschedule: 1f1b\ndevices: 3\n" in text
    data = yaml.safe_load(text)
    assert data["expected"] == {"step_ms": 34.57, "bubble": 0.123, "measured_calls": 4, "all_calls": 5}
    assert data["stages"][1] == {
        "stage": 1,
        "rank": 1,
        "layers": "transformer (1 call)",
        "parameters": 1000,
        "forward_ms": 1.234,
        "backward_ms": 2.51,
        "share": "33.3%",
        "memory": {},
        "bytes_onward": "3.0 MiB",
    }
    assert load_plan(path) == PlanFile(["transformer.h.3.ln_1", "tower@1"], 8, "1f1b", 3)


def test_a_plan_without_prediction_says_that_nothing_was_measured(tmp_path):
    save_plan(plan_of([("a", 0)], [("b", 0)], devices=4), tmp_path / "plan.yaml")
    assert "\n# on a nominal machine, as nothing was measured.\nstages:" in (tmp_path / "plan.yaml").read_text(
        encoding="utf-8"
    )
    assert load_plan(tmp_path / "plan.yaml") == PlanFile(["b"], devices=4)


def test_one_stage_has_no_cuts(tmp_path):
    save_plan(plan_of([("a", 0)]), tmp_path / "plan.yaml")
    assert load_plan(tmp_path / "plan.yaml") == PlanFile([], devices=1)


# Names that YAML would take for numbers, truth values, dates, comments or keys must come back as text.
AWKWARD = st.sampled_from(
    ["0", "1_0", "1e5", "1.5", "on", "no", "null", "~", "2024-01-01", "a: b", "a #b", "- x", "é…"]
)
# Control characters are left out: PyYAML 6.0 writes U+0085 so that it reads a space.
LETTERS = st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"])
NAMES = st.one_of(AWKWARD, st.text(LETTERS, min_size=1).filter(str.strip))
CALLS = st.lists(st.tuples(NAMES, st.integers(0, 3)), min_size=1, max_size=8, unique=True)
TOLD = st.builds(Prediction, st.integers(1, 512), st.sampled_from(["1f1b", "gpipe"]), st.just(1.0), st.just(0.5))


@settings(max_examples=50, deadline=None)  # files, on a machine that may be busy
@given(calls=CALLS, told=st.none() | TOLD, devices=st.integers(8, 64))
def test_what_is_written_is_read_back(tmp_path_factory, calls, told, devices):
    plan = plan_of(*([call] for call in calls), prediction=told, devices=devices)
    path = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    begins = [stage.begins for stage in plan.stages[1:]]
    save_plan(plan, path)
    if len(set(begins)) < len(begins):  # "a@1" may be a layer's name, and the second call of "a"
        with pytest.raises(ConfigurationError, match="only one stage"):
            load_plan(path)
    else:
        count, schedule = (told.num_microbatches, told.schedule) if told else (None, None)
        assert load_plan(path) == PlanFile(begins, count, schedule, devices)


@pytest.mark.parametrize("ranks", [1, 2, 4, 6])
def test_a_model_cut_by_the_file_of_its_plan_has_the_same_plan(tmp_path, ranks):
    calls = tuple(
        LayerCall(name, k, 1e6, 1e4, 4000, 1000)
        for name, k in [("a", 0), ("tower.x", 0), ("tower.y", 0), ("b", 0), ("tower.x", 1), ("tower.y", 1), ("c", 0)]
    )
    line = Timeline(calls, (0, *[2048] * 6), (True,) * 7)
    plan = make_plan(line, ranks, "auto", list(reversed(range(ranks))))
    save_plan(plan, tmp_path / "plan.yaml")
    assert make_plan(line, ranks, load_plan(tmp_path / "plan.yaml").cuts, list(reversed(range(ranks)))) == plan


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cuts: [model.h.5]", PlanFile(["model.h.5"])),
        ("- model.h.2\n- model.h.5  # here\n", PlanFile(["model.h.2", "model.h.5"])),
        ("[]", PlanFile([])),
        ("cuts: [a, b]\nranks: [0, 1, 0]", PlanFile(["a", "b"], ranks=(0, 1, 0))),
        ("schedule: gpipe\nnum_microbatches:\ncuts: [a@1]", PlanFile(["a@1"], schedule="gpipe")),
    ],
)
def test_a_file_may_be_written_by_hand(tmp_path, text, expected):
    assert load_plan(written(tmp_path, text)) == expected


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("", ["is empty", "cuts: [model.h.5]"]),
        ("model.h.5", ["holds 'model.h.5'", "cuts: [model.h.5]"]),
        ("cuts: [a", ["is not YAML", "line 1", "cuts: [model.h.5]"]),
        ("cuts: 2024-99-99", ["is not YAML"]),
        ("[" * 1000, ["is not YAML"]),
        ("a: 1\n---\nb: 1", ["is not YAML"]),
        ("cuts: !!python/object/apply:os.getcwd []", ["is not YAML", "python/object"]),
        ("{}", ["has no cuts", "cuts: [model.h.5]"]),
        ("schedule: 1f1b", ["has no cuts"]),
        ("cuts: [a]\ncut: [b]", ["key 'cut'", "['b']", "did you mean 'cuts'?"]),
        ("cuts: [a]\nmicrobatches: 4", ["'microbatches' (with 4)", "did you mean 'num_microbatches'?"]),
        ("cuts: [a]\n7: 4", ["key 7", "known are 'cuts'"]),
        ("cuts: [a]\nschedule: gpipe\ncuts: [b]", ["key 'cuts' stands there 2 times", "keep one"]),
        ("cuts: model.h.5", ["cuts='model.h.5' is not a list", "write cuts: [model.h.5]"]),
        ("cuts:", ["cuts=None is not a list"]),
        ("cuts: [a, 3]", ["cuts holds 3", 'quotation marks: "3"']),
        ("cuts: [a, yes]", ["cuts holds True", "write a list"]),
        ("- [a]", ["cuts holds ['a']", "write a list"]),
        ("cuts: [' ']", ["cuts holds ' '"]),
        ("cuts: [a, b, a]", ["names 'a' 2 times", "a@1"]),
        ("cuts: [a]\nnum_microbatches: -3", ["num_microbatches=-3", "positive integer"]),
        ("cuts: [a]\nnum_microbatches: 0", ["num_microbatches=0"]),
        ("cuts: [a]\nnum_microbatches: true", ["num_microbatches=True"]),
        ("cuts: [a]\nnum_microbatches: four", ["num_microbatches='four'", "leave the line out"]),
        ("cuts: [a]\ndevices: 2.5", ["devices=2.5", "positive integer"]),
        ("cuts: [a]\nschedule: 3", ["schedule=3", "1f1b"]),
    ],
)
def test_what_the_user_wrote_is_quoted(tmp_path, text, messages):
    path = written(tmp_path, text)
    with pytest.raises(ConfigurationError) as error:
        load_plan(path)
    assert all(message in str(error.value) for message in [repr(str(path)), *messages]), str(error.value)


@settings(max_examples=50, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])) | st.text("cuts:[]{}-?&*!|>'\"%@ \n#,a1"))
def test_any_text_is_a_plan_or_a_clear_error(tmp_path_factory, text):
    path = written(tmp_path_factory.getbasetemp(), text)
    try:
        assert isinstance(load_plan(path), PlanFile)
    except ConfigurationError as error:
        assert repr(str(path)) in str(error)


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ConfigurationError, match=r"no plan file .*missing.yaml.* in .*write the file: cuts:"):
        load_plan(tmp_path / "missing.yaml")
    with pytest.raises(ConfigurationError, match="cannot be read"):
        load_plan(tmp_path)
    (tmp_path / "plan.yaml").write_bytes(b"\xff\xfe\x80")
    with pytest.raises(ConfigurationError, match="not text in UTF-8"):
        load_plan(tmp_path / "plan.yaml")


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    (tmp_path / "plan.yaml").mkdir()
    with pytest.raises(ConfigurationError, match=r"cannot be written to .*plan.yaml"):
        save_plan(THREE, tmp_path / "plan.yaml")
    assert os.listdir(tmp_path) == ["plan.yaml"]
    path = written(tmp_path / "plan.yaml", "old")
    save_plan(THREE, path)
    assert load_plan(path).devices == 3 and os.listdir(path.parent) == ["plan.yaml"]


@pytest.mark.skipif(os.name != "posix", reason="file modes are those of POSIX")
def test_a_new_file_may_be_read_by_whom_the_user_lets(tmp_path):
    before = os.umask(0o022)
    try:
        save_plan(THREE, tmp_path / "plan.yaml")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "plan.yaml").stat().st_mode) == 0o644
