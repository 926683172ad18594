"""The random numbers of a run in its checkpoints: where every rank's generators and every stage's own stream are.

One device's checkpoint has none of it, so there it has one key more, and a resumed run draws what it would have drawn:
the order of the data, masks of dropout, noise.
"""

import random
from collections.abc import Mapping
from typing import Any

import numpy
import torch

from lightning_lwpm.pipeline.engine import Engine
from lightning_lwpm.pipeline.mailbox import Mailbox
from lightning_lwpm.staging.randomness import TorchRandom, drawn_from

__all__ = ["KEY", "after", "generators", "put_back", "put_generators", "random_states", "same_generators", "streams"]

KEY = "random_states"
_MOST = 4096


def streams(engine: Engine) -> dict[str, Any]:
    """Where the streams of the stages of this rank are, stage 0 aside, which draws from the rank's own generators."""
    executor = engine.executor
    all_streams = executor.random if executor is not None else {}
    own = {stage: stream.position() for stage, stream in all_streams.items() if stream.generators}
    seed = None if executor is None else executor.seed
    return {"seed": seed, "serial": engine.serial, "first": 0 in engine.stages, "streams": own}


def generators(device: torch.device) -> dict[str, Any]:
    """Where this process's own generators are, and that of its device."""
    name, words, *numbers = numpy.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "device": [generator.get_state() for generator in drawn_from(device)[1:]],
        "python": random.getstate(),
        "numpy": (name, torch.as_tensor(numpy.asarray(words, "int64")), *numbers),
    }


def put_generators(state: Mapping[str, Any], device: torch.device) -> None:
    """Let this process's own generators go on from :func:`generators`."""
    torch.set_rng_state(state["torch"])
    for generator, saved in zip(drawn_from(device)[1:], state.get("device", ()), strict=False):
        if saved.shape == generator.get_state().shape:  # else it is from a device of another kind
            generator.set_state(saved)
    version, words, more = state["python"]
    random.setstate((version, tuple(words), more))
    name, words, *numbers = state["numpy"]
    numpy.random.set_state((name, words.numpy().astype("uint32"), *numbers))


def same_generators(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether those of the host are in the same place."""
    tensors = [(one["torch"], other["torch"]), (one["numpy"][1], other["numpy"][1])]
    numbers = one["python"] == other["python"] and one["numpy"][2:] == other["numpy"][2:]
    return bool(numbers) and all(torch.equal(here, there) for here, there in tensors)


def after(first: Mapping[str, Any], start: Mapping[str, Any], end: Mapping[str, Any]) -> Mapping[str, Any]:
    """Where generators are that draw what took others from ``start`` to ``end``, but from ``first`` on.

    Only that of torch is looked at, and found for up to some thousand numbers; else this is ``end``.
    """
    if torch.equal(first["torch"], start["torch"]):
        return end
    here, there = torch.Generator(), torch.Generator()
    here.set_state(start["torch"])
    there.set_state(first["torch"])
    word = torch.empty((), dtype=torch.int32)
    for _ in range(_MOST):
        if torch.equal(here.get_state(), end["torch"]):
            return {**end, "torch": there.get_state()}
        word.random_(generator=here)
        word.random_(generator=there)
    return end


def random_states(mailbox: Mailbox, key: Any, here: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """What the checkpoint has of all ranks.

    Args:
        mailbox: The control connections.
        key: Names this exchange; the same on all ranks.
        here: From :func:`streams`.
        device: This rank's device.
    """
    everyone = mailbox.gather(("random", key), (generators(device), here), "the random numbers of all ranks")
    return {
        "seed": everyone[0][1]["seed"],
        "serial": here["serial"],
        "first": next((rank for rank, (_, told) in enumerate(everyone) if told["first"]), 0),
        "ranks": [own for own, _ in everyone],
        "streams": dict(sorted(item for _, told in everyone for item in told["streams"].items())),
    }


def put_back(saved: Mapping[str, Any], rank: int, engine: Engine) -> None:
    """Go on with the numbers of a checkpoint of any number of stages.

    Rank 0, which reads the data, and the rank of stage 0 go on as they did. A new stage has a new stream.
    """
    ranks = saved["ranks"]
    first = 0 in engine.stages and rank != 0
    put_generators(ranks[saved["first"]] if first else ranks[min(rank, len(ranks) - 1)], engine.device)
    engine.serial = saved["serial"]
    if engine.executor is None:
        return
    engine.executor.seed = saved["seed"]
    for stage, stream in engine.executor.random.items():
        position = saved["streams"].get(stage)
        if stream.generators and position is not None and len(position) == len(stream.generators):
            stream.back_to(position)
        elif stream.generators:
            stream.back_to(TorchRandom(saved["seed"] + saved["serial"], stage, engine.device).states)
