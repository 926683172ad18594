"""The mailbox by itself: every wait ends when what it waits for cannot come any more."""

import gc
import os
import pickle
import subprocess
import threading
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import connect

from lightning_lwpm.errors import ConfigurationError, LWPMError, PipelineError
from lightning_lwpm.pipeline.mailbox import Mailbox


def _error(run: Any) -> tuple[str, str]:
    try:
        run()
    except LWPMError as error:
        return type(error).__name__, str(error)
    return "", ""


def _one_leaves(rank: int, world: int, wait: str) -> Any:
    mailbox, _ = connect(rank, world)
    mailbox.gather("all here", None)
    if rank == 1:
        mailbox.close()
        time.sleep(2.0)
        return None
    begin = time.monotonic()
    waits = {
        "gather": lambda: mailbox.gather("norms", rank, "the norms of all ranks"),
        "broadcast": lambda: mailbox.broadcast("seed", None, source=1, what="the seed"),
        "take": lambda: mailbox.take("answer", 1, "an answer of rank 1", source=1),
    }
    outcome = _error(waits[wait])
    mailbox.close()
    return (*outcome, time.monotonic() - begin)


@pytest.mark.parametrize("wait", ["gather", "broadcast", "take"])
def test_waiting_for_a_rank_that_has_left(pool: Any, wait: str) -> None:
    outcomes = pool.run(3, _one_leaves, wait, timeout=30)
    for rank in (0, 2):
        kind, text, seconds = outcomes[rank]
        assert kind == "PipelineError" and seconds < 3
        assert "but rank 1 has come to the end of its program" in text
        assert "Call `fit`, `validate`" in text
    assert outcomes[0][1] == outcomes[2][1] or wait != "gather"


def _two_go_on(rank: int, world: int) -> Any:
    mailbox, _ = connect(rank, world)
    mailbox.gather("all here", None)
    if rank == 1:
        mailbox.close()
        time.sleep(2.5)
        return "left"
    other = 2 - rank
    time.sleep(0.5 + rank / 2)
    mailbox.post(other, "word", None, rank)
    mailbox.post(1, "word", None, rank)  # nobody is there to take it
    got = mailbox.take("word", None, "a word of the other", source=other)
    mailbox.close()
    return got


def test_others_may_go_on_without_it(pool: Any) -> None:
    assert pool.run(3, _two_go_on) == [2, "left", 0]


def _configuration(rank: int, world: int) -> Any:
    mailbox, _ = connect(rank, world)
    if rank == 1:
        failure = mailbox.failed("setup", ConfigurationError("leave it at 1"))
        outcome = type(failure).__name__, str(failure)
    else:
        outcome = _error(lambda: mailbox.take("never", None, "what never comes", source=1))
    mailbox.close()
    return outcome


def test_an_error_of_configuration_is_one_on_every_rank(pool: Any) -> None:
    assert pool.run(3, _configuration) == [("ConfigurationError", "rank 1 failed in setup: leave it at 1")] * 3


def _of_a_kind(rank: int, world: int, error: Exception) -> Any:
    mailbox, _ = connect(rank, world)
    try:
        with mailbox.guarded(lambda: "a step"):
            if rank == 1:
                raise error
            mailbox.take("never", None, "what never comes", source=1)
    except LWPMError as failure:
        found = type(failure).__name__, str(failure).partition("\n")[0], isinstance(failure, type(error))
        copied = type(pickle.loads(pickle.dumps(failure)))
    mailbox.close()
    return found, copied is PipelineError


@pytest.mark.parametrize(
    ("error", "caught"),
    [
        (torch.OutOfMemoryError("of 2 GiB"), True),
        (subprocess.CalledProcessError(3, "make"), True),
        (ExceptionGroup("several", [ValueError("one")]), False),
        (ConnectionResetError("in a step"), False),
        (StopIteration("in a step"), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_users_own_exceptions_are_caught_as_such_on_every_rank(pool: Any, error: Exception, caught: bool) -> None:
    words = f"rank 1 failed in a step: {type(error).__name__}: {error}"
    assert pool.run(2, _of_a_kind, error) == [(("PipelineError", words, caught), True)] * 2


def _mailbox_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("lwpm-mailbox")}


def _last_words(rank: int, world: int) -> Any:
    """Rank 0 sends more than its socket holds and closes, while rank 1 sends without pause what nobody takes."""
    before = _mailbox_threads()  # of other tests
    mailbox, _ = connect(rank, world)
    mailbox.gather("all here", None)
    got = 0
    if rank == 0:
        mailbox.post(1, "word", None, bytes(1 << 25))
    else:
        for _ in range(300):
            mailbox.post(0, "chatter", None, bytes(1 << 16))
        got = len(mailbox.take("word", None, "the last words of rank 0", source=0))
    begin = time.monotonic()
    mailbox.close()
    left = _mailbox_threads() - before
    return got, len(left), mailbox.failure, time.monotonic() - begin < 3


def test_what_was_sent_before_the_end_arrives(pool: Any) -> None:
    assert pool.run(2, _last_words) == [(0, 0, None, True), (1 << 25, 0, None, True)]


def _long_alone(rank: int, world: int) -> Any:
    before = _mailbox_threads()
    mailbox, _ = connect(rank, world)
    mailbox.gather("all here", None)
    time.sleep(4 * rank)
    begin = time.monotonic()
    mailbox.close()
    left = _mailbox_threads() - before
    return len(left), mailbox.failure, time.monotonic() - begin < 2


def test_closing_ends_all_threads_while_another_goes_on(pool: Any) -> None:
    assert pool.run(2, _long_alone) == [(0, None, True)] * 2


class _Unreadable:
    def __reduce__(self) -> Any:
        return _refuse, ()


def _refuse() -> None:
    raise ImportError("no such class here")


def _unreadable(rank: int, world: int) -> Any:
    mailbox, _ = connect(rank, world)
    if rank == 0:
        mailbox.post(1, "thing", None, _Unreadable())
        outcome = _error(lambda: mailbox.take("never", None, "what never comes", source=1))
    else:
        outcome = _error(lambda: mailbox.take("thing", None, "a thing of rank 0", source=0))
    mailbox.close()
    return outcome


def test_a_message_that_cannot_be_read(pool: Any) -> None:
    for kind, text in pool.run(2, _unreadable):
        assert kind == "PipelineError"
        assert text.startswith("rank 1 failed in reading a message of rank 0: ImportError: no such class here")


def _handler(rank: int, world: int) -> Any:
    mailbox, _ = connect(rank, world)
    mailbox.handle("?sum", lambda source, key, payload: mailbox.post(source, "sum", key, sum(payload)))
    mailbox.gather("all here", None)
    if rank == 0:
        mailbox.post(1, "?sum", 1, ["a"])
        outcome = _error(lambda: mailbox.take("sum", 1, "the sum of rank 1", source=1))
    else:
        outcome = _error(lambda: mailbox.take("never", None, "what never comes", source=0))
    mailbox.close()
    return outcome


def test_an_answer_that_fails(pool: Any) -> None:
    for kind, text in pool.run(2, _handler):
        assert kind == "PipelineError"
        assert text.startswith("rank 1 failed in answering '?sum' of rank 0: TypeError")


def _forked(rank: int, world: int) -> Any:
    """Rank 1 forks, as a DataLoader does, and dies: its child must not keep the connection open."""
    mailbox, _ = connect(rank, world)
    mailbox.gather("all here", None)
    if rank == 1:
        if os.fork() == 0:
            time.sleep(3.5)
            os._exit(0)
        os._exit(3)
    begin = time.monotonic()
    return (*_error(lambda: mailbox.take("never", None, "what never comes")), time.monotonic() - begin)


def test_a_forked_child_does_not_hide_a_death(pool: Any) -> None:
    (ok, (kind, text, seconds)), (died, _) = pool.outcomes(2, _forked, keep=True, timeout=30)
    assert ok and not died
    assert kind == "PipelineError" and text.startswith("rank 1 died without a word")
    assert seconds < 3


def _garbage(rank: int, world: int) -> Any:
    """What a trainer that has ended leaves: process groups that have been destroyed, in a reference cycle."""
    mailbox, _ = connect(rank, world)
    cycle: list[Any] = [dist.new_group()]
    cycle.append(cycle)
    mailbox.gather("end", None)
    dist.destroy_process_group()
    gc.collect()
    del cycle
    if (child := os.fork()) == 0:
        gc.collect()  # crashed in the destructor of a group
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    mailbox.close()
    return status, gc.isenabled() and not gc.get_freeze_count()


def test_a_forked_child_destroys_no_process_group(pool: Any) -> None:
    """Found by DataLoader workers that crashed now and then, in a process that had trained before."""
    assert pool.run(2, _garbage) == [(0, True)] * 2


def _foreign(rank: int, world: int) -> Any:
    mailbox, _ = connect(rank, world)
    mailbox.gather("all here", None)
    if rank == 0:
        failure = mailbox.failed("something", ValueError("boom"))
        time.sleep(9)
        mailbox.close()
        return str(failure)
    dist.barrier()


def test_a_rank_in_a_foreign_collective_is_ended(pool: Any) -> None:
    (ok, _), (lives, (kind, code, err)) = pool.outcomes(2, _foreign, keep=True, timeout=30)
    assert ok and not lives
    assert (kind, code) == ("Died", "exit code 1")
    assert "the main thread has not listened for 8 s; ending the process: rank 0 failed in something" in err


def test_alone() -> None:
    mailbox = Mailbox(0, 1, lambda value: [value])
    assert mailbox.gather("a", 1) == [1] and mailbox.broadcast("b", 2) == 2
    error = mailbox.failed("forward", ValueError("boom"))
    assert isinstance(error, PipelineError) and "ValueError: boom" in str(error)
    with pytest.raises(PipelineError, match="boom"):
        mailbox.check()
    mailbox.close()
    assert threading.active_count() < 20


def test_waits_of_the_owner_are_counted() -> None:
    mailbox = Mailbox(0, 1, lambda value: [value])
    mailbox.post(0, "word", 1)
    mailbox.take("word", 1, "what is there already")
    assert mailbox.waited == 0 and mailbox.waits is None
    mailbox.waits = []
    done = threading.Event()
    begin = time.perf_counter()
    other = threading.Thread(target=mailbox.take, args=("word", 3, "a wait of another thread"))
    other.start()
    threading.Timer(0.2, mailbox.post, (0, "word", 2)).start()
    mailbox.take("word", 2, "a word")
    threading.Timer(0.1, done.set).start()
    mailbox.wait(done.wait, "an event")
    mailbox.post(0, "word", 3)
    other.join()
    (first, *word), (second, *event) = mailbox.waits
    assert (first, second) == ("a word", "an event")
    assert begin <= word[0] < word[1] <= event[0] < event[1] <= time.perf_counter()
    assert mailbox.waited == sum(end - start for start, end in (word, event))
    assert 0.25 < mailbox.waited < 2
