"""A prefill worker's side of hand-offs: keeps pages alive while they are read, and turns news into consequences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engine.assembly import Engine
from engine.sequence import Sequence as EngineSequence
from fleet.logs import get_logger
from fleet.types import PeerRef
from fleet.worker_metrics import WorkerMetrics
from kvtransfer.actions import (
    Adopted,
    Committing,
    FailReason,
    Given,
    GrantClosed,
    Granted,
    HandOffFailed,
    PeerLost,
    TargetRefused,
)
from kvtransfer.endpoint import HandOffEndpoint

_log = get_logger("hand_offs")


@dataclass(frozen=True, slots=True)
class Consequences:
    """What the worker does about a hand-off's news; each is called with `(request_id, epoch)` first.

    Attributes:
        committing: the taker matters from now on.
        over: the worker need not hold the sequence any longer.
        give_back: nobody has taken it; the gateway must replay it. Called before `over`.
        freed: pages may have become free.
    """

    committing: Callable[[str, int, PeerRef, str], None]
    over: Callable[[str, int], None]
    give_back: Callable[[str, int, str], None]
    freed: Callable[[], None]


class PrefillHandOffs:
    """Gives sequences away; implements `kvtransfer.events.HandOffEvents`.

    A sequence's pages have two owners while it is handed off, the sequence and the hand-off: a Cancel lets go of the
    first at once, while a write that is under way may still read them.
    """

    def __init__(self, engine: Engine, metrics: WorkerMetrics, consequences: Consequences) -> None:
        self._engine = engine
        self._metrics = metrics
        self._do = consequences
        self._shared: dict[tuple[str, int], list[int]] = {}
        self.endpoint: HandOffEndpoint

    def offer(self, sequence: EngineSequence, targets: Sequence[PeerRef]) -> None:
        """Ask for room for a sequence whose pages are all allocated. Shares its pages until `release_pages`."""
        pages = list(sequence.page_table)
        self._engine.pool.share(pages)
        self._shared[sequence.request_id, sequence.epoch] = pages
        self.endpoint.offer(sequence.passport, page_hashes=sequence.page_hashes, num_pages=len(pages), targets=targets)

    # news of the endpoint

    def granted(self, news: Granted) -> None:
        """Pages begin to move."""
        _log.debug("granted", request_id=news.request_id, taker=news.taker.name, transport=news.transport)

    def committing(self, news: Committing) -> None:
        """The Commit goes out next; the gateway must know the taker."""
        self._do.committing(news.request_id, news.epoch, news.taker, news.transport)

    def given(self, news: Given) -> None:
        """The taker holds the sequence now."""
        self._metrics.hand_offs.labels(news.transport, "given").inc()
        self._metrics.hand_off_seconds.labels(news.transport).observe(news.hand_off_s)
        moved_bytes = news.num_moved_pages * self._engine.page_bytes
        self._metrics.hand_off_bytes.labels(news.transport).inc(moved_bytes)
        self._do.over(news.request_id, news.epoch)

    def failed(self, news: HandOffFailed) -> None:
        """Nobody took it. Unless the request is over or lives elsewhere, its gateway must replay it."""
        self._metrics.hand_offs.labels("none", news.reason.value).inc()
        if news.reason not in (FailReason.CANCELLED, FailReason.STALE):
            _log.warning("hand-off failed", request_id=news.request_id, reason=news.reason.value, detail=news.message)
            self._do.give_back(news.request_id, news.epoch, f"hand_off_{news.reason.value}")
        self._do.over(news.request_id, news.epoch)

    def target_refused(self, news: TargetRefused) -> None:
        """One target will never take it."""
        _log.info("target refused", request_id=news.request_id, taker=news.taker.name, detail=news.message)

    def release_pages(self, request_id: str, epoch: int) -> None:
        """The hand-off reads the pages no more."""
        self._engine.pool.release(self._shared.pop((request_id, epoch)))
        self._do.freed()

    def adopted(self, news: Adopted) -> None:
        """Never heard: this worker has no bank and grants nothing."""
        raise AssertionError(news)

    def grant_closed(self, news: GrantClosed) -> None:
        """Never heard, likewise."""
        raise AssertionError(news)

    def peer_lost(self, news: PeerLost) -> None:
        """A taker is gone; its hand-offs fail or go on to other targets by themselves."""
        _log.info("hand-off peer lost", peer=news.peer.name, reason=news.reason)
