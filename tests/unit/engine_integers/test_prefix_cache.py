"""Names of pages, and finding pages by name."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from support.passports import make_fingerprint

from engine.pages import PagePool
from engine.prefix_cache import NAME_BYTES, HashChain, PrefixCache, name_salt, page_hashes

PAGE_SIZE = 4
GOLDEN = "622349eab7b42bec8c737c9bbebaf680d2f3eac95a88ad13e26628eecb1e126d"  # changes only with the protocol version
SALT = name_salt(make_fingerprint(), "")


def hashes_of(token_ids: list[int], salt: bytes = SALT) -> list[bytes]:
    return page_hashes(token_ids, page_size=PAGE_SIZE, salt=salt)


def test_only_full_pages_have_names() -> None:
    assert hashes_of([1, 2, 3]) == []
    names = hashes_of(list(range(9)))
    assert len(names) == 2
    assert {len(name) for name in names} == {NAME_BYTES}


def test_a_name_depends_on_everything_before_it() -> None:
    one, other = hashes_of([1, 2, 3, 4, 5, 6, 7, 8]), hashes_of([9, 2, 3, 4, 5, 6, 7, 8])
    assert one[0] != other[0]
    assert one[1] != other[1]


def test_names_are_the_same_on_every_worker() -> None:
    assert hashes_of([1, 2, 3, 2**31 - 1])[0].hex() == GOLDEN


def test_the_salt_separates_models_and_tenants() -> None:
    salts = {
        name_salt(make_fingerprint(), ""),
        name_salt(make_fingerprint(), "tenant"),
        name_salt(make_fingerprint(model="other"), ""),
        name_salt(make_fingerprint(model="other"), "tenant"),
    }
    assert len({hashes_of([1, 2, 3, 4], salt)[0] for salt in salts}) == 4


@given(st.lists(st.integers(0, 2**31 - 1), max_size=60), st.data())
def test_a_chain_extended_bit_by_bit_equals_one_pass(token_ids: list[int], data: st.DataObject) -> None:
    chain = HashChain(page_size=PAGE_SIZE, salt=SALT)
    for num_tokens in sorted(data.draw(st.lists(st.integers(0, len(token_ids)), max_size=6))):
        chain.extend(token_ids, num_tokens)
        assert chain.hashes == hashes_of(token_ids[:num_tokens])
    resumed = HashChain(page_size=PAGE_SIZE, salt=SALT, hashes=chain.hashes)
    resumed.extend(token_ids, len(token_ids))
    assert resumed.hashes == hashes_of(token_ids)


@given(st.lists(st.integers(0, 3), max_size=24), st.lists(st.integers(0, 3), max_size=24))
def test_equal_names_mean_equal_prefixes(one: list[int], other: list[int]) -> None:
    for page, (a, b) in enumerate(zip(hashes_of(one), hashes_of(other), strict=False), start=1):
        assert (a == b) == (one[: page * PAGE_SIZE] == other[: page * PAGE_SIZE])


def make_cache(num_pages: int, *, enabled: bool = True) -> tuple[PagePool, PrefixCache]:
    pool = PagePool(num_pages, PAGE_SIZE)
    return pool, PrefixCache(pool, make_fingerprint(), enabled=enabled)


def test_match_shares_the_longest_leading_run() -> None:
    pool, cache = make_cache(8)
    ids = list(range(12))
    pages = pool.allocate(3)
    cache.insert(hashes_of(ids), pages)
    pool.release(pages)
    assert pool.num_cached == 3
    found = cache.match(hashes_of([*ids[:8], 99, 99, 99, 99]))
    assert found == pages[:2]
    assert (pool.num_used, pool.num_cached) == (2, 1)
    assert cache.match(hashes_of([99, *ids[1:]])) == []


def test_the_first_name_wins_and_the_duplicate_stays_anonymous() -> None:
    pool, cache = make_cache(8)
    names = hashes_of(list(range(8)))
    first, second = pool.allocate(2), pool.allocate(2)
    cache.insert(names[:1], first[:1])
    cache.insert(names, second)
    cache.insert(names, first)
    assert cache.match(names) == [first[0], second[1]]
    pool.release([first[0], second[1]])
    pool.release(first)
    pool.release(second)
    assert (pool.num_cached, pool.num_free) == (2, 8)
    pool.check()


def test_an_evicted_page_is_not_found_again() -> None:
    pool, cache = make_cache(2)
    names = hashes_of(list(range(8)))
    pages = pool.allocate(2)
    cache.insert(names, pages)
    pool.release(pages)
    taken = pool.allocate(1)
    assert taken == pages[1:]
    assert names[1] not in cache
    assert cache.match(names) == pages[:1]
    assert len(cache) == 1


def test_a_disabled_cache_finds_nothing() -> None:
    pool, cache = make_cache(2, enabled=False)
    names = hashes_of(list(range(8)))
    pages = pool.allocate(2)
    cache.insert(names, pages)
    assert cache.match(names) == []
    pool.release(pages)
    assert (pool.num_cached, pool.num_free) == (0, 2)


def test_statistics_count_admissions() -> None:
    _, cache = make_cache(2)
    cache.record(query_tokens=10, hit_tokens=4)
    cache.record(query_tokens=6, hit_tokens=0)
    assert (cache.query_tokens, cache.hit_tokens) == (16, 4)


class CacheMachine(RuleBasedStateMachine):
    """Sequences over a small alphabet share, fill, name and release pages; content is tracked beside the cache."""

    NUM_PAGES = 10

    def __init__(self) -> None:
        super().__init__()
        self.pool, self.cache = make_cache(self.NUM_PAGES)
        self.content: dict[int, tuple[int, ...]] = {}  # page -> the whole prefix it was computed from
        self.live: list[list[int]] = []

    @rule(token_ids=st.lists(st.integers(0, 1), min_size=4, max_size=20), backwards=st.booleans())
    def compute(self, token_ids: list[int], backwards: bool) -> None:
        names = hashes_of(token_ids)
        pages = self.cache.match(names)
        for index, page in enumerate(pages):
            assert self.content[page] == tuple(token_ids[: (index + 1) * PAGE_SIZE])
        if len(names) - len(pages) > self.pool.num_free:
            self.pool.release(pages)
            return
        num_cached = len(pages)
        pages += self.pool.allocate(len(names) - num_cached)
        for index in range(num_cached, len(pages)):
            self.content[pages[index]] = tuple(token_ids[: (index + 1) * PAGE_SIZE])
        order = range(num_cached, len(pages))
        for index in reversed(order) if backwards else order:
            self.cache.insert(names[index : index + 1], pages[index : index + 1])
        self.live.append(pages)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.pool.release(self.live.pop(data.draw(st.integers(0, len(self.live) - 1))))

    @invariant()
    def accounts_hold(self) -> None:
        self.pool.check()
        named = [page for page in range(self.NUM_PAGES) if self.pool.is_named(page)]
        assert len(self.cache) == len(named)
        assert self.pool.num_used == len({page for pages in self.live for page in pages})
        for page in named:
            assert hashes_of(list(self.content[page]))[-1] in self.cache


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(max_examples=50, stateful_step_count=30, deadline=None)
