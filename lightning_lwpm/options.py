"""Checks what the user wrote in the strategy's constructor: every message quotes it and says what to change."""

import dataclasses
import difflib
import os
import re
from typing import Any

from lightning_lwpm.errors import ConfigurationError
from lightning_lwpm.partition.plan import PartitionPlan
from lightning_lwpm.pipeline.asynchronous.registry import correction
from lightning_lwpm.pipeline.schedule import POLICIES
from lightning_lwpm.staging.recompute import MODES
from lightning_lwpm.timeline.write import check_path
from lightning_lwpm.tuning.lineup import FEWEST, MOST

__all__ = ["check_options", "parse_bytes"]

_UNITS = {"": 1, "b": 1, **{f"{k}b": 1000**i for i, k in enumerate("kmgt", 1)}}
_UNITS |= {f"{k}ib": 1024**i for i, k in enumerate("kmgt", 1)}


def parse_bytes(value: Any) -> float | None:
    """Bytes from a number, or from text such as ``"12 GiB"``.

    Raises:
        ConfigurationError: if it is neither.
    """
    if value is None:
        return None
    match = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([a-z]*)\s*", str(value).lower())
    if isinstance(value, bool) or match is None or match[2] not in _UNITS or not float(match[1]):
        raise ConfigurationError(
            f"device_memory={value!r}: pass a number of bytes, or text such as '12 GiB' or '800 MB'."
        )
    return float(match[1]) * _UNITS[match[2]]


def check_options(
    num_microbatches: Any,
    schedule: Any,
    partition: Any,
    costs: Any,
    repartition_every_n_epochs: Any,
    virtual_stages: Any,
    activation_checkpointing: Any,
    state_dict_type: Any,
    async_checkpoint: Any,
    weights_after_run: Any,
    data_parallel_size: Any,
    process_group_backend: Any,
    start_method: Any,
    patience: Any,
    timeline: Any,
    log_bubble: Any,
    deterministic_rng: Any,
    deferred_batch_norm: Any,
) -> None:
    """Check the options that need no model.

    Raises:
        ConfigurationError: for the first one that cannot be used.
    """
    if num_microbatches != "auto" and (
        not isinstance(num_microbatches, int) or isinstance(num_microbatches, bool) or num_microbatches < 1
    ):
        raise ConfigurationError(
            f"num_microbatches={num_microbatches!r}: a batch is split into at least 1 micro-batch. Pass a positive "
            'integer, such as four for each device, or "auto".'
        )
    known = ["auto", *POLICIES, "sequential", "async"]
    if schedule not in known:
        near = difflib.get_close_matches(str(schedule), known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigurationError(f"schedule={schedule!r} is not known. Known are: {_listed(known)}.{hint}")
    names = isinstance(partition, list | tuple) and all(isinstance(name, str) for name in partition)
    if costs not in ("measured", "estimated"):
        raise ConfigurationError(
            f"costs={costs!r} is not known. Known are: 'measured' (each layer timed once), 'estimated' (FLOPs)."
        )
    every = repartition_every_n_epochs
    if not isinstance(every, int) or isinstance(every, bool) or every < 0:
        raise ConfigurationError(f"repartition_every_n_epochs={every!r}: pass a number of epochs, or 0 for never.")
    named = isinstance(partition, str) and partition.endswith((".yaml", ".yml"))
    if partition != "auto" and not names and not named and not isinstance(partition, PartitionPlan):
        example = partition if isinstance(partition, str) and "." in partition else "model.layers.6"
        raise ConfigurationError(
            f'partition={partition!r}: pass "auto", a list with the dotted names of the layers that begin the '
            f'second, third, ... stage, such as ["{example}"], or the path of a plan, such as "plan.yaml".'
        )
    fewest, most = FEWEST.get(schedule, 1), MOST.get(schedule)
    if virtual_stages != "auto":
        if not isinstance(virtual_stages, int) or isinstance(virtual_stages, bool) or virtual_stages < 1:
            raise ConfigurationError(
                f'virtual_stages={virtual_stages!r}: pass the number of stages for each device, or "auto".'
            )
        if virtual_stages < fewest or (most is not None and virtual_stages > most):
            number = fewest if fewest == most else f"at least {fewest}"
            raise ConfigurationError(
                f"virtual_stages={virtual_stages!r}: the schedule {schedule!r} needs {number} stages for each device. "
                'Pass that, or leave it at "auto", or use the schedule "1f1b".'
            )
    if activation_checkpointing not in MODES:
        raise ConfigurationError(
            f"activation_checkpointing={activation_checkpointing!r} is not known. Known are: {_listed(MODES)}."
        )
    if state_dict_type not in ("full", "sharded"):
        raise ConfigurationError(
            f"state_dict_type={state_dict_type!r} is not known. Known are: 'full' (one file, that of one device), "
            "'sharded' (a folder, each rank its own share)."
        )
    if not isinstance(async_checkpoint, bool) or (async_checkpoint and state_dict_type != "sharded"):
        raise ConfigurationError(
            f"async_checkpoint={async_checkpoint!r}: pass True, with state_dict_type='sharded', or False. For one "
            "file, use Lightning's AsyncCheckpointIO."
        )
    if weights_after_run not in ("all_ranks", "rank_zero"):
        raise ConfigurationError(
            f"weights_after_run={weights_after_run!r} is not known. Known are: 'all_ranks' (every process has the "
            "whole model after a run), 'rank_zero' (only rank 0 has)."
        )
    if data_parallel_size != 1:
        raise ConfigurationError(
            f"data_parallel_size={data_parallel_size!r} is not built yet: all devices form one pipeline. Leave it at 1."
        )
    if process_group_backend not in (None, "nccl", "gloo"):
        raise ConfigurationError(
            f"process_group_backend={process_group_backend!r} is not known. Known are: 'nccl' (straight between GPUs) "
            "and 'gloo' (through host memory, for all devices). Leave it out for the faster one that can be used."
        )
    if start_method not in ("popen", "spawn", "fork", "forkserver"):
        raise ConfigurationError(
            f"start_method={start_method!r} is not known. Known are: 'popen', 'spawn', 'fork', 'forkserver'."
        )
    if isinstance(patience, bool) or not isinstance(patience, int | float) or not patience >= 0:
        raise ConfigurationError(
            f"patience={patience!r}: pass the seconds after which a wait is explained, or 0 for never."
        )
    if timeline is not None and not isinstance(timeline, str | os.PathLike):
        raise ConfigurationError(f"timeline={timeline!r}: pass a path such as 'timeline.svg', or None for no timeline.")
    if timeline is not None:
        check_path(timeline, "timeline=")
    switches = {"deterministic_rng": deterministic_rng, "deferred_batch_norm": deferred_batch_norm}
    for name, value in {"log_bubble": log_bubble, **switches}.items():
        if not isinstance(value, bool):
            raise ConfigurationError(f"{name}={value!r}: pass True or False.")
    idle = {"repartition_every_n_epochs": every, "timeline": timeline, "log_bubble": log_bubble}
    idle["num_microbatches"] = num_microbatches not in ("auto", 1) and num_microbatches
    for name, value in idle.items() if schedule == "sequential" else ():
        if value:
            raise ConfigurationError(
                f"{name}={value!r}: with schedule='sequential' every rank runs the whole step on the whole batch, in "
                "turns: there is no pipeline. Leave it out, or use another schedule."
            )
    if deferred_batch_norm and schedule == "async":
        raise ConfigurationError(
            'deferred_batch_norm=True: with schedule="async" a batch has no end at which all stages could update their '
            "statistics. Leave it out, or use an exact schedule."
        )


def check_rules(rules: Any, schedule: str, repartition_every_n_epochs: int) -> None:
    """Check the options of asynchronous training.

    Args:
        rules: The options, as a dataclass.
        schedule: The schedule, as the user wrote it.
        repartition_every_n_epochs: The same.

    Raises:
        ConfigurationError: for the first one that cannot be used.
    """
    correction(rules.staleness_correction)
    for field in dataclasses.fields(rules):
        value = getattr(rules, field.name)
        number = isinstance(value, int) and not isinstance(value, bool) and value >= 0
        if field.name != "staleness_correction" and value is not None and not number:
            none = " Leave it out for any." if field.default is None else ""
            raise ConfigurationError(f"{field.name}={value!r}: pass a number of steps, 0 or more.{none}")
        if value != field.default and schedule != "async":
            raise ConfigurationError(
                f"{field.name}={value!r} is of asynchronous training, but schedule={schedule!r}: pass "
                f'schedule="async", or leave {field.name} out.'
            )
    if schedule == "async" and repartition_every_n_epochs:
        raise ConfigurationError(
            f"repartition_every_n_epochs={repartition_every_n_epochs!r}: layers cannot move while batches overlap. "
            "Leave it at 0, or use an exact schedule."
        )


def _listed(names: Any) -> str:
    return ", ".join(repr(name) for name in names)
