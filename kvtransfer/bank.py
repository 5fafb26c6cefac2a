"""What the taker needs of whoever owns the pages; services implement it with their engine's page pool."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from fleet.types import Passport


@dataclass(frozen=True, slots=True)
class Reservation:
    """Pages set aside for one sequence on its way.

    Attributes:
        generation: the bank's own name for it, unique among its reservations.
        num_held_pages: leading pages found in the prefix cache; they need not move.
        page_ids: pages for the rest, in order; a remote writer owns them beside the request.
    """

    generation: int
    num_held_pages: int
    page_ids: tuple[int, ...]


class PageBank(Protocol):
    """Reserves, adopts and takes back pages. Called on the event-loop thread only; must not block."""

    def reserve(self, passport: Passport, page_hashes: Sequence[bytes], num_pages: int) -> Reservation | None:
        """Set aside `num_pages` pages, cached ones counted, with a writer on the new ones; None when full."""

    def adopt(self, reservation: Reservation, passport: Passport, num_computed_tokens: int) -> None:
        """The writer let go and all bytes of `num_computed_tokens` are there: start the sequence on these pages."""

    def cancel(self, reservation: Reservation, *, writer_done: bool) -> None:
        """The request lets go. Pages are free at once if the writer is done, else quarantined."""

    def writer_gone(self, generation: int) -> None:
        """The writer of a cancelled reservation let go: its quarantined pages are free."""


class NoBank:
    """For a process that only gives: it never has room."""

    def reserve(self, passport: Passport, page_hashes: Sequence[bytes], num_pages: int) -> Reservation | None:  # noqa: ARG002
        """None."""
        return None

    def adopt(self, reservation: Reservation, passport: Passport, num_computed_tokens: int) -> None:  # noqa: ARG002
        """Never called: nothing was reserved."""
        raise AssertionError("nothing was reserved here")

    def cancel(self, reservation: Reservation, *, writer_done: bool) -> None:  # noqa: ARG002
        """Never called: nothing was reserved."""
        raise AssertionError("nothing was reserved here")

    def writer_gone(self, generation: int) -> None:  # noqa: ARG002
        """Never called: nothing was reserved."""
        raise AssertionError("nothing was reserved here")


class WriteGate(Protocol):
    """Tells givers on direct transports which grant may write a page; `PoolRegion` is one."""

    def open_pages(self, page_ids: Iterable[int], generation: int) -> None:
        """Let grant `generation` write these pages."""

    def close_pages(self, page_ids: Iterable[int]) -> None:
        """Let nobody write them."""
