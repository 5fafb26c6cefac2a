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
import time
from collections.abc import Mapping, Sequence

from fleet.hand_off_messages import HandOffMessage, Refuse
from fleet.types import Passport, PeerRef
from kvtransfer.courier import Courier
from kvtransfer.endpoint_config import EndpointConfig, build_desk
from kvtransfer.stats import StaleReason, TransferStats

__all__ = ["EndpointConfig", "HandOffEndpoint"]


class HandOffEndpoint:
    """Gives and takes for one process. All methods belong to the event-loop thread.

    Attributes:
        stats: counts for metrics.
    """

    def __init__(self, config: EndpointConfig) -> None:
        self._clock = time.monotonic
        self.stats = TransferStats()
        self._desk = build_desk(config, self.stats)
        self._courier = Courier(config, self._desk, self.stats, self._clock)
        self._execute = self._courier.execute

    async def run(self) -> None:
        """Beat, retry and copy until cancelled. When it has returned, no thread of its touches pages any more."""
        await self._courier.run()

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
        """The bus lost its connection to this address, whether or not a hand-off with whoever is there is open."""
        self._courier.unmap(address)
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

    @property
    def refusals(self) -> Mapping[str, int]:
        """Refusals sent since start, by reason."""
        return self.stats.refusals_sent

    @property
    def stale(self) -> Mapping[str, int]:
        """Messages since start that came too late to do anything, by `StaleReason`."""
        return {reason.value: self.stats.stale[reason] for reason in StaleReason}

    @property
    def copy_seconds(self) -> Mapping[str, float]:
        """Time spent copying pages that were given, by transport."""
        return {transport: count.copy_s for transport, count in self.stats.given.items()}

    def note_old_epoch(self) -> None:
        """The service itself dropped a message of an old epoch."""
        self.stats.stale[StaleReason.EPOCH] += 1
