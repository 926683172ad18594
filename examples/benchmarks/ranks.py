"""Runs a function on several processes of this machine, as ranks of one Lightning job, and returns what they say."""

import multiprocessing
import os
import socket
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # for `examples`, in the child processes too


def run(world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """``function(rank, world, *args)`` in ``world`` fresh processes with one thread each; their results by rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with multiprocessing.get_context("spawn").Pool(world) as pool:
        # none of them ends before all have met, so each has a process of its own; the first failure ends them all
        jobs = [(rank, world, port, function, args) for rank in range(world)]
        outcomes = dict(pool.imap_unordered(_rank, jobs))
    return [outcomes[rank] for rank in range(world)]


def _rank(job: tuple[int, int, int, Callable[..., Any], Any]) -> tuple[int, Any]:
    rank, world, port, function, args = job
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), NODE_RANK="0"
    )
    import logging

    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # the table of the benchmark is what is to be read
    return rank, function(rank, world, *args)
