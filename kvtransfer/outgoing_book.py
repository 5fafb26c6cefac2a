"""The steps of which giving is made: ask the next target, move pages, close an attempt, end a hand-off."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from fleet.hand_off_messages import Abort, Commit, Grant, HandOffMessage, Offer, Pages, RefuseReason, Released
from fleet.types import Fingerprint, PeerRef
from kvtransfer.actions import (
    Action,
    Committing,
    FailReason,
    HandOffFailed,
    ReleasePages,
    Send,
    TargetRefused,
    Write,
)
from kvtransfer.host import ProcessIdentity
from kvtransfer.limits import HandOffLimits
from kvtransfer.numbering import first_number
from kvtransfer.outgoing import Attempt, GiverState, Outgoing
from kvtransfer.stats import StaleReason
from kvtransfer.targets import Target


@dataclass(frozen=True, slots=True, kw_only=True)
class GiverConfig:
    """What a giver is made of.

    Attributes:
        peer: this process.
        fingerprint, page_bytes: of its pages.
        transports: name to whether it is direct, best first.
        host, process: identity of this process, for takers on the same host.
        rng: jitter of pauses.
        stale: counts messages that came too late; shared with the other half.
    """

    peer: PeerRef
    fingerprint: Fingerprint
    page_bytes: int
    transports: Mapping[str, bool]
    host: str
    process: ProcessIdentity
    limits: HandOffLimits
    rng: random.Random
    stale: Counter[StaleReason] = field(default_factory=Counter)


_Found = tuple[Outgoing, Attempt] | tuple[None, None]


class OutgoingBook:
    """Open hand-offs of a giver, and the actions that piled up for its owner. Used by `Giver` alone.

    Attributes:
        open: by request id and epoch.
    """

    def __init__(self, config: GiverConfig) -> None:
        self.open: dict[tuple[str, int], Outgoing] = {}
        self._config = config
        self._page_size = config.fingerprint.page_size
        self._pages_per_message = max(1, config.limits.write_bytes // config.page_bytes)
        self._window_pages = max(1, config.limits.window_bytes // config.page_bytes)
        self._numbers = itertools.count(first_number(config.peer.incarnation))
        self._tickets = itertools.count(1)
        self._turns = itertools.count(1)
        self._actions: list[Action] = []

    def emit(self, action: Action) -> None:
        """Queue an action."""
        self._actions.append(action)

    def send(self, to: PeerRef, message: HandOffMessage) -> None:
        """Queue a message."""
        self._actions.append(Send(to, message))

    def flush(self) -> list[Action]:
        """Hand the queued actions out."""
        actions, self._actions = self._actions, []
        return actions

    def of_offer(self, offer: int) -> _Found:
        """The hand-off whose current attempt has this number."""
        return self._find(lambda attempt: attempt.offer.offer == offer)

    def of_generation(self, generation: int) -> _Found:
        """The hand-off whose current attempt has this grant."""
        return self._find(lambda attempt: attempt.generation == generation)

    def of_ticket(self, ticket: int) -> _Found:
        """The hand-off whose current attempt has this write in flight."""
        return self._find(lambda attempt: attempt.ticket == ticket)

    def _find(self, fits: Callable[[Attempt], bool]) -> _Found:
        for outgoing in self.open.values():
            if outgoing.attempt is not None and fits(outgoing.attempt):
                return outgoing, outgoing.attempt
        return None, None

    # attempts

    def next_target(self, outgoing: Outgoing, now_s: float) -> None:
        """Offer to the next target that is left; after a full round pause; without any fail."""
        while (target := outgoing.rounds.next()) is not None:
            transports = tuple(name for name in self._config.transports if name not in target.broken)
            if transports:
                self._offer(outgoing, target, transports, now_s)
                return
            target.struck = True
            message = f"no transport reaches it: {outgoing.last_refusal}"
            self.emit(TargetRefused(*outgoing.key, target.peer, RefuseReason.TRANSPORT, message))
        if outgoing.rounds.exhausted:
            self.fail(outgoing, FailReason.REFUSED, outgoing.last_refusal)
        else:
            outgoing.state = GiverState.WAITING
            outgoing.retry_at_s = now_s + outgoing.rounds.pause_s()

    def _offer(self, outgoing: Outgoing, target: Target, transports: tuple[str, ...], now_s: float) -> None:
        config = self._config
        offer = Offer(
            offer=next(self._numbers),
            giver=config.peer,
            passport=outgoing.passport,
            fingerprint=config.fingerprint,
            page_hashes=outgoing.page_hashes,
            num_pages=outgoing.num_pages,
            transports=transports,
            host=config.host,
            pid=config.process.pid,
            start_ticks=config.process.start_ticks,
        )
        outgoing.attempt = Attempt(target, offer, said_at_s=now_s)
        outgoing.state = GiverState.OFFERED
        self.send(target.peer, offer)

    def strike(self, outgoing: Outgoing, attempt: Attempt, reason: RefuseReason | None, message: str) -> None:
        """Never ask this target for this sequence again."""
        attempt.target.struck = True
        outgoing.last_refusal = f"{attempt.target.peer.name}: {message}"
        self.emit(TargetRefused(*outgoing.key, attempt.target.peer, reason, message))

    # pages

    def pump(self, outgoing: Outgoing, now_s: float) -> None:
        """Move what may move; commit once everything is there."""
        attempt = outgoing.attempt
        if outgoing.state is not GiverState.WRITING or attempt is None or attempt.grant is None:
            return
        movable = outgoing.num_movable(self._page_size)
        if outgoing.may_commit(self._page_size):
            self._commit(outgoing, attempt, attempt.grant, now_s)
        elif not attempt.direct:
            self.send_carried(now_s)
        elif attempt.ticket is None and attempt.num_handed < movable:
            first, end = attempt.num_handed, min(movable, attempt.num_handed + self._pages_per_message)
            attempt.ticket = next(self._tickets)
            attempt.num_handed = end
            held = attempt.grant.num_held_pages
            self.emit(Write(attempt.ticket, attempt.grant, first - held, outgoing.page_ids[first:end]))

    def send_carried(self, now_s: float) -> None:
        """Fill the window with pages of all carried hand-offs: who stands still first, then who sent longest ago.

        A Commit goes out right behind its last pages: order holds on the way, so that the taker has them by then.
        """
        while True:
            carried = [
                (outgoing.num_computed_tokens is None, attempt.turn, outgoing.key, outgoing, attempt)
                for outgoing in self.open.values()
                if (attempt := outgoing.attempt) is not None and attempt.grant is not None and not attempt.direct
            ]
            room = self._window_pages - sum(entry[-1].num_handed - entry[-1].num_done for entry in carried)
            unsent = [
                entry
                for entry in carried
                if entry[3].state is GiverState.WRITING and entry[4].num_handed < entry[3].num_movable(self._page_size)
            ]
            if room < 1 or not unsent:
                return
            *_, outgoing, attempt = min(unsent)
            movable = outgoing.num_movable(self._page_size)
            self._send_pages(outgoing, attempt, min(movable, attempt.num_handed + room), now_s)
            if attempt.grant is not None and outgoing.may_commit(self._page_size):
                self._commit(outgoing, attempt, attempt.grant, now_s)

    def _send_pages(self, outgoing: Outgoing, attempt: Attempt, end: int, now_s: float) -> None:
        assert attempt.grant is not None, "pages need a grant"  # noqa: S101  # our own invariant
        first, end = attempt.num_handed, min(end, attempt.num_handed + self._pages_per_message)
        if attempt.num_handed == attempt.num_done:
            attempt.said_at_s = now_s  # the silence after which pages are sent again begins here
        request_id, epoch = outgoing.key
        pages = Pages(
            request_id=request_id,
            epoch=epoch,
            generation=attempt.generation,
            first=first - attempt.grant.num_held_pages,
            count=end - first,
        )
        attempt.num_handed = end
        attempt.turn = next(self._turns)
        page_ids = outgoing.page_ids[first:end]
        self.emit(Send(attempt.target.peer, pages, page_ids, attempt.grant.transport))

    def _commit(self, outgoing: Outgoing, attempt: Attempt, grant: Grant, now_s: float) -> None:
        assert outgoing.num_computed_tokens is not None, "committed too early"  # noqa: S101  # our own invariant
        fitting = min(outgoing.num_computed_tokens, attempt.num_granted * self._page_size)
        attempt.commit = Commit(
            giver=self._config.peer,
            passport=outgoing.passport,
            generation=grant.generation,
            num_computed_tokens=fitting,
        )
        attempt.said_at_s = now_s
        outgoing.state = GiverState.COMMITTED
        self.emit(Committing(*outgoing.key, grant.taker, grant.transport))
        self.send(grant.taker, attempt.commit)

    def repeat(self, outgoing: Outgoing, attempt: Attempt, now_s: float) -> None:
        """Send an unanswered Offer or Commit again, the latter behind those carried pages that may be lost."""
        if outgoing.state is GiverState.OFFERED:
            self.send(attempt.target.peer, attempt.offer)
        elif outgoing.state is GiverState.COMMITTED and attempt.commit is not None:
            end, attempt.num_handed = attempt.num_handed, attempt.num_done
            while attempt.num_handed < end:
                self._send_pages(outgoing, attempt, end, now_s)
            self.send(attempt.target.peer, attempt.commit)
        else:
            return
        attempt.said_at_s = now_s

    # ends

    def close(self, outgoing: Outgoing, attempt: Attempt, farewell: Abort | Released, now_s: float) -> None:
        """Give the attempt up; once no write is in flight say `farewell` and go on with the next target."""
        outgoing.state = GiverState.CLOSING
        attempt.farewell = farewell
        if attempt.ticket is None:
            self.drained(outgoing, attempt, now_s)

    def drained(self, outgoing: Outgoing, attempt: Attempt, now_s: float) -> None:
        """No write of a closing attempt is in flight any more."""
        if attempt.farewell is not None:
            self.send(attempt.target.peer, attempt.farewell)
        outgoing.attempt = None
        if outgoing.ending is not None:
            self._end(outgoing)
        else:
            self.next_target(outgoing, now_s)

    def fail(self, outgoing: Outgoing, reason: FailReason, message: str) -> None:
        """End the hand-off as failed, after the write in flight. A committed one says nothing more to its taker."""
        outgoing.ending = outgoing.ending or HandOffFailed(*outgoing.key, reason, message)
        attempt = outgoing.attempt
        if attempt is not None and attempt.ticket is not None:
            if outgoing.state is not GiverState.CLOSING:
                attempt.farewell = self.abort(outgoing, attempt, message)
            outgoing.state = GiverState.CLOSING
            return
        if attempt is not None and outgoing.state in {GiverState.OFFERED, GiverState.WRITING}:
            self.send(attempt.target.peer, self.abort(outgoing, attempt, message))
        self._end(outgoing)

    def given(self, outgoing: Outgoing, news: Action) -> None:
        """End the hand-off with its good news."""
        self.emit(news)
        del self.open[outgoing.key]
        self.emit(ReleasePages(*outgoing.key))

    def _end(self, outgoing: Outgoing) -> None:
        assert outgoing.ending is not None, "an end needs a reason"  # noqa: S101  # our own invariant
        self.given(outgoing, outgoing.ending)

    def abort(self, outgoing: Outgoing, attempt: Attempt, reason: str) -> Abort:
        """What tells a taker that this attempt is off and drained."""
        request_id, epoch = outgoing.key
        return Abort(
            sender=self._config.peer,
            request_id=request_id,
            epoch=epoch,
            offer=attempt.offer.offer,
            generation=attempt.generation,
            reason=reason,
        )
