"""What libzmq tells of a socket's connections: made, broken, refused."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Final

import zmq
import zmq.asyncio
from zmq.utils.monitor import parse_monitor_message

REFUSED: Final = (
    zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)
"""A handshake failed: the other end has no key, another one, or speaks something else."""
_numbers = count()
"""Of endpoints in this process. Nothing of the socket will do, not even its address in memory: libzmq lets go of an
endpoint a moment after the socket's end, when the next socket may lie where the last one lay."""


class SocketMonitor:
    """Events of one socket, to be asked for. Begin before the socket binds or connects, lest the first be missed."""

    def __init__(
        self, context: zmq.asyncio.Context, sock: zmq.Socket[bytes] | zmq.asyncio.Socket, *, events: int
    ) -> None:
        self._watched = sock
        endpoint = f"inproc://monitor-{next(_numbers)}"
        sock.monitor(endpoint, events)
        self._pair: zmq.Socket[bytes] = zmq.Socket(context, zmq.PAIR)
        self._pair.setsockopt(zmq.LINGER, 0)
        self._pair.connect(endpoint)

    def news(self) -> Iterator[int]:
        """Yield what has happened so far, and end when that was all or the monitor is closed."""
        while not self._pair.closed:
            try:
                message = self._pair.recv_multipart(flags=zmq.NOBLOCK)
            except zmq.Again:
                return
            yield parse_monitor_message(message)["event"]

    def close(self) -> None:
        """End it, before its socket is closed."""
        self._watched.disable_monitor()
        self._pair.close(linger=0)
