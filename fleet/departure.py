"""Why and by when a worker leaves, whoever asked: a signal, an operator, or a provider that wants its machine back."""

from __future__ import annotations

import asyncio
import time
from typing import Protocol

from fleet.logs import get_logger
from fleet.messages import MoveReason

_log = get_logger("departure")


class AskToLeave(Protocol):
    """`Departure.ask`, as workers know it."""

    def __call__(self, why: str, *, within_s: float | None = None) -> None:
        """Leave."""


class Departure:
    """One worker's leaving. The first who asks gives the reason; whoever asks for less time gets it.

    Args:
        stop: set by a signal, and by `ask`.
        grace_s: for those who name no time.
    """

    def __init__(self, stop: asyncio.Event, *, grace_s: float) -> None:
        self._stop = stop
        self._grace_s = grace_s
        self._deadline_s: float | None = None
        self.reason = MoveReason.DRAIN

    def ask(self, why: str, *, reason: MoveReason = MoveReason.DRAIN, within_s: float | None = None) -> None:
        """Leave, within this time or the usual grace period. Repetitions change nothing but an earlier deadline."""
        within_s = self._grace_s if within_s is None else max(0.0, within_s)
        deadline_s = time.monotonic() + within_s
        if self._deadline_s is None:
            self.reason = reason
        if self._deadline_s is None or deadline_s < self._deadline_s - 1:
            _log.info("asked to leave", why=why, within_s=round(within_s, 1))
            self._deadline_s = deadline_s
        self._stop.set()

    @property
    def is_asked(self) -> bool:
        """Whether somebody wants the worker to leave."""
        return self._stop.is_set()

    async def wait(self) -> None:
        """Until somebody asks."""
        await self._stop.wait()
        if self._deadline_s is None:
            self.ask("signal")

    @property
    def left_s(self) -> float:
        """Time to go, from `wait` on; never negative. Earlier deadlines that come meanwhile count."""
        return self._grace_s if self._deadline_s is None else max(0.0, self._deadline_s - time.monotonic())
