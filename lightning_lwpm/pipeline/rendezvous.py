"""Proves that no rank waits for ever: whether sends and receives meet on a network that buffers nothing.

::

    rank 1   0F0  send  0F1  send  ...  reap         a send completes only once its receive is posted
                   |          |
    rank 0   post post  receive  1F0  receive  1F1   receives are posted ahead, in the sender's order
"""

from collections.abc import Container, Iterable, Sequence
from itertools import chain
from typing import NamedTuple

from lightning_lwpm.pipeline.action import Action, Table, dependencies, present_one
from lightning_lwpm.pipeline.tables import Deadlock, check_table


class Message(NamedTuple):
    """What one action sends to another on a different rank: an activation (F to F), a gradient (B or I to B or I)."""

    producer: Action
    consumer: Action


class _Wait(NamedTuple):
    """One line of a rank's program: ``what`` is "receive", "compute", "send" or "reap" (wait for all sends)."""

    what: str
    action: Action | None = None
    message: Message | None = None


def adjacent(num_stages: int) -> set[tuple[int, int]]:
    """Return the edges of a plain chain: each stage feeds the next."""
    return {(stage, stage + 1) for stage in range(num_stages - 1)}


def channels(
    table: Table, placement: Sequence[int], edges: Iterable[tuple[int, int]] | None = None
) -> dict[tuple[int, int], list[Message]]:
    """List the messages of each (sender, receiver) pair of ranks in the order of sending.

    This is the order in which the receiver must post its receives, and both ends can derive it from the table.

    Args:
        table: The actions of each rank.
        placement: The rank of each stage.
        edges: The (producer, consumer) pairs of stages; each carries activations one way and gradients the other.
            By default those of a chain.
    """
    pairs: dict[tuple[int, int], list[Message]] = {}
    links = sorted(adjacent(len(placement)) if edges is None else set(edges))
    present = frozenset(chain.from_iterable(table))
    for rank, actions in enumerate(table):
        for action in actions:
            for message in _sent(action, links, present):
                receiver = placement[message.consumer.stage]
                if receiver != rank:
                    pairs.setdefault((rank, receiver), []).append(message)
    return pairs


def rendezvous(
    table: Table,
    placement: Sequence[int],
    edges: Iterable[tuple[int, int]] | None = None,
    lookahead: int = 2,
) -> None:
    """Prove that a table's sends and receives all meet, on a network that buffers nothing.

    Args:
        table: The actions of each rank.
        placement: The rank of each stage.
        edges: The (producer, consumer) pairs of stages, as for ``channels``; add pairs such as ``(0, 3)`` for skip
            connections.
        lookahead: Number of receives posted beyond the one that is waited for, per (sender, receiver) pair and in
            the sender's order. Sends are then issued without waiting, and waited for at the end of the step. With 0
            everything blocks instead: a receive is posted when it is needed, and a send waits for it.

    Raises:
        Deadlock: If a rank would wait for ever, or the k-th send of a pair is not what its k-th receive expects
            (NCCL matches by order, not by tag).
        ConfigurationError: If an action comes twice, or not on the rank of its stage.
    """
    check_table(table, placement)
    links = sorted(adjacent(len(placement)) if edges is None else set(edges))
    present = frozenset(chain.from_iterable(table))
    blocking = lookahead == 0
    sends = channels(table, placement, links)
    needs: dict[tuple[int, int], list[Message]] = {}
    programs: list[list[_Wait]] = []
    for rank, actions in enumerate(table):
        program = []
        for action in actions:
            for message in received(action, links, present):
                sender = placement[message.producer.stage]
                if sender != rank:
                    needs.setdefault((sender, rank), []).append(message)
                    program.append(_Wait("receive", action, message))
            program.append(_Wait("compute", action))
            away = (message for message in _sent(action, links, present) if placement[message.consumer.stage] != rank)
            program.extend(_Wait("send", action, message) for message in away)
        programs.append([*program, _Wait("reap")])
    # Receives posted ahead follow the sender's order; receives posted on need, the receiver's.
    expected = {pair: needs[pair] if blocking else _in_order_of(sends.get(pair, []), needs[pair]) for pair in needs}
    _check_order(sends, expected)

    issued = dict.fromkeys(sends, 0)
    posted = {pair: min(lookahead, len(sends[pair])) for pair in sends}
    numbers = {message: number for messages in sends.values() for number, message in enumerate(messages)}
    computed: set[Action] = set()
    done = [0] * len(table)

    def passes(rank: int, wait: _Wait) -> bool:
        """Do what the line says, as far as possible; whether the rank may go on to the next one."""
        if wait.what == "reap":
            return all(posted[pair] >= issued[pair] for pair in issued if pair[0] == rank)
        if wait.what == "compute":
            assert wait.action is not None
            local = (s for s in dependencies(wait.action, len(placement), present) if placement[s.stage] == rank)
            if not computed.issuperset(local):
                return False
            computed.add(wait.action)
            return True
        assert wait.message is not None
        pair, number = _pair(wait.message, placement), numbers[wait.message]
        if wait.what == "receive":
            posted[pair] = max(posted[pair], min(number + 1 + lookahead, len(sends[pair])))
            return issued[pair] > number
        issued[pair] = max(issued[pair], number + 1)
        return not blocking or posted[pair] > number

    progress = True
    while progress:
        progress = False
        for rank, program in enumerate(programs):
            while done[rank] < len(program) and passes(rank, program[done[rank]]):
                done[rank] += 1
                progress = True
    stuck = [(rank, program[done[rank]]) for rank, program in enumerate(programs) if done[rank] < len(program)]
    if stuck:
        raise Deadlock("; ".join(_explain(rank, wait, placement) for rank, wait in stuck))


def _sent(action: Action, links: Sequence[tuple[int, int]], present: Container[Action]) -> list[Message]:
    kind, stage, microbatch = action
    if kind == "W":
        return []
    if kind == "F":
        return [Message(action, Action("F", consumer, microbatch)) for producer, consumer in links if producer == stage]
    takers = [Action(kind, producer, microbatch) for producer, consumer in links if consumer == stage]
    return [Message(action, present_one(taker, present)) for taker in takers]


def received(action: Action, links: Sequence[tuple[int, int]], present: Container[Action] = ()) -> list[Message]:
    """The messages that an action waits for, those of its own rank among them.

    Args:
        action: The action.
        links: The (producer, consumer) pairs of stages.
        present: All actions, where a table has some backward passes whole and others in two parts.
    """
    kind, stage, microbatch = action
    if kind == "W":
        return []
    if kind == "F":
        return [Message(Action("F", producer, microbatch), action) for producer, consumer in links if consumer == stage]
    givers = [Action(kind, consumer, microbatch) for producer, consumer in links if producer == stage]
    return [Message(present_one(giver, present), action) for giver in givers]


def _pair(message: Message, placement: Sequence[int]) -> tuple[int, int]:
    return placement[message.producer.stage], placement[message.consumer.stage]


def _in_order_of(sent: list[Message], needed: list[Message]) -> list[Message]:
    position = {message: number for number, message in enumerate(sent)}
    return sorted(needed, key=lambda message: position.get(message, len(sent)))


def _check_order(sends: dict[tuple[int, int], list[Message]], receives: dict[tuple[int, int], list[Message]]) -> None:
    for pair in sorted(sends.keys() | receives.keys()):
        sender, receiver = pair
        sent, expected = sends.get(pair, []), receives.get(pair, [])
        for got in sorted(set(expected) - set(sent)):
            raise Deadlock(f"rank {receiver} waits in {got.consumer} for {got.producer}, never sent by rank {sender}")
        for got in sorted(set(sent) - set(expected)):
            raise Deadlock(f"rank {sender} sends {got.producer} for {got.consumer}, never received by rank {receiver}")
        for number, (got, wanted) in enumerate(zip(sent, expected, strict=True)):
            if got != wanted:
                raise Deadlock(
                    f"message {number} from rank {sender} to rank {receiver} is {got.producer} for {got.consumer}, "
                    f"but the receiver expects {wanted.producer} for {wanted.consumer}"
                )


def _explain(rank: int, wait: _Wait, placement: Sequence[int]) -> str:
    if wait.what == "reap":
        return f"rank {rank} waits at the end of the step for its sends to be received"
    if wait.message is None:
        return f"rank {rank} waits in {wait.action} for an action that its list has only later, or not at all"
    sender, receiver = _pair(wait.message, placement)
    if wait.what == "receive":
        return f"rank {rank} waits in {wait.action} to receive {wait.message.producer} from rank {sender}"
    return f"rank {rank} waits after {wait.action} for rank {receiver} to post its receive for {wait.message.consumer}"
