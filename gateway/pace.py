"""How fast a line moves, and what a place in it therefore waits (docs/decisions/2026-11-25-admission.md)."""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from typing import NamedTuple

MEMORY = 32
"""Departures after which an old one counts a third."""
MIN_KNOWN = 4
"""Departures before which nothing is foretold."""
MIN_SHARE = 0.05
"""Of a line's pace, that is believed to be left to the least urgent."""
DEVIATIONS = 2.0
"""Standard deviations within which a wait must keep its bound."""
MIN_OVERTAKERS_S = 10.0
"""Arrivals of at least the last so many seconds say how many will overtake."""


class Wait(NamedTuple):
    """A wait to come, as a distribution; waits one after the other add up."""

    mean_s: float
    variance_s2: float

    def then(self, other: Wait) -> Wait:
        """This one and the other after it."""
        return Wait(self.mean_s + other.mean_s, self.variance_s2 + other.variance_s2)

    @property
    def at_most_s(self) -> float:
        """What it will not exceed, but for one time in forty."""
        return self.mean_s + DEVIATIONS * math.sqrt(self.variance_s2)


NO_WAIT = Wait(0.0, 0.0)


class Pace:
    """Mean time between departures from a line while somebody waited in it, younger ones counting more.

    Time in which nobody waits says nothing about how fast a line can move, so it is left out; an interval that is
    still open counts as soon as it is longer than usual.
    """

    def __init__(self) -> None:
        self._num_departed = 0.0
        self._departing_s = 0.0
        self._open_s = 0.0
        self._busy_since_s: float | None = None

    def waits(self, *, somebody: bool) -> None:
        """Whether somebody is in the line from now on. Idempotent."""
        now_s = time.monotonic()
        if self._busy_since_s is not None:
            self._open_s += now_s - self._busy_since_s
        self._busy_since_s = now_s if somebody else None

    def departed(self) -> None:
        """Somebody's turn has come. Call it while the line still counts as busy."""
        self.waits(somebody=self._busy_since_s is not None)
        keep = 1 - 1 / MEMORY
        self._num_departed = self._num_departed * keep + 1
        self._departing_s = self._departing_s * keep + self._open_s
        self._open_s = 0.0

    @property
    def per_s(self) -> float:
        """Departures per second; infinite without a history."""
        if self._num_departed < MIN_KNOWN * (1 - MIN_KNOWN / 2 / MEMORY):
            return math.inf
        open_s = self._open_s
        if self._busy_since_s is not None:
            open_s += time.monotonic() - self._busy_since_s
        interval_s = self._departing_s / self._num_departed
        interval_s = max(interval_s, (self._departing_s + open_s) / (self._num_departed + 1))
        return 1 / interval_s if interval_s > 0 else math.inf

    def wait(self, num_departures: int, overtaking_per_s: float) -> Wait:
        """Until so many have departed, while others come and go before them.

        The busy period of a queue whose arrivals and departures are as random as can be (Poisson); and since no more
        than the last `MEMORY` departures tell the pace, the pace itself is known only so well.
        """
        per_s = self.per_s
        if num_departures == 0 or math.isinf(per_s):
            return NO_WAIT
        overtaking_per_s = min(overtaking_per_s, per_s * (1 - MIN_SHARE))
        share_per_s = per_s - overtaking_per_s
        randomness = (per_s + overtaking_per_s) / share_per_s
        mean_s = num_departures / share_per_s
        misjudged_s = mean_s * per_s / share_per_s / math.sqrt(2 * MEMORY - 1)
        return Wait(mean_s, num_departures * randomness / share_per_s**2 + misjudged_s**2)


class Arrivals:
    """Who came lately, by priority: those who come next will overtake the less urgent in the same measure.

    Args:
        foresight_s: how far ahead is asked; as far back it looks.
    """

    def __init__(self, foresight_s: float) -> None:
        self._window_s = max(MIN_OVERTAKERS_S, foresight_s)
        self._came: deque[tuple[float, int]] = deque()
        self._num_came: Counter[int] = Counter()  # of those, by priority

    def came(self, priority: int) -> None:
        """A request was let in."""
        self._came.append((time.monotonic(), priority))
        self._num_came[priority] += 1
        self._forget()

    def more_urgent_per_s(self, priority: int) -> float:
        """Arrivals per second of what would be served before this priority."""
        self._forget()
        return sum(number for other, number in self._num_came.items() if other < priority) / self._window_s

    def _forget(self) -> None:
        oldest_s = time.monotonic() - self._window_s
        while self._came and self._came[0][0] < oldest_s:
            _, priority = self._came.popleft()
            self._num_came[priority] -= 1
            if not self._num_came[priority]:
                del self._num_came[priority]
