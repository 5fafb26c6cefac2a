"""Givers that really die or freeze: pages come back when, and only when, nobody can write them any more."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from pathlib import Path

import pytest
from support.hand_off_side import LIMITS, Side, until

from kvtransfer.region import sweep_stale

TESTS = Path(__file__).parents[2]


async def start_giver(transport: str, taker: Side) -> Process:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "support.giver_process",
        transport,
        taker.peer.name,
        str(taker.peer.incarnation),
        taker.peer.address,
        stdout=PIPE,
        cwd=TESTS,
        env={**os.environ, "PYTHONPATH": f"{TESTS}:{TESTS.parent}"},
    )
    assert process.stdout is not None
    async with asyncio.timeout(20):
        assert (await process.stdout.readline()).startswith(b"writing")
    return process


@pytest.mark.parametrize("transport", ["shm", "tcp"])
async def test_kill_9_of_a_writing_giver_frees_every_page(transport: str) -> None:
    async with Side("d", transport, {}) as taker:
        process = await start_giver(transport, taker)
        assert not taker.bank.is_whole
        process.kill()
        await process.wait()
        await until(lambda: taker.bank.is_whole, within_s=2 * LIMITS.liveness_s, what="pages are free")
    sweep_stale()


@pytest.mark.parametrize("transport", ["shm", "tcp"])
async def test_a_frozen_giver_blocks_pages_only_where_it_could_write(transport: str) -> None:
    async with Side("d", transport, {}) as taker:
        process = await start_giver(transport, taker)
        process.send_signal(signal.SIGSTOP)
        try:
            await until(lambda: taker.news.of("grant_closed"), within_s=3 * LIMITS.liveness_s)
            if transport == "shm":
                await asyncio.sleep(LIMITS.liveness_s)
                assert taker.bank.pool.num_quarantined == 8
                # It wakes up, learns that its grant is closed, and says that it writes no more.
                process.send_signal(signal.SIGCONT)
            await until(lambda: taker.bank.is_whole, within_s=3 * LIMITS.liveness_s, what="pages are free")
        finally:
            process.kill()
            await process.wait()
        assert taker.bank.adopted == []
    sweep_stale()


async def test_a_frozen_direct_givers_pages_come_back_when_it_dies() -> None:
    async with Side("d", "shm", {}) as taker:
        process = await start_giver("shm", taker)
        process.send_signal(signal.SIGSTOP)
        try:
            await until(lambda: taker.news.of("grant_closed"), within_s=3 * LIMITS.liveness_s)
            await asyncio.sleep(2 * LIMITS.liveness_s)
            assert taker.bank.pool.num_quarantined == 8, "silence is not death"
        finally:
            process.kill()
        await until(lambda: taker.bank.is_whole, within_s=2 * LIMITS.liveness_s, what="pages are free")
        await process.wait()
    sweep_stale()
