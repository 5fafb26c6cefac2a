"""An event loop that runs only when it is told to, by a clock and with threads that a test plays."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from heapq import heappop, heappush
from typing import Any

JOB_TURNS = 3
"""A model step or a copy takes as long as so many messages: decoding outruns nobody who wants to move a sequence."""


@dataclass(eq=False)
class _Job:
    """Something that a thread does."""

    future: asyncio.Future[Any]
    work: Callable[[], Any]
    num_left: int = JOB_TURNS


class WorldLoop(asyncio.SelectorEventLoop):
    """An event loop whose threads work when the world says so."""

    def __init__(self) -> None:
        super().__init__()
        self._jobs: list[_Job] = []
        self._stirred = False
        self._timers_s: list[float] = []

    def call_soon(self, *args: Any, **kwargs: Any) -> asyncio.Handle:  # type: ignore[override]
        """As the library's; something is to be done."""
        self._stirred = True
        return super().call_soon(*args, **kwargs)

    def call_at(self, when: float, *args: Any, **kwargs: Any) -> asyncio.TimerHandle:  # type: ignore[override]
        """As the library's; something will be to be done."""
        heappush(self._timers_s, when)
        return super().call_at(when, *args, **kwargs)

    def turn(self) -> bool:
        """Let whatever is due happen; whether anything was."""
        while self._timers_s and self._timers_s[0] <= self.time():
            heappop(self._timers_s)
            self._stirred = True
        if not self._stirred:
            return False
        self.call_soon(self.stop)
        self._stirred = False
        self.run_forever()
        return True

    @property
    def works(self) -> bool:
        """Whether its threads have something to do."""
        return bool(self._jobs)

    def run_in_executor(self, _executor: Any, work: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:  # type: ignore[override]
        """Let it be done after some turns of `work`."""
        future = self.create_future()
        self._jobs.append(_Job(future, partial(work, *args)))
        return future

    def work(self) -> None:
        """The threads get on with what they have to do."""
        for job in list(self._jobs):
            job.num_left -= 1
            if job.num_left:
                continue
            self._jobs.remove(job)
            try:
                job.future.set_result(job.work())
            except Exception as error:  # noqa: BLE001 - whatever it is belongs to who waits
                job.future.set_exception(error)
