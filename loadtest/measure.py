"""The measured phase as one process sees it."""

import asyncio
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np

from loadtest.arrivals import arrival_times, merged, profile_times
from loadtest.client import Client
from loadtest.health import LagMonitor, quiet_collector
from loadtest.preflight import Target
from loadtest.record import Record, Tally
from loadtest.runner import Limit, Runner
from loadtest.server import Server
from loadtest.settings import Settings
from loadtest.traces import Entry, read_trace, scaled
from loadtest.workload import Share, Workload

clock = time.perf_counter
"""Monotonic, and the same in all processes of a machine."""


class Measurement(msgspec.Struct, frozen=True, kw_only=True):
    """What one process brings home. ``lags_s`` are samples of its event loop's lag, seconds."""

    records: list[Record]
    lags_s: Sequence[float]
    cpu_share: float
    num_unsent: int
    peak_running: int
    stopped: bool


async def measure(
    settings: Settings,
    server: Server,
    target: Target,
    *,
    tally: Tally,
    share: Share | None = None,
    start_at_s: float | None = None,
    on_stoppable: Callable[[Callable[[], None]], None] = lambda _: None,
) -> Measurement:
    """Send the load, or our share of it, and wait for the last answer.

    Args:
        settings: of the run.
        server: to send to.
        target: what the preflight found.
        tally: kept up to date on the way.
        share: which requests are ours; None: all.
        start_at_s: when the phase begins on ``clock``; None: now.
        on_stoppable: is handed a function that ends the phase early.
    """
    share = share or Share()
    trace: list[Entry] = []
    if settings.trace is not None:
        trace = scaled(read_trace(Path(settings.trace)), speed=settings.trace_speed, scale=settings.trace_scale)
    workload = Workload(settings, server, target.model, target.dialect, target.sizes, share=share, trace=trace)
    total = settings.num_requests
    limit = Limit(None if total is None else share.count_of(total), settings.duration_s)
    with quiet_collector():  # before the clock starts: collecting may take a while
        start_at_s = clock() if start_at_s is None else start_at_s
        client = Client(server, tally, clock, start_at_s, settings.timeout_s)
        runner = Runner(client, workload, limit)
        on_stoppable(runner.stop)
        await asyncio.sleep(max(0.0, start_at_s - clock()))
        monitor = LagMonitor(clock)
        async with asyncio.TaskGroup() as group:
            watcher = group.create_task(monitor.watch())
            await _load(settings, runner, share, trace)
            watcher.cancel()
    return Measurement(
        records=client.records,
        lags_s=monitor.lags_s,
        cpu_share=monitor.cpu_share(),
        num_unsent=runner.num_unsent,
        peak_running=tally.peak_running,
        stopped=runner.stopped,
    )


async def _load(settings: Settings, runner: Runner, share: Share, trace: Sequence[Entry]) -> None:
    if not settings.open_loop:
        users = share.count_of(settings.concurrency or 1)
        if users:
            await runner.closed_loop(users)
        return
    ours = itertools.islice(arrivals_of(settings, trace), share.index, None, share.of)
    cap = settings.concurrency
    await runner.open_loop(ours, None if cap is None else max(1, share.count_of(cap)))


def arrivals_of(settings: Settings, trace: Sequence[Entry]) -> Iterator[float]:
    """Yield the arrival times of an open loop, seconds after the start."""
    if trace:
        return (entry.at_s for entry in trace)
    rng = np.random.default_rng(settings.seed)
    streams = []
    if settings.rate is not None:
        streams.append(arrival_times(settings.rate, settings.burstiness, rng))
    if settings.profile is not None:
        streams.append(profile_times(settings.profile, settings.burstiness, rng))
    if settings.burst is not None:
        streams.append(settings.burst.times())
    return merged(*streams)
