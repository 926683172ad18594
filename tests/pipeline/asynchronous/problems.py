"""Small problems to try corrections on."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from lightning_lwpm.pipeline.asynchronous.delay import Delay
from lightning_lwpm.pipeline.asynchronous.registry import correction

WIDTH, SAMPLES = 5, 8

OPTIMIZERS = {
    "sgd": lambda weights: torch.optim.SGD(weights, 0.1),
    "momentum": lambda weights: torch.optim.SGD(weights, 0.1, momentum=0.9, weight_decay=1e-3),
    "adamw": lambda weights: torch.optim.AdamW(weights, 0.01, betas=(0.9, 0.95)),
    "rmsprop": lambda weights: torch.optim.RMSprop(weights, 0.01),
}


def one(name, delay, optimizer="adamw", **options):
    """A layer, its optimizer and a correction."""
    torch.manual_seed(0)
    layer = nn.Linear(WIDTH, WIDTH)
    trainer = OPTIMIZERS[optimizer](layer.parameters())
    return layer, trainer, correction(name)(trainer, layer.parameters(), delay, **options)


def step(layer, optimizer, correction=None, seed=0):
    """A step on a random gradient of the weights as they are."""
    torch.manual_seed(seed)
    optimizer.zero_grad()
    F.mse_loss(layer(torch.randn(SAMPLES, WIDTH)), torch.randn(SAMPLES, WIDTH)).backward()
    if correction:
        correction.before_step()
    optimizer.step()
    if correction:
        correction.after_step()


def weights(layer):
    """A copy of the weights."""
    return [parameter.detach().clone() for parameter in layer.parameters()]


def same(these, those):
    """Whether all bits are."""
    return all(torch.equal(a, b) for a, b in zip(these, those, strict=True))


def stages(make, p, m, name, optimizer="adamw", lr=None):
    """A chain of layers as ``p`` stages with a falling learning rate; ``make`` is the class of a stage."""
    torch.manual_seed(1)
    made = []
    for k in range(p):
        module = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())
        trainer = OPTIMIZERS[optimizer](module.parameters())
        for group in trainer.param_groups:
            group["lr"] = group["lr"] if lr is None else lr
        delay = Delay(k, p, m)
        correct = correction(name)(trainer, module.parameters(), delay)
        made.append(make(module, trainer, LambdaLR(trainer, lambda step: 0.9**step), correct, delay))
    return made


def batches(count):
    """Inputs and targets."""
    torch.manual_seed(2)
    return [(torch.randn(SAMPLES, WIDTH), torch.randn(SAMPLES, WIDTH)) for _ in range(count)]
