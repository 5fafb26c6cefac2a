"""A decode worker's conduct: what it does with each message, each step and each hand-off's news."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from contextlib import suppress

from decode_svc.mover import Consequences, Mover
from engine.assembly import Engine
from engine.decode_scheduler import DecodeScheduler
from engine.errors import AlreadyFinished, EngineError
from engine.plan import StepPlan
from engine.progress import StepProgress
from engine.sequence import Sequence
from fleet.bus import Delivery
from fleet.departure import AskToLeave, Departure
from fleet.logs import get_logger
from fleet.messages import (
    Cancel,
    DrainRequest,
    GatewayHello,
    Goodbye,
    HandedOff,
    HandingOff,
    Heartbeat,
    MetricFamily,
    MoveReason,
    PrefillRequest,
    Publication,
    RequestFinished,
    RequestNote,
    Returned,
    TokenChunk,
)
from fleet.metrics import snapshot
from fleet.types import FinishReason, Passport, PeerRef, WorkerRecord
from fleet.worker_link import WorkerLink
from fleet.worker_metrics import WorkerMetrics
from kvtransfer.actions import (
    Adopted,
    Committing,
    Given,
    GrantClosed,
    Granted,
    HandOffFailed,
    PeerLost,
    TargetRefused,
)
from kvtransfer.endpoint import HandOffEndpoint

TICK_S = 0.05
"""While a worker drains it looks this often for what stands in the way, beside whatever news come."""

_log = get_logger("decode")


class DecodeWorker:
    """Joins scheduler and hand-offs. Everything happens on the event loop's thread, nothing here waits.

    Implements `kvtransfer.events.HandOffEvents`; what concerns giving goes on to the mover. The service sets `link`,
    `endpoint`, `wake`, `ask_to_leave`, `look_for_peers` and `stop_rebalancing`: the ways to the gateways, to the
    hand-offs, to the step loop, out, and to those who could go on with its sequences.
    """

    def __init__(
        self,
        *,
        record: WorkerRecord,
        engine: Engine,
        scheduler: DecodeScheduler,
        mover: Mover,
        metrics: WorkerMetrics,
    ) -> None:
        self._record = record
        self._engine = engine
        self._scheduler = scheduler
        self._mover = mover
        self._metrics = metrics
        self._draining = False
        self._news = asyncio.Event()
        self._adopted_s: dict[Sequence, float] = {}  # without a token of their own yet
        self.link: WorkerLink
        self.endpoint: HandOffEndpoint
        self.wake: Callable[[], None]
        self.ask_to_leave: AskToLeave
        self.look_for_peers: Callable[[], None]
        self.stop_rebalancing: Callable[[], None]
        mover.do = Consequences(committing=self._committing, give_back=self._give_back, freed=self._freed)

    # messages

    def handle(self, delivery: Delivery) -> None:
        """Act on one message; what is not for a decode worker is dropped."""
        match delivery.message:
            case Cancel(request_id=request_id, epoch=epoch):
                self._forget(request_id, epoch)
            case GatewayHello() as hello:
                self.link.hear_hello(hello)
            case DrainRequest(reason=reason, within_s=within_s):
                self.ask_to_leave(reason, within_s=within_s)
            case Publication() | Heartbeat() | Goodbye() | PrefillRequest():
                _log.warning("message for another role came here", kind=type(delivery.message).__name__)
            case message:
                self.endpoint.on_message(message, delivery.payload)
        self.link.flush()

    def _forget(self, request_id: str, epoch: int) -> None:
        for sequence in self._scheduler.abort(request_id, epoch):
            self._left(sequence)
        self.endpoint.cancel(request_id, epoch)
        self._freed()

    def _left(self, sequence: Sequence) -> None:
        self._adopted_s.pop(sequence, None)
        self._mover.forget(sequence)

    @property
    def _num_held(self) -> int:
        """Sequences here or on their way here."""
        return self._scheduler.num_running + self._scheduler.num_paused + self._scheduler.num_reserved

    def _freed(self) -> None:
        """Sequences may have left, and one that waits alone for pages may have them now."""
        self._news.set()
        self.wake()

    # steps

    def on_scheduled(self, plan: StepPlan | None) -> None:
        """Before a step: whoever lost its pages goes back to its gateway, to be replayed."""
        self._engine.activity.show(plan)
        for sequence in self._scheduler.take_returned():
            _log.info("out of pages, sequence goes back", request_id=sequence.request_id)
            self._left(sequence)
            self._return(sequence, "out_of_pages")
        if plan is None:
            self._mover.on_booked()
        self.link.flush()

    def _return(self, sequence: Sequence, reason: str) -> None:
        self._metrics.returned.labels(reason).inc()
        event = Returned(request_id=sequence.request_id, epoch=sequence.epoch, reason=reason)
        self.link.publish(sequence.passport.gateway, event)

    def on_step(self, plan: StepPlan, progress: StepProgress, step_s: float) -> None:
        """After a step: send each sequence's token, and its end if that was the last."""
        self._metrics.step_seconds.observe(step_s)
        self._metrics.computed_tokens.inc(plan.num_tokens)
        for row in progress.rows:
            sequence = row.sequence
            gateway = sequence.passport.gateway
            if row.sampled is not None:
                self._metrics.sampled_tokens.inc()
                if (adopted_s := self._adopted_s.pop(sequence, None)) is not None:
                    waited_s = time.monotonic() - adopted_s
                    self._metrics.move_seconds.labels("first_token").observe(waited_s)
                    _log.debug(
                        "first token",
                        request_id=sequence.request_id,
                        index=row.index,
                        waited_ms=round(waited_s * 1e3, 1),
                    )
                logprob = row.sampled.logprob
                chunk = TokenChunk(
                    request_id=sequence.request_id,
                    epoch=sequence.epoch,
                    index=row.index,
                    token_ids=[row.sampled.token_id],
                    logprobs=None if logprob is None else [logprob],
                )
                self.link.publish(gateway, chunk)
            if row.finish is not None:
                finished = RequestFinished(
                    request_id=sequence.request_id,
                    epoch=sequence.epoch,
                    reason=row.finish,
                    num_output_tokens=sequence.num_output_tokens,
                    error=row.error,
                )
                self._left(sequence)
                self._news.set()
                self.link.publish(gateway, finished)
        self.link.flush()
        self._mover.on_booked()

    # hand-offs

    def on_adopted(self, sequence: Sequence) -> None:
        """A sequence starts here: its gateway learns who holds it now."""
        event = HandedOff(request_id=sequence.request_id, epoch=sequence.epoch, next_index=sequence.num_output_tokens)
        _log.debug("sequence adopted", request_id=sequence.request_id, epoch=sequence.epoch)
        self._adopted_s[sequence] = time.monotonic()
        self.link.publish(sequence.passport.gateway, event)
        self.wake()

    def on_rejected(self, passport: Passport, error: EngineError) -> None:
        """A sequence was handed off that needs no further token, or that does not fit its pages."""
        whole = isinstance(error, AlreadyFinished)
        if not whole:
            _log.error("handed-off sequence cannot start", request_id=passport.request_id, error=str(error))
        finished = RequestFinished(
            request_id=passport.request_id,
            epoch=passport.epoch,
            reason=error.reason if isinstance(error, AlreadyFinished) else FinishReason.ERROR,
            num_output_tokens=passport.next_index,
            error=None if whole else "the hand-off of this request went wrong",
        )
        self.link.publish(passport.gateway, finished)

    def _committing(self, sequence: Sequence, taker: PeerRef, transport: str, reason: MoveReason) -> None:
        """From the Commit on both workers matter to the request."""
        event = HandingOff(
            request_id=sequence.request_id,
            epoch=sequence.epoch,
            taker=taker,
            transport=transport,
            reason=reason,
        )
        self.link.publish(sequence.passport.gateway, event)
        self.link.flush()

    def _give_back(self, sequence: Sequence, reason: str) -> None:
        self._return(sequence, reason)
        self.link.flush()

    def granted(self, news: Granted) -> None:
        """See `Mover`, for this and what follows."""
        self._mover.granted(news)

    def committing(self, news: Committing) -> None:
        """A sequence is about to leave."""
        self._mover.committing(news)

    def given(self, news: Given) -> None:
        """A sequence has left."""
        self._mover.given(news)

    def failed(self, news: HandOffFailed) -> None:
        """A sequence did not leave."""
        self._mover.failed(news)

    def target_refused(self, news: TargetRefused) -> None:
        """A peer will not have a sequence."""
        self._mover.target_refused(news)

    def release_pages(self, request_id: str, epoch: int) -> None:
        """A hand-off reads its pages no more."""
        self._mover.release_pages(request_id, epoch)

    def adopted(self, news: Adopted) -> None:
        """A sequence is ours; `on_adopted` has started it."""
        self._metrics.hand_offs.labels(news.transport, "taken").inc()

    def grant_closed(self, news: GrantClosed) -> None:
        """A granted sequence will not come."""
        self._metrics.hand_offs.labels("none", "closed").inc()
        _log.info("grant closed", request_id=news.request_id, reason=news.reason, quarantined=news.quarantined)
        self._freed()

    def peer_lost(self, news: PeerLost) -> None:
        """A giver or taker is gone; hand-offs with it are closed or go on elsewhere by themselves."""
        _log.info("hand-off peer lost", peer=news.peer.name, reason=news.reason)

    # the link's questions

    def record(self) -> WorkerRecord:
        """Registry record with current load."""
        load = self._engine.load(
            num_running=self._scheduler.num_running,
            num_waiting=self._scheduler.num_reserved,
        )
        self._metrics.show_load(load)
        return self._record.with_load(load, draining=self._draining)

    def notes(self) -> Iterable[tuple[PeerRef, RequestNote]]:
        """Every request held, with its gateway."""
        for sequence in self._scheduler.sequences():
            note = RequestNote(sequence.request_id, sequence.epoch, sequence.num_output_tokens)
            yield sequence.passport.gateway, note

    def metrics(self) -> list[MetricFamily]:
        """A snapshot."""
        return snapshot(self._metrics.registry)

    def gateway_lost(self, gateway: PeerRef) -> None:
        """Free everything that a gone gateway owned."""
        owned = [s for s in self._scheduler.sequences() if s.passport.gateway == gateway]
        for sequence in owned:
            self._forget(sequence.request_id, sequence.epoch)

    # leaving

    async def drain(self, departure: Departure) -> None:
        """Take nothing new, move what runs to peers within the grace period, and give the rest back for replay.

        Sequences decode on until they move or end, so that a worker without peers ends what it can.
        """
        self._draining = True
        self.endpoint.drain()
        self.stop_rebalancing()
        self.look_for_peers()
        self.link.beat_now()
        while self._num_held and (left_s := departure.left_s) > 0:
            self._news.clear()
            self._mover.tick(departure.reason)
            with suppress(TimeoutError):
                async with asyncio.timeout(min(TICK_S, left_s)):
                    await self._news.wait()
        if self._num_held:
            _log.warning("grace period is over", num_left=self._num_held)
        for sequence in list(self._scheduler.sequences()):
            self._return(sequence, "draining")
            self._forget(sequence.request_id, sequence.epoch)
        self.link.flush()
