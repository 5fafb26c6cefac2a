"""How often a crashed service is started again."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """After each crash a doubling pause; after `max_crashes` within `window_s` no more.

    Attributes:
        first_pause_s: before the first restart.
        max_pause_s: where doubling ends.
        max_crashes: crashes within the window that are answered with a restart.
        window_s: older crashes are forgotten.
    """

    first_pause_s: float = 0.5
    max_pause_s: float = 15.0
    max_crashes: int = 5
    window_s: float = 300.0


@dataclass(slots=True)
class CrashHistory:
    """The crashes of one service under a policy."""

    policy: RestartPolicy
    _times_s: deque[float] = field(default_factory=deque)

    def pause_after_crash(self, now_s: float) -> float | None:
        """Note a crash; the seconds to wait before the restart, or None when it has crashed too often."""
        while self._times_s and self._times_s[0] < now_s - self.policy.window_s:
            self._times_s.popleft()
        self._times_s.append(now_s)
        crashes = len(self._times_s)
        if crashes > self.policy.max_crashes:
            return None
        return float(min(self.policy.max_pause_s, self.policy.first_pause_s * 2 ** (crashes - 1)))
