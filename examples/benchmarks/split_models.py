"""Models for the race of schedules: as they are, for us, and split by hand into stages, for torch."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples.models.gpt import GPT
from examples.models.resnet import ResNet

__all__ = ["CASES", "Case"]

VOCABULARY, CONTEXT, CLASSES = 256, 128, 10


@dataclass(frozen=True)
class Case:
    """A model with a batch.

    Args:
        title: What tables call it.
        build: Makes the model; its blocks are in ``blocks``.
        front: Makes of it what comes before the blocks.
        back: Makes of it what comes after them.
        batch: Makes inputs and targets.
        loss: Of outputs and targets.
        cuts: By number of stages, the blocks with which stages 1, 2, ... begin.
    """

    title: str
    build: Callable[[], nn.Module]
    front: Callable[[nn.Module], nn.Module]
    back: Callable[[nn.Module], nn.Module]
    batch: Callable[[], tuple[Tensor, Tensor]]
    loss: Callable[[Tensor, Tensor], Tensor]
    cuts: dict[int, tuple[int, ...]] = field(default_factory=dict)

    def names(self, stages: int) -> list[str]:
        """The modules with which stages 1, 2, ... begin."""
        return [f"blocks.{cut}" for cut in self.cuts[stages]]

    def split(self, model: nn.Module, stages: int) -> list[nn.Module]:
        """A copy of the model, by stage."""
        model = copy.deepcopy(model)
        blocks = list(model.get_submodule("blocks").children())
        edges = [0, *self.cuts[stages], len(blocks)]
        parts = [blocks[begin:end] for begin, end in pairwise(edges)]
        parts[0].insert(0, self.front(model))
        parts[-1].append(self.back(model))
        return [nn.Sequential(*part) for part in parts]


class _Embed(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.tokens, self.positions = model.get_submodule("tokens"), model.get_submodule("positions")

    def forward(self, tokens: Tensor) -> Tensor:
        return self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))


class _Classify(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.head = model.get_submodule("head")

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.mean(dim=(2, 3)))


def _next_token(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def _text() -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, VOCABULARY, (16, CONTEXT + 1))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


CASES = {
    "gpt": Case(
        "GPT, 8 blocks, width 256, 16 x 128 tokens",
        lambda: GPT(VOCABULARY, CONTEXT, n_layer=8, n_embd=256, n_head=8, dropout=0.0),
        _Embed,
        lambda model: nn.Sequential(model.get_submodule("norm"), model.get_submodule("head")),
        _text,
        _next_token,
        {2: (4,), 4: (2, 4, 6)},
    ),
    "resnet": Case(
        "ResNet, 12 residual blocks, 128 pictures of 8 x 8",
        lambda: ResNet((32, 64, 96), blocks=4, num_classes=CLASSES),
        lambda model: model.get_submodule("stem"),
        _Classify,
        lambda: (torch.randn(128, 1, 8, 8), torch.randint(0, CLASSES, (128,))),
        F.cross_entropy,
        {2: (6,), 4: (3, 6, 9)},
    ),
}
