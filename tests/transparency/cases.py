"""Each difficulty as a case: model, step, batches, and what may be expected of it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from models import (
    WIDTH,
    Adversarial,
    Attention,
    Checkpointed,
    ControlFlow,
    CrossAttention,
    Detached,
    Dropping,
    GatesBefore,
    Hooked,
    InPlace,
    InPlaceConstant,
    InPlaceInput,
    InPlaceLate,
    Late,
    LayerDrop,
    Mixture,
    Momentum,
    MultiTask,
    Normed,
    Permuted,
    Prepared,
    Recurrence,
    Recurrent,
    Residual,
    RootParameters,
    Selecting,
    Siamese,
    StopGradient,
    Structures,
    Tied,
    Toggled,
    UNet,
    Unused,
)
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Case:
    """A model with a step.

    Attributes:
        build: Makes the model.
        step: The user's step: from model and micro-batch to the loss.
        batches: One for each optimizer step.
        rounding: From the number of stages and micro-batches: whether sums are taken in another order than on one
            device, so that they are equal up to rounding only. The causes are those of ``SHARED``, ``SHARED_OFTEN``
            and ``USED_OFTEN``.
        partition: From the number of stages to the layers that begin one, where the best balance would not cut
            through the difficulty.
    """

    build: Callable[[], nn.Module]
    step: Callable[[nn.Module, Any], Tensor]
    batches: Callable[[], list[Any]]
    rounding: Callable[[int, int], bool] = lambda stages, count: False
    partition: dict[int, list[str]] = field(default_factory=dict)


def SHARED(stages: int, count: int) -> bool:
    """Several stages use a weight, each once: each adds up its own micro-batches first."""
    return stages > 1 and count > 1


def SHARED_OFTEN(stages: int, count: int) -> bool:
    """The same, and a stage uses it more than once in a micro-batch: it adds up its own uses first."""
    return stages > 1


def USED_OFTEN(stages: int, count: int) -> bool:
    """Each of two later stages uses a tensor more than once: each adds up its own uses first, (a + b) + (c + d)."""
    return stages > 2


def classify(model: nn.Module, batch: Any) -> Tensor:
    """Cross entropy of (input, label)."""
    x, y = batch
    return F.cross_entropy(model(x), y)


def regress(model: nn.Module, x: Any) -> Tensor:
    """The batch is one tensor."""
    return model(x).square().mean()


def language(model: nn.Module, tokens: Tensor) -> Tensor:
    """The next token from the ones before."""
    logits = model(tokens[:, :-1])
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), tokens[:, 1:].reshape(-1))


def translate(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    logits = model(batch["source"], batch["target"])
    return F.cross_entropy(logits.reshape(-1, 20), batch["target"].reshape(-1))


def with_late_inputs(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    return F.cross_entropy(model(batch["x"], batch["more"][0], batch["more"][1]), batch["y"])


def toggled(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    return F.cross_entropy(model(batch["x"], batch["phase"]), batch["y"])


def two_losses(model: nn.Module, batch: Any) -> Tensor:
    early, late = model(batch[0])
    return F.cross_entropy(early, batch[1]) * 0.3 + F.cross_entropy(late, batch[1])


def pairs(*sizes: int, width: int = WIDTH) -> list[Any]:
    """(float, label) batches of the sizes given."""
    torch.manual_seed(1)
    return [(torch.randn(size, width), torch.randint(0, 4, (size,))) for size in sizes or (8, 8, 8)]


def images(classes: int = 4) -> list[Any]:
    torch.manual_seed(1)
    return [(torch.randn(8, 3, 8, 8), torch.randint(0, classes, (8,))) for _ in range(3)]


def pictures() -> list[Any]:
    """Float only: what is learned is the input itself."""
    torch.manual_seed(1)
    return [torch.randn(8, 3, 8, 8) for _ in range(3)]


def tokens(*shapes: tuple[int, int]) -> list[Any]:
    """Integers only."""
    torch.manual_seed(1)
    return [torch.randint(0, 20, shape) for shape in shapes or [(8, 7)] * 3]


def sentences() -> list[Any]:
    torch.manual_seed(1)
    lengths = [(6, 5), (6, 5), (4, 7)]
    return [{"source": torch.randint(0, 20, (8, a)), "target": torch.randint(0, 20, (8, b))} for a, b in lengths]


def large() -> list[Any]:
    torch.manual_seed(1)
    return [
        {
            "x": torch.randn(8, WIDTH),
            "y": torch.randint(0, 4, (8,)),
            "more": (torch.randn(8, 600), torch.randn(8, 600)),
            "names": [f"sample {i}" for i in range(8)],
        }
        for _ in range(3)
    ]


def phases() -> list[Any]:
    return [{"x": x, "y": y, "phase": i} for i, (x, y) in enumerate(pairs(8, 8, 8, 8))]


@dataclass
class Sample:
    """A batch as a dataclass, with something that is no tensor."""

    x: Tensor
    y: Tensor
    name: str = "sample"


def samples() -> list[Any]:
    return [Sample(x, y) for x, y in pairs()]


def on_sample(model: nn.Module, batch: Sample) -> Tensor:
    assert batch.name == "sample"
    return F.cross_entropy(model(batch.x), batch.y)


def frozen(*prefixes: str) -> nn.Module:
    """A residual net of which some layers do not learn."""
    model = Residual()
    for name, parameter in model.named_parameters():
        if name.startswith(prefixes):
            parameter.requires_grad_(False)
    return model


CASES: dict[str, Case] = {
    "residual": Case(Residual, classify, pairs),
    "long skip": Case(UNet, regress, pictures),
    "tied weights": Case(Tied, language, tokens, SHARED),
    "siamese": Case(Siamese, classify, pairs, SHARED),
    "recurrence": Case(Recurrence, classify, pairs, SHARED_OFTEN),
    "weights before a module's first layer": Case(
        GatesBefore,
        classify,
        pairs,
        lambda stages, count: stages > 2 and count > 1,  # the shared ones
        {2: ["first.norm"], 3: ["first.norm", "shared.norm@1"], 4: ["first.norm", "shared.norm", "shared.norm@1"]},
    ),
    "weights that the step changes": Case(Momentum, classify, pairs),
    "weights that hooks make": Case(
        Prepared, classify, pairs, partition={2: ["layers.2"], 3: ["layers.2", "layers.4"]}
    ),
    "root parameters": Case(RootParameters, classify, pairs),
    "batch norm": Case(Normed, classify, images),
    "batch norm, channels last": Case(partial(Normed, torch.channels_last), classify, images),
    "dropout of nothing": Case(partial(Dropping, 0.0), classify, pairs),
    "frozen first layers": Case(partial(frozen, "blocks.0", "blocks.1"), classify, pairs),
    "frozen last layers": Case(partial(frozen, "blocks.3", "blocks.4", "head"), classify, pairs),
    "frozen between": Case(partial(frozen, "blocks.1", "blocks.2", "blocks.3"), classify, pairs),
    "requires_grad toggled": Case(Toggled, toggled, phases),
    "dataclass batch": Case(Residual, on_sample, samples),
    "structures": Case(Structures, classify, pairs, USED_OFTEN),
    "control flow": Case(ControlFlow, classify, partial(pairs, 8, 8, 8, 8, 8), SHARED_OFTEN),
    "layer drop": Case(LayerDrop, classify, partial(pairs, 8, 8, 8, 8)),
    "in place": Case(InPlace, classify, pairs),
    "in place, a constant": Case(InPlaceConstant, classify, pairs),
    "in place, late": Case(InPlaceLate, classify, pairs),
    "in place, inputs of units": Case(InPlaceInput, classify, pairs),
    "views and permutations": Case(Permuted, classify, pairs),
    "cross attention": Case(CrossAttention, translate, sentences),
    "late inputs": Case(Late, with_late_inputs, large),
    "mixture of experts": Case(Mixture, classify, partial(pairs, 16, 16, 16, 16), USED_OFTEN),
    "shapes from values": Case(Selecting, lambda m, b: m(b[0]).square().sum(), partial(pairs, 16, 16, 16, 16)),
    "checkpointed": Case(Checkpointed, classify, pairs),
    "function of the user's own": Case(Adversarial, classify, pairs),
    "hooks on gradients": Case(Hooked, classify, pairs),
    "recurrent layers": Case(Recurrent, language, tokens),
    "transformer layers": Case(Attention, language, tokens),
    "unused parameters": Case(Unused, classify, pairs),
    "detached": Case(Detached, classify, pairs),
    "stopped gradient": Case(StopGradient, classify, pairs),
    "early loss": Case(MultiTask, two_losses, pairs),
    "variable length": Case(Recurrent, language, partial(tokens, (8, 7), (8, 4), (8, 9), (8, 7), (8, 4))),
    "last batch smaller": Case(Residual, classify, partial(pairs, 8, 8, 5)),
    "uneven micro-batches": Case(Residual, classify, partial(pairs, 11, 7, 10)),
    "fewer samples than micro-batches": Case(Residual, classify, partial(pairs, 2, 1, 3)),
}
