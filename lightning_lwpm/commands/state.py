"""``lwpm merge`` and ``lwpm split``: checkpoints from one form into the other, without the model's code."""

import argparse
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from lightning_lwpm.errors import ConfigurationError
from lightning_lwpm.pipeline.mailbox import Mailbox
from lightning_lwpm.state.load import UNREADABLE, check_file, fill, is_sharded, read_rest, why_unreadable
from lightning_lwpm.state.shards import ShardedSave
from lightning_lwpm.training.storage import WholeCheckpointIO

__all__ = ["merge", "split"]


def merge(args: argparse.Namespace) -> None:
    """Make one file of a sharded checkpoint.

    Args:
        args: As parsed by :mod:`lightning_lwpm.cli`.

    Raises:
        ConfigurationError: if the source cannot be read, or the target cannot be written.
    """
    source, target = Path(args.source), Path(args.target)
    with _explained(args):
        if not is_sharded(source):
            raise ConfigurationError(f"'{source}' is no sharded checkpoint; name the folder that has 'index.json'")
        if target.is_dir():
            raise ConfigurationError(f"'{target}' is a folder; name the file to write")
        check_file(source)
        rest, data = read_rest(source, weights_only=not args.trusted)
        if not isinstance(rest, dict):
            raise ConfigurationError(f"'{source}' holds {type(rest).__name__}, which is no checkpoint")
        WholeCheckpointIO().save_checkpoint(fill(rest, data), target)
    Console().print(f"written: {target}", markup=False)


def split(args: argparse.Namespace) -> None:
    """Make a sharded checkpoint of one file.

    Args:
        args: As parsed by :mod:`lightning_lwpm.cli`.

    Raises:
        ConfigurationError: if the source cannot be read, or the target cannot be written.
    """
    source, target = Path(args.source), Path(args.target)
    with _explained(args):
        if not source.is_file():
            raise ConfigurationError(f"'{source}' is no file; name a checkpoint that is one")
        if target.is_file():
            raise ConfigurationError(f"'{target}' is a file; name the folder to write")
        check_file(source)
        checkpoint = WholeCheckpointIO().load_checkpoint(source, weights_only=not args.trusted)
        if not isinstance(checkpoint, dict):
            raise ConfigurationError(f"'{source}' holds {type(checkpoint).__name__}, which is no checkpoint")
        saving = ShardedSave(Mailbox(0, 1, lambda value: [value]), 0, checkpoint, target, copy=False)
        saving.start(later=False)
        saving.wait()
    Console().print(f"written: {target}", markup=False)


@contextmanager
def _explained(args: argparse.Namespace) -> Iterator[None]:
    try:
        yield
    except pickle.UnpicklingError as error:
        raise ConfigurationError(
            f"'{args.source}' has more in it than tensors and plain values. Add --trusted if you trust "
            f"its source.\n{error}"
        ) from error
    except UNREADABLE as error:
        if isinstance(error, ConfigurationError):
            raise
        raise ConfigurationError(
            f"'{args.source}' to '{args.target}': {type(error).__name__}: {error}{why_unreadable(args.source)}"
        ) from error
