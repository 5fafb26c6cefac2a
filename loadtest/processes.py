"""Several client processes that share one load, for more streams than one event loop can follow."""

import asyncio
import contextlib
import multiprocessing
import signal
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from loadtest.errors import LoadTestError
from loadtest.measure import Measurement, clock, measure
from loadtest.preflight import Target
from loadtest.record import Tally
from loadtest.server import Server
from loadtest.settings import Settings
from loadtest.workload import Share

_START_AHEAD_S = 2.0
"""Time for new processes to import what they need; the measured phase of all begins together after it."""
_TELL_S = 0.5


async def measure_together(
    settings: Settings,
    target: Target,
    *,
    tally: Tally,
    on_stoppable: Callable[[Callable[[], None]], None],
    on_start: Callable[[float], None],
) -> list[Measurement]:
    """Run the measured phase in ``settings.processes`` processes and return what each brings home.

    ``on_start`` is told when the phase begins, on ``clock``. Raises: LoadTestError if a process dies.
    """
    context = multiprocessing.get_context("spawn")
    start_at_s = clock() + _START_AHEAD_S
    on_start(start_at_s)
    children = []
    for index in range(settings.processes):
        ours, theirs = context.Pipe()
        share = Share(index, settings.processes)
        process = context.Process(target=_child, args=(theirs, settings, target, share, start_at_s), daemon=True)
        process.start()
        theirs.close()
        children.append((process, ours))

    def stop() -> None:
        for _, pipe in children:
            with contextlib.suppress(OSError):
                pipe.send("stop")

    on_stoppable(stop)
    tallies: dict[int, dict[str, int]] = {}

    def told(index: int, counts: dict[str, int]) -> None:
        tallies[index] = counts
        for name in counts:
            setattr(tally, name, sum(other.get(name, 0) for other in tallies.values()))

    try:
        waits = [_result(pipe, partial(told, at)) for at, (_, pipe) in enumerate(children)]
        return await asyncio.gather(*waits)
    finally:
        for process, pipe in children:
            pipe.close()
            process.terminate()
            await asyncio.to_thread(process.join)


async def _result(pipe: Connection, told: Callable[[dict[str, int]], None]) -> Measurement:
    """Read a child's tallies until its measurement comes."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Measurement] = loop.create_future()

    def read() -> None:
        try:
            message: Any = pipe.recv()
        except (EOFError, OSError):
            loop.remove_reader(pipe.fileno())
            done.set_exception(LoadTestError("a client process died; see its message above"))
            return
        if isinstance(message, Measurement):
            loop.remove_reader(pipe.fileno())
            done.set_result(message)
        else:
            told(message)

    loop.add_reader(pipe.fileno(), read)
    try:
        return await done
    finally:
        with contextlib.suppress(ValueError, OSError):
            loop.remove_reader(pipe.fileno())


def _child(pipe: Connection, settings: Settings, target: Target, share: Share, start_at_s: float) -> None:
    # The terminal interrupts the whole group; the parent says what is to be done about it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(BrokenPipeError):
        pipe.send(asyncio.run(_measure(pipe, settings, target, share, start_at_s)))


async def _measure(
    pipe: Connection, settings: Settings, target: Target, share: Share, start_at_s: float
) -> Measurement:
    server = Server(settings, clock)
    tally = Tally()
    loop = asyncio.get_running_loop()
    stoppers: list[Callable[[], None]] = []

    def stop() -> None:
        loop.remove_reader(pipe.fileno())
        for stopper in stoppers:
            stopper()

    async def tell() -> None:
        while True:
            await asyncio.sleep(_TELL_S)
            pipe.send(tally.counts())

    loop.add_reader(pipe.fileno(), stop)
    try:
        async with asyncio.TaskGroup() as group:
            teller = group.create_task(tell())
            measurement = await measure(
                settings,
                server,
                target,
                tally=tally,
                share=share,
                start_at_s=start_at_s,
                on_stoppable=stoppers.append,
            )
            teller.cancel()
        return measurement
    finally:
        loop.remove_reader(pipe.fileno())
        server.close()
