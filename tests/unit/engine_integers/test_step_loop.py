"""The step loop over a device: the next step is launched before the results of the running one are awaited."""

from __future__ import annotations

import threading

from support.fake_runner import FakeRunner, fake_output
from support.late_runner import LateRunner
from support.passports import make_fingerprint, make_passport
from support.stepping import run_until_idle

from engine.decode_scheduler import DecodeScheduler
from engine.limits import DecodeLimits
from engine.pages import PagePool
from engine.plan import Pending, StepOutput, StepPlan
from engine.prefix_cache import PrefixCache
from engine.progress import RowProgress, StepProgress
from engine.sequence import Sequence
from fleet.types import FinishReason, SamplingParams

NUM_PAGES, PAGE_SIZE = 32, 4
PROMPTS = ([1, 2, 3], [4], [5, 6, 7, 8, 9])
MAX_TOKENS = (6, 1, 9)


class Device:
    """A `LateRunner` that writes down what it is asked for, and fails when told to."""

    def __init__(self, *, fails_at: int | None = None) -> None:
        self.pages = FakeRunner(NUM_PAGES, PAGE_SIZE)
        self.late = LateRunner(self.pages)
        self.log: list[str] = []
        self.threads: set[int] = set()
        self._fails_at = fails_at

    def feeds_next(self, plan: StepPlan) -> bool:
        return self.late.feeds_next(plan)

    def launch(self, plan: StepPlan) -> StepOutput | Pending:
        number = sum(line.startswith("launch") for line in self.log)
        self.log.append(f"launch {number}")
        self.threads.add(threading.get_ident())
        result = self.late.launch(plan)
        return result if isinstance(result, StepOutput) else _Watched(self, number, result)

    def wait(self, number: int, pending: Pending) -> StepOutput:
        self.log.append(f"wait {number}")
        self.threads.add(threading.get_ident())
        if number == self._fails_at:
            pending.wait()
            raise RuntimeError("the device is gone")
        return pending.wait()


class _Watched:
    def __init__(self, device: Device, number: int, pending: Pending) -> None:
        self._device, self._number, self._pending = device, number, pending

    def wait(self) -> StepOutput:
        return self._device.wait(self._number, self._pending)


async def drive(device: Device, *, constrained: bool = False) -> tuple[dict[str, list[RowProgress]], PagePool]:
    """Decode all prompts to their ends; the rows of each request."""
    pool = PagePool(NUM_PAGES, PAGE_SIZE)
    cache = PrefixCache(pool, make_fingerprint())
    limits = DecodeLimits(max_model_len=NUM_PAGES * PAGE_SIZE, lookahead_tokens=0)
    scheduler = DecodeScheduler(
        pool, cache, limits, feeds_next=lambda plan: not constrained and device.feeds_next(plan)
    )
    for number, (prompt, max_tokens) in enumerate(zip(PROMPTS, MAX_TOKENS, strict=True)):
        passport = make_passport(prompt, request_id=f"r{number}", params=SamplingParams(max_tokens=max_tokens))
        reservation = scheduler.reserve(passport, [])
        assert reservation is not None
        scheduler.adopt(reservation, passport, 0)
    rows: dict[str, list[RowProgress]] = {}

    def on_step(plan: StepPlan, progress: StepProgress, step_s: float) -> None:
        assert plan.rows
        assert step_s > 0
        device.log.append(f"book {sum(line.startswith('book') for line in device.log)}")
        for row in progress.rows:
            rows.setdefault(row.sequence.request_id, []).append(row)

    await run_until_idle(scheduler, device, on_step, timeout_s=20)
    pool.check()
    return rows, pool


def outputs(rows: dict[str, list[RowProgress]]) -> dict[str, list[int]]:
    return {
        request_id: [row.sampled.token_id for row in own if row.sampled is not None] for request_id, own in rows.items()
    }


async def test_each_step_is_launched_behind_the_one_before_and_gives_the_same_tokens() -> None:
    device = Device()
    rows, pool = await drive(device)
    expected = {
        f"r{number}": fake_output(prompt, SamplingParams(max_tokens=most), max_model_len=NUM_PAGES * PAGE_SIZE)[0]
        for number, (prompt, most) in enumerate(zip(PROMPTS, MAX_TOKENS, strict=True))
    }
    assert outputs(rows) == expected
    assert [own[-1].finish for own in rows.values()] == [FinishReason.LENGTH] * 3
    assert device.late.num_followers > 0
    # The first step has prompts to compute and overlaps with nothing; from the second on each one runs ahead.
    assert device.log[:8] == ["launch 0", "book 0", "launch 1", "launch 2", "wait 1", "book 1", "launch 3", "wait 2"]
    assert device.log[-2:] == ["wait 8", "book 8"]
    assert len(device.threads) == 1
    assert threading.get_ident() not in device.threads
    assert pool.num_used == 0


async def test_without_tokens_on_the_device_steps_stay_in_order() -> None:
    device = Device()
    rows, _ = await drive(device, constrained=True)
    assert len(rows) == 3
    kinds = [line.split()[0] for line in device.log]
    assert [kinds[at : at + 3] for at in range(2, len(kinds), 3)] == [["launch", "wait", "book"]] * 8


async def test_a_step_that_fails_on_the_device_ends_its_requests_and_the_one_behind_it_is_thrown_away() -> None:
    device = Device(fails_at=2)
    rows, pool = await drive(device)
    assert [len(own) for own in rows.values()] == [3, 1, 3]
    last = [rows["r0"][-1], rows["r2"][-1]]
    assert [row.finish for row in last] == [FinishReason.ERROR] * 2
    assert all("RuntimeError" in (row.error or "") for row in last)
    assert device.log[-4:] == ["wait 2", "book 2", "wait 3", "book 3"]
    assert pool.num_used == 0


def test_rows_behind_a_step_leave_out_who_surely_ends_and_wait_for_who_has_more_to_compute() -> None:
    pool = PagePool(NUM_PAGES, PAGE_SIZE)
    scheduler = DecodeScheduler(
        pool,
        PrefixCache(pool, make_fingerprint()),
        DecodeLimits(max_model_len=40, lookahead_tokens=0),
        feeds_next=lambda _: True,
    )

    def adopt(request_id: str, *, max_tokens: int, computed: int) -> Sequence:
        passport = make_passport(
            [1, 2, 3, 4], request_id=request_id, params=SamplingParams(max_tokens=max_tokens), prompt_len=3
        )
        reservation = scheduler.reserve(passport, [])
        assert reservation is not None
        return scheduler.adopt(reservation, passport, computed)

    ends, goes_on = adopt("a", max_tokens=2, computed=3), adopt("b", max_tokens=9, computed=3)
    assert scheduler.schedule_ahead() is None, "nothing is in flight"
    plan = scheduler.schedule()
    assert plan is not None
    comes = adopt("c", max_tokens=9, computed=3)
    ahead = scheduler.schedule_ahead()
    assert ahead is not None
    assert [(row.sequence, row.start, row.follows) for row in ahead.rows] == [(goes_on, 4, 1), (comes, 3, None)]
    assert len(goes_on.page_table) == 2, "room for a token that is not there yet"
    assert scheduler.schedule_ahead() is None, "two are in flight"
    assert ends not in [row.sequence for row in ahead.rows]
    runner = LateRunner(FakeRunner(NUM_PAGES, PAGE_SIZE))
    first, second = runner.launch(plan), runner.launch(ahead)
    assert not isinstance(first, StepOutput)
    assert not isinstance(second, StepOutput)
    assert [row.finish for row in scheduler.commit(plan, first.wait()).rows] == [FinishReason.LENGTH, None]
    adopt("d", max_tokens=9, computed=0)
    assert scheduler.schedule_ahead() is None, "a prompt comes first"
    assert [row.index for row in scheduler.commit(ahead, second.wait()).rows] == [2, 1]
