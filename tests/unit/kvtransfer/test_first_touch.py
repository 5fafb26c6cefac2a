"""Memory of a shared pool is made ahead of its use, while nobody computes, and whatever lies there stays."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from kvtransfer.first_touch import FirstTouch
from kvtransfer.host import SHM_DIRECTORY
from kvtransfer.region import PoolRegion
from tests.support.fleet import until

MIB = 2**20
NUM_PAGES = 12


@pytest.fixture
def region() -> Iterator[PoolRegion]:
    made = PoolRegion.create("touched", num_pages=NUM_PAGES, page_bytes=MIB, shared=True)
    yield made
    made.unlink()
    made.close()


def made_bytes(region: PoolRegion) -> int:
    return (SHM_DIRECTORY / region.ref.name).stat().st_blocks * 512


def test_it_keeps_its_distance_from_the_pages_in_use_up_to_the_end(region: PoolRegion) -> None:
    before = made_bytes(region)
    region.page(1)[:3] = b"abc"
    first_touch = FirstTouch(region, ahead_bytes=3 * MIB)
    until(lambda: first_touch.touched_bytes == 3 * MIB, within_s=20, what="the first pages")
    assert made_bytes(region) - before == 3 * MIB
    first_touch.follow(4)
    until(lambda: first_touch.touched_bytes == 7 * MIB, within_s=20, what="pages after those in use")
    first_touch.follow(NUM_PAGES)
    until(lambda: first_touch.touched_bytes == NUM_PAGES * MIB, within_s=20, what="all pages")
    assert made_bytes(region) - before == NUM_PAGES * MIB
    assert bytes(region.buffer) == bytes(MIB) + b"abc" + bytes((NUM_PAGES - 1) * MIB - 3)
    first_touch.close()


def test_it_waits_while_somebody_computes(region: PoolRegion) -> None:
    first_touch = FirstTouch(region, ahead_bytes=0)
    asked = threading.Semaphore(0)
    computes = True

    def must_wait() -> bool:
        asked.release()
        return computes

    first_touch.must_wait = must_wait
    first_touch.follow(2)
    for _ in range(2):
        assert asked.acquire(timeout=20)
    assert first_touch.touched_bytes == 0
    computes = False
    until(lambda: first_touch.touched_bytes == 2 * MIB, within_s=20, what="pages in use")
    first_touch.close()


def test_a_region_may_be_closed_at_once_and_private_ones_are_left_alone() -> None:
    shared = PoolRegion.create("touched", num_pages=NUM_PAGES, page_bytes=MIB, shared=True)
    first_touch = FirstTouch(shared)
    first_touch.close()
    shared.unlink()
    shared.close()
    private = PoolRegion.create("touched", num_pages=NUM_PAGES, page_bytes=MIB, shared=False)
    before = threading.active_count()
    ignored = FirstTouch(private)
    ignored.follow(NUM_PAGES)
    assert threading.active_count() <= before
    assert ignored.touched_bytes == 0
    ignored.close()
    private.close()
