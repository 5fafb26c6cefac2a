"""Builds a gateway out of its parts and runs it until it is asked to leave."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import uvicorn
from prometheus_client import CollectorRegistry

from fleet.bus import Bus, BusConfig, is_loopback
from fleet.errors import NameTaken, SettingsError
from fleet.keys import KeyRegistry
from fleet.lifecycle import calm_collector, give_back_freed_memory, new_peer
from fleet.logs import get_logger
from fleet.messages import Goodbye, Heartbeat, Publication
from fleet.metrics import FleetCollector
from fleet.model_files import ModelFiles
from fleet.process_metrics import watch_process
from fleet.redis_client import UNAVAILABLE, Redis, connect
from fleet.registry import Registry
from fleet.request_state import RequestStateWriter
from fleet.request_status import RequestStatusReader
from fleet.service_settings import GatewaySettings
from fleet.types import PeerRef
from fleet.usage import RedisUsage
from fleet.version import version
from gateway.admission import Admission
from gateway.api.config import MAX_GENERATIONS, ApiConfig
from gateway.api.rate_limit import RateLimiter
from gateway.api.responses_api.store import ResponseStore
from gateway.app import create_app
from gateway.catalog import Catalog
from gateway.directory import Directory, Worker
from gateway.fleet_pipeline import FleetPipeline
from gateway.http_door import BoundedHttp
from gateway.key_store import CachedKeys
from gateway.metrics import GatewayMetrics
from gateway.requests import RequestTable
from gateway.router import Router
from gateway.text.message_syntax import SyntaxChoices
from gateway.waiting_room import WaitingRoom

SWEEP_S = 0.1
REDIS_RETRY_S = 0.5
HTTP_GRACE_S = 5
KEEP_ALIVE_S = 75  # longer than clients and load balancers keep idle connections, so that they close first

_log = get_logger("service")


class _Server(uvicorn.Server):
    """Leaves signals to the service, which has more to put in order than HTTP."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield


async def serve(settings: GatewaySettings, stop: asyncio.Event) -> None:
    """Run one gateway until `stop` is set.

    Raises:
        BatonError: it cannot start.
    """
    syntaxes = _syntaxes(settings)
    listener = _listen(settings.host, settings.port)
    try:
        # What can be wrong without Redis is told before Redis is waited for.
        async with Bus(BusConfig.of(settings)) as bus:
            redis = connect(settings.redis_url)
            try:
                always = not is_loopback(settings.host) and not settings.insecure
                keys = CachedKeys(KeyRegistry(redis, namespace=settings.namespace), always_required=always)
                if await _first_contact(keys, settings, stop):
                    await _run(settings, stop, bus, redis, keys, listener, syntaxes)
            finally:
                await redis.aclose()
    finally:
        listener.close()


def _listen(host: str, port: int) -> socket.socket:
    """Take the port before anything else is started. Raises SettingsError when it is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise SettingsError(f"BATON_HOST, BATON_PORT: cannot listen on {host}:{port}: {error.strerror}") from error
    listener.setblocking(False)
    return listener


async def _first_contact(keys: CachedKeys, settings: GatewaySettings, stop: asyncio.Event) -> bool:
    """Wait for Redis, then refuse to serve strangers without keys; False if `stop` came first."""
    while not stop.is_set():
        try:
            await keys.refresh()
        except UNAVAILABLE as error:
            _log.warning("Redis is away, trying again", error=str(error))
            with suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), REDIS_RETRY_S)
        else:
            break
    if stop.is_set():
        return False
    if keys.required and keys.num_keys == 0:
        raise SettingsError(
            f"BATON_HOST = {settings.host} is reachable by others and no API key exists: make one with "
            "`baton keys create NAME`, or set BATON_INSECURE=true if something else guards this port"
        )
    return True


def _syntaxes(settings: GatewaySettings) -> SyntaxChoices:
    try:
        return SyntaxChoices(tool_formats=settings.tool_format, reasoning_formats=settings.reasoning_format)
    except ValueError as error:
        raise SettingsError(f"BATON_TOOL_FORMAT, BATON_REASONING_FORMAT: {error}") from error


async def _run(
    settings: GatewaySettings,
    stop: asyncio.Event,
    bus: Bus,
    redis: Redis,
    keys: CachedKeys,
    listener: socket.socket,
    syntaxes: SyntaxChoices,
) -> None:
    me = new_peer(name=settings.name, kind="gateway", address=bus.address)
    registry = Registry(redis, namespace=settings.namespace, lease_s=settings.lease_s)
    states = RequestStateWriter(redis, namespace=settings.namespace)
    usage = RedisUsage(redis, namespace=settings.namespace)
    directory = Directory(bus=bus, me=me, lease_s=settings.lease_s)
    catalog = Catalog(directory, ModelFiles(redis, namespace=settings.namespace), syntaxes)
    metrics = GatewayMetrics(CollectorRegistry())
    watch_process(metrics.registry, bus, prefix="baton_gateway")
    metrics.registry.register(FleetCollector(directory.workers))
    table = RequestTable(
        bus=bus,
        directory=directory,
        router=Router(directory),
        metrics=metrics,
        record=states.record,
        admission=Admission(
            WaitingRoom(settings.worker_wait_s),
            max_queued=settings.max_queued_requests,
            max_wait_s=settings.max_queue_wait_s,
        ),
        worker_wait_s=settings.worker_wait_s,
        settle_s=settings.heartbeat_s * 2,
    )

    def joined(worker: Worker) -> None:
        catalog.want(worker.record)
        table.serve_waiting()

    directory.on_joined = joined
    app = create_app(
        FleetPipeline(me=me, catalog=catalog, table=table),
        ApiConfig(
            version=version(),
            max_generations=min(MAX_GENERATIONS, settings.max_queued_requests),
            max_body_bytes=settings.max_body_bytes,
            lease_s=settings.lease_s,
            shared_prefix_cache=settings.shared_prefix_cache,
            cors_origins=tuple(origin.strip() for origin in settings.cors_origins.split(",") if origin.strip()),
        ),
        keys=keys,
        limiter=RateLimiter.on_redis(redis, namespace=settings.namespace),
        usage=usage,
        registry=metrics.registry,
        statuses=RequestStatusReader(redis, namespace=settings.namespace),
        responses=ResponseStore(redis, namespace=settings.namespace, ttl_s=settings.response_ttl_s),
    )
    server = _Server(
        uvicorn.Config(
            app,
            loop="none",
            http=BoundedHttp,
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=HTTP_GRACE_S,
        )
    )

    calm_collector()
    give_back_freed_memory()

    async def listen() -> None:
        async for delivery in bus.receive():
            match delivery.message:
                case Publication() as publication:
                    table.hear(publication)
                case Heartbeat() as beat:
                    directory.heartbeat(beat)
                case Goodbye(peer=peer):
                    directory.goodbye(peer)
                case other:
                    _log.warning("message for a worker came to a gateway", kind=type(other).__name__)

    async with asyncio.TaskGroup() as group:
        parts = (
            listen(),
            bus.watch_peers(),
            catalog.run(),
            keys.run(),
            states.run(),
            usage.run(),
            _introduce(registry, directory, me, settings),
            _greet(directory, settings.heartbeat_s),
            _sweep(directory, table, metrics),
        )
        tasks = [group.create_task(part) for part in parts]
        http = group.create_task(server.serve(sockets=[listener]))
        url = f"http://{settings.host}:{listener.getsockname()[1]}"
        _log.info("ready", gateway=me.name, url=url, address=me.address)
        stopped = group.create_task(stop.wait())
        await asyncio.wait([stopped, http], return_when=asyncio.FIRST_COMPLETED)
        server.should_exit = True
        await http
        table.close()
        await _withdraw(registry, states, usage, me)
        for task in (stopped, *tasks):
            task.cancel()
    _log.info("left", gateway=me.name)


async def _introduce(registry: Registry, directory: Directory, me: PeerRef, settings: GatewaySettings) -> None:
    """Keep this gateway in the registry and learn of workers from it; Redis may come and go."""
    away = False
    while True:
        try:
            await registry.announce_gateway(me)
            directory.introduce(await registry.workers())
            away = False
        except NameTaken as error:
            _log.error("gateway name is taken", error=str(error))
        except UNAVAILABLE as error:
            if not away:
                _log.warning("Redis is away, routing goes on from heartbeats", error=str(error))
            away = True
        await asyncio.sleep(settings.heartbeat_s)


async def _greet(directory: Directory, every_s: float) -> None:
    """Tell all workers that this gateway lives. Never behind Redis: who waits for it counts as silent himself."""
    while True:
        directory.greet()
        await asyncio.sleep(every_s)


async def _sweep(directory: Directory, table: RequestTable, metrics: GatewayMetrics) -> None:
    """Notice silence and waiting that took too long."""
    while True:
        await asyncio.sleep(SWEEP_S)
        directory.sweep()
        table.sweep()
        metrics.queued.set(table.num_queued)
        metrics.live.set(table.num_live)


async def _withdraw(registry: Registry, states: RequestStateWriter, usage: RedisUsage, me: PeerRef) -> None:
    """Write what is pending and leave the registry, if Redis lets us."""
    try:
        while states.num_pending:
            await states.flush()
        await usage.flush()
        await registry.withdraw_gateway(me)
    except UNAVAILABLE as error:
        _log.warning("could not withdraw, the lease will run out", error=str(error))
