"""Models drawn at random: layers of many kinds, and between them whatever people write in a ``forward``."""

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

__all__ = ["Program"]

WIDTH = 8


class Pair(nn.Module):
    """Returns a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        one, other = self.inner(x).chunk(2, -1)
        return one.sigmoid(), other


class Nested(nn.Module):
    """Returns a dict with a list in it, and its own input in that."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"one": self.one(x), "rest": [self.other(x).tanh(), x]}


class Keyword(nn.Module):
    """Takes keywords, and maybe another input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, *, x: Tensor, skip: Tensor | None = None) -> Tensor:
        out = self.inner(self.norm(x))
        return out if skip is None else out + skip


class Counted(nn.Module):
    """Has buffers that change with each call."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.mean.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
        return self.inner(x) - self.mean


class Recurrent(nn.Module):
    """Two outputs of a layer of torch's own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.GRU(4, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out, last = self.inner(x.reshape(len(x), 2, 4))
        return out.flatten(1) + last[0].repeat(1, 2)


LAYERS: list[tuple[Callable[[], nn.Module], Callable[[Any, Tensor, Tensor], Tensor]]] = [
    (partial(nn.Linear, WIDTH, WIDTH), lambda layer, a, b: layer(a)),
    (partial(nn.BatchNorm1d, WIDTH), lambda layer, a, b: layer(a)),
    (Pair, lambda layer, a, b: torch.mul(*layer(a))),
    (Nested, lambda layer, a, b: (lambda out: out["one"] + out["rest"][0] * out["rest"][1])(layer(a))),
    (Keyword, lambda layer, a, b: layer(x=a)),
    (Keyword, lambda layer, a, b: layer(x=a, skip=b)),
    (Counted, lambda layer, a, b: layer(a)),
    (Recurrent, lambda layer, a, b: layer(a)),
    (lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(inplace=True)), lambda layer, a, b: layer(a)),
]


class Scaled(torch.autograd.Function):
    """A user's own function."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x * factor

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0] * ctx.factor, None


def assigned(a: Tensor, b: Tensor) -> Tensor:
    a = a.clone()
    a[:, :4] = b[:, 4:]
    return a


def through_a_view(a: Tensor, b: Tensor) -> Tensor:
    a = a.clone()
    view = a[:, :4]
    view.copy_(b[:, :4] * 2)
    return a


def added_in_place(a: Tensor, b: Tensor) -> Tensor:
    a = a * 1
    a += b
    return F.relu(a, inplace=True)


GLUE: list[Callable[[Any, Tensor, Tensor], Tensor]] = [
    lambda model, a, b: a + b,
    lambda model, a, b: a * b.sigmoid(),
    lambda model, a, b: torch.where(a > 0, a, b),
    lambda model, a, b: torch.cat([a, b], 1)[:, 4:12],
    lambda model, a, b: torch.sub(*torch.stack([a, b]).unbind(0)),
    lambda model, a, b: a.view(-1, 2, 4).transpose(1, 2).reshape(len(a), WIDTH),
    lambda model, a, b: assigned(a, b),
    lambda model, a, b: through_a_view(a, b),
    lambda model, a, b: added_in_place(a, b),
    lambda model, a, b: a.detach() + b,
    lambda model, a, b: a * model.scale,
    lambda model, a, b: a * 2 if a.sum() > 0 else b * 0.5,
    lambda model, a, b: a * float(b.detach().abs().mean().clamp(max=2)),
    lambda model, a, b: a + torch.tensor(b.detach().tolist()).mean(),
    lambda model, a, b: Scaled.apply(a, 1.5),
    lambda model, a, b: a.max(1, keepdim=True).values + b,
    lambda model, a, b: F.softmax(a @ b.t(), -1) @ a,
    lambda model, a, b: F.layer_norm(a, (WIDTH,)),
    lambda model, a, b: torch.einsum("bi,bj->bi", a, b.tanh()),
    lambda model, a, b: torch.stack([row * 0.9 for row in a]),
    lambda model, a, b: a.flatten().view(a.shape) + torch.zeros_like(b),
    lambda model, a, b: a + a.gather(1, b.topk(4, dim=1).indices).mean(1, keepdim=True),
    lambda model, a, b: torch.cat(a.split(4, 1)[::-1], 1),
    lambda model, a, b: a.masked_fill(b < 0, 0.1).t().contiguous().t(),
    lambda model, a, b: model.keep(a),
    lambda model, a, b: b + model.kept,
]


class Program(nn.Module):
    """A model of which the layers, the functions between them and what they work on are drawn from a seed.

    Each takes one or two of the results before, later ones more likely, and makes a new one; some are forgotten.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = random.Random(seed)
        kinds = [draw.randrange(len(LAYERS)) for _ in range(draw.randint(4, 7))]
        self.layers = nn.ModuleList(LAYERS[kind][0]() for kind in kinds)
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, WIDTH))
        self.kept: Any = 0
        self.lines: list[tuple[str, int, float, float]] = []
        for number in range(len(kinds)):
            for _ in range(draw.randint(0, 4)):
                self.lines.append(("glue", draw.randrange(len(GLUE)), draw.random(), draw.random()))
            how = draw.choices(["layer", "without gradients", "checkpointed"], [20, 2, 2])[0]
            how = "layer" if number in (0, len(kinds) - 1) else how
            self.lines.append((how, number, draw.random(), draw.random()))
            if draw.random() < 0.3:
                self.lines.append(("forget", 0, draw.random(), 0.0))
        self.calls = [LAYERS[kind][1] for kind in kinds]

    def keep(self, x: Tensor) -> Tensor:
        """Hold a tensor as an attribute."""
        self.kept = x
        return x

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        made, self.kept = [x * 1.0], 0
        for what, number, first, second in self.lines:
            a, b = (made[int((1 - place * place) * (len(made) - 1))] for place in (first, second))
            if what == "forget":
                del made[int(first * (len(made) - 1)) if len(made) > 1 else 1 :][:1]
                continue
            call = partial(GLUE[number], self) if what == "glue" else partial(self.calls[number], self.layers[number])
            if what == "without gradients":
                with torch.no_grad():
                    made.append(call(a, b))
            elif what == "checkpointed" and not list(self.layers[number].buffers()):
                made.append(checkpoint(call, a, b, use_reentrant=False))
            else:
                made.append(call(a, b))
        return F.mse_loss((made[-1] + made[len(made) // 2]).tanh(), y)
