"""Reads the messages of a fleet out of the bytes of its connections as they pass (ZMTP 3.1, rfc.zeromq.org/spec/37).

Connections without CURVE only. A message is header frame, body frame and payload frames (`fleet.wire`); of payload
frames nothing is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

from fleet.errors import WireError
from fleet.messages import Message, Publication
from fleet.wire import decode

GREETING_BYTES = 64
MORE, LONG, COMMAND = 1, 2, 4
SHORT_HEAD_BYTES, LONG_HEAD_BYTES = 2, 9
NUM_KEPT_FRAMES = 2


class MessageReader:
    """Follows one direction of one connection from its first byte on."""

    def __init__(self) -> None:
        self._left = GREETING_BYTES  # of the greeting, of a frame's head or of its content, whichever is under way
        self._head: bytearray | None = None
        self._content: bytearray | None = None
        self._flags = 0
        self._frames: list[bytes] = []

    def feed(self, data: bytes) -> Iterator[tuple[int, list[bytes]]]:
        """Of each message whose last byte lies in `data`: the position behind it, and its first frames."""
        at = 0
        while at < len(data):
            taken = data[at : at + self._left]
            at += len(taken)
            self._left -= len(taken)
            part = self._head if self._head is not None else self._content
            if part is not None:
                part += taken
            if not self._left and self._part_ends():
                frames, self._frames = self._frames, []
                yield at, frames

    def _part_ends(self) -> bool:
        """Go on to the next part; True if a message ended."""
        if self._head is None:
            return self._frame_ends()
        self._flags = self._head[0]
        if self._flags & LONG and len(self._head) == SHORT_HEAD_BYTES:
            self._left = LONG_HEAD_BYTES - SHORT_HEAD_BYTES
            return False
        self._left = int.from_bytes(self._head[1:], "big")
        keeps = not self._flags & COMMAND and len(self._frames) < NUM_KEPT_FRAMES
        self._head, self._content = None, bytearray() if keeps else None
        return not self._left and self._frame_ends()

    def _frame_ends(self) -> bool:
        if self._content is not None:
            self._frames.append(bytes(self._content))
        self._head, self._content, self._left = bytearray(), None, SHORT_HEAD_BYTES
        ends, self._flags = bool(self._frames) and not self._flags & (COMMAND | MORE), 0
        return ends


def kinds(frames: list[bytes]) -> set[str]:
    """Names of the message and, if it is a Publication, of the events in it; empty for what is no message of ours."""
    message: Message
    with suppress(WireError):
        message, _ = decode(frames)
        events = message.events if isinstance(message, Publication) else []
        return {type(one).__name__ for one in (message, *events)}
    return set()
