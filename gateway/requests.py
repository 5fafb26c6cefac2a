"""The table of live requests: admits, listens, replays, cancels.

One mechanism mends everything that is not a planned move: bump the epoch, tell the old holders to forget, and send the
passport with all accepted tokens through prefill again (DESIGN section 5).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from fleet.bus import Bus
from fleet.logs import get_logger
from fleet.messages import (
    OVER_SHARE,
    Cancel,
    Embedded,
    HandedOff,
    HandingOff,
    PromptLogprobs,
    Publication,
    RequestFinished,
    RequestNote,
    RequestStarted,
    Returned,
    TokenChunk,
)
from fleet.request_state import Transition
from fleet.types import FinishReason, Passport, PeerRef, RequestState
from gateway.admission import Admission
from gateway.directory import Directory, Worker
from gateway.dispatcher import Dispatcher
from gateway.errors import NoWorkers, Overloaded
from gateway.holders import HolderIndex
from gateway.journal import Journal
from gateway.live import LiveRequest
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
        admission: Admission,
        worker_wait_s: float,
        settle_s: float,
    ) -> None:
        self._bus = bus
        self._directory = directory
        self._router = router
        self._metrics = metrics
        self._journal = Journal(metrics, record)
        self._admission = admission
        self._worker_wait_s = worker_wait_s
        self._settle_s = settle_s
        self._live: dict[str, LiveRequest] = {}
        self._holders = HolderIndex()
        self._dispatcher = Dispatcher(bus, router, self._holders, admission)
        directory.on_lost = self._worker_lost
        directory.on_left = self._worker_left
        directory.on_joined = lambda _: self.serve_waiting()
        directory.on_notes = self._compare_notes

    @property
    def num_live(self) -> int:
        """Requests that have not ended."""
        return len(self._live)

    @property
    def num_queued(self) -> int:
        """Live requests without a first token."""
        return self._admission.num_queued

    def check_room(self, model: str, num_requests: int, *, priority: int) -> list[LiveRequest]:
        """Whether so many more requests of one kind may come in now; returns those that must then leave for them.

        Raises:
            Overloaded: the first token of the first would come too late, or too many wait already.
        """
        try:
            return self._admission.require_room(model, priority, num_requests)
        except Overloaded:
            self._metrics.rejected.labels("overloaded").inc(num_requests)
            raise

    def require_room(self, model: str, num_requests: int, *, priority: int) -> None:
        """See that so many may come in, and push out who must leave for them. Raises: as `check_room`."""
        for live in self.check_room(model, num_requests, priority=priority):
            self._displace(live)

    def admit(self, passport: Passport, *, affinity: str = "") -> LiveRequest:
        """Take a request in and send it off as soon as there is room; it may push a less urgent one out.

        Raises:
            Overloaded: its first token would come too late, or too many wait already.
            NoWorkers: nobody serves the model and waiting is switched off.
        """
        if self._worker_wait_s <= 0 and not self._router.has_route(passport):
            self._metrics.rejected.labels("no_workers").inc()
            why = self._router.mismatch(passport.model)
            raise NoWorkers(f"no worker can serve {passport.model!r} now{why}", retry_after_s=5)
        self.require_room(passport.model, 1, priority=passport.priority)
        live = LiveRequest(passport, affinity=affinity, on_let_go=self._let_go)
        self._live[live.request_id] = live
        self._admission.enter(live)
        self._journal.admitted(live)
        done = live.reason_by_tokens()
        if done is None:
            self._dispatcher.send_off(live)
        else:
            self._end(live, done)
        return live

    def _displace(self, live: LiveRequest) -> None:
        """A more urgent request takes its place in a full queue."""
        self._metrics.rejected.labels("displaced").inc()
        refusal = self._admission.displacement(live)
        self._cancel_on_holders(live)
        live.displaced = True
        self._end(live, FinishReason.ERROR, error=str(refusal), retry_after_s=refusal.retry_after_s)

    def serve_waiting(self) -> None:
        """Workers may have come or have room again."""
        self._dispatcher.serve_waiting()

    def sweep(self) -> None:
        """Look again for room, and end what has waited for a worker too long."""
        self._dispatcher.serve_waiting()
        for live in self._dispatcher.overdue():
            self._metrics.rejected.labels("no_workers").inc()
            why = self._router.mismatch(live.passport.model)
            message = f"no worker came for {live.passport.model!r} within {self._worker_wait_s:g} s{why}"
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
            case PromptLogprobs():
                live.accept_prompt_logprobs(event)
            case Embedded():
                live.accept_vector(event)
            case RequestStarted():
                live.accept_started(event)
                self._journal.state(
                    live, RequestState.PREFILLING, prefill_worker=worker.name, cached_tokens=live.cached_tokens
                )
            case HandingOff():
                self._accept_handing_off(live, event, worker)
            case HandedOff():
                if live.accept_handed_off(event, worker):
                    self._accept_handed_off(live, worker)
            case RequestFinished():
                if live.passport.is_prompt_only:
                    self._admission.saw_first_token(live)
                if live.accept_finished(event):
                    self._end(live, event.reason, error=event.error)
            case Returned():
                # Who committed and heard no Ack gives back what may have arrived after all.
                if event.reason == OVER_SHARE and (full := self._directory.get(worker)) is not None:
                    full.refuses = True
                if worker in live.holders:
                    self.replay(live, event.reason)
                else:
                    self._metrics.stale_messages.inc()

    def _accept_handing_off(self, live: LiveRequest, event: HandingOff, worker: PeerRef) -> None:
        explains = live.hops.announce(event.taker.name, transport=event.transport, reason=event.reason.value)
        if not live.accept_handing_off(event, worker):
            if explains:  # the taker's word has overtaken this one, and did not say why it took over
                self._metrics.count_move(event.reason)
                self._journal.state(live, RequestState.DECODING, transport=event.transport)
            return
        self._holders.follow(live)
        taker = self._directory.get(event.taker)
        self._dispatcher.rebook(live, taker)
        if live.moving_for is None:  # else it is decoded all the while, and its state goes back in Redis never
            self._journal.state(
                live, RequestState.HANDING_OFF, decode_worker=event.taker.name, transport=event.transport
            )
        if taker is None:
            self.replay(live, "taker_gone")

    def _accept_handed_off(self, live: LiveRequest, worker: PeerRef) -> None:
        self._holders.follow(live)
        self._dispatcher.rebook(live, self._directory.get(worker))
        live.hops.adopt(worker.name, epoch=live.epoch)
        self._metrics.count_move(live.moving_for)
        live.moving_for = None
        self._journal.state(live, RequestState.DECODING, decode_worker=worker.name)

    def _accept_tokens(self, live: LiveRequest, chunk: TokenChunk, worker: PeerRef) -> None:
        first_before, last_before = live.first_token_s, live.last_token_s
        fresh = live.accept_tokens(chunk)
        if not fresh:
            return
        self._metrics.output_tokens.labels(live.passport.model).inc(fresh)
        if live.speaker is None:
            self._admission.saw_first_token(live)
        if first_before is None:
            self._journal.first_token(live)
        elif last_before is not None and live.last_token_s is not None:
            self._journal.gap(live, live.last_token_s - last_before, fresh, worker)
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
        for live in self._holders.of(worker.peer):
            if live.touched_s > settled_s:
                continue
            if (live.request_id, live.epoch) in listed:
                live.missing_beats = 0
                continue
            live.missing_beats += 1
            if live.missing_beats >= MISSING_BEATS * len(live.holders):
                self.replay(live, "lost_by_worker")
        self._dispatcher.serve(worker.record.model)

    def _worker_lost(self, worker: Worker, reason: str) -> None:
        self._dispatcher.forget(worker)
        for live in self._holders.of(worker.peer):
            live.num_lost += 1
            _log.info("request loses its worker", request_id=live.request_id, worker=worker.peer.name, reason=reason)
            if live.num_lost >= MAX_LOST:
                self._end(live, FinishReason.ERROR, error=f"{live.num_lost} workers in a row died on this request")
            else:
                self.replay(live, "worker_lost")

    def _worker_left(self, worker: Worker) -> None:
        """It has given away or given back all that it held; what it kept to itself is replayed."""
        self._dispatcher.forget(worker)
        for live in self._holders.of(worker.peer):
            if live.leave(worker.peer):
                self._holders.follow(live)
            else:
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
        live.replayed_for = reason
        self._holders.follow(live)
        self._dispatcher.leave(live)
        self._journal.replayed(live, reason)
        self._dispatcher.send_off(live)

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
        live.end(reason, error=error, retry_after_s=retry_after_s)
        del self._live[live.request_id]
        self._admission.leave(live)
        self._holders.follow(live)
        self._dispatcher.leave(live)
        self._journal.ended(live, reason)
        self._dispatcher.serve(live.passport.model)

    def close(self) -> None:
        """End everything; for a gateway that stops."""
        self._dispatcher.stop()
        for live in list(self._live.values()):
            self._cancel_on_holders(live)
            self._end(live, FinishReason.ERROR, error="the gateway is shutting down", retry_after_s=1)
