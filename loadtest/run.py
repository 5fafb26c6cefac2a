"""A bench: one server, looked over once and then measured, once or again and again."""

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta

import msgspec
from rich.console import Console

from loadtest.client import Client
from loadtest.gauges import GaugeWatch, Sample
from loadtest.health import ClientHealth, judge, raise_file_limit
from loadtest.measure import Measurement, clock, measure
from loadtest.metrics import Summary, Targets, summarise
from loadtest.preflight import Target, prepare
from loadtest.processes import measure_together
from loadtest.progress import ProgressView
from loadtest.record import Outcome, Record, Tally
from loadtest.runner import Limit, Runner
from loadtest.server import Server
from loadtest.settings import Settings
from loadtest.workload import Workload

_WARMUP_USERS = 8
_SPARE_FILES = 32


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """Everything a measured phase found. ``records`` are in the order the requests were made."""

    settings: Settings
    target: Target
    started_at: datetime
    interrupted: bool
    peak_running: int
    records: list[Record]
    summary: Summary
    health: ClientHealth
    notes: list[str]
    samples: list[Sample]


class Bench:
    """A server that has been looked over. Made by :func:`opened`."""

    def __init__(self, settings: Settings, server: Server, target: Target, console: Console, notes: list[str]) -> None:
        self._settings = settings
        self._server = server
        self._console = console
        self._notes = notes
        self._stop: list[Callable[[], None]] = []
        self.target = target
        self.stopped = False

    def stop(self) -> None:
        """End the measured phases under way early; they then return what they have. Idempotent."""
        self.stopped = True
        for stop in self._stop:
            stop()

    async def warm_up(self) -> None:
        """Send ``settings.warmup`` requests that are not measured."""
        settings = self._settings
        if not settings.warmup:
            return
        client = Client(self._server, Tally(), clock, clock(), settings.timeout_s)
        target = self.target
        workload = Workload(settings, self._server, target.model, target.dialect, target.sizes, warmup=True)
        runner = Runner(client, workload, Limit(num_requests=settings.warmup))
        await runner.closed_loop(min(settings.concurrency or _WARMUP_USERS, _WARMUP_USERS, settings.warmup))
        failed = [record for record in client.records if record.outcome is not Outcome.OK]
        if failed:
            first = failed[0].error
            self._notes.append(f"{len(failed)} of {settings.warmup} warm-up requests failed, the first: {first}")

    async def measure(self, settings: Settings) -> Result:
        """Run one measured phase. ``settings`` may differ from the bench's in everything but the server."""
        tally = Tally()
        watch = GaugeWatch(self._server, clock)
        view = None
        if settings.progress:
            view = ProgressView(self._console, tally, Limit(settings.num_requests, settings.duration_s), clock)
        started_at = datetime.now(UTC)
        with view or contextlib.nullcontext():
            async with asyncio.TaskGroup() as group:
                watchers = []
                if settings.server_metrics:
                    watchers.append(group.create_task(watch.watch()))
                if view is not None:
                    watchers.append(group.create_task(view.show()))
                if settings.processes == 1:
                    parts = [
                        await measure(settings, self._server, self.target, tally=tally, on_stoppable=self._stop.append)
                    ]
                else:
                    origin_s = clock()

                    def begins(at_s: float) -> None:
                        nonlocal started_at
                        started_at += timedelta(seconds=at_s - origin_s)
                        watch.start_at(at_s)

                    parts = await measure_together(
                        settings, self.target, tally=tally, on_stoppable=self._stop.append, on_start=begins
                    )
                for watcher in watchers:
                    watcher.cancel()
        self._stop.clear()
        return _result(settings, self.target, started_at, parts, [*self._notes], watch.samples)


@contextlib.asynccontextmanager
async def opened(settings: Settings, console: Console) -> AsyncIterator[Bench]:
    """Look a server over: model, dialect, prompt sizes. Raises: SetupError."""
    notes = []
    file_limit = raise_file_limit()
    if settings.concurrency is not None and settings.concurrency > file_limit - _SPARE_FILES:
        notes.append(f"the system allows {file_limit} open files, less than --concurrency needs (ulimit -n)")
    server = Server(settings, clock)
    try:
        target = await prepare(settings, server)
        console.print(f"model {target.model}; prompt sizes: {target.sizes.describe()}", markup=False)
        notes.extend(target.notes)
        yield Bench(settings, server, target, console, notes)
    finally:
        server.close()


async def run(settings: Settings, console: Console) -> Result:
    """Carry out a single run, telling ``console`` how it goes.

    The first interrupt (SIGINT or SIGTERM) during the measured phase ends it early with a result; any other
    cancels this coroutine. Raises: SetupError, asyncio.CancelledError.
    """
    with interrupts() as on_interrupt:
        async with opened(settings, console) as bench:
            await bench.warm_up()
            on_interrupt(bench.stop)
            return await bench.measure(settings)


def _result(
    settings: Settings,
    target: Target,
    started_at: datetime,
    parts: Sequence[Measurement],
    notes: list[str],
    samples: list[Sample],
) -> Result:
    records = sorted((one for part in parts for one in part.records), key=lambda record: (record.index, record.turn))
    summary = summarise(records, targets_of(settings))
    if len(parts) > 1:
        notes.append(f"{len(parts)} client processes; 'at most at once' adds up each one's peak")
    return Result(
        settings=settings,
        target=target,
        started_at=started_at,
        interrupted=any(part.stopped for part in parts),
        peak_running=sum(part.peak_running for part in parts),
        records=records,
        summary=summary,
        health=judge(
            records,
            lags_s=[lag for part in parts for lag in part.lags_s],
            cpu_share=max(part.cpu_share for part in parts),
            num_unsent=sum(part.num_unsent for part in parts),
            itl_p50_s=summary.itl_s.p50 if summary.itl_s is not None else None,
        ),
        notes=notes,
        samples=samples,
    )


def targets_of(settings: Settings) -> Targets:
    """Return the goodput targets that the settings give, in seconds."""

    def seconds(value_ms: float | None) -> float | None:
        return value_ms / 1e3 if value_ms is not None else None

    return Targets(seconds(settings.ttft_ms), seconds(settings.itl_ms), settings.itl_rule)


class _Interrupts:
    """What an interrupt does: cancel the task, unless something gentler is set; that is tried once."""

    def __init__(self, task: "asyncio.Task[object] | None") -> None:
        self._task = task
        self._gentle: Callable[[], None] | None = None

    def __call__(self, gentle: Callable[[], None]) -> None:
        self._gentle = gentle

    def interrupt(self) -> None:
        if self._gentle is not None:
            self._gentle()
            self._gentle = None
        elif self._task is not None:
            self._task.cancel()


@contextlib.contextmanager
def interrupts() -> Iterator[Callable[[Callable[[], None]], None]]:
    """Catch SIGINT and SIGTERM; yields a function that sets what the next one of them calls instead of cancelling."""
    loop = asyncio.get_running_loop()
    handler = _Interrupts(asyncio.current_task())
    taken = []
    for number in (signal.SIGINT, signal.SIGTERM):
        # Only a process's main thread may take signals; elsewhere they stay the caller's.
        with contextlib.suppress(ValueError, RuntimeError):
            loop.add_signal_handler(number, handler.interrupt)
            taken.append(number)
    try:
        yield handler
    finally:
        for number in taken:
            loop.remove_signal_handler(number)
