"""`baton drain WORKER`: ask a worker to leave, and watch it do so."""

from __future__ import annotations

import argparse
import asyncio
import time

from rich.console import Console

from baton.errors import CommandError, RedisUnusable
from baton.keys import find_redis
from baton.settings import Surroundings, without_password
from fleet.bus import Bus, BusConfig
from fleet.messages import DrainRequest
from fleet.redis_client import UNAVAILABLE, connect
from fleet.registry import Registry
from fleet.service_settings import DecodeSettings
from fleet.types import WorkerRecord

POLL_S = 0.2
SPARE_S = 10.0
"""Beyond the grace period, for closing and deregistering."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The worker, and how long it may take."""
    parser.add_argument("worker", help="its name in the fleet, see `/metrics` or its log")
    parser.add_argument(
        "--timeout",
        type=_seconds,
        metavar="S",
        help="grace period in which its work may leave (default: the worker's BATON_DRAIN_TIMEOUT_S)",
    )
    parser.add_argument("--no-wait", action="store_true", help="ask and return, without watching it leave")
    parser.add_argument("--redis-url", metavar="URL", help="default: BATON_REDIS_URL, else the running `baton up`")
    parser.add_argument("--namespace", metavar="TEXT", help="default: BATON_NAMESPACE, else `baton`")


def run(arguments: argparse.Namespace, around: Surroundings, console: Console) -> int:
    """Ask, watch, and return the exit code.

    Raises:
        CommandError: no Redis, no such worker, or it has not left in time.
    """
    url, namespace = find_redis(arguments.redis_url, arguments.namespace, around)
    settings = around.load(DecodeSettings, {"redis_url": url, "namespace": namespace})
    try:
        asyncio.run(_drain(arguments, settings, console))
    except UNAVAILABLE as error:
        raise RedisUnusable(f"Redis at {without_password(url)} does not answer: {error}") from error
    return 0


async def _drain(arguments: argparse.Namespace, settings: DecodeSettings, console: Console) -> None:
    redis = connect(settings.redis_url)
    registry = Registry(redis, namespace=settings.namespace, lease_s=settings.lease_s)
    grace_s = settings.drain_timeout_s if arguments.timeout is None else arguments.timeout
    try:
        workers = {worker.peer.name: worker for worker in await registry.workers()}
        worker = workers.get(arguments.worker)
        if worker is None:
            there = ", ".join(workers) or "none"
            raise CommandError(f"no worker is called {arguments.worker!r}; there are: {there}")
        async with Bus(BusConfig.of(settings)) as bus:
            order = DrainRequest(reason="baton drain", within_s=arguments.timeout)
            bus.send(worker.peer.address, order)
            await _watch(registry, worker, console, grace_s=grace_s, until_gone=not arguments.no_wait)
    finally:
        await redis.aclose()


async def _watch(
    registry: Registry, asked: WorkerRecord, console: Console, *, grace_s: float, until_gone: bool
) -> None:
    """Print what changes until it is gone, or only until it has heard us."""
    name, shown = asked.peer.name, ""
    deadline_s = time.monotonic() + grace_s + SPARE_S
    while time.monotonic() < deadline_s:
        workers = await registry.workers()
        now = next((worker for worker in workers if worker.peer == asked.peer), None)
        if now is None:
            console.print(f"{name} has left", markup=False, highlight=False)
            return
        if now.draining:
            load = now.load
            line = f"{name} is draining: {load.num_running} running, {load.num_waiting} waiting"
            if line != shown:
                console.print(line, markup=False, highlight=False)
            shown = line
            if not until_gone:
                return
        await asyncio.sleep(POLL_S)
    did = "has not left" if shown else "has not answered"
    raise CommandError(f"{name} {did} within {grace_s + SPARE_S:g} s; is BATON_CLUSTER_SECRET the fleet's?")


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= 86_400:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0 on")
    return seconds
