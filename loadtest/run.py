"""A whole run: preflight, warm-up, the measured phase, the result."""

import asyncio
import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime

import msgspec
import numpy as np
from rich.console import Console

from loadtest.arrivals import arrival_times
from loadtest.client import Client
from loadtest.health import ClientHealth, LagMonitor, quiet_collector, raise_file_limit
from loadtest.metrics import Summary, Targets, summarise
from loadtest.preflight import Target, prepare
from loadtest.progress import ProgressView
from loadtest.record import Outcome, Record, Tally
from loadtest.runner import Limit, Runner
from loadtest.server import Server
from loadtest.settings import Settings
from loadtest.workload import Workload

_WARMUP_USERS = 8
_SPARE_FILES = 32
_clock = time.perf_counter


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """Everything a run found. ``records`` are in the order the requests were sent."""

    settings: Settings
    target: Target
    started_at: datetime
    interrupted: bool
    peak_running: int
    records: list[Record]
    summary: Summary
    health: ClientHealth
    notes: list[str]


async def run(settings: Settings, console: Console) -> Result:
    """Carry out a run, telling ``console`` how it goes.

    The first interrupt (SIGINT or SIGTERM) during the measured phase ends it early with a result; any other
    cancels this coroutine. Raises: SetupError, asyncio.CancelledError.
    """
    notes = []
    file_limit = raise_file_limit()
    if settings.concurrency is not None and settings.concurrency > file_limit - _SPARE_FILES:
        notes.append(f"the system allows {file_limit} open files, less than --concurrency needs (ulimit -n)")
    server = Server(settings, _clock)
    with _interrupts(asyncio.current_task()) as on_interrupt:
        try:
            target = await prepare(settings, server)
            console.print(f"model {target.model}; prompt sizes: {target.sizes.describe()}", markup=False)
            notes.extend(target.notes)
            if settings.warmup:
                notes.extend(await _warm_up(settings, server, target))
            return await _measure(settings, server, target, console, notes, on_interrupt)
        finally:
            server.close()


async def _warm_up(settings: Settings, server: Server, target: Target) -> list[str]:
    client = Client(server, Tally(), _clock, _clock(), settings.timeout_s)
    workload = Workload(settings, server, target.model, target.dialect, target.sizes, warmup=True)
    runner = Runner(client, workload, Limit(num_requests=settings.warmup))
    await runner.closed_loop(min(settings.concurrency or _WARMUP_USERS, _WARMUP_USERS, settings.warmup))
    failed = [record for record in client.records if record.outcome is not Outcome.OK]
    if not failed:
        return []
    return [f"{len(failed)} of {settings.warmup} warm-up requests failed, the first: {failed[0].error}"]


async def _measure(
    settings: Settings,
    server: Server,
    target: Target,
    console: Console,
    notes: list[str],
    on_interrupt: "_Interrupts",
) -> Result:
    workload = Workload(settings, server, target.model, target.dialect, target.sizes)
    limit = Limit(settings.num_requests, settings.duration_s)
    tally = Tally()
    view = ProgressView(console, tally, limit, _clock) if settings.progress else None
    with view or contextlib.nullcontext(), quiet_collector():
        started_at = datetime.now(UTC)
        client = Client(server, tally, _clock, _clock(), settings.timeout_s)
        runner = Runner(client, workload, limit)
        monitor = LagMonitor(_clock)
        on_interrupt.call(runner.stop)
        async with asyncio.TaskGroup() as group:
            watchers = [group.create_task(monitor.watch())]
            if view is not None:
                watchers.append(group.create_task(view.show()))
            await _load(settings, runner)
            for watcher in watchers:
                watcher.cancel()
    records = sorted(client.records, key=lambda record: record.index)
    summary = summarise(records, targets_of(settings))
    itl_p50_s = summary.itl_s.p50 if summary.itl_s is not None else None
    return Result(
        settings=settings,
        target=target,
        started_at=started_at,
        interrupted=runner.stopped,
        peak_running=tally.peak_running,
        records=records,
        summary=summary,
        health=monitor.health(records, runner.num_unsent, itl_p50_s),
        notes=notes,
    )


async def _load(settings: Settings, runner: Runner) -> None:
    if settings.rate is None:
        await runner.closed_loop(settings.concurrency or 1)
        return
    rng = np.random.default_rng(settings.seed)
    await runner.open_loop(arrival_times(settings.rate, settings.burstiness, rng), settings.concurrency)


def targets_of(settings: Settings) -> Targets:
    """Return the goodput targets that the settings give, in seconds."""

    def seconds(value_ms: float | None) -> float | None:
        return value_ms / 1e3 if value_ms is not None else None

    return Targets(seconds(settings.ttft_ms), seconds(settings.itl_ms), settings.itl_rule)


class _Interrupts:
    """What an interrupt does: cancel the task, unless something gentler is set; that is tried once."""

    def __init__(self, task: "asyncio.Task[Result] | None") -> None:
        self._task = task
        self._gentle: Callable[[], None] | None = None

    def call(self, gentle: Callable[[], None]) -> None:
        self._gentle = gentle

    def __call__(self) -> None:
        if self._gentle is not None:
            self._gentle()
            self._gentle = None
        elif self._task is not None:
            self._task.cancel()


@contextlib.contextmanager
def _interrupts(task: "asyncio.Task[Result] | None") -> Iterator[_Interrupts]:
    loop = asyncio.get_running_loop()
    handler = _Interrupts(task)
    taken = []
    for number in (signal.SIGINT, signal.SIGTERM):
        # Only a process's main thread may take signals; elsewhere they stay the caller's.
        with contextlib.suppress(ValueError, RuntimeError):
            loop.add_signal_handler(number, handler)
            taken.append(number)
    try:
        yield handler
    finally:
        for number in taken:
            loop.remove_signal_handler(number)
