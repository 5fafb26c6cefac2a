"""Whether the client itself distorted what it measured."""

import asyncio
import contextlib
import gc
import resource
import time
from array import array
from collections.abc import Iterator, Sequence

import msgspec

from loadtest.connection import Clock
from loadtest.metrics import Distribution, distribution
from loadtest.record import Record

_INTERVAL_S = 0.010
_LAG_LIMIT_S = 0.005
_LAG_SHARE = 0.10
_SEND_DELAY_LIMIT_S = 0.010
_CPU_LIMIT = 0.90


class ClientHealth(msgspec.Struct, frozen=True, kw_only=True):
    """The client's own share in the figures.

    ``loop_lag_s``: how late the event loop woke a timer, sampled each 10 ms; every time stamp may be late by
    about as much (up to 1 ms of it is the timer's own grain). ``send_delay_s``: from when a request was due
    to when it was sent, without the wait for the concurrency cap, which is ``held_s`` (requests held only).
    ``cpu_share``: processor time of this process per second of run. ``problems`` is empty for a run to
    trust.
    """

    loop_lag_s: Distribution | None
    send_delay_s: Distribution | None
    held_s: Distribution | None
    num_unsent: int
    cpu_share: float
    problems: list[str]


class LagMonitor:
    """Samples the lag of the running event loop and the processor time of this process."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._started_s = clock()
        self._cpu_started_s = time.process_time()
        self.lags_s = array("d")

    async def watch(self) -> None:
        """Sample until cancelled."""
        while True:
            due_s = self._clock() + _INTERVAL_S
            await asyncio.sleep(_INTERVAL_S)
            self.lags_s.append(max(0.0, self._clock() - due_s))

    def cpu_share(self) -> float:
        """Return this process's time on a processor per second since the start."""
        elapsed_s = self._clock() - self._started_s
        return (time.process_time() - self._cpu_started_s) / elapsed_s if elapsed_s > 0 else 0.0


def judge(
    records: Sequence[Record], *, lags_s: Sequence[float], cpu_share: float, num_unsent: int, itl_p50_s: float | None
) -> ClientHealth:
    """Judge a run; ``itl_p50_s`` tells how much lag matters, ``cpu_share`` is that of the busiest process."""
    lag = distribution(lags_s)
    delay = distribution(max(0.0, r.sent_s - r.scheduled_s - r.held_s) for r in records)
    return ClientHealth(
        loop_lag_s=lag,
        send_delay_s=delay,
        held_s=distribution(r.held_s for r in records if r.held_s > 0),
        num_unsent=num_unsent,
        cpu_share=cpu_share,
        problems=find_problems(lag, delay, cpu_share, itl_p50_s),
    )


def find_problems(
    lag: Distribution | None, delay: Distribution | None, cpu_share: float, itl_p50_s: float | None
) -> list[str]:
    """Return a sentence for each way in which the client distorted the run.

    Lag counts from 5 ms at p99, or from a tenth of the median ITL where that is more; a send delay from
    10 ms at p99; processor time from 90 % of a core, the most that one event loop has.
    """
    problems = []
    lag_limit_s = max(_LAG_LIMIT_S, _LAG_SHARE * (itl_p50_s or 0.0))
    if lag is not None and lag.p99 > lag_limit_s:
        problems.append(f"the event loop was {lag.p99 * 1e3:.1f} ms late at p99 (limit {lag_limit_s * 1e3:.1f} ms)")
    if delay is not None and delay.p99 > _SEND_DELAY_LIMIT_S:
        problems.append(f"requests were sent {delay.p99 * 1e3:.1f} ms late at p99 (limit 10 ms)")
    if cpu_share > _CPU_LIMIT:
        problems.append(f"this process used {cpu_share:.0%} of a core")
    return problems


@contextlib.contextmanager
def quiet_collector() -> Iterator[None]:
    """Keep the garbage collector from pausing the measured phase: leave out what is alive, look seldom."""
    thresholds = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 50, 100)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()


def raise_file_limit() -> int:
    """Let this process open as many sockets as the system allows it; return that number."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        # Some systems call the limit infinite and still refuse it.
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            return hard
    return soft
