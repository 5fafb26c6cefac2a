"""The life of a worker process, from announced to gone; the same for both kinds."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, Protocol

from fleet import reclaim
from fleet.bus import Bus, BusConfig, Delivery
from fleet.departure import Departure
from fleet.lifecycle import calm_collector, give_back_freed_memory
from fleet.logs import get_logger
from fleet.service_settings import WorkerSettings
from fleet.types import WorkerRecord
from fleet.worker_link import WorkerLink

FAREWELL_S = 0.3
"""Between goodbye and the end of the process. Gateways see a broken connection at once, but goodbyes and the words of
those who took over wait their turn in an inbox; who is seen gone before it is heard to leave counts as dead."""

SWITCH_INTERVAL_S = 0.0005
"""How long the step's thread may keep the interpreter while the event loop wants it (Python's own is 5 ms, more than a
small model's step). A hand-off passes the loop several times while its sequence stands still."""

_log = get_logger("service")


class Conduct(Protocol):
    """What differs between workers: how they act on messages and how they leave."""

    def handle(self, delivery: Delivery) -> None:
        """Act on one message."""

    def record(self) -> WorkerRecord:
        """Its registry record with current load."""

    async def drain(self, departure: Departure) -> None:
        """Take nothing new and get rid of what runs, within the time that is left."""


def check(settings: WorkerSettings) -> None:
    """What can be wrong with a worker's settings is told before its model is loaded, which may take minutes.

    Raises:
        SettingsError: they do not fit together; the message names the variable.
    """
    BusConfig.of(settings).check()
    reclaim.check(settings)


async def run_worker(
    conduct: Conduct,
    *,
    bus: Bus,
    link: WorkerLink,
    departure: Departure,
    settings: WorkerSettings,
    parts: Sequence[Coroutine[Any, Any, None]],
    close_hand_offs: Callable[[], Awaitable[object]],
) -> None:
    """Announce the worker, run it until `stop`, drain it, and take it out of the fleet.

    The order of leaving: take nothing new, finish or give back, close hand-offs, stop heartbeats, deregister and say
    goodbye, stop the other tasks. Heartbeats go on until the goodbye, so that nobody takes a draining worker for a dead
    one, and no longer, so that nobody takes a gone one for a new one.

    Args:
        conduct: the worker.
        bus: its inbox.
        link: its way to the gateways.
        departure: asked for by a signal, a DrainRequest, a reclaim notice or at the admin socket.
        settings: of the worker.
        parts: further tasks that run as long as the worker: step loop, hand-offs.
        close_hand_offs: ends what hand-offs are left.

    Raises:
        NameTaken: another live process holds the worker's name.
        SettingsError: the admin socket is not usable.
    """

    async def listen() -> None:
        async for delivery in bus.receive():
            conduct.handle(delivery)

    if settings.admin_address:
        from fleet.admin import serve_admin  # an HTTP server that most workers do without

        parts = [*parts, serve_admin(settings, conduct.record, departure)]

    sys.setswitchinterval(SWITCH_INTERVAL_S)
    calm_collector()
    give_back_freed_memory()
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(part) for part in (listen(), bus.watch_peers(), *parts)]
        introduction, leaving = group.create_task(link.announce()), group.create_task(departure.wait())
        await asyncio.wait((introduction, leaving), return_when=asyncio.FIRST_COMPLETED)
        introduction.cancel()  # who is to leave does not wait for Redis
        announcing = [group.create_task(part) for part in (link.run(), link.beat())]
        tasks.append(group.create_task(reclaim.watch(settings, departure)))
        if not leaving.done():
            _log.info("ready", worker=link.peer.name, address=link.peer.address)
        await leaving
        _log.info("draining", worker=link.peer.name, reason=departure.reason.value)
        await conduct.drain(departure)
        await close_hand_offs()
        for task in announcing:
            task.cancel()
        await asyncio.wait(announcing)
        await link.leave()
        await asyncio.sleep(FAREWELL_S)
        for task in tasks:
            task.cancel()
    _log.info("left", worker=link.peer.name)
