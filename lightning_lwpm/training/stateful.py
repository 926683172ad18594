"""The part of the strategy that saves and loads checkpoints."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import BaseFinetuning
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override

from lightning_lwpm.errors import ConfigurationError
from lightning_lwpm.partition.plan import PartitionPlan
from lightning_lwpm.pipeline.engine import Engine
from lightning_lwpm.state.before import Before
from lightning_lwpm.state.load import UNREADABLE, check_file, fill, read_rest, why_unreadable
from lightning_lwpm.state.merge import held_states, merge_checkpoint
from lightning_lwpm.state.misfits import misfits
from lightning_lwpm.state.names import check_names, layer_of
from lightning_lwpm.state.shards import ShardedSave
from lightning_lwpm.state.tree import replaced
from lightning_lwpm.state.whole import found
from lightning_lwpm.training.building import fill_layers
from lightning_lwpm.training.overlapping import OverlappingStrategy
from lightning_lwpm.training.private import PathLike, WrappingCheckpointIO, restoring, set_up_training_data
from lightning_lwpm.training.random_state import KEY, generators, put_back, put_generators, random_states, streams
from lightning_lwpm.training.storage import WholeCheckpointIO, local_path
from lightning_lwpm.training.weights import merged_copy

__all__ = ["StatefulStrategy"]


class StatefulStrategy(OverlappingStrategy, ABC):
    """Checkpoints of one device, or sharded ones; both for any number of stages.

    Attributes:
        state_dict_type: "full": one file, that of one device; "sharded": a folder, each rank its share.
        async_checkpoint: Whether training goes on while a sharded one is written.
    """

    state_dict_type: Literal["full", "sharded"] = "full"
    async_checkpoint: bool = False
    _engine: Engine | None = None
    _saving: ShardedSave | None = None  # under way
    _source: Path | None = None  # the folder of a sharded checkpoint that is being loaded
    _before: tuple[Before, Mapping[str, Any]] | None = None  # what a checkpoint's weights have replaced, and it
    _random: dict[str, Any] | None = None  # the random numbers of the checkpoint that is being loaded
    _generators: dict[str, Any] | None = None  # those of this rank since the data is being read
    _unread: dict[str, Any] | None = None  # those of rank 0 before data was read to look at the step
    _begin_again: dict[str, Any] | None = None  # the same, where the data that was read has been used up by a finder
    _streams: dict[str, Any] | None = None  # those of the engine that has ended

    @property
    @override
    def checkpoint_io(self) -> CheckpointIO:
        if self._checkpoint_io is None:
            self._checkpoint_io = WholeCheckpointIO()
        elif isinstance(self._checkpoint_io, WrappingCheckpointIO) and not isinstance(
            self._checkpoint_io.checkpoint_io, WholeCheckpointIO
        ):
            self._checkpoint_io.checkpoint_io = WholeCheckpointIO()
        return self._checkpoint_io

    @checkpoint_io.setter
    def checkpoint_io(self, io: CheckpointIO) -> None:
        self._checkpoint_io = io

    # -- saving --------------------------------------------------------------------------------------------------

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: PathLike, storage_options: Any | None = None
    ) -> None:
        if self._mailbox is None:  # nothing has run yet, so each process holds the whole model
            super().save_checkpoint(checkpoint, filepath, storage_options=storage_options)
            return
        if self.failed and self.world_size > 1:
            rank_zero_warn(
                f"no checkpoint is written to '{filepath}': a process has failed, and a part of the model is out of "
                "reach. Save while training goes on, as with `ModelCheckpoint(every_n_train_steps=...)`."
            )
            return
        self._saved()
        with self._resting(checkpoint), self.told("saving a checkpoint"):
            here = streams(self._engine) if self._engine is not None else self._streams
            if here is not None and "optimizer_states" in checkpoint:  # else training does not go on from it
                checkpoint[KEY] = random_states(self.mailbox, self.next_turn(), here, self.root_device)
            if self.state_dict_type == "sharded":
                self._save_shards(checkpoint, self.broadcast(str(filepath)), storage_options)
                return
            merged = merge_checkpoint(self.mailbox, self.next_turn(), checkpoint)
            if self.is_global_zero:  # what it holds itself is in there as it is
                self.checkpoint_io.save_checkpoint(merged, filepath, storage_options=storage_options)

    def _save_shards(self, checkpoint: dict[str, Any], filepath: str, storage_options: Any) -> None:
        path = local_path(filepath)
        if path is None or storage_options is not None:
            raise ConfigurationError(
                f"state_dict_type='sharded' writes to folders of this machine's file system, not to '{filepath}' "
                'with storage options or elsewhere. Use state_dict_type="full" for it.'
            )
        later = self.async_checkpoint and self._engine is not None
        saving = ShardedSave(self.mailbox, self.next_turn(), checkpoint, path, later)
        saving.start(later)
        if later:
            self._saving = saving
        else:
            saving.wait()

    def _saved(self) -> None:
        """Wait for what is being written.

        Raises:
            PipelineError: on all ranks, if it could not be.
        """
        if self._saving is not None:
            saving, self._saving = self._saving, None
            with self.told("saving a checkpoint"):
                saving.wait()

    @override
    def remove_checkpoint(self, filepath: PathLike) -> None:
        self._saved()
        super().remove_checkpoint(filepath)

    @override
    def on_train_end(self) -> None:
        super().on_train_end()
        self._saved()

    @override
    def teardown(self) -> None:
        if self.failed:
            self._saving = None  # its threads end by themselves
        self._source = self._random = self._generators = self._before = None
        self._saved()
        super().teardown()

    def merged_module(self) -> nn.Module | None:
        """The model with all its weights as an ordinary module, for inference or export.

        To be called on all ranks: after a run, or during one in a callback.

        Returns:
            On rank 0 a copy in host memory, in the mode (training or evaluation) of the model; ``None`` elsewhere.
        """
        assert self.lightning_module is not None
        if self._mailbox is None:  # nothing has run yet, so each process holds the whole model
            return copy.deepcopy(self.lightning_module) if self.is_global_zero else None
        with self._resting({}), self.told("merging the model"):
            return merged_copy(self.mailbox, self.next_turn(), self.lightning_module)

    @abstractmethod
    def plan_ahead(self) -> PartitionPlan | None:
        """Which stage runs which layers of this module, where that is known: since an earlier run, or from the user."""

    @abstractmethod
    def plan_in_vain(self) -> PartitionPlan | None:
        """The plan of a run that will not be; all ranks take part, and the model stays as it is."""

    # -- loading -------------------------------------------------------------------------------------------------

    @override
    def load_checkpoint(self, checkpoint_path: PathLike, weights_only: bool | None = None) -> dict[str, Any]:
        self._saved()
        self._source, local = None, local_path(checkpoint_path)
        local = found(local) if local is not None else None
        checkpoint: dict[str, Any] = {}
        error: Exception | None = None
        try:
            if local is not None and local.exists():
                check_file(local, self.global_rank, self.world_size)
            if local is not None and local.is_dir():
                checkpoint, self._source = read_rest(local, weights_only)
                later = ("optimizer_states",)
                checkpoint = fill(checkpoint, self._source, lambda path: path[:1] != later)
            else:
                checkpoint = super().load_checkpoint(checkpoint_path, weights_only)
            if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), Mapping):
                raise ConfigurationError(
                    f"'{checkpoint_path}' is no checkpoint of Lightning: it has no 'state_dict'. Load it yourself, by "
                    "`model.load_state_dict(torch.load(...))` before `fit`, if these are weights."
                )
        except (FileNotFoundError, ConfigurationError) as caught:
            error = caught
        except UNREADABLE as caught:
            error = ConfigurationError(
                f"the checkpoint '{checkpoint_path}' cannot be read, and nothing was loaded: {type(caught).__name__}: "
                f"{caught}{why_unreadable(local)}"
            )
        errors = [error]
        if self._mailbox is not None:  # before the first run each process reads for itself
            errors = self.mailbox.gather(("load", self.next_turn()), error, "all ranks to read a checkpoint")
        first = next((error for error in errors if error is not None), None)
        if first is not None:
            raise first
        self._random = checkpoint.get(KEY)
        if self._engine is not None:  # a learning-rate finder puts back what was before it
            self._begin_again = self._unread
        return checkpoint

    def begin_again(self) -> None:
        """After a learning-rate finder, draw the order of the data as if the finder had not drawn any."""
        if self._begin_again is not None:
            put_generators(self._begin_again, self.root_device)
        self._unread = self._begin_again = None

    def _resume_data(self, trainer: Trainer) -> None:
        """Begin to read the data where the checkpoint's random numbers are; before planning, which sets up loaders."""
        if not restoring(trainer):  # somebody has only read a checkpoint
            self._random = None
        if self._random is not None and trainer.state.fn == TrainerFn.FITTING and self.world_size > 1:
            put_generators(self._random["ranks"][0], self.root_device)
            set_up_training_data(trainer)
            self._generators = generators(self.root_device)

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        module = self.lightning_module
        assert module is not None
        check_names(module, checkpoint["state_dict"], strict, self._stage_holding)
        fill_layers(module)  # built on the meta device, it has no memory that weights can be copied to
        if self._engine is None and restoring(module.trainer) and module.trainer.state.fn == TrainerFn.FITTING:
            self._before = Before(module, self.num_processes), checkpoint
        super().load_model_state_dict(checkpoint, strict=strict)

    def check_optimizer_states(self) -> None:
        """Compare the states of optimizers in a checkpoint whose weights have come in with the run's optimizers.

        Raises:
            ConfigurationError: if they do not fit; the model is then as it was before.
            KeyError: as Lightning does, if there are none; the same.
        """
        module = self.lightning_module
        if self._before is None or module is None:
            return
        (before, checkpoint), self._before = self._before, None
        if any(isinstance(callback, BaseFinetuning) for callback in module.trainer.callbacks):  # type: ignore[attr-defined]
            return  # it makes the groups of the checkpoint later on
        error: Exception | None = None
        if "optimizer_states" not in checkpoint:
            error = KeyError(
                "Trying to restore optimizer state but checkpoint contains only the model. It was probably saved with "
                "`save_weights_only=True`. Load its weights alone: `model.load_state_dict(torch.load(path)"
                "['state_dict'])`, and `fit` without `ckpt_path`."
            )
        elif words := misfits(self.optimizers, checkpoint["optimizer_states"], self._place_of):
            loaded = "\nThe model has the checkpoint's weights: there was no room to keep its own meanwhile."
            error = ConfigurationError(words + ("" if before.whole else loaded))
        errors = self.mailbox.gather(("optimizers", self.next_turn()), error, "all ranks to compare optimizers")
        first = next((error for error in errors if error is not None), None)
        if first is not None:
            before.put_back(module)
            raise first

    def _place_of(self, parameter: Tensor) -> tuple[str, str]:
        """A parameter's name, and the stage that holds it or the layer that it belongs to, in words."""
        module = self.lightning_module
        assert module is not None
        name = next((name for name, p in module.named_parameters() if p is parameter), "?")
        return name, self._stage_holding(name) or layer_of(module, name)

    def _stage_holding(self, name: str) -> str | None:
        """The stage that holds a weight which does not fit, in words; ``None`` where no plan can be had."""
        assert self.lightning_module is not None
        plan = self.plan_ahead()
        if plan is None and self.world_size > 1 and not self.failed and restoring(self.lightning_module.trainer):
            plan = self.plan_in_vain()
        return plan.stage_holding(name) if plan is not None else None

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        states = []
        for number, (optimizer, saved) in enumerate(zip(self.optimizers, checkpoint["optimizer_states"], strict=False)):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            held = held_states(saved, parameters)
            if self._source is not None:
                states.append(fill(held, self._source, at=("optimizer_states", number)))
            else:  # a copy: the optimizer is not to hold on to a mapped file
                states.append(replaced(held, lambda _, tensor: tensor.clone()))
        try:
            super().load_optimizer_state_dict({**checkpoint, "optimizer_states": states})
        except ValueError as error:
            if words := misfits(self.optimizers, states, self._place_of):
                raise ConfigurationError(words) from error
            raise
        if self._random is not None and self._engine is not None:
            put_back(self._random, self.global_rank, self._engine)
            if self._generators is not None and self.is_global_zero:  # the order of the data has been drawn from them
                put_generators(self._generators, self.root_device)
        self._source = self._random = self._generators = None
