"""Which sequences move to even loads out: never back and forth, never onto somebody who is fuller."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from decode_svc.balance import Candidate, Room, choose, page_shortage
from fleet.types import PeerRef

B, C = (PeerRef(name, 1, f"tcp://{name}") for name in "bc")


def room(num_seqs: int, num_used_pages: int = 0) -> Room:
    return Room(num_seqs=num_seqs, max_num_seqs=10, num_used_pages=num_used_pages, num_pages=100)


def sequences(count: int, *, num_pages: int = 5) -> list[Candidate]:
    return [Candidate(at, num_pages, num_wanted_pages=2, num_to_come=100 * (at + 1)) for at in range(count)]


def moves(
    count: int, me: Room, peers: dict[PeerRef, Room], *, shortage: int = 0, limit: int = 9, num_pages: int = 5
) -> list[tuple[int, str]]:
    chosen = choose(sequences(count, num_pages=num_pages), me=me, peers=peers, shortage=shortage, gap=0.4, limit=limit)
    return [(candidate.index, peer.name) for candidate, peer in chosen]


def test_a_newcomer_gets_what_is_above_the_mean_longest_first() -> None:
    assert moves(8, room(8, 40), {B: room(0)}) == [(7, "b"), (6, "b"), (5, "b"), (4, "b")]
    assert moves(8, room(8, 40), {B: room(0)}, limit=2) == [(7, "b"), (6, "b")]


def test_several_full_workers_do_not_overfill_one_newcomer() -> None:
    each = moves(8, room(8, 40), {B: room(0), C: room(8, 40)})
    assert [name for _, name in each] == ["b"] * len(each)
    assert 2 * len(each) <= 6, "two such workers bring the newcomer to no more than the mean of 5.3"


def test_small_differences_and_lone_workers_move_nothing() -> None:
    assert moves(8, room(8, 40), {B: room(5, 25)}) == []
    assert moves(8, room(8, 40), {}, shortage=50) == []


def test_a_shortage_moves_no_more_than_it_takes() -> None:
    assert moves(8, room(8, 80), {B: room(5, 50)}, shortage=8) == [(7, "b"), (6, "b")]
    assert moves(8, room(8, 80), {B: room(8, 90)}, shortage=8) == [(7, "b")], "as far as the peer has room"
    assert moves(8, room(8, 80), {B: room(8, 94)}, shortage=8) == []


def test_evening_out_is_not_worth_the_pause_of_one_that_ends_soon() -> None:
    ending = [Candidate(at, 5, 0, num_to_come=20) for at in range(8)]
    for shortage, expected in ((0, 0), (5, 1)):
        chosen = choose(ending, me=room(8, 40), peers={B: room(0)}, shortage=shortage, gap=0.4, limit=9)
        assert len(chosen) == expected


def test_pages_are_short_below_half_of_what_is_wanted() -> None:
    assert [page_shortage(num_free=free, num_wanted=20) for free in (30, 10, 9, 0)] == [0, 0, 11, 20]


@given(
    sizes=st.lists(st.integers(1, 12), max_size=10),
    peers=st.lists(st.tuples(st.integers(0, 10), st.integers(0, 100)), max_size=2),
    shortage=st.integers(0, 60),
)
def test_no_move_overfills_the_taker_and_evening_out_never_turns_the_tables(
    sizes: list[int], peers: list[tuple[int, int]], shortage: int
) -> None:
    me = room(len(sizes), min(100, sum(sizes)))
    rooms = {peer: room(*held) for peer, held in zip((B, C), peers, strict=False)}
    candidates = [Candidate(at, pages, 2, num_to_come=100 + at) for at, pages in enumerate(sizes)]
    chosen = choose(candidates, me=me, peers=rooms, shortage=shortage, gap=0.2, limit=10)
    assert max(Counter(candidate.index for candidate, _ in chosen).values(), default=1) == 1
    after = me.plus(-len(chosen), -sum(candidate.num_pages for candidate, _ in chosen))
    for peer in {peer for _, peer in chosen}:
        taken = [candidate for candidate, to in chosen if to == peer]
        full = rooms[peer].plus(len(taken), sum(one.num_pages + one.num_wanted_pages for one in taken))
        assert full.fullness <= 1.0
        if not shortage:
            assert full.fullness <= after.fullness
