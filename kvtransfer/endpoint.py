"""Runs a process's hand-offs: executes what the machines ask, on the bus, on transfer threads and by the clock.

Every service has one. A prefill worker gives, a decode worker takes and, when it drains, gives: one protocol.

    endpoint = HandOffEndpoint(config)
    task_group.create_task(endpoint.run())
    ...
    endpoint.on_message(delivery.message, delivery.payload)     # each HandOffMessage of the bus
    endpoint.offer(passport, page_hashes=..., num_pages=..., targets=...)
    endpoint.pages_ready(request_id, epoch, page_ids)           # after each chunk of the prompt
    endpoint.commit(passport, page_ids=..., num_computed_tokens=...)
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field

from fleet.messages import HandOffMessage, Refuse
from fleet.types import Fingerprint, Passport, PeerRef
from kvtransfer.actions import (
    Action,
    Adopted,
    Committing,
    Given,
    GrantClosed,
    Granted,
    HandOffFailed,
    PeerLost,
    ReleasePages,
    Send,
    Store,
    TargetRefused,
    Write,
)
from kvtransfer.bank import NoBank, PageBank
from kvtransfer.copying import copy_bytes
from kvtransfer.desk import HandOffDesk
from kvtransfer.errors import TransferError
from kvtransfer.events import HandOffEvents
from kvtransfer.giver import Giver
from kvtransfer.host import ProcessWatch, ProcProcessWatch, host_identity, own_process
from kvtransfer.limits import HandOffLimits
from kvtransfer.outgoing_book import GiverConfig
from kvtransfer.pulse import Pulse
from kvtransfer.region import PoolRegion
from kvtransfer.stats import TransferStats
from kvtransfer.taker import Taker, TakerConfig
from kvtransfer.transport import DirectTransport, Transports

Sender = Callable[[str, HandOffMessage, Sequence[memoryview]], bool]
"""`send(address, message, payload)`: queue a message without blocking; False if it was dropped. `fleet.bus.Bus.send` is
one. A sender that does not copy the payload is safe: bytes that change after a hand-off has ended are dropped by
the taker, whose grant is closed."""

_SHORTEST_SLEEP_S = 0.001


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointConfig:
    """What an endpoint is made of.

    Attributes:
        peer: this process, with the address of its inbox.
        region: its pages; the owner closes it after `run` has returned.
        fingerprint: of the pages.
        bank: who owns the pages that are taken; None for a process that only gives.
        transports: best first, from `build_transports`.
        send: how messages leave.
        events: who hears the news.
        limits: times and sizes.
        watch: tells whether givers on this host are dead.
        seed: of the jitter in pauses.
    """

    peer: PeerRef
    region: PoolRegion
    fingerprint: Fingerprint
    bank: PageBank | None
    transports: Transports
    send: Sender
    events: HandOffEvents
    limits: HandOffLimits = field(default_factory=HandOffLimits)
    watch: ProcessWatch = field(default_factory=ProcProcessWatch)
    seed: int = 0


class HandOffEndpoint:
    """Gives and takes for one process. All methods belong to the event-loop thread.

    Attributes:
        stats: counts for metrics.
    """

    def __init__(self, config: EndpointConfig) -> None:
        self.stats = TransferStats()
        self._config = config
        self._clock = time.monotonic
        self._desk = _build_desk(config)
        self._actions: deque[Action] = deque()
        self._executing = False
        self._writes: asyncio.Queue[Write] = asyncio.Queue()
        self._stores: asyncio.Queue[Store] = asyncio.Queue()
        self._nudge = asyncio.Event()
        self._wakes_at_s = 0.0

    async def run(self) -> None:
        """Beat, retry and copy until cancelled. When it has returned, no thread of its touches pages any more."""
        with ThreadPoolExecutor(max_workers=2, thread_name_prefix="transfer") as threads:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._tick_forever())
                tasks.create_task(self._write_forever(threads))
                tasks.create_task(self._store_forever(threads))

    async def close(self, timeout_s: float) -> bool:
        """Close every hand-off in order and wait until none is left; False if some are after `timeout_s`.

        `run` must be running, and messages must still be delivered. Pages of direct grants whose giver does not
        answer stay quarantined.
        """
        self._desk.taker.drain()
        self._execute(self._desk.giver.cancel_all("the worker stops"))
        self._execute(self._desk.taker.close_all("the worker stops", self._clock()))
        deadline_s = self._clock() + timeout_s
        while self.num_giving or self._desk.taker.num_quarantined:
            if self._clock() >= deadline_s:
                return False
            await asyncio.sleep(0.01)
        return True

    # what the service and the bus say

    def on_message(self, message: HandOffMessage, payload: Sequence[memoryview]) -> None:
        """A hand-off message of the bus; frames must stay valid as long as they are referenced."""
        if isinstance(message, Refuse):
            self.stats.refusals_heard[message.reason] += 1
        self._execute(self._desk.on_message(message, payload, self._clock()))

    def on_peer_lost(self, address: str) -> None:
        """The bus lost its connection to this address."""
        self._execute(self._desk.peer_lost(address, self._clock()))

    def offer(
        self, passport: Passport, *, page_hashes: Sequence[bytes], num_pages: int, targets: Sequence[PeerRef]
    ) -> None:
        """Begin to hand a sequence off; see `Giver.start`."""
        now_s = self._clock()
        started = self._desk.giver.start(
            passport, page_hashes=page_hashes, num_pages=num_pages, targets=targets, now_s=now_s
        )
        self._execute(started)

    def pages_ready(self, request_id: str, epoch: int, page_ids: Sequence[int]) -> None:
        """The sequence's first `len(page_ids)` pages are full and their bytes final; they may move now."""
        self._execute(self._desk.giver.pages_ready(request_id, epoch, page_ids, self._clock()))

    def commit(self, passport: Passport, *, page_ids: Sequence[int], num_computed_tokens: int) -> None:
        """The sequence stands still; see `Giver.commit`."""
        now_s = self._clock()
        committed = self._desk.giver.commit(
            passport, page_ids=page_ids, num_computed_tokens=num_computed_tokens, now_s=now_s
        )
        self._execute(committed)

    def cancel(self, request_id: str, epoch: int) -> None:
        """A Cancel reached this worker: both halves close what they hold, and the taker remembers."""
        self._execute(self._desk.cancel(request_id, epoch, self._clock()))

    def is_cancelled(self, request_id: str, epoch: int) -> bool:
        """Whether a Cancel of this epoch or a later one was heard not long ago."""
        return self._desk.taker.is_cancelled(request_id, epoch, self._clock())

    def drain(self) -> None:
        """Take nothing new from now on; what is open goes on, and giving stays possible."""
        self._desk.taker.drain()

    def lag(self, request_id: str, epoch: int) -> int | None:
        """Ready pages that do not lie at the taker yet; None without a grant."""
        return self._desk.giver.lag(request_id, epoch)

    @property
    def num_giving(self) -> int:
        """Hand-offs being given."""
        return self._desk.giver.num_open

    @property
    def num_taking(self) -> int:
        """Grants that wait for their Commit."""
        return self._desk.taker.num_open

    @property
    def num_quarantined(self) -> int:
        """Closed grants whose writer is not known to be done."""
        return self._desk.taker.num_quarantined

    # execution

    def _execute(self, actions: Sequence[Action]) -> None:
        """Carry actions out in order. A callback may come back in here: its actions queue up behind."""
        self._actions.extend(actions)
        if self._executing:
            return
        self._executing = True
        try:
            while self._actions:
                self._carry_out(self._actions.popleft())
        finally:
            self._executing = False
        if self._desk.next_tick_s() < self._wakes_at_s - _SHORTEST_SLEEP_S:
            self._nudge.set()

    def _carry_out(self, action: Action) -> None:
        match action:
            case Send():
                self._send(action)
            case Write():
                self._writes.put_nowait(action)
            case Store():
                self._stores.put_nowait(action)
            case _:
                self._tell(action)

    def _send(self, action: Send) -> None:
        payload = [self._config.region.page(page_id) for page_id in action.page_ids]
        began_s = self._clock()
        if not self._config.send(action.to.address, action.message, payload):
            self.stats.dropped_sends += 1
        if payload:
            count = self.stats.given["tcp"]
            count.pages += len(payload)
            count.bytes += sum(page.nbytes for page in payload)
            count.copy_s += self._clock() - began_s
        elif isinstance(action.message, Refuse):
            self.stats.refusals_sent[action.message.reason] += 1

    def _tell(self, news: Action) -> None:
        """Count the news and pass it on to the service."""
        events = self._config.events
        match news:
            case Granted():
                events.granted(news)
            case Committing():
                events.committing(news)
            case Given():
                count = self.stats.given[news.transport]
                count.hand_offs += 1
                count.held_pages += news.num_held_pages
                count.hand_off_s += news.hand_off_s
                events.given(news)
            case HandOffFailed():
                self.stats.failed[news.reason] += 1
                events.failed(news)
            case TargetRefused():
                events.target_refused(news)
            case ReleasePages(request_id=request_id, epoch=epoch):
                events.release_pages(request_id, epoch)
            case Adopted():
                self.stats.taken[news.transport].hand_offs += 1
                events.adopted(news)
            case GrantClosed():
                events.grant_closed(news)
            case PeerLost():
                self.stats.lost_peers += 1
                for transport in self._config.transports.values():
                    if isinstance(transport, DirectTransport):
                        transport.forget(news.peer)
                events.peer_lost(news)

    # tasks

    async def _tick_forever(self) -> None:
        while True:
            self._execute(self._desk.tick(self._clock()))
            self._wakes_at_s = max(self._desk.next_tick_s(), self._clock() + _SHORTEST_SLEEP_S)
            self._nudge.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(self._wakes_at_s - self._clock()):
                    await self._nudge.wait()

    async def _write_forever(self, threads: ThreadPoolExecutor) -> None:
        """One direct write after the other, so that one hand-off's copies do not slow another's down."""
        loop = asyncio.get_running_loop()
        while True:
            write = await self._writes.get()
            pages = [self._config.region.page(page_id) for page_id in write.page_ids]
            transport = self._config.transports[write.grant.transport]
            assert isinstance(transport, DirectTransport), "carried pages are sent"  # noqa: S101  # our own invariant
            began_s = self._clock()
            error: TransferError | None = None
            try:
                await loop.run_in_executor(threads, transport.write, write.grant, write.first, pages)
            except TransferError as caught:
                error = caught
                self.stats.broken_writes[type(caught).__name__] += 1
            else:
                count = self.stats.given[transport.name]
                count.pages += len(pages)
                count.bytes += sum(page.nbytes for page in pages)
                count.copy_s += self._clock() - began_s
            self._execute(self._desk.giver.on_written(write.ticket, error, self._clock()))

    async def _store_forever(self, threads: ThreadPoolExecutor) -> None:
        loop = asyncio.get_running_loop()
        while True:
            store = await self._stores.get()
            pages = [self._config.region.page(page_id) for page_id in store.page_ids]
            began_s = self._clock()
            await loop.run_in_executor(threads, _copy_all, pages, store.frames)
            count = self.stats.taken["tcp"]
            count.pages += len(pages)
            count.bytes += sum(page.nbytes for page in pages)
            count.copy_s += self._clock() - began_s
            self._execute(self._desk.taker.on_stored(store.ticket, self._clock()))


def _copy_all(targets: Sequence[memoryview], sources: Sequence[memoryview]) -> None:
    for target, source in zip(targets, sources, strict=True):
        copy_bytes(target, source)


def _build_desk(config: EndpointConfig) -> HandOffDesk:
    giver = Giver(
        GiverConfig(
            peer=config.peer,
            fingerprint=config.fingerprint,
            page_bytes=config.region.ref.page_bytes,
            transports={name: isinstance(t, DirectTransport) for name, t in config.transports.items()},
            host=host_identity(),
            process=own_process(),
            limits=config.limits,
            rng=random.Random(config.seed),  # noqa: S311  # jitter, not a secret
        )
    )
    taker = Taker(
        TakerConfig(
            peer=config.peer,
            fingerprint=config.fingerprint,
            pool=config.region.ref,
            transports=config.transports,
            bank=config.bank or NoBank(),
            gate=config.region,
            watch=config.watch,
            limits=config.limits,
        )
    )
    return HandOffDesk(giver, taker, Pulse(config.peer, config.limits))
