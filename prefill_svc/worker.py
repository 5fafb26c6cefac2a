"""A prefill worker's conduct: what it does with each message, each step and each hand-off's news."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from contextlib import suppress

from engine.assembly import Engine
from engine.errors import AlreadyFinished, DuplicateSequence, SequenceTooLong
from engine.plan import StepPlan
from engine.prefill_scheduler import PrefillScheduler
from engine.progress import RowProgress, StepProgress
from engine.sequence import Phase, Sequence
from fleet.bus import Delivery
from fleet.departure import AskToLeave, Departure
from fleet.logs import get_logger
from fleet.messages import (
    OVER_SHARE,
    Cancel,
    DrainRequest,
    Embedded,
    GatewayHello,
    Goodbye,
    HandingOff,
    Heartbeat,
    MetricFamily,
    PrefillRequest,
    PromptLogprobs,
    Publication,
    RequestFinished,
    RequestNote,
    RequestStarted,
    Returned,
    TokenChunk,
)
from fleet.metrics import snapshot
from fleet.types import FinishReason, PeerRef, WorkerRecord
from fleet.worker_link import WorkerLink
from fleet.worker_metrics import WorkerMetrics
from prefill_svc.hand_offs import Consequences, PrefillHandOffs
from prefill_svc.vectors import Vectors

LOOK_S = 0.5
"""While it drains it looks this often whether its deadline has come nearer."""

_log = get_logger("prefill")


class PrefillWorker:
    """Joins scheduler and hand-offs. Everything happens on the event loop's thread, nothing here waits.

    Attributes:
        hand_offs: its `endpoint` is set by the service, as are the attributes below.
        link, wake, ask_to_leave: the way to the gateways, to the step loop, and out.
    """

    def __init__(
        self,
        *,
        record: WorkerRecord,
        engine: Engine,
        scheduler: PrefillScheduler,
        metrics: WorkerMetrics,
    ) -> None:
        self._record = record
        self._engine = engine
        self._scheduler = scheduler
        self._metrics = metrics
        self._num_arrived = 0
        self._requests: dict[tuple[str, int], PrefillRequest] = {}
        self._started: set[tuple[str, int]] = set()
        self._vectors = Vectors()
        self._draining = False
        self._idle = asyncio.Event()
        self.hand_offs = PrefillHandOffs(
            engine,
            metrics,
            Consequences(
                committing=self._committing,
                over=self._let_go,
                give_back=self._give_back_failed,
                freed=lambda: self.wake(),  # noqa: PLW0108 - the service sets `wake` later
            ),
        )
        self.link: WorkerLink
        self.wake: Callable[[], None]
        self.ask_to_leave: AskToLeave

    # messages

    def handle(self, delivery: Delivery) -> None:
        """Act on one message; what is not for a prefill worker is dropped."""
        match delivery.message:
            case PrefillRequest() as request:
                self._take(request)
            case Cancel(request_id=request_id, epoch=epoch):
                self._forget(request_id, epoch)
            case GatewayHello() as hello:
                self.link.hear_hello(hello)
            case DrainRequest(reason=reason, within_s=within_s):
                self.ask_to_leave(reason, within_s=within_s)
            case Publication() | Heartbeat() | Goodbye():
                _log.warning("message for a gateway came to a worker", kind=type(delivery.message).__name__)
            case message:
                self.hand_offs.endpoint.on_message(message, delivery.payload)
        self.link.flush()

    def _take(self, request: PrefillRequest) -> None:
        passport = request.passport
        key = (passport.request_id, passport.epoch)
        if self.hand_offs.endpoint.is_cancelled(*key):
            self.hand_offs.endpoint.note_old_epoch()
            return
        if self._draining:
            self._return(passport.gateway, key, "draining")
            return
        self.link.know(passport.gateway)
        if key not in self._requests and self._has_its_share(passport.gateway):
            self._metrics.over_share.inc()
            self._return(passport.gateway, key, OVER_SHARE)
            return
        sequence = Sequence.from_passport(passport, arrival=self._num_arrived)
        self._num_arrived += 1
        try:
            self._scheduler.add(sequence)
        except DuplicateSequence:
            return
        except AlreadyFinished as finished:
            self._finish(sequence, finished.reason)
        except SequenceTooLong as error:
            self._finish(sequence, FinishReason.ERROR, str(error))
        else:
            self._requests[key] = request
            self._engine.grammars.prepare(passport.params.grammar)
            _log.debug("prompt taken", request_id=key[0], epoch=key[1], num_tokens=len(passport.token_ids))
            self.wake()

    def _has_its_share(self, gateway: PeerRef) -> bool:
        bound = self._record.max_requests_per_gateway
        return 0 < bound <= sum(request.passport.gateway == gateway for request in self._requests.values())

    def _forget(self, request_id: str, epoch: int) -> None:
        for sequence in self._scheduler.abort(request_id, epoch):
            self._drop(sequence)
        self.hand_offs.endpoint.cancel(request_id, epoch)
        self.wake()

    def _drop(self, sequence: Sequence) -> None:
        key = (sequence.request_id, sequence.epoch)
        self._requests.pop(key, None)
        self._started.discard(key)
        self._vectors.drop(sequence)
        if not self._requests:
            self._idle.set()

    def _return(self, gateway: PeerRef, key: tuple[str, int], reason: str) -> None:
        self._metrics.returned.labels(reason).inc()
        self.link.publish(gateway, Returned(request_id=key[0], epoch=key[1], reason=reason))

    def _finish(self, sequence: Sequence, reason: FinishReason, error: str | None = None) -> None:
        self.link.publish(
            sequence.passport.gateway,
            RequestFinished(
                request_id=sequence.request_id,
                epoch=sequence.epoch,
                reason=reason,
                num_output_tokens=sequence.num_output_tokens,
                error=error,
            ),
        )

    # steps

    def on_scheduled(self, plan: StepPlan | None) -> None:
        """Before a step: tell gateways what begins, and ask for room at the takers while the chunk computes."""
        self._engine.activity.show(plan)
        for row in plan.rows if plan is not None else ():
            sequence = row.sequence
            key = (sequence.request_id, sequence.epoch)
            if key in self._started:
                continue
            self._started.add(key)
            self.link.publish(
                sequence.passport.gateway,
                RequestStarted(
                    request_id=sequence.request_id, epoch=sequence.epoch, cached_tokens=sequence.num_cached_tokens
                ),
            )
            if sequence.num_output_tokens + 1 < sequence.params.max_tokens:
                self.hand_offs.offer(sequence, self._requests[key].targets)
        self.link.flush()

    def on_step(self, plan: StepPlan, progress: StepProgress, step_s: float) -> None:
        """After a step: send tokens, let pages flow, commit what is computed."""
        self._metrics.step_seconds.observe(step_s)
        self._metrics.computed_tokens.inc(plan.num_tokens)
        for row in progress.rows:
            self._settle(row)
        self.link.flush()

    def _settle(self, row: RowProgress) -> None:
        sequence = row.sequence
        self._publish_prompt_results(row)
        if row.sampled is not None:
            self._metrics.sampled_tokens.inc()
            logprob = row.sampled.logprob
            self.link.publish(
                sequence.passport.gateway,
                TokenChunk(
                    request_id=sequence.request_id,
                    epoch=sequence.epoch,
                    index=row.index,
                    token_ids=[row.sampled.token_id],
                    logprobs=None if logprob is None else [logprob],
                ),
            )
        if row.finish is not None:
            self.hand_offs.endpoint.cancel(sequence.request_id, sequence.epoch)
            self._end(row, row.finish)
            self._drop(sequence)
            return
        final = sequence.page_table[: row.new_pages.stop]
        self.hand_offs.endpoint.pages_ready(sequence.request_id, sequence.epoch, final)
        if row.sampled is not None:
            self.hand_offs.endpoint.commit(
                sequence.to_passport(),
                page_ids=sequence.page_table,
                num_computed_tokens=sequence.num_computed_tokens,
            )

    def _publish_prompt_results(self, row: RowProgress) -> None:
        """What the row says of its prompt. A step's budget of tokens bounds the size of a message."""
        sequence = row.sequence
        if row.pooled is not None:
            self._vectors.add(sequence, row.pooled)
        if row.scored is not None:
            self.link.publish(
                sequence.passport.gateway,
                PromptLogprobs(
                    request_id=sequence.request_id,
                    epoch=sequence.epoch,
                    position=row.scored.position,
                    logprobs=row.scored.logprobs,
                ),
            )

    def _end(self, row: RowProgress, reason: FinishReason) -> None:
        """The row was its sequence's last: the vector, if it was to become one, and the terminal message."""
        sequence = row.sequence
        if sequence.passport.pooling is None or reason is FinishReason.ERROR:
            self._finish(sequence, reason, row.error)
            return
        vector = self._vectors.take(sequence)
        if vector is None:
            self._finish(sequence, FinishReason.ERROR, "the model gave no finite vector for this input")
            return
        event = Embedded(request_id=sequence.request_id, epoch=sequence.epoch, vector=vector)
        self.link.publish(sequence.passport.gateway, event)
        self._finish(sequence, reason)

    # hand-offs

    def _committing(self, request_id: str, epoch: int, taker: PeerRef, transport: str) -> None:
        """From the Commit on both workers matter to the request."""
        request = self._requests.get((request_id, epoch))
        if request is not None:
            event = HandingOff(request_id=request_id, epoch=epoch, taker=taker, transport=transport)
            self.link.publish(request.passport.gateway, event)
            self.link.flush()

    def _give_back_failed(self, request_id: str, epoch: int, reason: str) -> None:
        request = self._requests.get((request_id, epoch))
        if request is not None:
            self._return(request.passport.gateway, (request_id, epoch), reason)
            self.link.flush()

    def _let_go(self, request_id: str, epoch: int) -> None:
        for sequence in self._scheduler.abort(request_id, epoch):
            self._drop(sequence)
        self.wake()

    # the link's questions

    def record(self) -> WorkerRecord:
        """Registry record with current load."""
        load = self._engine.load(
            num_running=self._scheduler.num_running + self._scheduler.num_prefilled,
            num_waiting=self._scheduler.num_waiting,
            waiting_tokens=self._scheduler.waiting_tokens,
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
        """Take nothing new, give waiting prompts back, finish the rest; what is left after the grace goes back."""
        self._draining = True
        self.link.beat_now()
        for sequence in [s for s in self._scheduler.sequences() if s.phase is Phase.WAITING]:
            self._give_back(sequence, "draining")
        self.link.flush()
        self._idle.clear()
        while self._requests and (left_s := departure.left_s) > 0:
            with suppress(TimeoutError):
                async with asyncio.timeout(min(left_s, LOOK_S)):
                    await self._idle.wait()
        if self._requests:
            _log.warning("grace period is over", num_left=len(self._requests))
        for sequence in list(self._scheduler.sequences()):
            self._give_back(sequence, "draining")
        self.link.flush()

    def _give_back(self, sequence: Sequence, reason: str) -> None:
        self._return(sequence.passport.gateway, (sequence.request_id, sequence.epoch), reason)
        self._forget(sequence.request_id, sequence.epoch)
