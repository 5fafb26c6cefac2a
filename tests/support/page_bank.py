"""A page bank for hand-off tests: the engine's real pool and prefix cache, without a scheduler."""

from __future__ import annotations

from collections.abc import Sequence

from engine.errors import OutOfPages
from engine.pages import PagePool
from engine.prefix_cache import PrefixCache
from fleet.types import Fingerprint, Passport
from kvtransfer.bank import Reservation

FINGERPRINT = Fingerprint("model", "float32", 2, 1, 4, 4, "page-major-1", 1)
PAGE_BYTES = 2 * 2 * 1 * 4 * 4 * 4


class PoolBank:
    """Implements `kvtransfer.bank.PageBank`.

    Attributes:
        adopted: passports with their page ids, in order of adoption.
    """

    def __init__(self, num_pages: int, fingerprint: Fingerprint = FINGERPRINT) -> None:
        self.pool = PagePool(num_pages, fingerprint.page_size)
        self.cache = PrefixCache(self.pool, fingerprint)
        self.adopted: list[tuple[Passport, list[int]]] = []
        self._reserved: dict[int, tuple[list[int], list[bytes]]] = {}

    def reserve(self, passport: Passport, page_hashes: Sequence[bytes], num_pages: int) -> Reservation | None:  # noqa: ARG002
        held = self.cache.match(page_hashes)
        try:
            new = self.pool.allocate(num_pages - len(held))
        except OutOfPages:
            self.pool.release(held)
            return None
        generation = self.pool.begin_write(new)
        self._reserved[generation] = (held + new, list(page_hashes))
        return Reservation(generation, len(held), tuple(new))

    def adopt(self, reservation: Reservation, passport: Passport, num_computed_tokens: int) -> None:
        pages, hashes = self._reserved.pop(reservation.generation)
        self.pool.end_write(reservation.generation)
        num_full = min(len(hashes), num_computed_tokens // self.pool.page_size)
        self.cache.insert(hashes[:num_full], pages[:num_full])
        self.adopted.append((passport, pages))

    def cancel(self, reservation: Reservation, *, writer_done: bool) -> None:
        pages, _ = self._reserved.pop(reservation.generation)
        num_new = len(reservation.page_ids)
        self.pool.release(pages[: len(pages) - num_new])
        self.pool.quarantine(reservation.generation)
        if writer_done:
            self.pool.end_write(reservation.generation)

    def writer_gone(self, generation: int) -> None:
        self.pool.end_write(generation)

    def end_adopted(self) -> None:
        """The adopted sequences are over: their pages become cache or free."""
        for _, pages in self.adopted:
            self.pool.release(pages)
        self.adopted.clear()

    @property
    def is_whole(self) -> bool:
        """Whether every page can be had again."""
        self.pool.check()
        return self.pool.num_free == self.pool.num_pages
