"""Costs measured by several ranks together, and the speed of their links; all ranks hear the same."""

import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import connect
from pool import Pool
from torch import Tensor, nn

from lightning_lwpm.partition.costs import Costs, Link
from lightning_lwpm.partition.probe import probe
from lightning_lwpm.tuning import link as linking
from lightning_lwpm.tuning import profile as profiling
from lightning_lwpm.tuning.cache import CostCache
from lightning_lwpm.tuning.link import measure_link
from lightning_lwpm.tuning.profile import profile

CPU = torch.device("cpu")
LINK = Link(0.5, 1e3)


class Net(nn.Module):
    """Four kinds of layers, one of them three times."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(4, 8), *[nn.Linear(8, 8) for _ in range(3)], nn.LayerNorm(8), nn.Linear(8, 2)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Touchy(nn.Module):
    """A layer that works in the step only: it wants positive numbers, and tells those that it is given."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        if (x < 0).any():
            raise ValueError("negative")
        return x * self.weight


class Raising(Net):
    def __init__(self) -> None:
        super().__init__()
        self.layers[4] = Touchy(8)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).abs()
        return x


class Unsendable(Net):
    """Gives a layer something that stays in its process."""

    class Locked(nn.Linear):
        def forward(self, x: Tensor, lock: Any = None) -> Tensor:
            assert lock is not None
            with lock:
                return super().forward(x)

    def __init__(self) -> None:
        super().__init__()
        self.layers[4] = self.Locked(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        lock = threading.Lock()
        for layer in self.layers:
            x = layer(x, lock) if isinstance(layer, self.Locked) else layer(x)
        return x


class Token:
    """Can be packed, but not unpacked, as an object of a class that other processes lack."""

    def __reduce__(self) -> Any:
        return (_nothing_here, ())


def _nothing_here() -> None:
    raise ImportError("no such class in this process")


class Unreadable(Net):
    """Gives a layer something that other ranks cannot unpack."""

    class Named(nn.Linear):
        def forward(self, x: Tensor, token: Any = None) -> Tensor:
            assert isinstance(token, Token)
            return super().forward(x)

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(self.Named(width, width + 1) for width in range(4, 10))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, Token())
        return x


def measured(rank: int, world: int, build: Callable[[], nn.Module], folder: str, turns: int = 1) -> Any:
    """Profile a model some times; for each time the costs, and the layers that this rank timed by itself."""
    mailbox, _ = connect(rank, world)
    torch.manual_seed(0)
    net = build()
    seen = probe(net, lambda: net(torch.ones(3, 4)).sum()) if rank == 0 else None
    timed: list[str] = []
    original, chosen = profiling.time_segment, profiling._timers

    def counting(segment: Any, *args: Any, **kwargs: Any) -> Any:
        timed.extend(segment.layers)
        return original(segment, *args, **kwargs)

    profiling.time_segment = counting
    profiling._timers = lambda *_: list(range(world))  # as if each were on a host of its own
    found = []
    try:
        for turn in range(turns):
            timed.clear()
            cache = CostCache("test", Path(folder))
            costs = profile(mailbox, ("turn", turn), seen, net, CPU, True, nullcontext, cache, LINK)
            found.append((costs, list(timed)))
    finally:
        profiling.time_segment, profiling._timers = original, chosen
        mailbox.close()
    return found


def check(costs: Costs) -> None:
    assert costs.link == LINK and len(costs.calls) == 6
    assert all(call.forward > 0 and call.backward > 0 for call in costs.calls)
    assert all(0 <= call.weight <= call.backward for call in costs.calls)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_each_distinct_layer_is_timed_once_by_some_rank(pool: Pool, world: int, tmp_path: Path) -> None:
    results = pool.run(world, measured, Net, str(tmp_path), 2)
    costs = results[0][0][0]
    check(costs)
    assert costs.measured == 6
    assert costs.calls[1] == costs.calls[2], "equal layers cost the same"
    assert costs.calls[0] != costs.calls[1]
    for first, second in results:
        assert first[0] == second[0] == costs, "the same on all ranks, and the second time from the cache"
        assert first[1] and not second[1]
    timed = [name for first, _ in results for name in first[1]]
    assert len(timed) == len(set(timed)) == 4


def test_what_raises_by_itself_is_estimated(pool: Pool, tmp_path: Path) -> None:
    results = pool.run(2, measured, Raising, str(tmp_path))
    costs = results[0][0][0]
    check(costs)
    assert [call.measured for call in costs.calls] == [True] * 4 + [False, True]
    assert results[1][0][0] == costs


def test_what_cannot_be_packed_stays_on_rank_0(pool: Pool, tmp_path: Path) -> None:
    results = pool.run(3, measured, Unsendable, str(tmp_path))
    assert results[0][0][0].measured == 6
    assert "layers.4" in results[0][0][1]
    assert results[1][0][1] or results[2][0][1], "the others time the rest"
    assert len({str(found[0][0]) for found in results}) == 1


def test_what_cannot_be_unpacked_is_no_reason_to_stop(pool: Pool, tmp_path: Path) -> None:
    results = pool.run(3, measured, Unreadable, str(tmp_path))
    costs = results[0][0][0]
    check(costs)
    assert 1 <= costs.measured == len(results[0][0][1]) < 6, "only what rank 0 has timed"
    assert all(found[0][0] == costs for found in results)


def test_hooks_of_the_user_do_not_hear_of_it(pool: Pool, tmp_path: Path) -> None:
    """A layer whose hook keeps what it sees is not timed by itself; it costs what its like does, or an estimate."""
    heard: list[Tensor] = []
    net = Net()
    net.layers[2].register_forward_hook(lambda module, args, out: heard.append(out))
    net.layers[4].register_forward_pre_hook(lambda module, args: heard.append(args[0]))
    ((costs, timed),) = measured(0, 1, lambda: net, str(tmp_path))
    check(costs)
    assert len(heard) == 2, "once each, when the step was looked at"
    assert [call.measured for call in costs.calls] == [True] * 4 + [False, True]
    assert not {"layers.2", "layers.4"} & set(timed)


def test_recomputed_layers_cost_their_forward_pass_twice(tmp_path: Path) -> None:
    from torch.utils.checkpoint import checkpoint

    class Half(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.layers[1](self.layers[0](x))
            return self.layers[5](self.layers[4](checkpoint(self.layers[2:4], x, use_reentrant=False)))

    ((costs, _),) = measured(0, 1, Half, str(tmp_path))
    plain, again = costs.calls[1], costs.calls[2]
    assert again.forward == plain.forward
    assert again.backward == pytest.approx(plain.backward + plain.forward)


def test_generators_are_left_alone(tmp_path: Path) -> None:
    net = Net()
    measured(0, 1, lambda: net, str(tmp_path))  # seeds with 0
    assert torch.equal(torch.get_rng_state(), torch.Generator().manual_seed(0).get_state())


def timers(rank: int, world: int) -> list[list[int]]:
    mailbox, _ = connect(rank, world)
    devices = [CPU, torch.device("cuda", rank), torch.device("cuda", rank // 2)]
    found = [profiling._timers(mailbox, number, device) for number, device in enumerate(devices)]
    mailbox.close()
    return found


def test_one_rank_times_on_each_device(pool: Pool) -> None:
    """The CPU ranks of a host share its memory, and would slow each other down."""
    assert pool.run(3, timers) == [[[0], [0, 1, 2], [0, 2]]] * 3


def link_of(rank: int, world: int) -> list[Link]:
    mailbox, transport = connect(rank, world)
    found = [measure_link(mailbox, transport, turn) for turn in range(2)]
    mailbox.gather("done", None)
    if transport is not None:
        transport.close()
    mailbox.close()
    return found


@pytest.mark.parametrize("world", [2, 3])
def test_links_are_measured_alike_on_all_ranks(pool: Pool, world: int) -> None:
    results = pool.run(world, link_of)
    for link in results[0]:
        assert 0 < link.latency < 1 and 1e6 < link.bytes_per_second < 1e12
        assert link.seconds(1 << 24) > link.seconds(0)
    assert all(found == results[0] for found in results)


def uneven_links(rank: int, world: int) -> Link:
    """The second pair has twice the latency and half the bandwidth of the first."""
    mailbox, transport = connect(rank, world)
    original = linking._turns
    linking._turns = lambda transport, peer, rank: (0.001 * (1 + rank), 0.101 * (1 + rank))
    try:
        return measure_link(mailbox, transport, "uneven")
    finally:
        linking._turns = original
        mailbox.close()


def test_the_slowest_link_counts(pool: Pool) -> None:
    for link in pool.run(3, uneven_links):
        assert (link.latency, link.bytes_per_second) == (pytest.approx(0.002), pytest.approx((2 << 20) / 0.2))


def test_one_rank_has_no_links() -> None:
    assert link_of(0, 1) == [Link(), Link()]
