"""Moves running sequences to other decode workers: pre-copy while they decode, then a short stop for the last pages.

Live migration as in Llumnix (OSDI 2024), over the protocol by which they came:

    running --offer--> offered --grant--> pre-copied --a page or so is left--> standing --Commit--> gone
       ^                  |                   |                                   |          |
       +------------------+-------------------+------ no grant any more ----------+          +--> given back
                                                                                  no Ack: only a replay may go on

A sequence decodes here until the stop, and again whenever a hand-off ends before its Commit. It is stopped right
after a step was booked and stands once no plan in flight computes it, so that the passport holds every token that was
said. What is left to move then is at most `MAX_LAG` full pages and a partial one, or one page more where the next step
was under way already.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from engine.decode_scheduler import DecodeScheduler
from engine.pages import PagePool, pages_for
from engine.sequence import Phase, Sequence
from fleet.logs import get_logger
from fleet.messages import MoveReason
from fleet.types import PeerRef
from fleet.worker_metrics import WorkerMetrics
from kvtransfer.actions import Committing, FailReason, Given, Granted, HandOffFailed, TargetRefused
from kvtransfer.endpoint import HandOffEndpoint

MAX_MOVING = 4
"""Hand-offs given at once: few enough that each one's last pages find the transfer thread free."""
MAX_LAG = 1
"""Full pages that may still be on their way when a sequence stops."""
SLACK_PAGES = 2
"""Pages asked for beyond those in use, for what is decoded meanwhile."""
OFFER_S = 1.0
"""An offer that nobody grants for so long is made anew, with today's figures and peers."""
PRE_COPY_S = 5.0
"""A sequence that grows as fast as its pages move stops after so long all the same."""

_log = get_logger("mover")


@dataclass(frozen=True, slots=True)
class Consequences:
    """What the worker does about a move's news.

    Attributes:
        committing: the taker matters to the gateway from now on.
        give_back: only a replay may go on with this sequence. Called before `freed`.
        freed: a sequence may have left, or runs again; pages may have become free.
    """

    committing: Callable[[Sequence, PeerRef, str, MoveReason], None]
    give_back: Callable[[Sequence, str], None]
    freed: Callable[[], None]


@dataclass(eq=False, slots=True)
class _Move:
    """One sequence on its way out.

    Attributes:
        num_pages: that the taker was asked for.
        shared: own pages that the hand-off may read, held for it until `release_pages`.
        granted_s: when there was first room; None before.
        stopped_s: when it stopped for its last pages.
        asked_commit: what it computed last is booked, and the hand-off has all its pages to move.
        committed_s: when the Commit went out: never to run here again; None before.
        withdrawn: called off by us; it runs on here.
    """

    sequence: Sequence
    num_pages: int
    reason: MoveReason
    offered_s: float
    shared: list[int] = field(default_factory=list)
    granted_s: float | None = None
    stopped_s: float = 0.0
    asked_commit: bool = False
    committed_s: float | None = None
    withdrawn: bool = False


class Mover:
    """The giving half of a decode worker. Everything happens on the event loop's thread, nothing here waits.

    The worker calls `tick` now and then while it wants to be rid of all its sequences, or `offer` for some of them and
    `call_off` now and then; `on_booked` after each step and where there is none, and `forget` for each sequence that
    ends here. The hand-offs' news come as in `HandOffEvents`.

    Args:
        pool: of the pages.
        scheduler: of the sequences.
        page_bytes: for the count of moved bytes.
        max_model_len: in tokens, bounds what a sequence may still want.
        pick: peers to ask in a sequence's n-th turn, best first.
    """

    def __init__(
        self,
        *,
        pool: PagePool,
        scheduler: DecodeScheduler,
        metrics: WorkerMetrics,
        page_bytes: int,
        max_model_len: int,
        pick: Callable[[int], list[PeerRef]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pool = pool
        self._scheduler = scheduler
        self._metrics = metrics
        self._page_bytes = page_bytes
        self._max_model_len = max_model_len
        self._pick = pick
        self._clock = clock
        self._moves: dict[tuple[str, int], _Move] = {}
        self._turns: dict[tuple[str, int], int] = {}
        self.endpoint: HandOffEndpoint
        self.do: Consequences

    @property
    def num_moving(self) -> int:
        """Hand-offs that have not ended."""
        return len(self._moves)

    def is_moving(self, sequence: Sequence) -> bool:
        """Whether a hand-off of its request, be it of another epoch, has not ended."""
        return any(request_id == sequence.request_id for request_id, _ in self._moves)

    # the worker's calls

    def call_off(self) -> None:
        """Let go on here what has lost its grant or never got one."""
        now_s = self._clock()
        for move in list(self._moves.values()):
            if move.committed_s is not None or move.withdrawn or self._lag(move) is not None:
                continue
            if move.granted_s is not None or now_s - move.offered_s >= OFFER_S:
                self._withdraw(move)

    def tick(self, reason: MoveReason) -> None:
        """Call off what goes nowhere; offer the sequences with the longest way to go to the peers whose turn it is."""
        self.call_off()
        waiting = [s for s in self._scheduler.sequences() if s.phase is Phase.RUNNING]
        waiting.sort(key=lambda s: (self._turns.get(_key(s), 0), -self.num_to_come(s)))
        for sequence in waiting:
            if len(self._moves) >= MAX_MOVING:
                break
            if not self.is_moving(sequence):
                self.offer(sequence, self._pick(self._turns.get(_key(sequence), 0)), reason)

    def num_to_come(self, sequence: Sequence) -> int:
        """Tokens that it may still say."""
        return self._end_of(sequence) - len(sequence.token_ids)

    def _end_of(self, sequence: Sequence) -> int:
        return min(sequence.prompt_len + sequence.params.max_tokens, self._max_model_len)

    def offer(self, sequence: Sequence, targets: list[PeerRef], reason: MoveReason) -> None:
        """Ask these peers for room, if there are any, and no hand-off of the request is open."""
        if not targets or self.is_moving(sequence):
            return
        key = _key(sequence)
        self._turns[key] = self._turns.get(key, 0) + 1
        num_used = len(sequence.page_table)
        wanted = min(num_used + SLACK_PAGES, pages_for(self._end_of(sequence), self._pool.page_size))
        move = self._moves[key] = _Move(sequence, max(num_used, wanted), reason, offered_s=self._clock())
        self.endpoint.offer(
            sequence.to_passport(),
            page_hashes=sequence.page_hashes,
            num_pages=move.num_pages,
            targets=targets,
        )

    def on_booked(self) -> None:
        """Let full pages flow, stop the sequences of which little is left to move, and send what stands."""
        now_s = self._clock()
        for move in list(self._moves.values()):
            sequence = move.sequence
            if move.withdrawn or move.granted_s is None:
                continue
            if sequence.phase is Phase.PAUSED:
                self._commit_once_booked(move)
            if sequence.phase is not Phase.RUNNING:
                continue
            full = sequence.page_table[: sequence.num_computed_tokens // self._pool.page_size]
            self._share(move, full)
            self.endpoint.pages_ready(*_key(sequence), full)
            lag = self._lag(move)
            if lag is None or (lag > MAX_LAG and now_s - move.granted_s < PRE_COPY_S):
                continue
            # A holder that never said a token of its own could not be told from the one before it.
            if sequence.num_output_tokens > sequence.passport.next_index:
                self._scheduler.pause(sequence)
                move.stopped_s = now_s
                self._commit_once_booked(move)

    def _commit_once_booked(self, move: _Move) -> None:
        sequence = move.sequence
        if move.asked_commit or self._scheduler.is_in_flight(sequence):
            return
        move.asked_commit = True
        used = sequence.page_table[: pages_for(sequence.num_computed_tokens, self._pool.page_size)]
        self._share(move, used)
        self.endpoint.commit(sequence.to_passport(), page_ids=used, num_computed_tokens=sequence.num_computed_tokens)

    def _share(self, move: _Move, page_ids: list[int]) -> None:
        fresh = page_ids[len(move.shared) :]
        self._pool.share(fresh)
        move.shared += fresh

    def forget(self, sequence: Sequence) -> None:
        """The sequence has ended here, whatever the reason. Idempotent."""
        self._turns.pop(_key(sequence), None)
        move = self._moves.get(_key(sequence))
        if move is not None and not move.withdrawn:
            self._withdraw(move)

    def _withdraw(self, move: _Move) -> None:
        move.withdrawn = True
        self.endpoint.cancel(*_key(move.sequence))

    def _lag(self, move: _Move) -> int | None:
        return self.endpoint.lag(*_key(move.sequence))

    # the hand-offs' news

    def granted(self, news: Granted) -> None:
        """Somebody has room. A sequence that has outgrown it meanwhile asks anew."""
        move = self._moves[news.request_id, news.epoch]
        if move.withdrawn:
            return
        if len(move.sequence.page_table) > move.num_pages:
            self._withdraw(move)
            return
        move.granted_s = self._clock()
        # Where no step runs, nobody else would look at it.
        self.do.freed()

    def committing(self, news: Committing) -> None:
        """The Commit goes out next: the gateway must know the taker, and this worker is silent from then on."""
        move = self._moves[news.request_id, news.epoch]
        move.committed_s = self._clock()
        self.do.committing(move.sequence, news.taker, news.transport, move.reason)

    def given(self, news: Given) -> None:
        """The taker holds the sequence now."""
        self._metrics.hand_offs.labels(news.transport, "given").inc()
        self._metrics.hand_off_seconds.labels(news.transport).observe(news.hand_off_s)
        self._metrics.hand_off_bytes.labels(news.transport).inc(news.num_moved_pages * self._page_bytes)
        move = self._moves[news.request_id, news.epoch]
        sequence = move.sequence
        committed_s = move.committed_s or move.stopped_s
        copy_s, answer_s = committed_s - move.stopped_s, self._clock() - committed_s
        self._metrics.move_seconds.labels("last_pages").observe(copy_s)
        self._metrics.move_seconds.labels("answer").observe(answer_s)
        _log.info(
            "sequence moved",
            request_id=news.request_id,
            taker=news.taker.name,
            transport=news.transport,
            output_tokens=sequence.num_output_tokens,
            moved_pages=news.num_moved_pages,
            held_pages=news.num_held_pages,
            hand_off_ms=round(news.hand_off_s * 1e3, 1),
            last_pages_ms=round(copy_s * 1e3, 1),
            answer_ms=round(answer_s * 1e3, 1),
        )
        self._let_go(sequence)

    def failed(self, news: HandOffFailed) -> None:
        """Nobody took it: before the Commit it goes on here, after it only a replay may."""
        move = self._moves[news.request_id, news.epoch]
        sequence = move.sequence
        self._metrics.hand_offs.labels("none", news.reason.value).inc()
        if sequence.phase is Phase.DONE:
            return
        _log.info("move failed", request_id=news.request_id, reason=news.reason.value, detail=news.message)
        if move.committed_s is not None:
            self.do.give_back(sequence, f"hand_off_{news.reason.value}")
            self._let_go(sequence)
        elif move.withdrawn or news.reason is FailReason.REFUSED:
            self._scheduler.resume(sequence)
            self.do.freed()
        else:
            # Cancelled or replayed: the request is not ours any more, whoever told the taker so.
            self._let_go(sequence)

    def _let_go(self, sequence: Sequence) -> None:
        self._turns.pop(_key(sequence), None)
        self._scheduler.release(sequence)
        self.do.freed()

    def target_refused(self, news: TargetRefused) -> None:
        """One peer will never take it."""
        _log.info("peer refused", request_id=news.request_id, taker=news.taker.name, detail=news.message)

    def release_pages(self, request_id: str, epoch: int) -> None:
        """The hand-off reads the pages no more."""
        self._pool.release(self._moves.pop((request_id, epoch)).shared)
        self.do.freed()


def _key(sequence: Sequence) -> tuple[str, int]:
    return (sequence.request_id, sequence.epoch)
