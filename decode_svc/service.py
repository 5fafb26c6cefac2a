"""Builds a decode worker out of its parts and runs it until it is asked to leave."""

from __future__ import annotations

import asyncio

from decode_svc.bank import DecodeBank
from decode_svc.mover import Mover
from decode_svc.peers import Peers
from decode_svc.rebalancer import Rebalancer
from decode_svc.worker import DecodeWorker
from engine.assembly import OpenModel, open_model, resolve_device
from engine.decode_scheduler import DecodeScheduler
from engine.limits import DecodeLimits
from engine.step_loop import StepLoop
from fleet.bus import Bus, BusConfig
from fleet.departure import Departure
from fleet.lifecycle import new_peer
from fleet.process_metrics import watch_process
from fleet.redis_client import connect
from fleet.registry import Registry
from fleet.service_settings import DecodeSettings
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

CLOSE_HAND_OFFS_S = 2.0


async def serve(settings: DecodeSettings, stop: asyncio.Event) -> None:
    """Run one decode worker until `stop` is set, then drain and leave.

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
            peer = new_peer(name=settings.name, kind="decode", address=bus.address)
            transports = build_transports(place.transports, region)
            await _run(settings, stop, opened, region, first_touch, transports, bus, peer)
    finally:
        first_touch.close()
        region.unlink()
        region.close()


async def _run(
    settings: DecodeSettings,
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
    engine = opened.over(region.buffer, fingerprint, decodes=True)
    engine.pool.set_growth_hook(first_touch.follow)
    first_touch.must_wait = engine.activity.is_any
    limits = DecodeLimits(
        max_model_len=opened.plan.max_model_len,
        max_num_seqs=settings.max_num_seqs,
        lookahead_tokens=settings.lookahead_tokens,
        watermark_pages=settings.watermark_pages,
    )
    scheduler = DecodeScheduler(engine.pool, engine.cache, limits, feeds_next=engine.runner.feeds_next)
    record = opened.record(peer, Role.DECODE, fingerprint, host=host_identity(), transports=tuple(transports))
    redis = connect(settings.redis_url)
    registry = Registry(redis, namespace=settings.namespace, lease_s=settings.lease_s)
    peers = Peers(registry, record, lease_s=settings.lease_s)
    metrics = WorkerMetrics()
    metrics.page_bytes.labels(fingerprint.dtype).set(opened.plan.page_bytes)
    metrics.watch_steps(engine.runner.num_steps)
    mover = Mover(
        pool=engine.pool,
        scheduler=scheduler,
        metrics=metrics,
        page_bytes=engine.page_bytes,
        max_model_len=opened.plan.max_model_len,
        pick=peers.pick,
    )
    rebalancer = Rebalancer(
        scheduler=scheduler,
        pool=engine.pool,
        mover=mover,
        peers=peers,
        max_num_seqs=settings.max_num_seqs,
        gap=settings.rebalance_gap,
    )
    worker = DecodeWorker(record=record, engine=engine, scheduler=scheduler, mover=mover, metrics=metrics)
    steps = StepLoop(scheduler, engine.runner, on_step=worker.on_step, on_scheduled=worker.on_scheduled)
    endpoint = HandOffEndpoint(
        EndpointConfig(
            peer=peer,
            region=region,
            fingerprint=fingerprint,
            bank=DecodeBank(
                scheduler,
                max_per_gateway=settings.max_requests_per_gateway,
                on_reserved=lambda passport: engine.grammars.prepare(passport.params.grammar),
                on_adopted=worker.on_adopted,
                on_rejected=worker.on_rejected,
                on_over_share=lambda _: metrics.over_share.inc(),
            ),
            transports=transports,
            send=bus.send,
            events=worker,
            limits=HandOffLimits(liveness_s=settings.hand_off_liveness_s),
        )
    )
    metrics.watch_hand_offs(endpoint)
    watch_process(metrics.registry, bus, prefix="baton_worker")
    bus.on_peer_lost(endpoint.on_peer_lost)
    link = WorkerLink.of(settings, peer=peer, holder=worker, bus=bus, redis=redis, published=opened.files)
    worker.endpoint = mover.endpoint = endpoint
    worker.link = link
    worker.wake, worker.ask_to_leave, worker.look_for_peers = steps.wake, departure.ask, peers.want
    worker.stop_rebalancing = rebalancer.stop
    balancing = (rebalancer.run(),) if settings.rebalance else ()
    try:
        await run_worker(
            worker,
            bus=bus,
            link=link,
            departure=departure,
            settings=settings,
            parts=(steps.run(), endpoint.run(), peers.run(), *balancing),
            close_hand_offs=lambda: endpoint.close(CLOSE_HAND_OFFS_S),
        )
    finally:
        engine.close()
        for transport in transports.values():
            transport.close()
        await redis.aclose()
