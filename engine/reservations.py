"""Pages that a decode worker sets aside for sequences that are still on their way to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.errors import ReservationMismatch
from engine.limits import DecodeLimits
from engine.pages import PagePool, pages_for
from engine.prefix_cache import PrefixCache
from fleet.types import Passport


@dataclass(frozen=True, slots=True, eq=False)
class Reservation:
    """Pages for one sequence at Commit time.

    Attributes:
        passport: as offered; the one at Commit has these ids and maybe more.
        page_hashes: names of the passport's leading full pages, as offered.
        held_page_ids: its first pages, found in the prefix cache and shared.
        new_page_ids: the pages after those, for the giver to write.
        generation: of the giver's write; a message with another one is stale.
    """

    passport: Passport
    page_hashes: tuple[bytes, ...]
    held_page_ids: tuple[int, ...]
    new_page_ids: tuple[int, ...]
    generation: int

    @property
    def num_pages(self) -> int:
        """Held and new pages together."""
        return len(self.held_page_ids) + len(self.new_page_ids)


class Reservations:
    """The open reservations of one pool. Each ends once: adopted, or cancelled.

    Whoever writes into the new pages is an owner of its own (see `engine.pages`): a reservation cancelled while its
    writer is silent leaves quarantined pages behind until `writer_gone`.
    """

    def __init__(self, pool: PagePool, cache: PrefixCache) -> None:
        self._pool = pool
        self._cache = cache
        self._open: dict[int, Reservation] = {}

    def __len__(self) -> int:
        return len(self._open)

    def open(self) -> list[Reservation]:
        """Those that are neither adopted nor cancelled, oldest first."""
        return list(self._open.values())

    def make(
        self, passport: Passport, page_hashes: Sequence[bytes], *, num_pages: int, num_spare: int
    ) -> Reservation | None:
        """Share what the prefix cache holds and allocate the rest, or None if under `num_spare` pages would be left.

        Mutates: the pool, and the cache's statistics; neither where it returns None.
        """
        held = self._cache.match(page_hashes[:num_pages])
        num_new = num_pages - len(held)
        if self._pool.num_free - num_new < num_spare:
            self._pool.release(held)
            return None
        new = self._pool.allocate(num_new)
        generation = self._pool.begin_write(new)
        self._cache.record(query_tokens=len(passport.token_ids), hit_tokens=len(held) * self._pool.page_size)
        reservation = Reservation(passport, tuple(page_hashes), tuple(held), tuple(new), generation)
        self._open[generation] = reservation
        return reservation

    def check(self, reservation: Reservation, passport: Passport, num_computed_tokens: int) -> None:
        """Whether this passport, computed so far, may be adopted into this reservation.

        Raises:
            ReservationMismatch: the reservation is not open, the passport is another request's or does not
                continue the one offered, or the count leaves nothing to compute or does not fit the pages.
        """
        offered = reservation.passport
        if self._open.get(reservation.generation) is not reservation:
            raise ReservationMismatch(f"the reservation of generation {reservation.generation} is closed")
        if (passport.request_id, passport.epoch) != (offered.request_id, offered.epoch):
            raise ReservationMismatch(
                f"pages reserved for {offered.request_id} epoch {offered.epoch}, "
                f"not for {passport.request_id} epoch {passport.epoch}"
            )
        if passport.token_ids[: len(offered.token_ids)] != offered.token_ids:
            raise ReservationMismatch("the passport does not continue the one that was offered")
        page_size = self._pool.page_size
        least = len(reservation.held_page_ids) * page_size
        most = min(len(passport.token_ids) - 1, reservation.num_pages * page_size)
        if not least <= num_computed_tokens <= most:
            raise ReservationMismatch(
                f"{num_computed_tokens} computed tokens; this reservation takes {least} to {most}"
            )

    def take(self, reservation: Reservation) -> list[int]:
        """Close an open reservation whose writer is done, and hand its pages, in order, to the caller."""
        del self._open[reservation.generation]
        self._pool.end_write(reservation.generation)
        return [*reservation.held_page_ids, *reservation.new_page_ids]

    def cancel(self, reservation: Reservation, *, writer_done: bool) -> None:
        """Give the pages back; quarantine the new ones unless the writer is known to have stopped. Idempotent."""
        if self._open.pop(reservation.generation, None) is not None:
            self._pool.release(reservation.held_page_ids)
            self._pool.quarantine(reservation.generation)
        if writer_done:
            self._pool.end_write(reservation.generation)

    def writer_gone(self, generation: int) -> None:
        """No write of this generation is or will be in flight: free what it kept quarantined.

        Cancels its reservation if that is still open; an unknown generation is no error.
        """
        reservation = self._open.get(generation)
        if reservation is not None:
            self.cancel(reservation, writer_done=True)
        else:
            self._pool.end_write(generation)


def growth_pages(passport: Passport, num_tokens: int, num_pages: int, *, page_size: int, limits: DecodeLimits) -> int:
    """Pages that a sequence of `num_tokens` tokens and `num_pages` pages may want soon.

    Soon is within `limits.lookahead_tokens`, or before its length ends it if that is sooner.
    """
    end = min(passport.prompt_len + passport.params.max_tokens, limits.max_model_len)
    horizon = min(num_tokens + limits.lookahead_tokens, end)
    return max(0, pages_for(horizon, page_size) - num_pages)
