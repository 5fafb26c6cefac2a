"""Who may come in: a request whose first token would come too late is refused at once, by what its lines' pace says.

A request without a first token waits in two lines, one after the other: in the waiting room for a worker with room,
and at its prefill worker for its prompt's turn. Both are ordered by priority, so a request waits for those ahead of it
that are as urgent or more so, and for more urgent ones that will come meanwhile.
"""

from __future__ import annotations

import time
from collections import defaultdict

from gateway.errors import Overloaded
from gateway.line import Line
from gateway.live import LiveRequest
from gateway.pace import Arrivals, Wait
from gateway.waiting_room import WaitingRoom

MAX_RETRY_AFTER_S = 60.0


class _Model:
    """What is kept of one model, beside its line in the waiting room."""

    def __init__(self, foresight_s: float) -> None:
        self.prompts = Line()
        self.arrivals = Arrivals(foresight_s)


class Admission:
    """The queue of this gateway: every live request without a first token.

    Args:
        room: where requests wait for workers; shared with the dispatcher.
        max_queued: requests of all models that may wait for their first token.
        max_wait_s: time to the first token beyond which a request is refused; 0: no such bound.
    """

    def __init__(self, room: WaitingRoom, *, max_queued: int, max_wait_s: float) -> None:
        self.room = room
        self._max_queued = max_queued
        self._max_wait_s = max_wait_s
        self._queued: set[str] = set()
        self._models: defaultdict[str, _Model] = defaultdict(lambda: _Model(max_wait_s))

    @property
    def num_queued(self) -> int:
        """Live requests without a first token."""
        return len(self._queued)

    def require_room(self, model: str, priority: int, num_requests: int) -> list[LiveRequest]:
        """Whether so many requests may come in together; returns less urgent ones that must leave for them, if any.

        Those are the last ones: as many as do not fit beside the newcomers, or the one that came lately and would be
        late now that it is overtaken. Who has waited for half of the bound is let through, if late.

        Raises:
            Overloaded: too many wait, or the first of them would be late.
        """
        wait = self._wait(model, priority)
        num_missing = max(0, self.num_queued + num_requests - self._max_queued)
        behind = [live for live in self._less_urgent(model, priority) if live.epoch == 0]
        if len(behind) < num_missing or 0 < self._max_wait_s < wait.at_most_s:
            raise self._refusal(self._num_ahead(model, priority), wait)
        return behind[: max(num_missing, self._is_late(behind[0]))] if behind else []

    def _is_late(self, last: LiveRequest) -> bool:
        """Whether the last one of the queue, which came lately, would not be let in now."""
        came_lately = time.monotonic() - last.created_s < self._max_wait_s / 2
        return came_lately and self._wait(last.passport.model, last.passport.priority).mean_s > self._max_wait_s

    def _wait(self, model: str, priority: int) -> Wait:
        """What a newcomer waits for its first token, beyond what it would alone."""
        seats, prompts = self.room.line(model), self._models[model].prompts
        overtaking_per_s = self._models[model].arrivals.more_urgent_per_s(priority)
        num_ahead = seats.num_ahead(priority)
        num_departures = num_ahead + 1 if num_ahead else 0  # where nobody waits, a seat may be free
        wait = seats.pace.wait(num_departures, overtaking_per_s)
        return wait.then(prompts.pace.wait(prompts.num_ahead(priority), overtaking_per_s))

    def _num_ahead(self, model: str, priority: int) -> int:
        return self.room.line(model).num_ahead(priority) + self._models[model].prompts.num_ahead(priority)

    def _less_urgent(self, model: str, priority: int) -> list[LiveRequest]:
        """Those of the queue that this priority goes before, last one first."""
        lines = (self.room.line(model), self._models[model].prompts)
        behind = [live for line in lines for live in line.less_urgent(priority) if live.request_id in self._queued]
        return sorted(behind, key=lambda live: -live.passport.priority)  # stable: within a priority as they were

    def _refusal(self, num_ahead: int, wait: Wait) -> Overloaded:
        wait_s = min(MAX_RETRY_AFTER_S, wait.mean_s) or 1.0
        return Overloaded(
            f"{num_ahead} requests wait before this one, for about {wait_s:.0f} s; try again later",
            retry_after_s=wait_s,
        )

    def displacement(self, live: LiveRequest) -> Overloaded:
        """The refusal of one that was let in and must leave for a more urgent one."""
        model, priority = live.passport.model, live.passport.priority
        return self._refusal(self._num_ahead(model, priority), self._wait(model, priority))

    def enter(self, live: LiveRequest) -> None:
        """A request waits for its first token from now on."""
        self._queued.add(live.request_id)
        self._models[live.passport.model].arrivals.came(live.passport.priority)

    def sent_off(self, live: LiveRequest) -> None:
        """A prefill worker has it now."""
        self._models[live.passport.model].prompts.enter(live)

    def saw_first_token(self, live: LiveRequest) -> None:
        """Its prompt has had its turn, in this epoch, and it waits no more."""
        self._queued.discard(live.request_id)
        self._models[live.passport.model].prompts.leave(live, served=True)

    def sent_back(self, live: LiveRequest) -> None:
        """No worker has it any more. Idempotent."""
        self.room.leave(live)
        self._models[live.passport.model].prompts.leave(live)

    def leave(self, live: LiveRequest) -> None:
        """It is over. Idempotent."""
        self._queued.discard(live.request_id)
        self.sent_back(live)
