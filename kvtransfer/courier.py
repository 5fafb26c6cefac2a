"""Carries out what the hand-off machines ask: sends, copies on transfer threads, ticks, counts, tells the service."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from fleet.hand_off_messages import Refuse
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
from kvtransfer.desk import HandOffDesk
from kvtransfer.endpoint_config import EndpointConfig
from kvtransfer.errors import TransferError
from kvtransfer.region import PoolRegion
from kvtransfer.stats import TransferStats
from kvtransfer.transport import DirectTransport

INLINE_BYTES = 2 * 1024 * 1024
"""Pages up to so many bytes are copied at once, on the event loop's thread: handing them to another and back takes
longer, the more so while a step computes, and a standing sequence waits for it. Less than `HandOffLimits.write_bytes`,
so that only the end of a long hand-off is."""
_SHORTEST_SLEEP_S = 0.001


class Courier:
    """Executes the actions of one desk, in order, on the event-loop thread, and counts them in `stats`."""

    def __init__(
        self, config: EndpointConfig, desk: HandOffDesk, stats: TransferStats, clock: Callable[[], float]
    ) -> None:
        self.stats = stats
        self._config = config
        self._desk = desk
        self._clock = clock
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

    def execute(self, actions: Sequence[Action]) -> None:
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
                if self._may_copy_here(action):
                    self._written(action, *self._write(action))
                else:
                    self._writes.put_nowait(action)
            case Store():
                if self._may_copy_here(action):
                    self._stored(action, self._store(action))
                else:
                    self._stores.put_nowait(action)
            case _:
                self._tell(action)

    def _send(self, action: Send) -> None:
        payload = [self._config.region.frame(page_id) for page_id in action.page_ids]
        began_s = self._clock()
        if not self._config.send(action.to.address, action.message, payload):
            self.stats.dropped_sends += 1
        if payload:
            count = self.stats.given[action.transport]
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
                self.unmap(news.peer.address)
                events.peer_lost(news)

    def unmap(self, address: str) -> None:
        """Drop what is mapped of a taker that is gone, or out of reach for now.

        The memory of a dead worker's pool lasts until the last who mapped it lets go.
        """
        for transport in self._config.transports.values():
            if isinstance(transport, DirectTransport):
                transport.forget(address)

    # tasks

    async def _tick_forever(self) -> None:
        while True:
            self.execute(self._desk.tick(self._clock()))
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
            error, copy_s = await loop.run_in_executor(threads, self._write, write)
            self._written(write, error, copy_s)

    def _write(self, write: Write) -> tuple[TransferError | None, float]:
        """Copy, on whichever thread; what went wrong, and how long it took in seconds."""
        transport = self._config.transports[write.grant.transport]
        assert isinstance(transport, DirectTransport), "carried pages are sent"  # noqa: S101  # our own invariant
        began_s = self._clock()
        try:
            transport.write(write.grant, write.first, write.page_ids)
        except TransferError as error:
            return error, 0.0
        return None, self._clock() - began_s

    def _written(self, write: Write, error: TransferError | None, copy_s: float) -> None:
        if error is not None:
            self.stats.broken_writes[type(error).__name__] += 1
        else:
            count = self.stats.given[write.grant.transport]
            count.pages += len(write.page_ids)
            count.bytes += len(write.page_ids) * self._config.region.ref.page_bytes
            count.copy_s += copy_s
        self.execute(self._desk.giver.on_written(write.ticket, error, self._clock()))

    async def _store_forever(self, threads: ThreadPoolExecutor) -> None:
        loop = asyncio.get_running_loop()
        while True:
            store = await self._stores.get()
            self._stored(store, await loop.run_in_executor(threads, self._store, store))

    def _may_copy_here(self, copy: Write | Store) -> bool:
        in_host_memory = isinstance(self._config.region, PoolRegion)
        return in_host_memory and len(copy.page_ids) * self._config.region.ref.page_bytes <= INLINE_BYTES

    def _store(self, store: Store) -> float:
        """Copy, on whichever thread; returns how long it took in seconds."""
        began_s = self._clock()
        for page_id, frame in zip(store.page_ids, store.frames, strict=True):
            self._config.region.store(page_id, frame)
        return self._clock() - began_s

    def _stored(self, store: Store, copy_s: float) -> None:
        count = self.stats.taken[store.transport]
        count.pages += len(store.page_ids)
        count.bytes += len(store.page_ids) * self._config.region.ref.page_bytes
        count.copy_s += copy_s
        self.execute(self._desk.taker.on_stored(store.ticket, self._clock()))
