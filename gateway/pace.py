"""How fast one model's queue moves, measured at its first tokens."""

from __future__ import annotations

import time
from collections import deque

WINDOW = 64
MAX_WAIT_S = 60.0


class Pace:
    """Seconds between first tokens while somebody waited, over the last `WINDOW` of them.

    Whatever holds requests up, prompts to compute or seats to become free, shows in this one figure; and where several
    gateways share the workers, each measures its own share.
    """

    def __init__(self) -> None:
        self._intervals_s: deque[float] = deque(maxlen=WINDOW)
        self._last_s = time.monotonic()

    @property
    def is_known(self) -> bool:
        """Whether there is a history to judge by."""
        return len(self._intervals_s) >= 2

    def saw_first_token(self, ttft_s: float) -> None:
        """A request got its first token so long after it came."""
        now_s = time.monotonic()
        # Idle time before a request came says nothing about how fast it was served
        self._intervals_s.append(min(now_s - self._last_s, ttft_s))
        self._last_s = now_s

    def wait_s(self, num_ahead: int) -> float:
        """How long so many requests take; 0 without a history."""
        if not self.is_known:
            return 0.0
        return num_ahead * sum(self._intervals_s) / len(self._intervals_s)

    def retry_after_s(self, num_ahead: int) -> float:
        """When those ahead now will have been served: 1 s without a history, never above `MAX_WAIT_S`."""
        return min(MAX_WAIT_S, self.wait_s(num_ahead)) if self.is_known else 1.0
