"""Builds a prefill worker out of its parts and runs it until it is asked to leave."""

from __future__ import annotations

import asyncio

from engine.assembly import OpenModel, open_model, resolve_device
from engine.limits import PrefillLimits
from engine.prefill_scheduler import PrefillScheduler
from engine.step_loop import StepLoop
from fleet.bus import Bus, BusConfig
from fleet.departure import Departure
from fleet.lifecycle import new_peer
from fleet.process_metrics import watch_process
from fleet.redis_client import connect
from fleet.service_settings import PrefillSettings
from fleet.types import PeerRef, Role
from fleet.worker_link import WorkerLink
from fleet.worker_metrics import WorkerMetrics
from fleet.worker_run import run_worker
from kvtransfer.endpoint import EndpointConfig, HandOffEndpoint
from kvtransfer.first_touch import FirstTouch
from kvtransfer.host import host_identity
from kvtransfer.layout import PageLayout
from kvtransfer.limits import HandOffLimits
from kvtransfer.pool_memory import PoolPlace, Region
from kvtransfer.region import sweep_stale
from kvtransfer.transport import Transports
from kvtransfer.transports import build_transports
from prefill_svc.worker import PrefillWorker

CLOSE_HAND_OFFS_S = 2.0


async def serve(settings: PrefillSettings, stop: asyncio.Event) -> None:
    """Run one prefill worker until `stop` is set, then drain and leave.

    Raises:
        BatonError: it cannot start.
    """
    sweep_stale()
    place = PoolPlace.of(resolve_device(settings.device), settings.transport_names)
    opened = await asyncio.to_thread(open_model, settings, ceiling_bytes=place.ceiling_bytes)
    plan = opened.plan
    region = place.create(settings.name, num_pages=plan.num_pages, page_bytes=plan.page_bytes)
    first_touch = FirstTouch(region)
    try:
        async with Bus(BusConfig.of(settings)) as bus:
            peer = new_peer(name=settings.name, kind="prefill", address=bus.address)
            transports = build_transports(place.transports, region)
            await _run(settings, stop, opened, region, first_touch, transports, bus, peer)
    finally:
        first_touch.close()
        region.unlink()
        region.close()


async def _run(
    settings: PrefillSettings,
    stop: asyncio.Event,
    opened: OpenModel,
    region: Region,
    first_touch: FirstTouch,
    transports: Transports,
    bus: Bus,
    peer: PeerRef,
) -> None:
    fingerprint = PageLayout(**opened.page_facts).fingerprint(opened.model.fingerprint)
    departure = Departure(stop, grace_s=settings.drain_timeout_s)
    engine = opened.over(region.buffer, fingerprint)
    engine.pool.set_growth_hook(first_touch.follow)
    first_touch.must_wait = engine.activity.is_any
    limits = PrefillLimits(
        max_model_len=opened.plan.max_model_len,
        max_step_tokens=settings.max_step_tokens,
        max_chunk_tokens=settings.max_chunk_tokens or None,
        max_num_seqs=settings.max_num_seqs,
    )
    scheduler = PrefillScheduler(engine.pool, engine.cache, limits)
    record = opened.record(peer, Role.PREFILL, fingerprint, host=host_identity(), transports=tuple(transports))
    metrics = WorkerMetrics()
    metrics.page_bytes.labels(fingerprint.dtype).set(opened.plan.page_bytes)
    worker = PrefillWorker(record=record, engine=engine, scheduler=scheduler, metrics=metrics)
    steps = StepLoop(scheduler, engine.runner, on_step=worker.on_step, on_scheduled=worker.on_scheduled)
    endpoint = HandOffEndpoint(
        EndpointConfig(
            peer=peer,
            region=region,
            fingerprint=fingerprint,
            bank=None,
            transports=transports,
            send=bus.send,
            events=worker.hand_offs,
            limits=HandOffLimits(liveness_s=settings.hand_off_liveness_s),
        )
    )
    metrics.watch_hand_offs(endpoint)
    watch_process(metrics.registry, bus, prefix="baton_worker")
    bus.on_peer_lost(endpoint.on_peer_lost)
    redis = connect(settings.redis_url)
    link = WorkerLink.of(settings, peer=peer, holder=worker, bus=bus, redis=redis, published=opened.files)
    worker.hand_offs.endpoint, worker.link = endpoint, link
    worker.wake, worker.ask_to_leave = steps.wake, departure.ask
    try:
        await run_worker(
            worker,
            bus=bus,
            link=link,
            departure=departure,
            settings=settings,
            parts=(steps.run(), endpoint.run()),
            close_hand_offs=lambda: endpoint.close(CLOSE_HAND_OFFS_S),
        )
    finally:
        engine.close()
        for transport in transports.values():
            transport.close()
        await redis.aclose()
