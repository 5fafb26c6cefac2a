"""Requests of one model that wait for the same thing: most urgent first, interrupted ones before new ones."""

from __future__ import annotations

import itertools
import time
from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator
from typing import NamedTuple

from gateway.live import LiveRequest
from gateway.pace import Pace


class _Place(NamedTuple):
    priority: int
    minus_epoch: int
    arrival: int


class _Waiting(NamedTuple):
    place: _Place
    live: LiveRequest
    since_s: float


def _place(waiting: _Waiting) -> _Place:
    return waiting.place


class Line:
    """See the module.

    Attributes:
        pace: how fast it moves.
    """

    def __init__(self) -> None:
        self.pace = Pace()
        self._arrivals = itertools.count()
        self._waiting: list[_Waiting] = []
        self._places: dict[str, _Place] = {}
        self._halted = False

    def __len__(self) -> int:
        """How many wait."""
        return len(self._waiting)

    def enter(self, live: LiveRequest) -> None:
        """Take a place. Requires: it has none here."""
        place = _Place(live.passport.priority, -live.epoch, next(self._arrivals))
        self._places[live.request_id] = place
        insort(self._waiting, _Waiting(place, live, time.monotonic()), key=_place)
        self._tell_pace()

    def leave(self, live: LiveRequest, *, served: bool = False) -> None:
        """Give the place up, or have its turn if `served`. Idempotent."""
        place = self._places.pop(live.request_id, None)
        if place is None:
            return
        if served:
            self.pace.departed()
        del self._waiting[bisect_left(self._waiting, place, key=_place)]
        self._tell_pace()

    def halt(self, halted: bool) -> None:
        """Nobody is there to serve it, which says nothing about its pace. Idempotent."""
        if halted != self._halted:
            self._halted = halted
            self._tell_pace()

    def _tell_pace(self) -> None:
        self.pace.waits(somebody=bool(self._waiting) and not self._halted)

    @property
    def first(self) -> LiveRequest | None:
        """Whose turn is next."""
        return self._waiting[0].live if self._waiting else None

    def num_ahead(self, priority: int, epoch: int = 0) -> int:
        """Those that a newcomer would wait for."""
        newcomer = (priority, -epoch + 1)
        return bisect_left(self._waiting, newcomer, key=lambda waiting: waiting.place[:2])

    def less_urgent(self, priority: int) -> Iterator[LiveRequest]:
        """Those behind this priority, last one first."""
        begin = bisect_right(self._waiting, priority, key=lambda waiting: waiting.place.priority)
        return (waiting.live for waiting in reversed(self._waiting[begin:]))

    def here_before(self, time_s: float) -> list[LiveRequest]:
        """Those that have waited since before this monotonic time."""
        return [waiting.live for waiting in self._waiting if waiting.since_s <= time_s]
