"""Lends the decode scheduler's pages to the hand-off machines: `kvtransfer.bank.PageBank` over `DecodeScheduler`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from engine import reservations
from engine.decode_scheduler import DecodeScheduler
from engine.errors import EngineError, SequenceTooLong
from engine.sequence import Sequence as EngineSequence
from fleet.logs import get_logger
from fleet.types import Passport, PeerRef
from kvtransfer.bank import Reservation

_log = get_logger("bank")


class DecodeBank:
    """Reservations by generation, on both sides of the border.

    Args:
        scheduler: owns the pages.
        max_per_gateway: sequences that one gateway may have here or on their way here; 0: no bound.
        on_reserved: told of each sequence that may come here.
        on_adopted: told of each sequence that starts here.
        on_rejected: told of each that was handed off but cannot start, and why.
        on_over_share: told of each that is refused because its gateway has its share.
    """

    def __init__(
        self,
        scheduler: DecodeScheduler,
        *,
        max_per_gateway: int,
        on_reserved: Callable[[Passport], None],
        on_adopted: Callable[[EngineSequence], None],
        on_rejected: Callable[[Passport, EngineError], None],
        on_over_share: Callable[[Passport], None],
    ) -> None:
        self._scheduler = scheduler
        self._max_per_gateway = max_per_gateway
        self._on_reserved = on_reserved
        self._on_adopted = on_adopted
        self._on_rejected = on_rejected
        self._on_over_share = on_over_share
        self._open: dict[int, reservations.Reservation] = {}

    def reserve(self, passport: Passport, page_hashes: Sequence[bytes], num_pages: int) -> Reservation | None:
        """Set pages aside; None when full, or when its gateway has its share here; the giver then tries elsewhere.

        None too for what could never fit: the gateway lets none of that through.
        """
        if 0 < self._max_per_gateway <= self._num_of(passport.gateway):
            self._on_over_share(passport)
            return None
        try:
            made = self._scheduler.reserve(passport, page_hashes, num_pages)
        except SequenceTooLong as error:
            _log.error("offer of a sequence that can never fit", request_id=passport.request_id, error=str(error))
            return None
        if made is None:
            return None
        self._open[made.generation] = made
        self._on_reserved(passport)
        return Reservation(made.generation, len(made.held_page_ids), made.new_page_ids)

    def _num_of(self, gateway: PeerRef) -> int:
        coming = sum(made.passport.gateway == gateway for made in self._open.values())
        return coming + sum(sequence.passport.gateway == gateway for sequence in self._scheduler.sequences())

    def adopt(self, reservation: Reservation, passport: Passport, num_computed_tokens: int) -> None:
        """Start the sequence on its pages; one that cannot start fails alone and its pages are free again."""
        made = self._open.pop(reservation.generation)
        try:
            sequence = self._scheduler.adopt(made, passport, num_computed_tokens)
        except EngineError as error:
            self._scheduler.cancel_reservation(made, writer_done=True)
            self._on_rejected(passport, error)
        else:
            self._on_adopted(sequence)

    def cancel(self, reservation: Reservation, *, writer_done: bool) -> None:
        """Give the pages back."""
        made = self._open.pop(reservation.generation, None)
        if made is not None:
            self._scheduler.cancel_reservation(made, writer_done=writer_done)

    def writer_gone(self, generation: int) -> None:
        """Free what a silent writer kept quarantined."""
        self._open.pop(generation, None)
        self._scheduler.writer_gone(generation)
