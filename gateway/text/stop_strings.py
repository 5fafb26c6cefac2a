"""Stop strings on a stream of text: cut exactly, hold back no more than needed.

The match that begins earliest in the text wins, whatever the order of the stop strings and however the text was cut
into tokens; of two that begin at the same place, the shorter. Text that could still become part of a match is held
back and released when it cannot.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec


class StopMatch(msgspec.Struct, frozen=True):
    """A match, in characters of the whole output: it spans `[start, end)`."""

    start: int
    end: int
    text: str


class StopScanner:
    """State of one output.

    Args:
        stops: the stop strings, none empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._pending = ""
        self._num_released = 0
        self.match: StopMatch | None = None

    def skip(self, text: str) -> str:
        """Let text through unread: a match may not begin in it. Returns what is released."""
        released = self._pending + text
        self._num_released += len(released)
        self._pending = ""
        return released

    def feed(self, text: str) -> str:
        """Add output text; returns what is released. Once `match` is set, text from its start on is gone."""
        if self.match is not None:
            return ""
        self._pending += text
        hold_from = len(self._pending)
        found = self._find()
        if found is not None:
            hold_from = found[0]
        hold_from = self._partial_before(hold_from)
        if found is not None and hold_from >= found[0]:
            return self._settle(*found)
        return self._release(hold_from)

    def finish(self) -> str:
        """The output is over: a match that waited for an earlier one wins, else all held text is released."""
        if self.match is not None:
            return ""
        found = self._find()
        return self._release(len(self._pending)) if found is None else self._settle(*found)

    def _find(self) -> tuple[int, str] | None:
        hits = [(self._pending.find(stop), len(stop), stop) for stop in self._stops]
        found = [hit for hit in hits if hit[0] >= 0]
        if not found:
            return None
        start, _, stop = min(found)
        return start, stop

    def _partial_before(self, limit: int) -> int:
        """The earliest place before `limit` where the pending text could go on to a match, else `limit`."""
        pending = self._pending
        for stop in self._stops:
            place = pending.find(stop[0], max(0, len(pending) - len(stop) + 1), limit)
            while 0 <= place < limit:
                if stop.startswith(pending[place:]):
                    limit = place
                    break
                place = pending.find(stop[0], place + 1, limit)
        return limit

    def _settle(self, start: int, stop: str) -> str:
        begin = self._num_released + start
        self.match = StopMatch(begin, begin + len(stop), stop)
        return self._release(start)

    def _release(self, length: int) -> str:
        released, self._pending = self._pending[:length], self._pending[length:]
        self._num_released += length
        return released
