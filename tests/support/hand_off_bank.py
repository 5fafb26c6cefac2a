"""A page bank of integers that checks every call against what it knows of each page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count

from fleet.types import Passport
from kvtransfer.bank import Reservation

Adoption = Callable[[Passport, list[int], int], None]


class FakeBank:
    """Owns `num_pages` pages; `names` are pages of its prefix cache, which stay for good.

    Attributes:
        owners: page to `reserved:<n>`, `quarantined:<n>` or `adopted:<request>:<epoch>`; free pages are missing.
        adopted: how often each `(request_id, epoch)` was.
        on_adopt: called with passport, page table and computed tokens, to look at the bytes.
    """

    def __init__(self, num_pages: int, *, on_adopt: Adoption | None = None) -> None:
        self.num_pages = num_pages
        self.owners: dict[int, str] = {}
        self.names: dict[bytes, int] = {}
        self.adopted: dict[tuple[str, int], int] = {}
        self.tables: dict[tuple[str, int], list[int]] = {}
        self.on_adopt = on_adopt
        self.cancelled: list[bool] = []
        self._held: dict[int, list[int]] = {}
        self._numbers = count(1)

    @property
    def free(self) -> list[int]:
        taken = self.owners.keys() | set(self.names.values())
        return [page for page in range(self.num_pages) if page not in taken]

    def name(self, name: bytes) -> int:
        """Put a page into the prefix cache."""
        page = self.names[name] = self.free[-1]
        return page

    def reserve(self, passport: Passport, page_hashes: Sequence[bytes], num_pages: int) -> Reservation | None:  # noqa: ARG002
        held = []
        for name in page_hashes:
            if name not in self.names:
                break
            held.append(self.names[name])
        free = self.free
        if len(free) < num_pages - len(held):
            return None
        number = next(self._numbers)
        pages = tuple(free[: num_pages - len(held)])
        self.owners.update(dict.fromkeys(pages, f"reserved:{number}"))
        self._held[number] = held
        return Reservation(number, len(held), pages)

    def adopt(self, reservation: Reservation, passport: Passport, num_computed_tokens: int) -> None:
        self._expect(reservation, f"reserved:{reservation.generation}")
        key = (passport.request_id, passport.epoch)
        self.adopted[key] = self.adopted.get(key, 0) + 1
        self.owners.update(dict.fromkeys(reservation.page_ids, f"adopted:{key[0]}:{key[1]}"))
        self.tables[key] = [*self._held.pop(reservation.generation), *reservation.page_ids]
        if self.on_adopt is not None:
            self.on_adopt(passport, self.tables[key], num_computed_tokens)

    def cancel(self, reservation: Reservation, *, writer_done: bool) -> None:
        self._expect(reservation, f"reserved:{reservation.generation}")
        self.cancelled.append(writer_done)
        if writer_done:
            self._free(reservation.page_ids)
        else:
            self.owners.update(dict.fromkeys(reservation.page_ids, f"quarantined:{reservation.generation}"))

    def writer_gone(self, generation: int) -> None:
        pages = [page for page, owner in self.owners.items() if owner == f"quarantined:{generation}"]
        assert pages or not self._held.get(generation, [None]), f"nothing is quarantined for {generation}"
        self._free(pages)

    def finish(self, key: tuple[str, int]) -> None:
        """An adopted sequence ends."""
        self._free([page for page, owner in self.owners.items() if owner == f"adopted:{key[0]}:{key[1]}"])

    def in_transit(self) -> dict[int, str]:
        """Pages that are reserved or quarantined."""
        return {page: owner for page, owner in self.owners.items() if not owner.startswith("adopted")}

    def _expect(self, reservation: Reservation, owner: str) -> None:
        assert all(self.owners.get(page) == owner for page in reservation.page_ids), (reservation, self.owners)

    def _free(self, pages: Sequence[int]) -> None:
        for page in pages:
            del self.owners[page]
