"""Small models, each of which holds one difficulty for a step that is cut into stages."""

import random
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

WIDTH = 16


def block(width: int = WIDTH) -> nn.Sequential:
    """A layer of two products."""
    return nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))


class Residual(nn.Module):
    """Blocks around which the input goes on: every value is used twice."""

    def __init__(self, depth: int = 5) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(block() for _ in range(depth))
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        for inner in self.blocks:
            x = x + inner(x)
        return self.head(x)


class UNet(nn.Module):
    """What the first stage makes, the last one needs, with pooling and interpolation between layers."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 8, 3, padding=1)])
        self.mid = nn.Conv2d(8, 8, 3, padding=1)
        self.up = nn.ModuleList([nn.Conv2d(16, 4, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)])
        self.head = nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for layer in self.down:
            x = F.relu(layer(x))
            skips.append(x)
            x = F.max_pool2d(x, 2)
        x = F.relu(self.mid(x))
        for layer in self.up:
            x = F.interpolate(x, scale_factor=2)
            x = F.relu(layer(torch.cat([x, skips.pop()], dim=1)))
        return self.head(x)


class Tied(nn.Module):
    """One weight is the embedding and the head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, WIDTH)
        self.blocks = nn.ModuleList(block() for _ in range(3))
        self.head = nn.Linear(WIDTH, 20, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for inner in self.blocks:
            x = x + inner(x)
        return self.head(x)


class Siamese(nn.Module):
    """The same tower is called for two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Sequential(block(), nn.ReLU(), block())
        self.head = nn.Linear(2 * WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([self.tower(x), self.tower(x.flip(1))], dim=1))


class Recurrence(nn.Module):
    """One cell in a loop, with state handed on as a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(4, WIDTH)
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for part in x.chunk(4, dim=1):
            state = self.cell(part, state)
        return self.head(state[0])


class GatesBefore(nn.Module):
    """Modules that use a weight and change a buffer before their first layer, at which a stage may begin."""

    class Gate(nn.Module):
        def __init__(self, counts: bool) -> None:
            super().__init__()
            self.mask = nn.Parameter(torch.zeros(WIDTH))
            self.gate = nn.Sigmoid()
            self.norm = nn.LayerNorm(WIDTH)
            if counts:
                self.register_buffer("count", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            if hasattr(self, "count"):
                self.count += 1
            return self.norm(x * self.gate(self.mask) * 2.0)

    def __init__(self) -> None:
        super().__init__()
        self.inlet, self.middle, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4)
        self.first, self.shared = self.Gate(True), self.Gate(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.shared(self.first(self.inlet(x)))
        return self.head(self.shared(self.middle(x).tanh()))


class Momentum(nn.Module):
    """A second network that follows the first: the step itself changes weights, in two ways."""

    def __init__(self) -> None:
        super().__init__()
        self.fast = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.slow = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2)).requires_grad_(False)
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for layer in self.fast:
            y = y + layer(y).tanh()
        with torch.no_grad():
            for layer in self.slow:
                x = layer(x).tanh()
        for fast, slow in zip(self.fast, self.slow, strict=False):
            slow.weight.data = slow.weight.data * 0.9 + fast.weight.data * 0.1
            slow.bias.data.mul_(0.9).add_(fast.bias.data, alpha=0.1)
        return self.head(y - x)


class Prepared(nn.Module):
    """Weights that a hook makes before each call of their layer (weight and spectral normalisation)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(6))
        for layer in self.layers[1::2]:
            nn.utils.spectral_norm(layer)
        for layer in self.layers[2::2]:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                nn.utils.weight_norm(layer)
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x).tanh()
        return self.head(x)


class RootParameters(nn.Module):
    """Parameters that no layer holds: a class token, a table of positions, a temperature at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.cls = nn.Parameter(torch.randn(1, 1, 4))
        self.positions = nn.Parameter(torch.randn(1, 5, 4))
        self.stem = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(block(4) for _ in range(3))
        self.late = nn.Parameter(torch.randn(4))
        self.temperature = nn.Parameter(torch.tensor(0.7))
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.view(len(x), 4, 4))
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], dim=1) + self.positions
        for i, inner in enumerate(self.blocks):
            x = x + inner(x) * self.scale
            if i == 1:
                x = x * self.late
        return x[:, 0] * self.temperature.exp()


class Normed(nn.Module):
    """Batch normalisation: statistics must see every micro-batch once, in order."""

    def __init__(self, layout: torch.memory_format = torch.contiguous_format) -> None:
        super().__init__()
        self.layout = layout
        self.convs = nn.ModuleList(nn.Conv2d(3 if i == 0 else 6, 6, 3, padding=1) for i in range(4))
        self.norms = nn.ModuleList(nn.BatchNorm2d(6) for _ in range(4))
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(memory_format=self.layout)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(norm(conv(x)), inplace=True)
        return self.head(x.mean(dim=(2, 3)))


class Permuted(nn.Module):
    """Transposed and permuted layouts cross the stages; expand, chunk and split views as well."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.mix = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
        self.out = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.view(len(x), 4, 4)).transpose(1, 2)
        for layer in self.mix:
            left, right = layer(x).chunk(2, dim=-1)
            x = torch.cat([right, left], dim=-1).permute(0, 2, 1) + left.mean(-1, keepdim=True).expand(-1, -1, 4)
        a, b = x.split([1, 3], dim=2)
        return self.out(torch.cat([b, a], dim=2).reshape(len(x), -1))


class InPlace(nn.Module):
    """Values are changed after they were made, through views too; also by layers and before them."""

    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(inplace=True), nn.Linear(WIDTH, WIDTH)) for _ in range(depth)
        )
        self.act = nn.ReLU(inplace=True)
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        kept = x * 2
        for i, inner in enumerate(self.blocks):
            y = inner(x)
            y += x
            y[:, 0] = kept[:, i]
            kept += y
            kept[:, 3:5].mul_(0.5)
            x = self.act(y)
        return self.head(x + kept)


class InPlaceLate(nn.Module):
    """A later stage changes in place, whole and through a view, what an earlier one made."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        total = torch.zeros_like(x) + self.layers[0](x)
        half = total[:, : WIDTH // 2]
        x = total.tanh()
        for layer in self.layers[1:]:
            x = layer(x).sigmoid()
            total += x
            half.mul_(0.9)
        return self.head(total + x)


class Accumulate(nn.Module):
    """Adds to a tensor that it is given, as flows add up their determinants."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(WIDTH, WIDTH)

    def forward(self, z: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        h = self.net(z).tanh()
        total += h.sum(1)
        return z + h, total


class InPlaceConstant(nn.Module):
    """Layers of several stages change a tensor that every rank makes itself, which gets a gradient by that."""

    def __init__(self) -> None:
        super().__init__()
        self.flows = nn.ModuleList(Accumulate() for _ in range(5))
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        z, total = x, torch.zeros(len(x), device=x.device)
        for flow in self.flows:
            z, total = flow(z, total)
        return self.head(z) + total[:, None] * torch.arange(4, device=x.device)


class InPlaceInput(nn.Module):
    """Units change what they are given; the caller goes on with the changed tensor."""

    class Adds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            x += self.inner(y)
            return x

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(self.Adds() for _ in range(4))
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        state = self.stem(x).clone()
        for layer in self.layers:
            before = state.tanh()
            layer(state, before)
            state = state * 1.0
        return self.head(state)


class CrossAttention(nn.Module):
    """An encoder's result is used by every layer of the decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(20, WIDTH), nn.Embedding(20, WIDTH)
        self.encoder = nn.ModuleList(block() for _ in range(2))
        self.query = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.memory = nn.ModuleList(nn.Linear(WIDTH, 2 * WIDTH) for _ in range(2))
        self.head = nn.Linear(WIDTH, 20)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        memory = self.source(source)
        for inner in self.encoder:
            memory = memory + inner(memory)
        x = self.target(target)
        for query, keys in zip(self.query, self.memory, strict=True):
            k, v = keys(memory).chunk(2, dim=-1)
            x = x + F.scaled_dot_product_attention(query(x), k, v)
        return self.head(x)


@dataclass
class Hidden:
    """What travels between the layers of :class:`Structures`."""

    x: Tensor
    skip: Tensor | None = None
    depth: int = 0
    history: list[Tensor] = field(default_factory=list)


class Structures(nn.Module):
    """Layers take and return dicts, tuples, None, dataclasses and plain numbers."""

    class Layer(nn.Module):
        def __init__(self, kind: str) -> None:
            super().__init__()
            self.kind, self.inner = kind, nn.Linear(WIDTH, WIDTH)

        def forward(self, value: Any) -> Any:
            if self.kind == "dict":
                return {"x": self.inner(value), "none": None, "count": 3, "nested": {"y": [value, (value.sum(), 2.5)]}}
            if self.kind == "tuple":
                x = self.inner(value["x"]) * value["count"]
                return x, None, value["nested"]["y"][1][0], "text"
            if self.kind == "dataclass":
                x, nothing, total, text = value
                assert nothing is None and text == "text"
                return Hidden(self.inner(x), skip=x * total, depth=4, history=[x])
            value.x = self.inner(value.x) / value.depth + value.skip
            value.history = [*value.history, value.x]
            return value

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(self.Layer(kind) for kind in ("dict", "tuple", "dataclass", "hidden", "hidden"))
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(torch.stack(x.history).sum(0))


class ControlFlow(nn.Module):
    """Values decide what is done between layers, how often a layer is called, and by what a result is scaled."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.loop = nn.Linear(WIDTH, WIDTH)
        self.left, self.right = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.body = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        gate = x.mean()
        rounds = 1 + int(x.abs().sum().item() * 10) % 3
        for _ in range(rounds):
            x = x + self.loop(x).tanh()
        for layer in self.body:
            x = layer(x)
            if gate > 0:  # the same value is asked on every later stage
                x = x.relu() * (1 + x.max().item())
            elif bool((x > 0).any()):
                x = x.tanh()
        x = self.left(x) if x.sum() > 0 else self.right(x)
        return self.head(x)


class LayerDrop(nn.Module):
    """Python's generator decides which layers are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(block() for _ in range(6))
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for inner in self.blocks:
            if random.random() < 0.7:
                x = x + inner(x)
        return self.head(x)


class Late(nn.Module):
    """A large float input is used in the last stage only, another one in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.side = nn.Linear(600, WIDTH)
        self.head = nn.Linear(WIDTH + 600, 4)

    def forward(self, x: Tensor, middle: Tensor, late: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = layer(x).tanh()
            if i == 1:
                x = x + self.side(middle * 0.5)
        return self.head(torch.cat([x, late.sin()], dim=1))


class Noise(nn.Module):
    """Noise is drawn between layers, as in diffusion; several stages see the same one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.randn_like(x)
        t = torch.rand(len(x), 1, device=x.device)
        x = x * t + noise * (1 - t)
        for layer in self.layers:
            x = layer(x) + 0.1 * torch.randn(x.shape, device=x.device)
            x = F.dropout(x, 0.1, self.training)
        return x - noise


class Mixture(nn.Module):
    """Each expert gets the rows routed to it: shapes depend on values, and the cuts fall among the experts."""

    def __init__(self, experts: int = 4) -> None:
        super().__init__()
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.router = nn.Linear(WIDTH, experts)
        self.experts = nn.ModuleList(block() for _ in range(experts))
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        probabilities = self.router(x).softmax(-1)
        weight, choice = probabilities.topk(2, dim=-1)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows, slot = torch.where(choice == i)
            out.index_add_(0, rows, expert(x[rows]) * weight[rows, slot, None])
        return self.head(x + out)


class Selecting(nn.Module):
    """A layer returns as many rows as values say; their number is used later as a Python number."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> tuple[Tensor, int]:
            x = self.inner(x)
            kept = x[x[:, 0] > -0.3]
            return (kept, len(kept)) if len(kept) else (x, len(x))

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(self.Layer() for _ in range(3))
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        counts = []
        for layer in self.layers:
            x, count = layer(x)
            counts.append(count)
        return self.head(x * x.shape[0]) / sum(counts)


class Checkpointed(nn.Module):
    """The user recomputes blocks in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(block(), nn.LayerNorm(WIDTH)) for _ in range(4))
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        for inner in self.blocks:
            x = x + checkpoint(inner, x, use_reentrant=False)
        x = checkpoint(lambda value: value.tanh().exp(), x, use_reentrant=False)
        return self.head(x)


class Recurrent(nn.Module):
    """torch's own recurrent layers, one handing its state to the next."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, WIDTH)
        self.lstm = nn.LSTM(WIDTH, WIDTH, batch_first=True)
        self.gru = nn.GRU(WIDTH, WIDTH, num_layers=2, batch_first=True)
        self.head = nn.Linear(WIDTH, 20)

    def forward(self, tokens: Tensor) -> Tensor:
        x, (hidden, cell) = self.lstm(self.embedding(tokens))
        x, last = self.gru(x, torch.cat([hidden, cell]))
        return self.head(x + last[-1][:, None])


class Attention(nn.Module):
    """torch's own transformer, with masks made between layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.head = nn.Linear(WIDTH, 20)

    def forward(self, tokens: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1], device=tokens.device)
        x = self.encoder(self.embedding(tokens), mask=mask, is_causal=True)
        attended, weights = self.attention(x, x, x, attn_mask=mask)
        return self.head(x + attended) + weights.mean()


class Unused(nn.Module):
    """Parameters that no step touches, and one of which the use has no effect."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.never = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(block() for _ in range(3))
        self.idle = nn.Parameter(torch.ones(3))
        self.head = nn.Linear(WIDTH, 4)
        self.dropped = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        self.dropped(x)
        return self.head(x)


class Detached(nn.Module):
    """Later stages look at what earlier ones made, without a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(block() for _ in range(4))
        self.aside = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        first = self.layers[0](x)
        side = self.aside(first)
        x = first
        for layer in self.layers[1:]:
            x = layer(x)
        with torch.no_grad():
            scale = side.abs().mean() + 1
        return self.head(x / scale + first.detach())


class StopGradient(nn.Module):
    """The whole first half is cut off from the loss: its parameters get no gradient although they want one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(block() for _ in range(4))
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i == 1:
                x = x.detach()
        return self.head(x)


class Toggled(Residual):
    """What is frozen changes from step to step."""

    def forward(self, x: Tensor, phase: int = 0) -> Tensor:
        for i, inner in enumerate(self.blocks):
            inner.requires_grad_(i % 2 == phase % 2 or phase == 2)
        return super().forward(x)


class Dropping(nn.Module):
    """Dropout in layers and as layers of their own."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(block(), nn.Dropout(p)) for _ in range(4))
        self.drop = nn.Dropout(p)
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + self.drop(layer(x))
        return self.head(x)


class MultiTask(nn.Module):
    """Losses of several heads, of which one hangs on an early stage."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(block() for _ in range(4))
        self.early = nn.Linear(WIDTH, 4)
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.layers[0](x)
        early = self.early(x)
        for layer in self.layers[1:]:
            x = layer(x)
        return early, self.head(x)


class Reversed(torch.autograd.Function):
    """The gradient, turned round."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        return x * 1

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return -gradient * ctx.saved_tensors[0], None


class Adversarial(nn.Module):
    """A function of the user's own, with its own backward, between layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(block() for _ in range(4))
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + Reversed.apply(layer(x), x.detach().abs().mean())
        return self.head(x)


class Hooked(nn.Module):
    """Hooks on values between layers change their gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(block() for _ in range(4))
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
            x.register_hook(lambda gradient: gradient.clamp(-1e-3, 1e-3))
        return self.head(x)
