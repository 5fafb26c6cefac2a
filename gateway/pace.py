"""How fast one model's queue moves, measured at its first tokens."""

from __future__ import annotations

import time
from collections import deque

WINDOW = 64
MAX_WAIT_S = 60.0
MIN_SHARE = 0.05
"""Of the pace, that is believed to be left to the least urgent."""


class Pace:
    """Seconds between first tokens while somebody waited, over the last `WINDOW` of them.

    Whatever holds requests up, prompts to compute or seats to become free, shows in this one figure; and where several
    gateways share the workers, each measures its own share.
    """

    def __init__(self) -> None:
        self._intervals_s: deque[float] = deque(maxlen=WINDOW)
        self._priorities: deque[int] = deque(maxlen=WINDOW)
        self._last_s = time.monotonic()

    @property
    def is_known(self) -> bool:
        """Whether there is a history to judge by."""
        return len(self._intervals_s) >= 2

    def saw_first_token(self, ttft_s: float, priority: int = 0) -> None:
        """A request of this priority got its first token so long after it came."""
        now_s = time.monotonic()
        # Idle time before a request came says nothing about how fast it was served
        self._intervals_s.append(min(now_s - self._last_s, ttft_s))
        self._last_s = now_s
        self._priorities.append(priority)

    def wait_s(self, num_ahead: int, priority: int = 0) -> float:
        """How long a request waits for so many ahead of it, and for those more urgent that will overtake it.

        0 without a history.
        """
        if not self.is_known:
            return 0.0
        overtaking = sum(other < priority for other in self._priorities) / len(self._priorities)
        interval_s = sum(self._intervals_s) / len(self._intervals_s)
        return num_ahead * interval_s / max(MIN_SHARE, 1 - overtaking)

    def retry_after_s(self, num_ahead: int, priority: int = 0) -> float:
        """When those ahead now will have been served: 1 s without a history, never above `MAX_WAIT_S`."""
        return min(MAX_WAIT_S, self.wait_s(num_ahead, priority)) if self.is_known else 1.0
