"""The residual network with batch norm that asynchronous training is tried on: 6 blocks, 8 x 8 pictures of digits."""

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

from examples.data.digits import DigitsDataModule
from examples.models.resnet import ResNet
from lightning_lwpm.pipeline.asynchronous.correction import Correction

BATCH, LEARNING_RATE = 64, 0.1

SCORE = "test error, %"

ALIKE = False
"""Whether the model treats samples alike, however a batch is split."""


class Head(nn.Module):
    """What comes after the last block."""

    def __init__(self, net: ResNet) -> None:
        super().__init__()
        self.head = net.head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.mean(dim=(2, 3)))


class Data:
    """All pictures in another order in each epoch."""

    def __init__(self) -> None:
        module = DigitsDataModule()
        module.setup("fit")
        self.train, self.test = module.train.tensors, module.test.tensors

    def batches(self, steps: int, seed: int) -> list[tuple[Tensor, Tensor]]:
        """Pictures and labels of each step; the rest of an epoch that fills no batch is left out."""
        generator = torch.Generator().manual_seed(seed)
        x, y = self.train
        each = len(x) // BATCH
        rows = [
            row
            for _ in range(-(-steps // each))
            for row in torch.randperm(len(x), generator=generator).split(BATCH)[:each]
        ]
        return [(x[row], y[row]) for row in rows[:steps]]


def loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of a picture, in nats."""
    return F.cross_entropy(logits, targets)


def stages(
    count: int, num_microbatches: int, steps: int, seed: int, correction: Callable[..., Correction], init: str = "torch"
) -> list[Stage]:
    """The model in ``count`` stages of as many layers each, SGD with Nesterov momentum, cosine.

    Args:
        count: Number of stages.
        num_microbatches: Micro-batches of a batch.
        steps: Steps of the whole run.
        seed: Seed of the weights.
        correction: What corrects each stage.
        init: Only ``"torch"``: PyTorch's own initial weights.
    """
    assert init == "torch"
    torch.manual_seed(seed)
    net = ResNet((32, 64, 96), 2, 10)
    layers = [net.stem, *net.blocks, Head(net)]
    cuts = [len(layers) * k // count for k in range(count + 1)]

    def factor(step: int) -> float:
        return 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))

    parts = [nn.Sequential(*layers[cuts[k] : cuts[k + 1]]) for k in range(count)]
    optimizer = partial(torch.optim.SGD, lr=LEARNING_RATE, momentum=0.9, weight_decay=5e-4, nesterov=True)
    return staged(parts, num_microbatches, optimizer, factor, correction)


def score(parts: list[Stage], data: Data) -> float:
    """Percentage of test pictures that are told wrong, at the weights as they are."""
    net = nn.Sequential(*(stage.module for stage in parts))
    x, y = data.test
    net.eval()
    with torch.no_grad():
        wrong = (net(x).argmax(1) != y).sum().item()
    net.train()
    return 100 * wrong / len(y)
