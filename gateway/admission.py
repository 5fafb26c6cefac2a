"""Who may come in: a request whose first token would come too late is refused at once, by what the queue's pace says.

The queue is every live request without a first token, wherever it waits. It is ordered by priority, so a request sees
only those ahead of it that are as urgent or more so; and where the queue is full, the least urgent one makes place.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left, bisect_right, insort
from collections import defaultdict
from typing import NamedTuple

from gateway.errors import Overloaded
from gateway.live import LiveRequest
from gateway.pace import Pace


class _Place(NamedTuple):
    priority: int
    arrival: int


class Admission:
    """The queue of this gateway by model.

    Args:
        max_queued: requests of all models that may wait for their first token.
        max_wait_s: expected time to the first token beyond which a request is refused; 0: no such bound.
    """

    def __init__(self, *, max_queued: int, max_wait_s: float) -> None:
        self._max_queued = max_queued
        self._max_wait_s = max_wait_s
        self._arrivals = itertools.count()
        self._places: dict[str, _Place] = {}
        self._queues: defaultdict[str, list[tuple[_Place, LiveRequest]]] = defaultdict(list)
        self._paces: defaultdict[str, Pace] = defaultdict(Pace)

    @property
    def num_queued(self) -> int:
        """Live requests without a first token."""
        return len(self._places)

    def require_room(self, model: str, priority: int, num_requests: int) -> list[LiveRequest]:
        """Whether so many requests may come in together; returns less urgent ones that must leave for them, if any.

        Raises:
            Overloaded: too many wait, or those ahead of them take too long.
        """
        queue, pace = self._queues[model], self._paces[model]
        num_ahead = bisect_right(queue, priority, key=lambda entry: entry[0].priority)
        num_missing = max(0, self.num_queued + num_requests - self._max_queued)
        num_leaving = num_requests if self._is_late(pace, len(queue), priority) else num_missing
        displaceable = [live for _, live in reversed(queue[num_ahead:]) if live.epoch == 0]
        if len(displaceable) < num_missing or self._is_late(pace, num_ahead, priority):
            raise self.overloaded(model, priority, num_ahead)
        return displaceable[:num_leaving]

    def _is_late(self, pace: Pace, num_ahead: int, priority: int) -> bool:
        return 0 < self._max_wait_s < pace.wait_s(num_ahead, priority)

    def overloaded(self, model: str, priority: int, num_ahead: int | None = None) -> Overloaded:
        """The refusal of a request that `num_ahead` others stand before; by default all that wait."""
        queue, pace = self._queues[model], self._paces[model]
        num_ahead = len(queue) if num_ahead is None else num_ahead
        wait_s = pace.retry_after_s(num_ahead, priority)
        return Overloaded(
            f"{num_ahead} requests wait before this one, for about {wait_s:.0f} s; try again later",
            retry_after_s=wait_s,
        )

    def enter(self, live: LiveRequest) -> None:
        """A request waits for its first token from now on."""
        place = self._places[live.request_id] = _Place(live.passport.priority, next(self._arrivals))
        insort(self._queues[live.passport.model], (place, live), key=lambda entry: entry[0])

    def saw_first_token(self, live: LiveRequest, ttft_s: float) -> None:
        """It waits no more, and its time tells how fast the queue moves."""
        self.leave(live)
        self._paces[live.passport.model].saw_first_token(ttft_s, live.passport.priority)

    def leave(self, live: LiveRequest) -> None:
        """It waits no more. Idempotent."""
        place = self._places.pop(live.request_id, None)
        if place is not None:
            queue = self._queues[live.passport.model]
            del queue[bisect_left(queue, place, key=lambda entry: entry[0])]
