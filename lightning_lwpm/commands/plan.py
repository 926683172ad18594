"""``lwpm plan``: the plans of a model for several numbers of devices, without training."""

import argparse
import importlib
import inspect
import os
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.accelerators import CPUAccelerator
from rich.console import Console
from rich.table import Table

from lightning_lwpm.errors import ConfigurationError
from lightning_lwpm.partition.plan import PartitionPlan
from lightning_lwpm.partition.units import human_bytes, human_seconds
from lightning_lwpm.report import considered
from lightning_lwpm.training.survey import SurveyStrategy
from lightning_lwpm.tuning.choose import Choice

__all__ = ["plan"]

_OURS = ("num_microbatches", "schedule", "virtual_stages", "device_memory", "costs")


def plan(args: argparse.Namespace) -> None:
    """Show the plans.

    Args:
        args: As parsed by :mod:`lightning_lwpm.cli`.

    Raises:
        ConfigurationError: if there is no model, it cannot be looked at, or no plan fits.
    """
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # the project's own modules, as `python train.py` would find them
    if any(number < 1 for number in args.devices):
        raise ConfigurationError(f"--devices {' '.join(map(str, args.devices))}: numbers of devices are at least 1")
    model, data, options, precision = _from_hydra(args) if args.config_dir else _from_class(args)
    options |= {"schedule": args.schedule} if args.schedule else {}
    options |= {"device_memory": args.device_memory} if args.device_memory else {}
    if args.microbatches:
        options["num_microbatches"] = int(args.microbatches) if args.microbatches.isdigit() else args.microbatches
    strategy = SurveyStrategy(args.devices, **options)
    trainer = L.Trainer(
        accelerator=args.accelerator,
        devices=1,
        strategy=strategy,
        precision=args.precision or precision,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    if isinstance(trainer.accelerator, CPUAccelerator):  # the processes of a run share the cores
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // max(args.devices)))
    trainer.fit(model, datamodule=data)
    _show(strategy.choices, args)


def _show(choices: dict[int, Choice | ConfigurationError], args: argparse.Namespace) -> None:
    console = Console()
    plans: dict[int, PartitionPlan] = {}
    for devices, choice in choices.items():
        if isinstance(choice, ConfigurationError):
            console.print(f"{devices} devices: {choice}", markup=False)
        else:
            plans[devices] = choice.plan
            table = choice.plan.table()
            table.title = f"{devices} device{'s' if devices != 1 else ''}"
            console.print(table)
            console.print(considered(choice), style="dim")
    if not plans:
        raise ConfigurationError("no plan fits any of these numbers of devices")
    console.print(_overview(plans))
    last = plans[max(plans)]
    if args.save:
        last.save(args.save)
        console.print(f"written: {args.save}, to be used as partition={args.save!r}", markup=False)
    if args.draw:
        last.draw(args.draw)
        console.print(f"drawn: {args.draw}", markup=False)


def _overview(plans: dict[int, PartitionPlan]) -> Table:
    """One line a number of devices."""
    table = Table(title="expected of a batch, without the optimizer")
    for column in ("devices", "micro-batches", "schedule", "time", "speed-up", "bubble", "slowest / mean", "memory"):
        table.add_column(column, justify="right")
    for devices, found in plans.items():
        told = found.prediction
        assert told is not None
        times = [stage.forward_seconds + stage.backward_seconds for stage in found.stages]
        alone = sum(times) * told.num_microbatches
        memory = max(sum(stage.memory.values()) for stage in found.stages)
        table.add_row(
            str(devices),
            str(told.num_microbatches),
            told.schedule,
            human_seconds(told.step_seconds),
            f"{alone / told.step_seconds:.2f}",
            f"{told.bubble:.0%}",
            f"{max(times) * len(times) / sum(times):.2f}",
            human_bytes(memory),
        )
    return table


def _from_hydra(args: argparse.Namespace) -> tuple[Any, Any, dict[str, Any], Any]:
    """Module, data, options of the strategy and precision, from a project laid out as Lightning's Hydra template."""
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from hydra.utils import instantiate
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    folder = Path(args.config_dir).resolve()
    if not folder.is_dir():
        raise ConfigurationError(f"--config-dir {args.config_dir}: there is no such folder")
    try:
        with initialize_config_dir(str(folder), version_base="1.3"):
            cfg = compose(args.config_name, overrides=args.overrides, return_hydra_config=False)
    except HydraException as error:
        raise ConfigurationError(f"the configuration {args.config_name!r} in {args.config_dir}: {error}") from error
    if "model" not in cfg:
        raise ConfigurationError(
            f"the configuration {args.config_name!r} has no 'model': its groups are expected to be named as in "
            f"Lightning's Hydra template (model, data or datamodule, trainer). It has: {', '.join(map(str, cfg))}"
        )
    L.seed_everything(cfg.get("seed") or 0, verbose=False)
    data = cfg.get("data") or cfg.get("datamodule")
    try:
        trainer = cfg.get("trainer") or {}
        strategy = trainer.get("strategy")
        options = OmegaConf.to_container(strategy, resolve=True) if OmegaConf.is_dict(strategy) else {}
        model, data = instantiate(cfg.model), instantiate(data) if data else None
        precision = trainer.get("precision") or "32-true"
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigurationError(f"the configuration {args.config_name!r} in {args.config_dir}: {error}") from error
    assert isinstance(options, dict)
    return model, data, {str(key): value for key, value in options.items() if key in _OURS}, precision


def _from_class(args: argparse.Namespace) -> tuple[Any, Any, dict[str, Any], Any]:
    """The same, from classes."""
    if not args.model:
        raise ConfigurationError(
            "name a Hydra configuration (--config-dir conf) or a class (--model package.module:Class)"
        )
    kind = _named(args.model, "--model", L.LightningModule)
    if args.checkpoint:
        try:
            module = kind.load_from_checkpoint(args.checkpoint, map_location="cpu")
        except FileNotFoundError as error:
            raise ConfigurationError(f"--checkpoint {args.checkpoint}: {error}") from error
    else:
        module = _made(kind, "--model", args.model)
    data = _made(_named(args.data, "--data", L.LightningDataModule), "--data", args.data) if args.data else None
    return module, data, {}, "32-true"


def _made(kind: Any, option: str, path: str) -> Any:
    """An object of a class that needs no arguments."""
    try:
        inspect.signature(kind).bind()
    except TypeError as error:
        raise ConfigurationError(
            f"{option} {path}: {error}. A class is made without arguments here; those of a model may come from a "
            "--checkpoint, and any from a Hydra configuration (--config-dir conf)."
        ) from error
    return kind()


def _named(path: str, option: str, base: type) -> Any:
    """The class that ``package.module:Class`` names, which must be one of a kind."""
    module, _, name = path.replace(":", ".").rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigurationError(f"{option} {path}: {error}. Write package.module:Class.") from error
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ConfigurationError(f"{option} {path}: that is no {base.__name__}. Write package.module:Class.")
    return found
