"""The page pool: accounts add up whatever happens, and no page is handed out while anyone may touch it."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.errors import BrokenInvariant, OutOfPages
from engine.pages import PagePool, pages_for


def test_pages_for_rounds_up() -> None:
    assert [pages_for(n, 4) for n in (0, 1, 4, 5, 8)] == [0, 1, 1, 2, 2]


@pytest.mark.parametrize(("num_pages", "page_size"), [(0, 4), (4, 0), (-1, 4)])
def test_a_pool_of_nothing_is_refused(num_pages: int, page_size: int) -> None:
    with pytest.raises(ValueError, match="no pool"):
        PagePool(num_pages, page_size)


def test_allocate_is_all_or_nothing() -> None:
    pool = PagePool(4, 4)
    pool.allocate(3)
    with pytest.raises(OutOfPages) as raised:
        pool.allocate(2)
    assert (raised.value.needed, raised.value.available) == (2, 1)
    assert pool.num_free == 1
    pool.check()


def test_a_shared_page_is_free_only_after_its_last_release() -> None:
    pool = PagePool(2, 4)
    pages = pool.allocate(2)
    pool.share(pages)
    pool.release(pages)
    assert pool.num_used == 2
    pool.release(pages)
    assert pool.num_free == 2


def test_named_pages_stay_cached_and_go_tail_first() -> None:
    pool = PagePool(4, 4)
    evicted: list[int] = []
    pool.set_evict_hook(evicted.append)
    old, new = pool.allocate(2), pool.allocate(2)
    for page in old + new:
        pool.mark_named(page)
    pool.release(old)
    pool.release(new)
    assert (pool.num_cached, pool.num_free, pool.num_used) == (4, 4, 0)
    pool.allocate(3)
    assert evicted == [old[1], old[0], new[1]]
    pool.check()


def test_free_pages_go_before_cached_ones() -> None:
    pool = PagePool(2, 4)
    named, anonymous = pool.allocate(1), pool.allocate(1)
    pool.mark_named(named[0])
    pool.release(named)
    pool.release(anonymous)
    assert pool.allocate(1) == anonymous


def test_a_share_rescues_a_cached_page_from_eviction() -> None:
    pool = PagePool(2, 4)
    pages = pool.allocate(2)
    for page in pages:
        pool.mark_named(page)
    pool.release(pages)
    pool.share(pages[1:])
    assert pool.allocate(1) == pages[:1]
    with pytest.raises(OutOfPages):
        pool.allocate(1)


def test_quarantined_pages_come_back_only_with_their_writer() -> None:
    pool = PagePool(4, 4)
    pages = pool.allocate(3)
    generation = pool.begin_write(pages)
    pool.quarantine(generation)
    assert (pool.num_quarantined, pool.num_free, pool.num_used) == (3, 1, 0)
    with pytest.raises(OutOfPages):
        pool.allocate(2)
    assert pool.end_write(generation)
    assert (pool.num_quarantined, pool.num_free) == (0, 4)
    assert not pool.end_write(generation)


def test_a_release_under_a_writer_quarantines_too() -> None:
    pool = PagePool(1, 4)
    pages = pool.allocate(1)
    generation = pool.begin_write(pages)
    pool.release(pages)
    assert pool.num_quarantined == 1
    pool.end_write(generation)
    assert pool.allocate(1) == pages


def test_generations_are_never_given_twice() -> None:
    pool = PagePool(1, 4)
    seen = set()
    for _ in range(10):
        pages = pool.allocate(1)
        generation = pool.begin_write(pages)
        assert generation > 0
        assert generation not in seen
        seen.add(generation)
        pool.end_write(generation)
        pool.release(pages)


def test_misuse_is_loud() -> None:
    pool = PagePool(4, 4)
    pages = pool.allocate(2)
    generation = pool.begin_write(pages)
    with pytest.raises(BrokenInvariant, match="being written"):
        pool.share(pages)
    with pytest.raises(BrokenInvariant, match="not fresh"):
        pool.begin_write(pages)
    with pytest.raises(BrokenInvariant, match="cannot be named"):
        pool.mark_named(pages[0])
    pool.end_write(generation)
    with pytest.raises(BrokenInvariant, match="no open write"):
        pool.quarantine(generation)
    pool.release(pages)
    with pytest.raises(BrokenInvariant, match="more often"):
        pool.release(pages)
    with pytest.raises(BrokenInvariant, match="is free"):
        pool.share(pages)
    pool.set_evict_hook(lambda _: None)
    with pytest.raises(BrokenInvariant, match="one prefix cache"):
        pool.set_evict_hook(lambda _: None)


def test_growth_is_told_where_pages_are_taken_that_never_were_before() -> None:
    pool = PagePool(6, 4)
    grown: list[int] = []
    pool.set_growth_hook(grown.append)
    first = pool.allocate(2)
    pool.release(first)
    assert set(pool.allocate(3)) > set(first)
    pool.mark_named(first[0])
    pool.release([first[0]])
    pool.allocate(4)
    assert grown == [2, 3, 6]
    with pytest.raises(BrokenInvariant, match="followed"):
        pool.set_growth_hook(grown.append)


def test_check_notices_a_lost_page() -> None:
    pool = PagePool(4, 4)
    pool.release(pool.allocate(1))
    pool._free.pop()
    with pytest.raises(BrokenInvariant):
        pool.check()


class PoolMachine(RuleBasedStateMachine):
    """Random owners against a plain model: who holds what, who writes what, what is named."""

    NUM_PAGES = 12

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(self.NUM_PAGES, 4)
        self.pool.set_evict_hook(self._evicted)
        self.holders: list[list[int]] = []
        self.writing: dict[int, list[int]] = {}  # generation -> pages, request still holds
        self.silent: dict[int, list[int]] = {}  # generation -> pages, quarantined
        self.named: set[int] = set()

    def _evicted(self, page_id: int) -> None:
        assert page_id in self.named
        assert page_id not in self._held()
        self.named.remove(page_id)

    def _held(self) -> set[int]:
        return {page for pages in (*self.holders, *self.writing.values()) for page in pages}

    def _quarantined(self) -> set[int]:
        return {page for pages in self.silent.values() for page in pages}

    @rule(num_pages=st.integers(0, NUM_PAGES))
    def allocate(self, num_pages: int) -> None:
        available = self.NUM_PAGES - len(self._held() | self._quarantined())
        if num_pages > available:
            with pytest.raises(OutOfPages):
                self.pool.allocate(num_pages)
            return
        taboo = self._held() | self._quarantined()
        pages = self.pool.allocate(num_pages)
        assert len(set(pages)) == num_pages
        assert taboo.isdisjoint(pages)
        assert self.named.isdisjoint(pages)
        self.holders.append(pages)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def share_a_prefix(self, data: st.DataObject) -> None:
        pages = data.draw(st.sampled_from(self.holders))
        prefix = pages[: data.draw(st.integers(0, len(pages)))]
        self.pool.share(prefix)
        self.holders.append(list(prefix))

    @precondition(lambda self: self.named - self._held())
    @rule(data=st.data())
    def share_an_idle_page(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(sorted(self.named - self._held())))
        self.pool.share([page])
        self.holders.append([page])

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.pool.release(self.holders.pop(data.draw(st.integers(0, len(self.holders) - 1))))

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def name(self, data: st.DataObject) -> None:
        for page in data.draw(st.sampled_from(self.holders)):
            self.pool.mark_named(page)
            self.named.add(page)

    @rule(num_pages=st.integers(0, 4))
    def begin_write(self, num_pages: int) -> None:
        if num_pages <= self.pool.num_free:
            pages = self.pool.allocate(num_pages)
            generation = self.pool.begin_write(pages)
            assert generation not in self.writing
            assert generation not in self.silent
            self.writing[generation] = pages

    @precondition(lambda self: self.writing)
    @rule(data=st.data())
    def adopt(self, data: st.DataObject) -> None:
        generation = data.draw(st.sampled_from(sorted(self.writing)))
        assert self.pool.end_write(generation)
        self.holders.append(self.writing.pop(generation))

    @precondition(lambda self: self.writing)
    @rule(data=st.data())
    def quarantine(self, data: st.DataObject) -> None:
        generation = data.draw(st.sampled_from(sorted(self.writing)))
        self.pool.quarantine(generation)
        self.silent[generation] = self.writing.pop(generation)

    @precondition(lambda self: self.silent)
    @rule(data=st.data())
    def writer_is_dead(self, data: st.DataObject) -> None:
        generation = data.draw(st.sampled_from(sorted(self.silent)))
        assert self.pool.end_write(generation)
        del self.silent[generation]

    @invariant()
    def accounts_agree_with_the_model(self) -> None:
        self.pool.check()
        held = self._held()
        assert self.pool.num_used == len(held)
        assert self.pool.num_quarantined == len(self._quarantined())
        assert self.pool.num_cached == len(self.named - held)
        assert self.pool.num_free == self.NUM_PAGES - len(held) - len(self._quarantined())

    def teardown(self) -> None:
        while self.holders:
            self.pool.release(self.holders.pop())
        for generation in self.writing:
            self.pool.quarantine(generation)
        for generation in [*self.writing, *self.silent]:
            self.pool.end_write(generation)
        self.writing.clear()
        self.pool.check()
        assert self.pool.num_free == self.NUM_PAGES
        assert len(set(self.pool.allocate(self.NUM_PAGES))) == self.NUM_PAGES


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
