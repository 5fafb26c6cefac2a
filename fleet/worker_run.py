"""The life of a worker process, from announced to gone; the same for both kinds."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, Protocol

from fleet.bus import Bus, Delivery
from fleet.logs import get_logger
from fleet.worker_link import WorkerLink

FAREWELL_S = 0.3
"""Between goodbye and the end of the process. Gateways see a broken connection at once, but goodbyes and the words of
those who took over wait their turn in an inbox; who is seen gone before it is heard to leave counts as dead."""

_log = get_logger("service")


class Conduct(Protocol):
    """What differs between workers: how they act on messages and how they leave."""

    def handle(self, delivery: Delivery) -> None:
        """Act on one message."""

    async def drain(self, timeout_s: float) -> None:
        """Take nothing new and get rid of what runs, within the grace period."""


async def run_worker(
    conduct: Conduct,
    *,
    bus: Bus,
    link: WorkerLink,
    stop: asyncio.Event,
    drain_timeout_s: float,
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
        stop: set by a signal or a DrainRequest.
        drain_timeout_s: grace period.
        parts: further tasks that run as long as the worker: step loop, hand-offs.
        close_hand_offs: ends what hand-offs are left.

    Raises:
        NameTaken: another live process holds the worker's name.
    """

    async def listen() -> None:
        async for delivery in bus.receive():
            conduct.handle(delivery)

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(part) for part in (listen(), bus.watch_peers(), *parts)]
        await link.announce()
        announcing = [group.create_task(part) for part in (link.run(), link.beat())]
        _log.info("ready", worker=link.peer.name, address=link.peer.address)
        await stop.wait()
        _log.info("draining", worker=link.peer.name)
        await conduct.drain(drain_timeout_s)
        await close_hand_offs()
        for task in announcing:
            task.cancel()
        await asyncio.wait(announcing)
        await link.leave()
        await asyncio.sleep(FAREWELL_S)
        for task in tasks:
            task.cancel()
    _log.info("left", worker=link.peer.name)
