"""The nodes of a `World`: real gateway table, workers, schedulers and hand-offs, each with an event loop of its own."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast
from unittest.mock import patch

from prometheus_client import CollectorRegistry

from decode_svc.bank import DecodeBank
from decode_svc.mover import Mover
from decode_svc.worker import DecodeWorker
from engine.activity import Activity
from engine.assembly import Engine
from engine.decode_scheduler import DecodeScheduler
from engine.limits import DecodeLimits, PrefillLimits
from engine.pages import PagePool
from engine.prefill_scheduler import PrefillScheduler
from engine.prefix_cache import PrefixCache
from engine.step_loop import StepLoop
from fleet.bus import Bus, Delivery
from fleet.departure import Departure
from fleet.hand_off_messages import Offer
from fleet.messages import Heartbeat, Message, Publication
from fleet.request_state import Transition
from fleet.types import Passport, PeerRef, RequestState, Role, SamplingParams, WorkerRecord
from fleet.wire import Frame, decode, encode
from fleet.worker_link import WorkerLink
from fleet.worker_metrics import WorkerMetrics
from gateway.admission import Admission
from gateway.directory import Directory
from gateway.live import LiveRequest
from gateway.metrics import GatewayMetrics
from gateway.requests import RequestTable
from gateway.router import Router
from gateway.waiting_room import WaitingRoom
from kvtransfer.endpoint import EndpointConfig, HandOffEndpoint
from kvtransfer.events import HandOffEvents
from kvtransfer.host import ProcessIdentity
from kvtransfer.limits import HandOffLimits
from kvtransfer.loopback import LoopbackTransport
from kvtransfer.region import PoolRegion
from kvtransfer.tcp import TcpTransport
from kvtransfer.transport import Transport
from prefill_svc.worker import PrefillWorker
from support.fake_runner import SLOT_BYTES, FakeRunner
from support.passports import make_fingerprint
from support.world_loop import WorldLoop

if TYPE_CHECKING:
    from support.fleet_world import World

PAGE_SIZE = 4
PAGE_BYTES = PAGE_SIZE * SLOT_BYTES
NUM_PAGES = 24
MAX_MODEL_LEN = 64
CHUNK_TOKENS = 6
GRACE_S = 5.0
CLOSE_S = 2.0
LEASE_S = 0.6
LIMITS = HandOffLimits(liveness_s=LEASE_S, write_bytes=2 * PAGE_BYTES, window_bytes=3 * PAGE_BYTES)


class OneMachine(LoopbackTransport):
    """The direct transport, between nodes that play processes of one machine."""

    def can_take(self, offer: Offer) -> bool:  # noqa: ARG002
        return True


@dataclass
class Flight:
    """A message on the network."""

    sender: str
    to: str
    message: Message
    payload: list[memoryview]


class WorldBus:
    """One node's bus."""

    def __init__(self, world: World, name: str) -> None:
        self._world = world
        self._name = name
        self.lost: list[Callable[[str], None]] = []

    def send(self, address: str, message: Message, payload: Sequence[Frame] = ()) -> bool:
        frames = [bytes(frame) for frame in encode(message, payload)]
        self._world.network.append(Flight(self._name, address.removeprefix("sim://"), *decode(frames)))
        return True

    def forget(self, address: str) -> None:
        """Nothing is kept of it."""

    def on_peer_lost(self, callback: Callable[[str], None]) -> None:
        self.lost.append(callback)


class NoRegistry:
    """Redis is away, all the time."""

    async def withdraw_worker(self, peer: PeerRef) -> None:
        """Nothing is kept of it."""


class NoGrammars:
    """No request has one."""

    def prepare(self, grammar: object) -> None:
        """Nothing to prepare."""


class Node:
    """One process: its bus, its event loop, whether it lives and whether it is frozen."""

    def __init__(self, world: World, name: str, number: int) -> None:
        self.name = name
        self.peer = PeerRef(name, number, f"sim://{name}")
        self.bus = WorldBus(world, name)
        self.loop = WorldLoop()
        self.alive = True
        self.frozen = False
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def runs(self) -> bool:
        """Whether it can do anything now."""
        return self.alive and not self.frozen

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Let a task of its own begin."""
        task = self.loop.create_task(work)
        self._tasks.append(task)
        return task

    def turn(self) -> None:
        """Let whatever is due happen."""
        if self.loop.turn():
            for task in [task for task in self._tasks if task.done()]:
                self._tasks.remove(task)
                task.result()

    def handle(self, flight: Flight) -> None:
        """Act on a message."""
        raise NotImplementedError

    def tick(self) -> None:
        """Time has passed."""

    def end(self) -> None:
        """Its tasks end here and now."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            self.loop.run_until_complete(asyncio.wait(self._tasks))
        self.loop.close()


class WorkerNode(Node):
    """What is alike in both kinds of workers: real parts over memory of their own."""

    worker: PrefillWorker | DecodeWorker
    scheduler: PrefillScheduler | DecodeScheduler

    def __init__(self, world: World, name: str, number: int, role: Role) -> None:
        super().__init__(world, name, number)
        self.region = PoolRegion.create(name, num_pages=NUM_PAGES, page_bytes=PAGE_BYTES, shared=False)
        fingerprint = make_fingerprint(page_size=PAGE_SIZE)
        self.pool = PagePool(NUM_PAGES, PAGE_SIZE)
        self.metrics = WorkerMetrics()
        runner = FakeRunner(NUM_PAGES, PAGE_SIZE, buffer=self.region.buffer)
        cache = PrefixCache(self.pool, fingerprint)
        engine = Engine(PAGE_BYTES, self.pool, cache, cast("Any", runner), cast("Any", NoGrammars()), Activity(None))
        record = WorkerRecord(
            peer=self.peer, role=role, model="m", fingerprint=fingerprint, model_files="", max_model_len=MAX_MODEL_LEN,
            max_num_seqs=8, page_size=PAGE_SIZE, num_pages=NUM_PAGES, host="h", pid=number, transports=("tcp",),
            max_requests_per_gateway=world.max_per_gateway,
        )  # fmt: skip
        bank, events = self._join(engine, record)
        direct = OneMachine(self.peer, self.region, world.regions)
        transports: dict[str, Transport] = {direct.name: direct} if world.direct else {"tcp": TcpTransport()}
        with patch("kvtransfer.endpoint_config.own_process", lambda: ProcessIdentity(number, number)):
            self.endpoint = HandOffEndpoint(
                EndpointConfig(
                    peer=self.peer,
                    region=self.region,
                    fingerprint=fingerprint,
                    bank=bank,
                    transports=transports,
                    send=self.bus.send,
                    events=events,
                    limits=LIMITS,
                    watch=world,
                )
            )
        self.bus.on_peer_lost(self.endpoint.on_peer_lost)
        self.link = self.worker.link = WorkerLink(
            peer=self.peer, holder=self.worker, bus=cast("Bus", self.bus), registry=cast("Any", NoRegistry()),
            files=cast("Any", None), published=("", {}), lease_s=LEASE_S, liveness_file="",
        )  # fmt: skip
        steps = StepLoop(self.scheduler, runner, on_step=self.worker.on_step, on_scheduled=self.worker.on_scheduled)
        self.worker.wake = steps.wake
        self.worker.metrics = list  # type: ignore[method-assign]  # nobody looks, and they are most of a heartbeat
        for work in (steps.run(), self.endpoint.run(), self.link.beat()):
            self.spawn(work)

    def _join(self, engine: Engine, record: WorkerRecord) -> tuple[DecodeBank | None, HandOffEvents]:
        """Make worker and scheduler; returns who owns taken pages, and who hears of hand-offs."""
        raise NotImplementedError

    def handle(self, flight: Flight) -> None:
        self.worker.handle(Delivery(flight.message, flight.payload))

    def leave(self) -> None:
        """As on SIGTERM."""
        departure = Departure(asyncio.Event(), grace_s=GRACE_S)
        departure.ask("the test")
        self.spawn(self._leave(departure))

    async def _leave(self, departure: Departure) -> None:
        await self.worker.drain(departure)
        await self.endpoint.close(CLOSE_S)
        await self.link.leave()

    def held(self) -> dict[str, int]:
        """What must be nothing when nobody asks for anything."""
        return {
            "pages": self.pool.num_used + self.pool.num_quarantined,
            "giving": self.endpoint.num_giving,
            "taking": self.endpoint.num_taking,
            "quarantined": self.endpoint.num_quarantined,
            "sequences": len(list(self.scheduler.sequences())),
        }


class PrefillNode(WorkerNode):
    """A prefill worker."""

    worker: PrefillWorker

    def __init__(self, world: World, name: str, number: int) -> None:
        super().__init__(world, name, number, Role.PREFILL)
        self.worker.hand_offs.endpoint = self.endpoint

    def _join(self, engine: Engine, record: WorkerRecord) -> tuple[DecodeBank | None, HandOffEvents]:
        limits = PrefillLimits(max_model_len=MAX_MODEL_LEN, max_step_tokens=CHUNK_TOKENS)
        scheduler = self.scheduler = PrefillScheduler(self.pool, engine.cache, limits)
        self.worker = PrefillWorker(record=record, engine=engine, scheduler=scheduler, metrics=self.metrics)
        return None, self.worker.hand_offs


class DecodeNode(WorkerNode):
    """A decode worker. When it leaves, whoever else lives may have its sequences."""

    worker: DecodeWorker

    def __init__(self, world: World, name: str, number: int) -> None:
        self._world = world
        super().__init__(world, name, number, Role.DECODE)
        self.worker.endpoint = self._mover.endpoint = self.endpoint
        self.worker.look_for_peers = lambda: None
        self.worker.stop_rebalancing = lambda: None

    def _join(self, engine: Engine, record: WorkerRecord) -> tuple[DecodeBank | None, HandOffEvents]:
        limits = DecodeLimits(max_model_len=MAX_MODEL_LEN, lookahead_tokens=0)
        scheduler = self.scheduler = DecodeScheduler(self.pool, engine.cache, limits)
        mover = self._mover = Mover(
            pool=self.pool, scheduler=scheduler, metrics=self.metrics, page_bytes=PAGE_BYTES,
            max_model_len=MAX_MODEL_LEN, pick=self._pick, clock=time.monotonic,
        )  # fmt: skip
        worker = self.worker = DecodeWorker(
            record=record, engine=engine, scheduler=scheduler, mover=mover, metrics=self.metrics
        )
        bank = DecodeBank(
            scheduler, max_per_gateway=record.max_requests_per_gateway, on_reserved=lambda _: None,
            on_adopted=worker.on_adopted, on_rejected=worker.on_rejected,
            on_over_share=lambda _: self.metrics.over_share.inc(),
        )  # fmt: skip
        return bank, worker

    def _pick(self, _turn: int) -> list[PeerRef]:
        return [node.peer for node in self._world.decode_nodes() if node is not self and node.alive]


class GatewayNode(Node):
    """A gateway's table and directory."""

    def __init__(self, world: World, name: str, number: int) -> None:
        super().__init__(world, name, number)
        bus = cast("Bus", self.bus)
        self.transitions: list[Transition] = []
        self.directory = Directory(bus=bus, me=self.peer, lease_s=LEASE_S)
        self.table = RequestTable(
            bus=bus,
            directory=self.directory,
            router=Router(self.directory, seed=0),
            metrics=GatewayMetrics(CollectorRegistry()),
            record=self.transitions.append,
            admission=Admission(WaitingRoom(10.0), max_queued=100, max_wait_s=0.0),
            worker_wait_s=10.0,
            settle_s=LEASE_S / 3,
        )
        self._greets_at_s = 0.0

    def handle(self, flight: Flight) -> None:
        match flight.message:
            case Publication() as publication:
                self.table.hear(publication)
            case Heartbeat() as beat:
                self.directory.heartbeat(beat)
            case message:
                self.directory.goodbye(message.peer)  # type: ignore[union-attr]

    def tick(self) -> None:
        self.directory.sweep()
        self.table.sweep()
        if time.monotonic() >= self._greets_at_s:
            self._greets_at_s = time.monotonic() + LEASE_S / 6
            self.directory.greet()

    def ask(self, prompt: list[int], *, max_tokens: int) -> LiveRequest:
        """Admit one request."""
        return self.table.admit(
            Passport(
                request_id="r",
                epoch=0,
                model="m",
                token_ids=prompt,
                prompt_len=len(prompt),
                params=SamplingParams(max_tokens=max_tokens),
                gateway=self.peer,
            )
        )

    def num_ends(self) -> int:
        """How often the request has ended."""
        return sum(one.state in (RequestState.FINISHED, RequestState.FAILED) for one in self.transitions)
