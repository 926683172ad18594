"""Streams: messages of all sizes both ways at once, in order; what goes wrong is said."""

import random
import socket
import threading
import time

import pytest

from lightning_lwpm.pipeline.streams import Pending, Stream


@pytest.fixture
def pair() -> tuple[Stream, Stream]:
    ours, theirs = socket.socketpair()
    return Stream(ours, "1"), Stream(theirs, "0")


def pending(size: int) -> tuple[Pending, bytearray]:
    """A message that is to come, and where its bytes go."""
    target = bytearray(size)
    return Pending(memoryview(target)), target


def close(*streams: Stream) -> None:
    for stream in streams:
        stream.finish(time.monotonic() + 3)
    for stream in streams:
        stream.close()


@pytest.mark.parametrize("seed", range(8))
def test_messages_of_all_sizes_both_ways(pair: tuple[Stream, Stream], seed: int) -> None:
    """More than the system takes at once, and nobody reads before both have sent everything."""
    draw = random.Random(seed)
    sent = [[draw.randbytes(draw.choice([1, 100, 40_000, 2_000_000])) for _ in range(30)] for _ in pair]
    posted = []
    for stream, expected in zip(pair, reversed(sent), strict=True):
        posted.append([pending(len(message)) for message in expected])
        ahead = draw.randrange(len(expected))
        for one, _ in posted[-1][:ahead]:
            stream.post(one)
        posted[-1].append(ahead)
    for stream, messages in zip(pair, sent, strict=True):
        for message in messages:
            stream.send(memoryview(message))
    for stream, (*coming, ahead), expected in zip(pair, posted, reversed(sent), strict=True):
        order = list(range(ahead))
        draw.shuffle(order)  # who waits need not wait in order
        for one, _ in coming[ahead:]:
            stream.post(one)
        for i in [*order, *range(ahead, len(coming))]:
            assert stream.wait(coming[i][0], 10)
            assert coming[i][1] == expected[i]
            assert stream.wait(coming[i][0], 0)  # and again
    close(*pair)


@pytest.mark.parametrize("size", [10, 100_000])
def test_a_wait_ends_in_time(pair: tuple[Stream, Stream], size: int) -> None:
    ours, theirs = pair
    one, target = pending(size)
    theirs.post(one)
    begin = time.perf_counter()
    assert not theirs.wait(one, 0) and not theirs.wait(one, 0.1)
    assert 0.1 <= time.perf_counter() - begin < 2
    threading.Timer(0.1, ours.send, (memoryview(b"x" * size),)).start()
    assert theirs.wait(one, 5)
    assert target == b"x" * size
    close(*pair)


@pytest.mark.parametrize("size", [10, 100_000])
def test_the_end_of_the_other_side(pair: tuple[Stream, Stream], size: int) -> None:
    ours, theirs = pair
    (first, _), (second, _) = pending(5), pending(size)
    theirs.post(first)
    theirs.post(second)
    ours.send(memoryview(b"hello"))
    close(ours)
    assert theirs.wait(first, 5)  # what was sent before has come
    for _ in range(2):
        with pytest.raises(OSError, match="closed"):
            theirs.wait(second, 5)
    with pytest.raises(OSError):
        for _ in range(2):
            theirs.send(memoryview(b"hello"))
    close(theirs)


@pytest.mark.parametrize("size", [10, 100_000])
def test_ends_that_disagree(pair: tuple[Stream, Stream], size: int) -> None:
    ours, theirs = pair
    one, _ = pending(size)
    theirs.post(one)
    ours.send(memoryview(b"x" * (size + 1)))
    for _ in range(2):
        with pytest.raises(OSError, match=rf"of {size + 1} bytes has come where one of {size} bytes was expected"):
            theirs.wait(one, 5)
    close(*pair)
