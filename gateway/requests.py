"""The table of live requests: admits, dispatches, listens, replays, cancels.

One mechanism mends everything that is not a planned move: bump the epoch, tell the old holders to forget, and send the
passport with all accepted tokens through prefill again (DESIGN section 5).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from fleet.bus import Bus
from fleet.logs import get_logger
from fleet.messages import (
    Cancel,
    HandedOff,
    HandingOff,
    PrefillRequest,
    Publication,
    RequestFinished,
    RequestNote,
    RequestStarted,
    Returned,
    TokenChunk,
)
from fleet.request_state import Transition
from fleet.types import FinishReason, Passport, PeerRef, RequestState
from gateway.booking import Bookings
from gateway.directory import Directory, Worker
from gateway.errors import NoWorkers, Overloaded
from gateway.live import LiveRequest, Stage
from gateway.metrics import GatewayMetrics
from gateway.router import Router

MAX_LOST = 8
"""A request whose workers died this often is suspected of killing them, and ends with an error."""
MISSING_BEATS = 2
"""A worker that omits a request it should hold from this many heartbeats in a row has lost it."""

_log = get_logger("requests")


class RequestTable:
    """All requests that this gateway owns. Everything happens on the event loop's thread, nothing here waits."""

    def __init__(
        self,
        *,
        bus: Bus,
        directory: Directory,
        router: Router,
        metrics: GatewayMetrics,
        record: Callable[[Transition], None],
        max_queued: int,
        worker_wait_s: float,
        settle_s: float,
    ) -> None:
        self._bus = bus
        self._directory = directory
        self._router = router
        self._metrics = metrics
        self._record = record
        self._max_queued = max_queued
        self._worker_wait_s = worker_wait_s
        self._settle_s = settle_s
        self._bookings = Bookings()
        self._live: dict[str, LiveRequest] = {}
        self._unrouted: dict[str, float] = {}
        self._num_queued = 0
        directory.on_lost = self._worker_lost
        directory.on_left = self._worker_left
        directory.on_joined = lambda _: self.dispatch_unrouted()
        directory.on_notes = self._compare_notes

    @property
    def num_live(self) -> int:
        """Requests that have not ended."""
        return len(self._live)

    @property
    def num_queued(self) -> int:
        """Live requests without a first token."""
        return self._num_queued

    def admit(self, passport: Passport) -> LiveRequest:
        """Take a request in and send it off, or let it wait for a worker to come.

        Raises:
            Overloaded: too many requests wait for their first token already.
            NoWorkers: nobody serves the model and waiting is switched off.
        """
        if self._num_queued >= self._max_queued:
            self._metrics.rejected.labels("overloaded").inc()
            raise Overloaded(
                f"{self._num_queued} requests are waiting already; try again later",
                retry_after_s=self._metrics.expected_wait_s(self._num_queued),
            )
        if self._worker_wait_s <= 0 and not self._router.has_route(passport.model):
            self._metrics.rejected.labels("no_workers").inc()
            raise NoWorkers(f"no worker can serve {passport.model!r} now", retry_after_s=5)
        live = LiveRequest(passport, on_let_go=self._let_go)
        self._live[live.request_id] = live
        self._num_queued += 1
        self._metrics.prompt_tokens.labels(passport.model).inc(passport.prompt_len)
        self._note_state(live, RequestState.QUEUED, model=passport.model, prompt_tokens=passport.prompt_len)
        self._dispatch(live)
        return live

    def _dispatch(self, live: LiveRequest) -> None:
        passport = live.next_passport()
        route = self._router.pick(passport.model, passport.token_ids, cache_salt=passport.cache_salt)
        if route is None:
            self._unrouted.setdefault(live.request_id, time.monotonic() + self._worker_wait_s)
            return
        self._unrouted.pop(live.request_id, None)
        live.stage = Stage.PREFILLING
        live.prefill_peer = route.prefill.peer
        live.holders = [route.prefill.peer]
        live.touched_s = time.monotonic()
        live.missing_beats = 0
        self._bookings.book(live.request_id, route.prefill, len(passport.token_ids))
        self._bookings.book(live.request_id, route.targets[0], len(passport.token_ids))
        request = PrefillRequest(passport=passport, targets=[worker.peer for worker in route.targets])
        self._bus.send(route.prefill.peer.address, request)

    def dispatch_unrouted(self) -> None:
        """Try again for the requests that wait for a worker."""
        for request_id in list(self._unrouted):
            self._dispatch(self._live[request_id])

    def sweep(self) -> None:
        """End what has waited for a worker too long."""
        now = time.monotonic()
        for request_id, deadline_s in list(self._unrouted.items()):
            if now >= deadline_s:
                live = self._live[request_id]
                self._metrics.rejected.labels("no_workers").inc()
                message = f"no worker came for {live.passport.model!r} within {self._worker_wait_s:g} s"
                self._end(live, FinishReason.ERROR, error=message, retry_after_s=5)

    # what workers say

    def hear(self, publication: Publication) -> None:
        """Apply what one step of a worker had to say. Words about requests or epochs that are no more are dropped."""
        for event in publication.events:
            live = self._live.get(event.request_id)
            if live is None or event.epoch != live.epoch:
                self._metrics.stale_messages.inc()
                if isinstance(event, HandedOff):  # its Cancel went to the holder before
                    cancel = Cancel(request_id=event.request_id, epoch=event.epoch)
                    self._bus.send(publication.worker.address, cancel)
                continue
            live.touched_s = time.monotonic()
            live.missing_beats = 0
            self._apply(live, event, publication.worker)

    def _apply(self, live: LiveRequest, event: object, worker: PeerRef) -> None:
        match event:
            case TokenChunk():
                self._accept_tokens(live, event, worker)
            case RequestStarted():
                live.accept_started(event)
                self._note_state(
                    live, RequestState.PREFILLING, prefill_worker=worker.name, cached_tokens=event.cached_tokens
                )
            case HandingOff():
                self._accept_handing_off(live, event, worker)
            case HandedOff():
                if live.accept_handed_off(event, worker):
                    self._accept_handed_off(live, worker)
            case RequestFinished():
                if live.accept_finished(event):
                    self._end(live, event.reason, error=event.error)
            case Returned():
                # Who committed and heard no Ack gives back what may have arrived after all.
                if worker in live.holders:
                    self.replay(live, event.reason)
                else:
                    self._metrics.stale_messages.inc()

    def _accept_handing_off(self, live: LiveRequest, event: HandingOff, worker: PeerRef) -> None:
        if not live.accept_handing_off(event, worker):
            return
        taker = self._rebook(live, event.taker)
        if live.moving_for is None:  # else it is decoded all the while, and its state goes back in Redis never
            self._note_state(live, RequestState.HANDING_OFF, decode_worker=event.taker.name, transport=event.transport)
        if taker is None:
            self.replay(live, "taker_gone")

    def _accept_handed_off(self, live: LiveRequest, worker: PeerRef) -> None:
        self._rebook(live, worker)
        if live.moving_for is not None:
            self._metrics.migrations.labels(live.moving_for.value).inc()
            live.moving_for = None
        self._note_state(live, RequestState.DECODING, decode_worker=worker.name)

    def _rebook(self, live: LiveRequest, peer: PeerRef) -> Worker | None:
        """Count the request towards this worker alone; None if it is not known."""
        self._bookings.release(live.request_id)
        worker = self._directory.get(peer)
        if worker is not None:
            self._bookings.book(live.request_id, worker, live.prompt_len + len(live.output))
        return worker

    def _accept_tokens(self, live: LiveRequest, chunk: TokenChunk, worker: PeerRef) -> None:
        first_before, last_before = live.first_token_s, live.last_token_s
        fresh = live.accept_tokens(chunk)
        if not fresh:
            return
        model = live.passport.model
        self._metrics.output_tokens.labels(model).inc(fresh)
        if first_before is None and live.first_token_s is not None:
            self._num_queued -= 1
            self._metrics.saw_first_token(model, live.first_token_s - live.created_s)
        elif last_before is not None and live.last_token_s is not None:
            self._metrics.itl_seconds.labels(model).observe((live.last_token_s - last_before) / fresh)
            if live.speaker not in (worker, None, live.prefill_peer):
                self._metrics.migration_pause_seconds.labels(model).observe(live.last_token_s - last_before)
        live.speaker = worker
        if live.is_complete() and live.ending is not None:
            self._end(live, live.ending.reason, error=live.ending.error)

    def _compare_notes(self, worker: Worker, notes: list[RequestNote]) -> None:
        """Tell a worker to forget what is not its business any more; miss what it should have and has not."""
        listed = set()
        for note in notes:
            listed.add((note.request_id, note.epoch))
            live = self._live.get(note.request_id)
            if live is None or note.epoch < live.epoch:
                self._bus.send(worker.peer.address, Cancel(request_id=note.request_id, epoch=note.epoch))
        settled_s = time.monotonic() - self._settle_s
        for live in list(self._live.values()):
            if worker.peer not in live.holders or live.touched_s > settled_s:
                continue
            if (live.request_id, live.epoch) in listed:
                live.missing_beats = 0
                continue
            live.missing_beats += 1
            if live.missing_beats >= MISSING_BEATS * len(live.holders):
                self.replay(live, "lost_by_worker")

    def _worker_lost(self, worker: Worker, reason: str) -> None:
        self._bookings.forget(worker)
        for live in [live for live in self._live.values() if worker.peer in live.holders]:
            live.num_lost += 1
            _log.info("request loses its worker", request_id=live.request_id, worker=worker.peer.name, reason=reason)
            if live.num_lost >= MAX_LOST:
                self._end(live, FinishReason.ERROR, error=f"{live.num_lost} workers in a row died on this request")
            else:
                self.replay(live, "worker_lost")

    def _worker_left(self, worker: Worker) -> None:
        """It has given away or given back all that it held; what it kept to itself is replayed."""
        self._bookings.forget(worker)
        for live in [live for live in self._live.values() if worker.peer in live.holders]:
            if not live.leave(worker.peer):
                self.replay(live, "worker_left")

    # moving on

    def replay(self, live: LiveRequest, reason: str) -> None:
        """Go on elsewhere from the accepted tokens, under the next epoch."""
        if live.ended:
            return
        self._cancel_on_holders(live)
        done = live.reason_by_tokens()
        if done is not None:
            self._end(live, done)
            return
        live.begin_epoch()
        self._bookings.release(live.request_id)
        self._metrics.replays.labels(reason).inc()
        _log.info("request replayed", request_id=live.request_id, epoch=live.epoch, reason=reason)
        self._note_state(live, RequestState.QUEUED, output_tokens=len(live.output), replay_reason=reason)
        self._dispatch(live)

    def _let_go(self, live: LiveRequest, reason: FinishReason) -> None:
        """The client's side is done with it before its worker was."""
        self._cancel_on_holders(live)
        self._end(live, reason)

    def _cancel_on_holders(self, live: LiveRequest) -> None:
        peers: Iterable[PeerRef | None] = {live.prefill_peer, live.decode_peer, *live.holders}
        for peer in peers:
            worker = self._directory.get(peer)
            if worker is not None:
                self._bus.send(worker.peer.address, Cancel(request_id=live.request_id, epoch=live.epoch))

    def _end(
        self, live: LiveRequest, reason: FinishReason, *, error: str | None = None, retry_after_s: float | None = None
    ) -> None:
        if live.ended:
            return
        if live.first_token_s is None:
            self._num_queued -= 1
        live.end(reason, error=error, retry_after_s=retry_after_s)
        del self._live[live.request_id]
        self._unrouted.pop(live.request_id, None)
        self._bookings.release(live.request_id)
        self._metrics.finished.labels(live.passport.model, reason.value).inc()
        self._metrics.e2e_seconds.labels(live.passport.model).observe(time.monotonic() - live.created_s)
        state = RequestState.FAILED if reason is FinishReason.ERROR else RequestState.FINISHED
        self._note_state(live, state, output_tokens=len(live.output), finish_reason=reason.value)
        now_s = time.monotonic()
        _log.info(
            "request ended",
            request_id=live.request_id,
            model=live.passport.model,
            reason=reason.value,
            prompt_tokens=live.prompt_len,
            output_tokens=len(live.output),
            epoch=live.epoch,
            ttft_ms=None if live.first_token_s is None else round((live.first_token_s - live.created_s) * 1e3, 1),
            total_ms=round((now_s - live.created_s) * 1e3, 1),
        )

    def close(self) -> None:
        """End everything; for a gateway that stops."""
        for live in list(self._live.values()):
            self._cancel_on_holders(live)
            self._end(live, FinishReason.ERROR, error="the gateway is shutting down", retry_after_s=1)

    def _note_state(self, live: LiveRequest, state: RequestState, **fields: str | int) -> None:
        self._record(Transition(live.request_id, live.epoch, state, dict(fields)))
