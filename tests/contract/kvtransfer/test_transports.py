"""The contract of every transport, on real sockets and real memory."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import msgspec
import pytest
from support.hand_off_side import LIMITS, Gift, Side, until
from support.page_bank import FINGERPRINT

from fleet.hand_off_messages import Commit, RefuseReason
from fleet.types import PeerRef
from kvtransfer.actions import FailReason
from kvtransfer.region import PoolRegion

TRANSPORTS = ("loopback", "shm", "cuda_ipc", "tcp")


@pytest.fixture(params=TRANSPORTS)
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def directory() -> dict[PeerRef, PoolRegion]:
    return {}


Directory = dict[PeerRef, PoolRegion]


async def test_pages_arrive_bit_equal_and_both_sides_know_it(transport: str, directory: Directory) -> None:
    async with Side("p", transport, directory) as giver, Side("d", transport, directory) as taker:
        gift = Gift(giver, "r", 30)
        gift.offer(taker)
        gift.chunk(3)
        gift.chunk(7)
        gift.commit()
        await until(lambda: giver.news.of("given"))
        (arrived, pages), *rest = taker.bank.adopted
        assert not rest
        assert arrived.token_ids == [*gift.passport.token_ids, 42]
        assert gift.bytes_at(taker, pages)
        assert giver.news.of("given")[0].transport == transport
        assert giver.news.of("release_pages") == [("r", 0)]
        assert giver.endpoint.stats.given[transport].pages == len(gift.pages) == 8
        taker.bank.end_adopted()
        assert taker.bank.is_whole


async def test_chunks_flow_while_prefill_goes_on(transport: str, directory: Directory) -> None:
    async with Side("p", transport, directory) as giver, Side("d", transport, directory) as taker:
        gift = Gift(giver, "r", 40)
        gift.offer(taker)
        for ready in (2, 5, 9):
            gift.chunk(ready)
            await until(lambda: giver.endpoint.lag("r", 0) == 0, what="chunk has moved")
            assert giver.endpoint.stats.given[transport].pages == ready
        assert taker.bank.adopted == []
        gift.commit()
        await until(lambda: taker.bank.adopted)


def was_released(giver: Side, request_id: str) -> bool:
    return (request_id, 0) in giver.news.of("release_pages")


async def test_pages_that_the_taker_holds_are_skipped(transport: str, directory: Directory) -> None:
    async with Side("p", transport, directory) as giver, Side("d", transport, directory) as taker:
        for request_id in ("first", "second"):
            gift = Gift(giver, request_id, 30)
            gift.offer(taker)
            gift.chunk(7)
            gift.commit()
            await until(partial(was_released, giver, request_id))
        moved = [given.num_moved_pages for given in giver.news.of("given")]
        held = [given.num_held_pages for given in giver.news.of("given")]
        assert (moved, held) == ([8, 1], [0, 7])
        assert gift.bytes_at(taker, taker.bank.adopted[1][1])
        assert taker.bank.adopted[0][1][:7] == taker.bank.adopted[1][1][:7]


async def test_a_full_taker_refuses_and_the_giver_goes_elsewhere(transport: str, directory: Directory) -> None:
    async with (
        Side("p", transport, directory) as giver,
        Side("small", transport, directory, num_pages=3) as small,
        Side("large", transport, directory) as large,
    ):
        gift = Gift(giver, "r", 30)
        gift.offer(small, large)
        gift.commit()
        await until(lambda: large.bank.adopted)
        assert giver.endpoint.stats.refusals_heard[RefuseReason.FULL] == 1
        assert small.bank.is_whole


async def test_where_all_are_full_the_giver_waits_and_succeeds_later(transport: str, directory: Directory) -> None:
    async with Side("p", transport, directory) as giver, Side("d", transport, directory, num_pages=8) as taker:
        busy = taker.bank.pool.allocate(8)
        gift = Gift(giver, "r", 30)
        gift.offer(taker)
        gift.commit()
        await until(lambda: giver.endpoint.stats.refusals_heard[RefuseReason.FULL] >= 3)
        assert giver.news.of("failed") == []
        taker.bank.pool.release(busy)
        await until(lambda: taker.bank.adopted)


@pytest.mark.parametrize("change", [{"num_layers": 1, "head_dim": 8}, {"dtype": "float8_e4m3fn"}])
async def test_a_layout_mismatch_moves_no_byte_and_names_both(
    change: dict[str, int | str], transport: str, directory: Directory
) -> None:
    other = msgspec.structs.replace(FINGERPRINT, **change)
    async with (
        Side("p", transport, directory) as giver,
        Side("d", transport, directory, fingerprint=other) as taker,
    ):
        gift = Gift(giver, "r", 30)
        gift.offer(taker)
        gift.commit()
        await until(lambda: giver.news.of("failed"))
        (failed,) = giver.news.of("failed")
        assert failed.reason is FailReason.REFUSED
        assert str(FINGERPRINT) in failed.message
        assert str(other) in failed.message
        assert giver.endpoint.stats.given[transport].bytes == 0
        assert taker.bank.is_whole


async def test_a_cancel_frees_both_sides_and_is_remembered(transport: str, directory: Directory) -> None:
    async with Side("p", transport, directory) as giver, Side("d", transport, directory) as taker:
        gift = Gift(giver, "r", 30)
        gift.offer(taker)
        gift.chunk(4)
        await until(lambda: giver.endpoint.lag("r", 0) == 0)
        taker.endpoint.cancel("r", 0)
        await until(lambda: giver.news.of("failed"))
        await until(lambda: taker.bank.is_whole, what="taker's pages are free")
        assert giver.news.of("failed")[0].reason is FailReason.CANCELLED
        late = Gift(giver, "s", 10)
        taker.endpoint.cancel("s", 0)
        late.offer(taker)
        late.commit()
        await until(lambda: len(giver.news.of("failed")) == 2)
        assert taker.bank.adopted == []


async def test_an_older_epoch_after_a_newer_one_is_stale(transport: str, directory: Directory) -> None:
    async with Side("p", transport, directory) as giver, Side("d", transport, directory) as taker:
        newer = Gift(giver, "r", 8, epoch=2)
        newer.offer(taker)
        newer.commit()
        await until(lambda: giver.news.of("given"))
        older = Gift(giver, "r", 8, epoch=1)
        older.offer(taker)
        older.commit()
        await until(lambda: giver.news.of("failed"))
        assert giver.news.of("failed")[0].reason is FailReason.STALE
        assert taker.endpoint.stale == {"epoch": 1, "grant": 0, "incarnation": 0}
        assert len(taker.bank.adopted) == 1


async def test_a_commit_of_a_stale_generation_is_refused(transport: str, directory: Directory) -> None:
    async with Side("p", transport, directory) as giver, Side("d", transport, directory) as taker:
        gift = Gift(giver, "r", 30)
        gift.offer(taker)
        gift.chunk(7)
        await until(lambda: giver.endpoint.lag("r", 0) == 0)
        forged = Commit(giver=giver.peer, passport=gift.passport, generation=12345, num_computed_tokens=30)
        giver.bus.send(taker.peer.address, forged)
        await until(lambda: taker.endpoint.stats.refusals_sent[RefuseReason.STALE] == 1)
        assert taker.bank.adopted == []
        assert taker.endpoint.stale == {"epoch": 0, "grant": 1, "incarnation": 0}
        gift.commit()
        await until(lambda: taker.bank.adopted)


@pytest.mark.parametrize("when", ["offered", "writing", "before commit"])
async def test_a_vanished_giver_frees_the_takers_pages(transport: str, directory: Directory, when: str) -> None:
    async with Side("d", transport, directory) as taker, Side("p", transport, directory) as giver:
        gift = Gift(giver, "r", 30)
        gift.offer(taker)
        if when != "offered":
            gift.chunk(4 if when == "writing" else 7)
            await until(lambda: giver.endpoint.lag("r", 0) == 0)
        else:
            await until(lambda: taker.endpoint.num_taking == 1)
        await giver.vanish()
        await until(lambda: taker.news.of("grant_closed"), within_s=2 * LIMITS.liveness_s)
        # Its process (this one) still lives, so a direct giver might still write: quarantine, not reuse.
        direct = transport != "tcp"
        assert taker.news.of("grant_closed")[0].quarantined is direct
        assert taker.bank.is_whole is not direct
        assert taker.bank.adopted == []


async def test_a_vanished_taker_is_unmapped_though_no_hand_off_is_open(directory: Directory) -> None:
    async with Side("p", "shm", directory) as giver, Side("d", "shm", directory) as taker:
        gift = Gift(giver, "r", 30)
        gift.offer(taker)
        gift.commit()
        await until(lambda: giver.endpoint.num_giving == 0)

        def num_mapped() -> int:
            return Path("/proc/self/maps").read_text(encoding="utf-8").count(taker.region.ref.name)

        assert num_mapped() == 2  # the taker's own, and the giver's
        await taker.vanish()
        await until(lambda: num_mapped() == 1)


@pytest.mark.parametrize("when", ["offered", "writing", "committed"])
async def test_a_vanished_taker_lets_the_giver_go_on(transport: str, directory: Directory, when: str) -> None:
    async with Side("p", transport, directory) as giver, Side("d2", transport, directory) as other:
        async with Side("d1", transport, directory) as taker:
            gift = Gift(giver, "r", 30)
            gift.offer(taker, other)
            if when != "offered":
                gift.chunk(4)
                await until(lambda: giver.endpoint.lag("r", 0) == 0)
            await taker.vanish()
            gift.commit()
            if when == "committed":
                await until(lambda: giver.news.of("committing") or giver.news.of("failed"), within_s=4)
            await until(lambda: other.bank.adopted or giver.news.of("failed"), within_s=4)
            await until(lambda: giver.news.of("release_pages"))
        if other.bank.adopted:
            assert gift.bytes_at(other, other.bank.adopted[0][1])
        else:
            # It may have said Commit: only a replay by the gateway may go on, never a second taker.
            assert giver.news.of("failed")[0].reason is FailReason.UNCERTAIN
