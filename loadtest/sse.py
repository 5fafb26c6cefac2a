"""Server-sent events out of a stream of bytes, however the reads cut it.

Follows the event stream section of the WHATWG HTML standard
(https://html.spec.whatwg.org/multipage/server-sent-events.html), except that ``id`` and ``retry`` are
dropped: this client never reconnects.
"""

import msgspec

from loadtest.errors import BadAnswer

MAX_EVENT_BYTES = 8 * 1024 * 1024
_BOM = b"\xef\xbb\xbf"


class Event(msgspec.Struct, frozen=True, gc=False):
    r"""One event: its type (empty unless the server named one) and its data, lines joined by ``\n``."""

    kind: str
    data: bytes


class SseParser:
    """Incremental parser of one event stream. Works on bytes, so a read may end inside a character."""

    def __init__(self) -> None:
        self._rest = b""  # an unfinished line
        self._kind = ""
        self._data: list[bytes] = []
        self._data_bytes = 0
        self._skip_newline = False
        self._at_start = True

    def feed(self, data: bytes) -> list[Event]:
        """Return the events that ``data`` completes, in order; an unfinished one waits for the next call.

        Raises: BadAnswer once a single event is larger than ``MAX_EVENT_BYTES``.
        """
        if self._skip_newline and data:
            # The last read ended in a carriage return, whose line was taken as finished.
            data = data.removeprefix(b"\n")
            self._skip_newline = False
        buffer = self._rest + data
        if self._at_start:
            if len(buffer) < len(_BOM) and _BOM.startswith(buffer):
                self._rest = buffer
                return []
            buffer = buffer.removeprefix(_BOM)
            self._at_start = False
        lines = buffer.splitlines(keepends=True)
        self._rest = b""
        if lines and not lines[-1].endswith((b"\n", b"\r")):
            self._rest = lines.pop()
        if not self._rest and buffer.endswith(b"\r"):
            self._skip_newline = True
        if len(self._rest) + self._data_bytes > MAX_EVENT_BYTES:
            raise BadAnswer(f"one server-sent event is larger than {MAX_EVENT_BYTES} bytes")
        events = []
        for line in lines:
            event = self._line(line.rstrip(b"\r\n"))
            if event is not None:
                events.append(event)
        return events

    def _line(self, line: bytes) -> Event | None:
        if not line:
            return self._dispatch()
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if name == b"data":
            self._data.append(value)
            self._data_bytes += len(value)
        elif name == b"event":
            self._kind = value.decode("utf-8", "replace")
        return None  # a comment has an empty name; unknown fields are ignored

    def _dispatch(self) -> Event | None:
        event = Event(self._kind, b"\n".join(self._data)) if self._data else None
        self._kind = ""
        self._data = []
        self._data_bytes = 0
        return event
