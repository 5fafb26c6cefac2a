"""What a service hears of its hand-offs. Called on the event-loop thread; must not block."""

from __future__ import annotations

from typing import Protocol

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


class HandOffEvents(Protocol):
    """Per `offer` call a giver hears exactly one of `given` and `failed`, then `release_pages`, and nothing after."""

    def granted(self, news: Granted) -> None:
        """Giver: pages begin to move."""

    def committing(self, news: Committing) -> None:
        """Giver: the Commit goes out next; say nothing more about the request."""

    def given(self, news: Given) -> None:
        """Giver: the taker holds the sequence now."""

    def failed(self, news: HandOffFailed) -> None:
        """Giver: the hand-off is over without success; `news.reason` says whether to give the request back."""

    def target_refused(self, news: TargetRefused) -> None:
        """Giver: a target will never take this sequence; worth a log line, others are tried."""

    def release_pages(self, request_id: str, epoch: int) -> None:
        """Giver: the hand-off reads the sequence's pages no more."""

    def adopted(self, news: Adopted) -> None:
        """Taker: the bank has adopted the sequence; tell its gateway."""

    def grant_closed(self, news: GrantClosed) -> None:
        """Taker: a granted sequence will not come."""

    def peer_lost(self, news: PeerLost) -> None:
        """All hand-offs with this peer are closed."""
