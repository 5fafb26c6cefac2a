"""The giving side of hand-offs, as a state machine without input or output.

                    every target full
              +---------------------------+
              v        (pause)            |
    start -> WAITING ------------------> OFFERED --Grant--> WRITING --pages moved-----> COMMITTED --Ack--> given
              ^                           |  ^ Refuse: next   |                            |
              |                           |  | target         | Abort, peer lost,          | Refuse, Abort, peer lost:
              |                           v  |                | write failed               | failed (UNCERTAIN)
              +------ next target ------ CLOSING <------------+
                                          |   waits for the write in flight
                                          +--> failed (CANCELLED, STALE, REFUSED)

Whatever happens, every `start` ends with one `Given` or `HandOffFailed` and one `ReleasePages`, never before the last
write has returned. A refusal is liveness, not failure: full targets are asked again as long as the request lives.
Only full pages move while the sequence still computes; the last partial one goes at `commit`. A Commit follows its last
pages at once: written ones lie at the taker, carried ones come in order before it, and a taker that misses some waits
until both are sent again.
"""

from __future__ import annotations

from collections.abc import Sequence

from fleet.hand_off_messages import Abort, Ack, Grant, OpenHandOff, PagesTaken, Refuse, RefuseReason, Released
from fleet.types import Passport, PeerRef
from kvtransfer.actions import Action, FailReason, Given, Granted
from kvtransfer.errors import GrantRevoked, HandOffExists, TransferError
from kvtransfer.numbering import belongs_to
from kvtransfer.outgoing import GiverState, Outgoing
from kvtransfer.outgoing_book import GiverConfig, OutgoingBook
from kvtransfer.stats import StaleReason
from kvtransfer.targets import TargetRounds

_ENDS = {RefuseReason.CANCELLED: FailReason.CANCELLED, RefuseReason.STALE: FailReason.STALE}
_STRIKES = {RefuseReason.LAYOUT, RefuseReason.TRANSPORT, RefuseReason.DRAINING}


class Giver:
    """All hand-offs that one process gives. Every method returns the actions to execute, in order."""

    def __init__(self, config: GiverConfig) -> None:
        self._config = config
        self._limits = config.limits
        self._book = OutgoingBook(config)

    # what the service says

    def start(
        self,
        passport: Passport,
        *,
        page_hashes: Sequence[bytes],
        num_pages: int,
        targets: Sequence[PeerRef],
        now_s: float,
    ) -> list[Action]:
        """Begin to hand a sequence off; an older epoch of the request is closed.

        `page_hashes` name the full pages of the passport's ids, `num_pages` is how many the sequence will have at
        `commit`. A sequence that has outgrown them by then is handed off with as many computed tokens as fit, and
        the taker computes the rest.

        Raises:
            HandOffExists: this epoch or a newer one of the request is being handed off.
        """
        older = [o for o in self._book.open.values() if o.passport.request_id == passport.request_id]
        for outgoing in older:
            if outgoing.passport.epoch >= passport.epoch:
                raise HandOffExists(f"{passport.request_id} is being handed off in epoch {outgoing.passport.epoch}")
        for outgoing in older:
            self._book.fail(outgoing, FailReason.STALE, "a newer epoch began")
        rounds = TargetRounds(targets, self._limits, self._config.rng)
        outgoing = Outgoing(passport, list(page_hashes), num_pages, rounds)
        self._book.open[outgoing.key] = outgoing
        self._book.next_target(outgoing, now_s)
        return self._book.flush()

    def pages_ready(self, request_id: str, epoch: int, page_ids: Sequence[int], now_s: float) -> list[Action]:
        """The sequence's first `len(page_ids)` pages are full and final. Unknown requests are ignored."""
        outgoing = self._book.open.get((request_id, epoch))
        if outgoing is not None and len(page_ids) > len(outgoing.page_ids):
            outgoing.page_ids = tuple(page_ids)
            self._book.pump(outgoing, now_s)
        return self._book.flush()

    def commit(
        self, passport: Passport, *, page_ids: Sequence[int], num_computed_tokens: int, now_s: float
    ) -> list[Action]:
        """The sequence stands still: move the rest of `page_ids`, a partial last page included, then commit it.

        `passport` carries all ids so far. Unknown requests are ignored: their `HandOffFailed` has been told.
        """
        outgoing = self._book.open.get((passport.request_id, passport.epoch))
        if outgoing is not None and outgoing.num_computed_tokens is None:
            outgoing.passport = passport
            outgoing.page_ids = tuple(page_ids)
            outgoing.num_computed_tokens = num_computed_tokens
            self._book.pump(outgoing, now_s)
        return self._book.flush()

    def cancel(self, request_id: str, epoch: int) -> list[Action]:
        """The request is over up to and including `epoch`: close its hand-offs. Idempotent."""
        for outgoing in list(self._book.open.values()):
            if outgoing.passport.request_id == request_id and outgoing.passport.epoch <= epoch:
                self._book.fail(outgoing, FailReason.CANCELLED, "cancelled")
        return self._book.flush()

    def cancel_all(self, reason: str) -> list[Action]:
        """This process stops giving: close every hand-off."""
        for outgoing in list(self._book.open.values()):
            self._book.fail(outgoing, FailReason.CANCELLED, reason)
        return self._book.flush()

    def lag(self, request_id: str, epoch: int) -> int | None:
        """Ready pages that do not lie at the taker yet; None without a grant. For stopping a moving sequence late."""
        outgoing = self._book.open.get((request_id, epoch))
        if outgoing is None or outgoing.attempt is None or outgoing.attempt.grant is None:
            return None
        return max(0, len(outgoing.page_ids) - outgoing.attempt.num_done)

    # what takers and transfer threads say

    def on_grant(self, grant: Grant, now_s: float) -> list[Action]:
        """A taker has room. A Grant that nobody waits for is sent back, so that its pages are free again."""
        outgoing, attempt = self._book.of_offer(grant.offer)
        if outgoing is None or attempt is None or attempt.generation not in {0, grant.generation}:
            self._decline(grant)
        elif outgoing.state is GiverState.OFFERED:  # else a repetition
            attempt.grant = grant
            attempt.granted_at_s = attempt.said_at_s = now_s
            if problem := attempt.problem_with(outgoing.num_pages):
                self._book.strike(outgoing, attempt, None, problem)
                self._book.close(outgoing, attempt, self._book.abort(outgoing, attempt, problem), now_s)
                return self._book.flush()
            attempt.direct = self._config.transports[grant.transport]
            attempt.num_handed = attempt.num_done = grant.num_held_pages
            outgoing.state = GiverState.WRITING
            self._book.emit(Granted(*outgoing.key, grant.taker, grant.transport, grant.num_held_pages))
            self._book.pump(outgoing, now_s)
        return self._book.flush()

    def _decline(self, grant: Grant) -> None:
        """True to say only of our own offers: of another life's we cannot know whether a write is in flight."""
        ours = belongs_to(grant.offer, self._config.peer.incarnation)
        self._config.stale[StaleReason.GRANT if ours else StaleReason.INCARNATION] += 1
        if ours:
            abort = Abort(
                sender=self._config.peer,
                request_id=grant.request_id,
                epoch=grant.epoch,
                offer=grant.offer,
                generation=grant.generation,
                reason="not wanted any more",
            )
            self._book.send(grant.taker, abort)

    def on_refuse(self, refuse: Refuse, now_s: float) -> list[Action]:
        """A taker says no, to an Offer or to a Commit."""
        if refuse.generation:
            outgoing, attempt = self._book.of_generation(refuse.generation)
            if outgoing is not None and outgoing.state is GiverState.COMMITTED:
                self._book.fail(outgoing, FailReason.UNCERTAIN, f"{refuse.taker.name}: {refuse.message}")
            return self._book.flush()
        outgoing, attempt = self._book.of_offer(refuse.offer)
        if outgoing is None or attempt is None or outgoing.state is not GiverState.OFFERED:
            self._config.stale[StaleReason.GRANT] += 1
            return self._book.flush()
        outgoing.attempt = None
        outgoing.last_refusal = f"{refuse.taker.name}: {refuse.message}"
        if ending := _ENDS.get(refuse.reason):
            self._book.fail(outgoing, ending, outgoing.last_refusal)
            return self._book.flush()
        if refuse.taker != attempt.target.peer:
            self._book.strike(outgoing, attempt, None, "it has restarted")
        elif refuse.reason in _STRIKES:
            self._book.strike(outgoing, attempt, refuse.reason, refuse.message)
        outgoing.rounds.hint(refuse.retry_after_ms / 1000)
        self._book.next_target(outgoing, now_s)
        return self._book.flush()

    def on_written(self, ticket: int, error: TransferError | None, now_s: float) -> list[Action]:
        """The write of this ticket has returned. Must be called for every `Write`, whatever became of it."""
        outgoing, attempt = self._book.of_ticket(ticket)
        assert outgoing is not None and attempt is not None, "a write outlived its hand-off"  # noqa: S101, PT018
        attempt.ticket = None
        if outgoing.state is GiverState.CLOSING:
            self._book.drained(outgoing, attempt, now_s)
        elif error is None:
            attempt.num_done = attempt.num_handed
            self._book.pump(outgoing, now_s)
        else:
            if not isinstance(error, GrantRevoked) and attempt.grant is not None:
                attempt.target.broken.add(attempt.grant.transport)
            outgoing.last_refusal = str(error)
            self._book.close(outgoing, attempt, self._book.abort(outgoing, attempt, str(error)), now_s)
        return self._book.flush()

    def on_pages_taken(self, taken: PagesTaken, now_s: float) -> list[Action]:
        """Carried pages have arrived: the window moves. Pages lost on the way are sent again after a silence."""
        outgoing, attempt = self._book.of_generation(taken.generation)
        if outgoing is None or attempt is None or attempt.grant is None:
            self._config.stale[StaleReason.GRANT] += 1
            return self._book.flush()
        committed = outgoing.state is GiverState.COMMITTED
        if attempt.direct or not (committed or outgoing.state is GiverState.WRITING):
            return self._book.flush()
        arrived = attempt.grant.num_held_pages + taken.count
        if attempt.num_done < arrived <= attempt.num_granted:
            attempt.num_done = arrived
            attempt.num_handed = max(attempt.num_handed, arrived)
            attempt.said_at_s = attempt.said_at_s if committed else now_s
        elif committed:
            return self._book.flush()  # `repeat` sends them again
        elif attempt.num_handed > attempt.num_done and now_s - attempt.said_at_s >= self._limits.liveness_s:
            attempt.num_handed = attempt.num_done
        self._book.send_carried(now_s)
        return self._book.flush()

    def on_ack(self, ack: Ack, now_s: float) -> list[Action]:
        """The taker has adopted the sequence."""
        outgoing, attempt = self._book.of_generation(ack.generation)
        if outgoing is None or attempt is None or attempt.grant is None:
            self._config.stale[StaleReason.GRANT] += 1
            return self._book.flush()
        if outgoing.state is GiverState.COMMITTED:
            grant = attempt.grant
            news = Given(
                *outgoing.key,
                taker=grant.taker,
                transport=grant.transport,
                num_moved_pages=attempt.num_handed - grant.num_held_pages,
                num_held_pages=grant.num_held_pages,
                hand_off_s=now_s - attempt.granted_at_s,
            )
            self._book.given(outgoing, news)
            self._book.send_carried(now_s)
        return self._book.flush()

    def on_abort(self, abort: Abort, now_s: float) -> list[Action]:
        """A taker closed a grant, and asks to hear when no write of it is in flight."""
        outgoing, attempt = self._book.of_offer(abort.offer)
        released = Released(request_id=abort.request_id, epoch=abort.epoch, generation=abort.generation)
        if outgoing is None or attempt is None or attempt.generation not in {0, abort.generation}:
            if belongs_to(abort.offer, self._config.peer.incarnation):
                self._book.send(abort.sender, released)
        elif outgoing.state is GiverState.COMMITTED:
            self._book.send(abort.sender, released)
            self._book.fail(outgoing, FailReason.UNCERTAIN, f"{abort.sender.name}: {abort.reason}")
        elif outgoing.state is GiverState.CLOSING:
            attempt.farewell = released
        else:
            outgoing.last_refusal = f"{abort.sender.name}: {abort.reason}"
            self._book.close(outgoing, attempt, released, now_s)
        return self._book.flush()

    # liveness

    def peers(self) -> set[PeerRef]:
        """Takers with which a hand-off is open."""
        return {o.attempt.target.peer for o in self._book.open.values() if o.attempt is not None}

    def listing(self, peer: PeerRef) -> list[OpenHandOff]:
        """What an Alive tells this peer."""
        return [
            OpenHandOff(*outgoing.key, attempt.generation)
            for outgoing in self._book.open.values()
            if (attempt := outgoing.attempt) is not None and attempt.target.peer == peer
        ]

    def on_listing(self, peer: PeerRef, listed: Sequence[OpenHandOff], now_s: float) -> list[Action]:
        """What a taker believes open: a grant that it lists no longer for two beats is closed here too."""
        for outgoing in list(self._book.open.values()):
            attempt = outgoing.attempt
            if outgoing.state is not GiverState.WRITING or attempt is None or attempt.target.peer != peer:
                continue
            known = OpenHandOff(*outgoing.key, attempt.generation) in listed
            attempt.misses = 0 if known else attempt.misses + 1
            if attempt.misses >= 2:
                reason = "the taker has forgotten the grant"
                outgoing.last_refusal = f"{peer.name}: {reason}"
                self._book.close(outgoing, attempt, self._book.abort(outgoing, attempt, reason), now_s)
        return self._book.flush()

    def peer_lost(self, peer: PeerRef, reason: str, now_s: float) -> list[Action]:
        """Close all hand-offs with a peer; what is not committed goes to the next target."""
        for outgoing in list(self._book.open.values()):
            attempt = outgoing.attempt
            if attempt is None or attempt.target.peer != peer:
                continue
            if outgoing.state is GiverState.COMMITTED:
                self._book.fail(outgoing, FailReason.UNCERTAIN, f"{peer.name}: {reason}")
            else:
                self._book.strike(outgoing, attempt, None, reason)
                if outgoing.state is not GiverState.CLOSING:
                    self._book.close(outgoing, attempt, self._book.abort(outgoing, attempt, reason), now_s)
        return self._book.flush()

    def tick(self, now_s: float) -> list[Action]:
        """Repeat what is unanswered, ask targets again whose pause is over."""
        for outgoing in list(self._book.open.values()):
            attempt = outgoing.attempt
            if outgoing.state is GiverState.WAITING and outgoing.retry_at_s <= now_s:
                self._book.next_target(outgoing, now_s)
            elif attempt is not None and now_s - attempt.said_at_s >= self._limits.beat_s:
                self._book.repeat(outgoing, attempt, now_s)
        self._book.send_carried(now_s)  # an end may have left room in the window
        return self._book.flush()

    @property
    def next_retry_s(self) -> float | None:
        """When `tick` has a pause to end; None if nobody pauses."""
        waiting = [o.retry_at_s for o in self._book.open.values() if o.state is GiverState.WAITING]
        return min(waiting, default=None)

    @property
    def num_open(self) -> int:
        """Hand-offs that have not ended."""
        return len(self._book.open)
