"""What the mailbox asks of its sockets beyond sending and receiving."""

import os
import socket
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

__all__ = ["keep_alive", "own_address", "own_host", "send_at_once", "shut", "within_host"]


def shut(connection: Connection, how: int) -> None:
    """Shut one direction of a connection, for all processes that hold it.

    Args:
        connection: The connection.
        how: ``socket.SHUT_WR``: what has been sent still arrives. ``socket.SHUT_RD``: who reads here hears its end.
    """
    with socket.socket(fileno=os.dup(connection.fileno())) as view:
        view.shutdown(how)


def keep_alive(connection: Connection) -> None:
    """Notice within half a minute that a host went away without closing its connections."""
    with socket.socket(fileno=os.dup(connection.fileno())) as view:
        view.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
            if hasattr(socket, name):
                view.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def send_at_once(connection: Connection) -> None:
    """Send small messages at once.

    Otherwise the second of two waits until the other side has confirmed the first (Nagle's algorithm), which the other
    side puts off by up to 40 ms (delayed acknowledgement).
    """
    with socket.socket(fileno=os.dup(connection.fileno())) as view:
        view.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def within_host(connection: Connection) -> bool:
    """Whether a connection is one within a host, of a kind that there is only there."""
    with socket.socket(fileno=os.dup(connection.fileno())) as view:
        return view.family != socket.AF_INET


def own_address() -> str:
    """The address under which other hosts reach this one: the one that faces the main host."""
    probe = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    try:
        probe.connect((os.environ.get("MASTER_ADDR", "127.0.0.1"), 9))
        return str(probe.getsockname()[0])
    except OSError:
        return "127.0.0.1"
    finally:
        probe.close()


def own_host() -> tuple[str, ...]:
    """Tells hosts apart, and containers with networks of their own within a host."""
    parts = [socket.gethostname()]
    with suppress(OSError):  # where there is no Linux
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/net")]
    return tuple(parts)
