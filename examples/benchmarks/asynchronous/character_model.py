"""The character language model that corrections are compared on: 8 blocks of width 96, 64 characters of context."""

import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[3]))

from emulation import Stage, staged

from examples.data.topics import TopicsDataModule
from examples.models.gpt import GPT
from lightning_lwpm.pipeline.asynchronous.correction import Correction

CONTEXT, BATCH, LEARNING_RATE, WARM_UP = 64, 32, 3e-3, 40

SCORE = "validation loss"

ALIKE = True
"""Whether the model treats samples alike, however a batch is split."""


class Embedding(nn.Module):
    """What comes before the first block."""

    def __init__(self, net: GPT) -> None:
        super().__init__()
        self.tokens, self.positions = net.tokens, net.positions

    def forward(self, tokens: Tensor) -> Tensor:
        return self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]


class Data:
    """Windows at random places of the training text, and all windows of the validation text."""

    def __init__(self) -> None:
        module = TopicsDataModule(block_size=CONTEXT)
        module.setup("fit")
        self.train = module.train.tensors[0].flatten()
        self.val = module.val.tensors

    def batches(self, steps: int, seed: int) -> list[tuple[Tensor, Tensor]]:
        """Inputs and targets of each step, ``(BATCH, CONTEXT)``."""
        generator = torch.Generator().manual_seed(seed)
        starts = torch.randint(0, len(self.train) - CONTEXT, (steps, BATCH, 1), generator=generator)
        places = starts + torch.arange(CONTEXT + 1)
        return [(window[:, :-1], window[:, 1:]) for window in self.train[places]]


def loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of a character, in nats."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def stages(
    count: int, num_microbatches: int, steps: int, seed: int, correction: Callable[..., Correction], init: str = "torch"
) -> list[Stage]:
    """The model in ``count`` stages of as many blocks each, AdamW, linear warm-up and cosine.

    Args:
        count: Number of stages.
        num_microbatches: Micro-batches of a batch.
        steps: Steps of the whole run.
        seed: Seed of the weights.
        correction: What corrects each stage.
        init: ``"torch"`` for PyTorch's own initial weights, ``"gpt"`` for those of GPT-2 (deviation 0.02).
    """
    torch.manual_seed(seed)
    net = GPT(vocab_size=96, block_size=CONTEXT, n_layer=8, n_embd=96, n_head=4, dropout=0.0)
    if init == "torch":
        for module in net.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                module.reset_parameters()
        nn.init.normal_(net.positions.weight, std=0.02)
    layers = [Embedding(net), *net.blocks, nn.Sequential(net.norm, net.head)]
    cuts = [0, *(1 + 8 * k // count for k in range(1, count)), len(layers)]

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))

    parts = [nn.Sequential(*layers[cuts[k] : cuts[k + 1]]) for k in range(count)]
    optimizer = partial(torch.optim.AdamW, lr=LEARNING_RATE, betas=(0.9, 0.95))
    return staged(parts, num_microbatches, optimizer, factor, correction)


def score(parts: list[Stage], data: Data) -> float:
    """Mean validation loss at the weights as they are."""
    net = nn.Sequential(*(stage.module for stage in parts))
    inputs, targets = data.val
    with torch.no_grad():
        sums = [loss(net(x), y).item() * len(x) for x, y in zip(inputs.split(64), targets.split(64), strict=True)]
    return sum(sums) / len(inputs)
