"""The supervisor on tiny children: order, crashes, stubbornness, leftovers."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pytest
from child_scripts import (
    DRAINED,
    LITTERING,
    POLITE,
    SICKLY,
    STILLBORN,
    STUBBORN,
    FileProbe,
    Recorder,
    is_running,
    litter_of,
    notes_in,
    spec,
)

from baton.child import Child, ChildSpec
from baton.errors import ServiceDied
from baton.policy import CrashHistory, RestartPolicy
from baton.report import Stage
from baton.supervisor import Supervisor

QUICK = RestartPolicy(first_pause_s=0.05, max_pause_s=0.1, max_crashes=2)


async def swallowing_probe(_: Child) -> bool:
    """Never ready; a cancellation that hits it is lost, as in redis-py's reads."""
    with suppress(asyncio.CancelledError):
        await asyncio.sleep(0.5)
    return False


class Bench:
    """A supervisor over `specs` with everything it needs."""

    def __init__(self, specs: Sequence[ChildSpec], tmp_path: Path, policy: RestartPolicy = QUICK) -> None:
        self.reporter = Recorder()
        self.groups: list[tuple[int, bool]] = []
        self.ready = False
        self.supervisor = Supervisor(
            specs,
            run_dir=tmp_path,
            probe=FileProbe(tmp_path / "order"),
            reporter=self.reporter,
            policy=policy,
            on_group=lambda pid, alive: self.groups.append((pid, alive)),
        )

    async def run(self, *, stop_after_s: float | None = 0.0) -> None:
        """Run; stop `stop_after_s` after everything was ready (None: never by itself)."""

        async def on_ready() -> None:
            self.ready = True
            if stop_after_s is not None:
                await asyncio.sleep(stop_after_s)
                self.supervisor.stop.set()

        await self.supervisor.run(on_ready=on_ready)


async def test_starts_redis_first_and_stops_in_the_order_of_the_flow(tmp_path: Path) -> None:
    order = tmp_path / "order"
    specs = [spec(POLITE, role, role, order) for role in ("decode", "gateway", "prefill", "redis")]
    bench = Bench(specs, tmp_path)
    await bench.run()
    notes = notes_in(order)
    assert bench.ready
    assert notes[0] == "began redis"
    assert sorted(notes[1:4]) == ["began decode", "began gateway", "began prefill"]
    assert notes[4:] == ["left gateway", "left prefill", "left decode", "left redis"]
    assert bench.reporter.stages("decode") == [Stage.STARTING, Stage.LOADING, Stage.READY, Stage.STOPPED]
    begun = [pid for pid, alive in bench.groups if alive]
    assert sorted(begun) == sorted(pid for pid, alive in bench.groups if not alive)
    assert not any(is_running(pid) for pid in begun)


async def test_an_early_exit_stops_the_others_and_shows_the_last_words(tmp_path: Path) -> None:
    order = tmp_path / "order"
    bench = Bench([spec(POLITE, "gateway", "gateway", order), spec(STILLBORN, "decode-0", "decode", order)], tmp_path)
    with pytest.raises(ServiceDied, match=r"decode-0 ended before it was ready \(exit code 3\)") as died:
        await bench.run()
    assert sorted(died.value.log_lines) == ["first line", "the reason why"]
    assert not bench.ready
    assert not any(is_running(pid) for pid, _ in bench.groups)


async def test_a_stubborn_child_is_killed_with_a_warning(tmp_path: Path) -> None:
    bench = Bench([spec(STUBBORN, "decode-0", "decode", tmp_path / "order", grace_s=0.3)], tmp_path)
    await bench.run()
    assert bench.reporter.changes[-1] == ("decode-0", Stage.STOPPED, "by SIGKILL")
    assert bench.reporter.lines == ["warning: decode-0 did not leave within 0.3 s and was killed"]
    assert not any(is_running(pid) for pid, _ in bench.groups)


async def test_hurry_does_not_wait_for_the_grace_period(tmp_path: Path) -> None:
    bench = Bench([spec(STUBBORN, "decode-0", "decode", tmp_path / "order", grace_s=60)], tmp_path)
    bench.supervisor.hurry.set()
    async with asyncio.timeout(5):
        await bench.run()
    assert not any(is_running(pid) for pid, _ in bench.groups)


async def test_a_probe_that_swallows_cancellation_does_not_hold_up_the_stop(tmp_path: Path) -> None:
    bench = Bench([spec(POLITE, "decode-0", "decode", tmp_path / "order")], tmp_path)
    bench.supervisor._probe = swallowing_probe
    asyncio.get_running_loop().call_later(0.32, bench.supervisor.stop.set)
    async with asyncio.timeout(5):
        await bench.run()
    assert bench.reporter.stages("decode-0")[-1] is Stage.STOPPED


async def test_a_crashed_worker_is_restarted_and_given_up_when_it_keeps_crashing(tmp_path: Path) -> None:
    order = tmp_path / "order"
    specs = [spec(SICKLY, "decode-0", "decode", order), spec(POLITE, "decode-1", "decode", order)]
    bench = Bench(specs, tmp_path)
    await bench.run(stop_after_s=1.8)
    stages = bench.reporter.stages("decode-0")
    assert stages.count(Stage.RESTARTING) == QUICK.max_crashes
    assert stages[-1] is Stage.FAILED
    assert notes_in(order).count("began decode-0") == QUICK.max_crashes + 1
    # The other one stands in for it, so the fleet went on until it was stopped.
    assert bench.reporter.stages("decode-1")[-1] is Stage.STOPPED


async def test_the_last_of_its_role_crashing_too_often_ends_the_fleet(tmp_path: Path) -> None:
    order = tmp_path / "order"
    bench = Bench([spec(SICKLY, "decode-0", "decode", order), spec(POLITE, "gateway", "gateway", order)], tmp_path)
    with pytest.raises(ServiceDied, match=r"crashed too often \(killed by SIGKILL\)"):
        await bench.run(stop_after_s=None)
    assert notes_in(order)[-1] == "left gateway"


async def test_a_worker_that_was_drained_is_not_restarted(tmp_path: Path) -> None:
    order = tmp_path / "order"
    bench = Bench([spec(DRAINED, "decode-0", "decode", order), spec(POLITE, "gateway", "gateway", order)], tmp_path)
    await bench.run(stop_after_s=0.6)
    assert bench.reporter.stages("decode-0")[-1] is Stage.LEFT


async def test_nothing_survives_in_a_childs_process_group(tmp_path: Path) -> None:
    order = tmp_path / "order"
    bench = Bench([spec(LITTERING, "decode-0", "decode", order, grace_s=2)], tmp_path)
    await bench.run()
    litter = litter_of(order)
    for _ in range(50):
        if not is_running(litter):
            break
        await asyncio.sleep(0.02)
    assert not is_running(litter)


def test_pauses_double_up_to_a_bound_and_old_crashes_are_forgotten() -> None:
    history = CrashHistory(RestartPolicy(first_pause_s=1, max_pause_s=3, max_crashes=3, window_s=10))
    assert [history.pause_after_crash(now_s) for now_s in (0, 1, 2, 3)] == [1, 2, 3, None]
    assert history.pause_after_crash(20) == 1
