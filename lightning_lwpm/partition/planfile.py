"""A plan as a file that a person can read and edit: YAML, of which only the user's own choices are read back.

::

    cuts:                     # the layers that begin stages 1, 2, ...
    - transformer.h.3.ln_1
    - tower@1                 # a later call of a layer
    num_microbatches: 8
    schedule: 1f1b
    devices: 2
    ranks: [0, 1, 1, 0]       # of each stage, where they do not simply go round
    expected: ...             # for reading only
    stages: ...               # for reading only
"""

import difflib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lightning_lwpm.errors import ConfigurationError
from lightning_lwpm.partition.plan import PartitionPlan, StagePlan
from lightning_lwpm.partition.units import human_bytes

__all__ = ["PlanFile", "load_plan", "save_plan"]

_READ = ("cuts", "num_microbatches", "schedule", "devices", "ranks")
_KNOWN = (*_READ, "expected", "stages")
_EXAMPLE = "cuts: [model.h.5]"

_HEAD = """\
# A partition plan of lightning_lwpm, to read and to edit. LWPMStrategy(partition="<this file>") uses it.
# Only cuts, num_microbatches, schedule and ranks are read back, and devices, to tell whether the plan fits.
# All but cuts may be left out.
"""
_CUTS = (
    "# The layers with which stages 1, 2, ... begin; stage 0 begins by itself. name@1 is the second call of a layer."
)
_STAGES = """\
# For reading only. bytes_onward are what a micro-batch sends to later stages; times are of one micro-batch{nominal}."""


@dataclass(frozen=True)
class PlanFile:
    """What is read back from a plan's file.

    Args:
        cuts: The layers that begin stages 1, 2, ..., as in ``partition=[...]``.
        num_microbatches: In how many micro-batches to split a batch; ``None`` if the file does not say.
        schedule: Name of the schedule, not checked here; ``None`` if the file does not say.
        devices: For how many devices the plan was made; ``None`` if the file does not say.
        ranks: The rank of each stage; ``None`` if the file does not say.
    """

    cuts: list[str]
    num_microbatches: int | None = None
    schedule: str | None = None
    devices: int | None = None
    ranks: tuple[int, ...] | None = None


def save_plan(plan: PartitionPlan, path: str | os.PathLike[str]) -> None:
    """Write a plan, whole or not at all; folders that are missing are made.

    Args:
        plan: The plan.
        path: Where to; a file that exists is replaced.

    Raises:
        ConfigurationError: If the file cannot be written.
    """
    path = Path(path)
    text = _text(plan)
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            draft.write_text(text, encoding="utf-8")
            os.replace(draft, path)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigurationError(
            f"the plan cannot be written to {str(path)!r} ({error.strerror}); name a file that you may write"
        ) from error


def load_plan(path: str | os.PathLike[str]) -> PlanFile:
    """Read a plan's file, written by :func:`save_plan` or by hand.

    Args:
        path: The file. By hand ``cuts`` alone is enough, or nothing but a list of layers.

    Raises:
        ConfigurationError: If the file cannot be read, or holds what is no plan; the message says what to write.
    """
    name = str(path)
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigurationError(
            f"there is no plan file {name!r} in {str(Path.cwd())!r}; correct the path, or write the file: {_EXAMPLE}"
        ) from None
    except OSError as error:
        raise ConfigurationError(
            f"the plan file {name!r} cannot be read ({error.strerror}); pass a YAML file that you may read"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{name!r} is not text in UTF-8, so it is no plan; write {_EXAMPLE}") from error
    data = _parsed(text, name)
    if isinstance(data, list):
        return PlanFile(_cuts(data, name))
    if not isinstance(data, dict):
        found = f"holds {data!r}" if data is not None else "is empty"
        raise ConfigurationError(f"the plan file {name!r} {found}; write the layers that begin a stage: {_EXAMPLE}")
    for key in data:
        if key not in _KNOWN:
            near = difflib.get_close_matches(str(key), _KNOWN, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(map(repr, _KNOWN))}"
            raise ConfigurationError(f"{name!r}: the key {key!r} (with {data[key]!r}) is not known; {hint}")
    if "cuts" not in data:
        raise ConfigurationError(f"{name!r} has no cuts; write the layers that begin stages 1, 2, ...: {_EXAMPLE}")
    schedule = data.get("schedule")
    if schedule is not None and (not isinstance(schedule, str) or not schedule.strip()):
        raise ConfigurationError(f"{name!r}: schedule={schedule!r}: write a name, such as 1f1b, or leave the line out")
    counts = {key: _count(data.get(key), key, name) for key in ("num_microbatches", "devices")}
    cuts = _cuts(data["cuts"], name)
    return PlanFile(cuts, schedule=schedule, ranks=_ranks(data.get("ranks"), len(cuts) + 1, name), **counts)


def _text(plan: PartitionPlan) -> str:
    told = plan.prediction
    chosen: dict[str, Any] = {"devices": plan.num_ranks}
    if told is not None:
        named = {"schedule": told.schedule} if told.schedule else {}
        chosen = {"num_microbatches": told.num_microbatches, **named, **chosen}
        if not plan.goes_round:
            chosen["ranks"] = list(plan.ranks)
        chosen["expected"] = {
            "step_ms": _milliseconds(told.step_seconds),
            "bubble": round(told.bubble, 3),
            "measured_calls": told.measured,
            "all_calls": sum(len(stage.calls) for stage in plan.stages),
        }
    stages = [_stage(stage, layers) for stage, layers in zip(plan.stages, plan.layers(), strict=True)]
    nominal = "" if told is not None and told.measured else "\n# on a nominal machine, as nothing was measured"
    return "\n".join(
        [
            _HEAD,
            _CUTS,
            _yaml({"cuts": [stage.begins for stage in plan.stages[1:]]}),
            _yaml(chosen),
            _STAGES.format(nominal=nominal),
            _yaml({"stages": stages}),
        ]
    )


def _stage(stage: StagePlan, layers: str) -> dict[str, Any]:
    """One stage in plain words and round numbers."""
    return {
        "stage": stage.index,
        "rank": stage.rank,
        "layers": layers,
        "parameters": stage.parameters,
        "forward_ms": _milliseconds(stage.forward_seconds),
        "backward_ms": _milliseconds(stage.backward_seconds),
        "share": f"{stage.share:.1%}",
        "memory": {part: human_bytes(nbytes) for part, nbytes in stage.memory.items()},
        "bytes_onward": human_bytes(stage.bytes_onward),
    }


def _milliseconds(seconds: float) -> float:
    return float(f"{seconds * 1e3:.4g}")


def _yaml(data: dict[str, Any]) -> str:
    # An endless width: a layer's name must stay on one line to be found and edited.
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=float("inf"))


def _parsed(text: str, name: str) -> Any:
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date that is none, such as 2024-99-99
        told = " ".join(str(error).split())
        raise ConfigurationError(f"the plan file {name!r} is not YAML ({told}); write {_EXAMPLE}") from error
    if isinstance(root, yaml.MappingNode):  # of two equal keys safe_load would silently keep the last
        keys = [key.value for key, _ in root.value]
        for key in keys:
            if keys.count(key) > 1:
                raise ConfigurationError(f"{name!r}: the key {key!r} stands there {keys.count(key)} times; keep one")
    return data


def _cuts(cuts: Any, name: str) -> list[str]:
    if not isinstance(cuts, list):
        layer = cuts if isinstance(cuts, str) and cuts else "model.h.5"
        raise ConfigurationError(f"{name!r}: cuts={cuts!r} is not a list; write cuts: [{layer}]")
    for cut in cuts:
        if not isinstance(cut, str) or not cut.strip():
            hint = f'put it in quotation marks: "{cut}"' if _is_number(cut) else f"write a list: {_EXAMPLE}"
            raise ConfigurationError(f"{name!r}: cuts holds {cut!r}, which is not the name of a layer; {hint}")
        if cuts.count(cut) > 1:
            raise ConfigurationError(
                f"{name!r}: cuts names {cut!r} {cuts.count(cut)} times, but a layer begins only one stage; "
                f"keep one, and write {cut}@1 for its second call"
            )
    return cuts


def _count(value: Any, key: str, name: str) -> int | None:
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigurationError(f"{name!r}: {key}={value!r}: write a positive integer, or leave the line out")
    return value


def _ranks(ranks: Any, stages: int, name: str) -> tuple[int, ...] | None:
    if ranks is None:
        return None
    if not isinstance(ranks, list) or len(ranks) != stages or any(type(r) is not int or r < 0 for r in ranks):
        raise ConfigurationError(
            f"{name!r}: ranks={ranks!r}: write the rank of each of the {stages} stages, or leave the line out"
        )
    return tuple(ranks)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
