"""The page pool: which page belongs to whom. Integers only; the bytes lie elsewhere.

A page has two kinds of owner (DESIGN section 4). *Requests* hold it by a reference count. A *remote writer* holds
it from `begin_write` to `end_write`, under a generation number. It is reused only when both have let go:

    requests  writer   named    the page is
    --------  -------  -------  ------------------------------------------------------------------
    > 0       any      any      used
    0         yes      no       quarantined: someone may still write into it
    0         no       yes      idle: available, and kept as prefix cache until the room is needed
    0         no       no       free
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

from engine.errors import BrokenInvariant, OutOfPages

_NO_WRITER = 0  # generations start at 1, so messages may say 0 for "none"


def pages_for(num_tokens: int, page_size: int) -> int:
    """How many pages `num_tokens` tokens fill, a last partial one included."""
    return -(-num_tokens // page_size)


class PagePool:
    """Accounts of `num_pages` pages of `page_size` tokens each. Every operation is O(1) per page it names.

    Not thread-safe: one thread owns it. Misuse (releasing what is not held, and the like) raises
    `BrokenInvariant` and may leave the accounts half changed: it is always our own mistake.

    Raises:
        ValueError: a size is not positive.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        if num_pages < 1 or page_size < 1:
            raise ValueError(f"a pool of {num_pages} pages of {page_size} tokens is no pool")
        self.num_pages = num_pages
        self.page_size = page_size
        self._num_references = [0] * num_pages
        self._writer = [_NO_WRITER] * num_pages  # generation per page
        self._named = bytearray(num_pages)
        self._free: list[int] = []  # let go
        self._num_begun = 0  # pages before this one have been taken at some time, the others are free
        self._idle: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._grants: dict[int, tuple[int, ...]] = {}  # open generations
        self._num_quarantined = 0
        self._last_generation = _NO_WRITER
        self._on_evict: Callable[[int], None] | None = None
        self._on_growth: Callable[[int], None] | None = None

    @property
    def num_free(self) -> int:
        """Pages that `allocate` could give now, idle ones included."""
        return len(self._free) + self.num_pages - self._num_begun + len(self._idle)

    @property
    def num_cached(self) -> int:
        """Idle pages: available, but named in the prefix cache until they are needed."""
        return len(self._idle)

    @property
    def num_quarantined(self) -> int:
        """Pages that no request holds but a remote writer might still write into."""
        return self._num_quarantined

    @property
    def num_used(self) -> int:
        """Pages that at least one request holds."""
        return self.num_pages - self.num_free - self._num_quarantined

    # requests

    def allocate(self, num_pages: int) -> list[int]:
        """Take pages that nobody owns, each with one reference: all of them or none.

        Free pages go first, those that were used last before those that never were, whose memory the system has yet
        to find; then idle ones, least recently used first; of a chain released together the tail goes before the head,
        so that what remains is still a prefix.

        Raises:
            OutOfPages: fewer than `num_pages` are available.
        """
        if num_pages > self.num_free:
            raise OutOfPages(needed=num_pages, available=self.num_free)
        num_begun = self._num_begun
        page_ids = [self._take() for _ in range(num_pages)]
        if self._num_begun != num_begun and self._on_growth is not None:
            self._on_growth(self._num_begun)
        for page_id in page_ids:
            self._num_references[page_id] = 1
        return page_ids

    def share(self, page_ids: Sequence[int]) -> None:
        """Add one reference to each page. The pages must be used or idle, and have no writer."""
        for page_id in page_ids:
            if self._writer[page_id] != _NO_WRITER:
                raise BrokenInvariant(f"page {page_id} is being written and cannot be shared")
            if self._num_references[page_id] == 0:
                if page_id not in self._idle:
                    raise BrokenInvariant(f"page {page_id} is free and cannot be shared")
                del self._idle[page_id]
            self._num_references[page_id] += 1

    def release(self, page_ids: Sequence[int]) -> None:
        """Drop one reference of each page; pass a sequence's pages in order.

        A page whose last request lets go becomes quarantined while it has a writer, idle if it is named, else
        free. Tails become idle before heads, hence are evicted first.
        """
        for page_id in reversed(page_ids):
            if self._num_references[page_id] == 0:
                raise BrokenInvariant(f"page {page_id} is released more often than it was taken")
            self._num_references[page_id] -= 1
            if self._num_references[page_id] == 0:
                self._let_go(page_id)

    # writers

    def begin_write(self, page_ids: Sequence[int]) -> int:
        """Mark a remote writer on freshly allocated pages; returns its generation, never given before.

        The pages must have exactly one reference, no writer and no name. An empty list is fine: everything the
        sequence needs may be held already.
        """
        for page_id in page_ids:
            if self._num_references[page_id] != 1 or self._writer[page_id] != _NO_WRITER or self._named[page_id]:
                raise BrokenInvariant(f"page {page_id} is not fresh and cannot get a remote writer")
        self._last_generation += 1
        self._grants[self._last_generation] = tuple(page_ids)
        for page_id in page_ids:
            self._writer[page_id] = self._last_generation
        return self._last_generation

    def end_write(self, generation: int) -> bool:
        """The writer let go, or is dead: pages that no request holds become free.

        Returns whether the generation was open; an unknown or ended one is no error, since the news that a
        writer is gone comes by several ways.
        """
        page_ids = self._grants.pop(generation, None)
        if page_ids is None:
            return False
        for page_id in page_ids:
            self._writer[page_id] = _NO_WRITER
            if self._num_references[page_id] == 0:
                self._num_quarantined -= 1
                self._free.append(page_id)
        return True

    def quarantine(self, generation: int) -> None:
        """The request lets go of the pages of this open generation, but its writer has not said so yet.

        Drops one reference of each page. They count as quarantined until `end_write`.
        """
        if generation not in self._grants:
            raise BrokenInvariant(f"generation {generation} has no open write")
        self.release(self._grants[generation])

    # names

    def set_evict_hook(self, on_evict: Callable[[int], None]) -> None:
        """Call `on_evict(page_id)` when a named page is about to be reused: its name is void from then on."""
        if self._on_evict is not None:
            raise BrokenInvariant("the pool serves one prefix cache already")
        self._on_evict = on_evict

    def mark_named(self, page_id: int) -> None:
        """Keep this used page as prefix cache when its last reference goes. It must have no writer."""
        if self._num_references[page_id] == 0 or self._writer[page_id] != _NO_WRITER:
            raise BrokenInvariant(f"page {page_id} cannot be named: it is not ours alone")
        self._named[page_id] = 1

    def is_named(self, page_id: int) -> bool:
        """Whether the page has a name in the prefix cache."""
        return bool(self._named[page_id])

    # memory

    def set_growth_hook(self, on_growth: Callable[[int], None]) -> None:
        """Call `on_growth(n)` when pages are taken that never were before: from then on those are the first `n`."""
        if self._on_growth is not None:
            raise BrokenInvariant("the pool's growth is followed already")
        self._on_growth = on_growth

    # tests

    def check(self) -> None:
        """Verify every invariant of the accounts in O(num_pages). For tests.

        Raises:
            BrokenInvariant: one does not hold.
        """
        free = {*self._free, *range(self._num_begun, self.num_pages)}
        quarantined = 0
        for page_id in range(self.num_pages):
            used = self._num_references[page_id] > 0
            written = self._writer[page_id] != _NO_WRITER
            named = bool(self._named[page_id])
            _require(self._num_references[page_id] >= 0, f"page {page_id} has a negative count")
            _require(not (written and named), f"page {page_id} is named while it is written")
            _require((page_id in self._idle) == (not used and not written and named), f"page {page_id}: idle")
            _require((page_id in free) == (not used and not written and not named), f"page {page_id}: free")
            _require(
                not written or page_id in self._grants.get(self._writer[page_id], ()),
                f"page {page_id} has a writer that no grant knows",
            )
            quarantined += written and not used
        _require(len(free) == len(self._free) + self.num_pages - self._num_begun, "a page is free twice")
        _require(quarantined == self._num_quarantined, "quarantined pages are miscounted")
        for generation, page_ids in self._grants.items():
            _require(
                all(self._writer[page_id] == generation for page_id in page_ids),
                f"a page of generation {generation} has another writer",
            )
        _require(self.num_free + self.num_used + self.num_quarantined == self.num_pages, "counts do not add up")

    def _let_go(self, page_id: int) -> None:
        if self._writer[page_id] != _NO_WRITER:
            self._num_quarantined += 1
        elif self._named[page_id]:
            self._idle[page_id] = None
        else:
            self._free.append(page_id)

    def _take(self) -> int:
        if self._free:
            return self._free.pop()
        if self._num_begun < self.num_pages:
            self._num_begun += 1
            return self._num_begun - 1
        return self._evict()

    def _evict(self) -> int:
        page_id, _ = self._idle.popitem(last=False)
        self._named[page_id] = 0
        if self._on_evict is not None:
            self._on_evict(page_id)
        return page_id


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise BrokenInvariant(message)
