"""Chunked prefill: order, budget, prefix reuse, page pressure, aborts, failures."""

from __future__ import annotations

import pytest
from support.fake_runner import FakeRunner, fake_logprob, fake_next_token, fake_output
from support.passports import make_fingerprint, make_passport

from engine.errors import AlreadyFinished, BrokenInvariant, DuplicateSequence, SequenceTooLong, StepOutOfOrder
from engine.limits import PrefillLimits
from engine.pages import PagePool
from engine.plan import Failed, Sampled, StepOutput, StepPlan
from engine.prefill_scheduler import PrefillScheduler
from engine.prefix_cache import PrefixCache
from engine.progress import RowProgress
from engine.sequence import Phase, Sequence
from fleet.types import FinishReason, Pooling, SamplingParams

PAGE_SIZE = 4


class Worker:
    """A pool, a scheduler and a fake runner."""

    def __init__(
        self,
        *,
        num_pages: int = 64,
        max_step_tokens: int = 16,
        max_chunk_tokens: int | None = None,
        seats: int = 8,
        prefix_cache: bool = True,
    ) -> None:
        self.pool = PagePool(num_pages, PAGE_SIZE)
        self.cache = PrefixCache(self.pool, make_fingerprint(), enabled=prefix_cache)
        limits = PrefillLimits(
            max_model_len=200,
            max_step_tokens=max_step_tokens,
            max_chunk_tokens=max_chunk_tokens,
            max_num_seqs=seats,
        )
        self.scheduler = PrefillScheduler(self.pool, self.cache, limits)
        self.runner = FakeRunner(num_pages, PAGE_SIZE)
        self.arrival = 0

    def add(
        self,
        token_ids: list[int],
        request_id: str,
        *,
        epoch: int = 0,
        prompt_len: int | None = None,
        params: SamplingParams | None = None,
        cache_salt: str = "",
        priority: int = 0,
        pooling: Pooling | None = None,
    ) -> Sequence:
        passport = make_passport(
            token_ids,
            request_id=request_id,
            epoch=epoch,
            prompt_len=prompt_len,
            params=params,
            cache_salt=cache_salt,
            priority=priority,
            pooling=pooling,
        )
        sequence = Sequence.from_passport(passport, arrival=self.arrival)
        self.arrival += 1
        self.scheduler.add(sequence)
        return sequence

    def plan(self) -> StepPlan:
        plan = self.scheduler.schedule()
        assert plan is not None
        return plan

    def plan_and_commit(self) -> StepPlan:
        plan = self.plan()
        self.scheduler.commit(plan, self.runner.run(plan))
        return plan

    def step(self) -> tuple[RowProgress, ...]:
        plan = self.plan()
        return self.scheduler.commit(plan, self.runner.run(plan)).rows


def shape(plan: StepPlan) -> list[tuple[str, int, int, bool]]:
    return [(row.sequence.request_id, row.start, row.count, row.sample) for row in plan.rows]


def test_a_prompt_is_computed_in_chunks_and_keeps_its_pages() -> None:
    worker = Worker(max_step_tokens=6)
    prompt = list(range(14))
    sequence = worker.add(prompt, "a")
    assert len(sequence.page_hashes) == 3
    assert (worker.scheduler.num_waiting, worker.scheduler.waiting_tokens) == (1, 14)

    (first,) = worker.step()
    assert (first.new_pages, first.sampled, first.index, first.finish) == (range(1), None, 0, None)
    assert (worker.scheduler.num_running, worker.scheduler.waiting_tokens) == (1, 8)
    (second,) = worker.step()
    assert second.new_pages == range(1, 3)
    (last,) = worker.step()
    assert last.new_pages == range(3, 3)
    assert last.sampled == Sampled(fake_next_token(prompt))
    assert sequence.phase is Phase.PREFILLED
    assert sequence.token_ids == [*prompt, fake_next_token(prompt)]
    assert (sequence.num_computed_tokens, len(sequence.page_table)) == (14, 4)
    assert (worker.scheduler.num_running, worker.scheduler.num_prefilled) == (0, 1)
    assert list(worker.scheduler.sequences()) == [sequence]
    assert worker.scheduler.schedule() is None

    assert worker.pool.num_used == 4
    worker.scheduler.release(sequence)
    worker.scheduler.release(sequence)
    assert (worker.pool.num_used, worker.pool.num_cached, worker.scheduler.num_prefilled) == (0, 3, 0)
    assert not list(worker.scheduler.sequences())


def test_several_prompts_share_a_step_first_come_first_served() -> None:
    worker = Worker(max_step_tokens=16)
    worker.add([1] * 5, "a")
    worker.add([2] * 9, "b")
    worker.add([3] * 7, "c")
    plan = worker.plan()
    assert shape(plan) == [("a", 0, 5, True), ("b", 0, 9, True), ("c", 0, 2, False)]
    assert plan.num_tokens == 16
    worker.scheduler.commit(plan, worker.runner.run(plan))
    assert shape(worker.plan()) == [("c", 2, 5, True)]


def test_prompts_that_begin_alike_compute_it_once_and_let_others_pass() -> None:
    worker = Worker(max_step_tokens=8)
    prompt = list(range(14))
    first = worker.add(prompt, "a0")
    siblings = [worker.add(prompt, f"a{sample}") for sample in (1, 2)]
    worker.add([9] * 3, "b")
    plan = worker.plan()
    assert shape(plan) == [("a0", 0, 8, False)]
    worker.scheduler.commit(plan, worker.runner.run(plan))
    plan = worker.plan()
    assert shape(plan) == [("a0", 8, 6, True), ("b", 0, 2, False)]
    worker.scheduler.commit(plan, worker.runner.run(plan))
    assert first.phase is Phase.PREFILLED
    plan = worker.plan()
    assert shape(plan) == [("a1", 12, 2, True), ("a2", 12, 2, True), ("b", 2, 1, True)]
    worker.scheduler.commit(plan, worker.runner.run(plan))
    assert all(sibling.token_ids == first.token_ids for sibling in siblings)
    assert all(sibling.page_table[:3] == first.page_table[:3] for sibling in siblings)
    scoring = worker.add(prompt, "scores", params=SamplingParams(prompt_logprobs=1))
    again = worker.add(prompt, "again", params=SamplingParams(prompt_logprobs=1))
    assert len(worker.step()) == 1
    worker.scheduler.abort("scores", 0)
    assert shape(worker.plan()) == [("again", 0, 8, False)]
    assert (scoring.phase, again.num_cached_tokens) == (Phase.DONE, 0)


def test_a_prompt_alone_ends_without_a_token_and_frees_its_pages() -> None:
    worker = Worker(max_step_tokens=6)
    prompt = list(range(14))
    worker.add(prompt, "warm", params=SamplingParams(max_tokens=1))
    for _ in range(3):
        worker.step()
    nothing = SamplingParams(max_tokens=0)
    mean = worker.add(prompt, "mean", params=nothing, pooling=Pooling.MEAN)
    rows = [worker.step()[0] for _ in range(3)]
    assert [row.pooled is not None for row in rows] == [True] * 3
    assert [(row.sampled, row.finish) for row in rows] == [(None, None), (None, None), (None, FinishReason.LENGTH)]
    assert mean.phase is Phase.DONE
    last = worker.add(prompt, "last", params=nothing, pooling=Pooling.LAST)
    (row,) = worker.step()
    assert (last.num_cached_tokens, row.finish) == (12, FinishReason.LENGTH)
    scored = worker.add(prompt, "scored", params=SamplingParams(max_tokens=0, prompt_logprobs=1))
    scores = [one for _ in range(3) if (one := worker.step()[0].scored) is not None]
    assert [one.position for one in scores] == [1, 7, 13]
    told = [entry.top[0].token_id for one in scores for entry in one.logprobs]
    assert (told, scored.num_cached_tokens) == (prompt[1:], 0)
    assert worker.pool.num_used == 0
    whole = worker.add([1] * 200, "whole", params=nothing)
    assert whole.phase is Phase.WAITING
    with pytest.raises(SequenceTooLong):
        worker.add([1] * 201, "beyond", params=nothing)
    worker.scheduler.abort("whole", 0)
    worker.add(prompt, "lost", params=nothing, pooling=Pooling.LAST)
    plan = worker.plan()
    (row,) = worker.scheduler.commit(plan, StepOutput((None,))).rows
    assert (row.finish, row.error) == (
        FinishReason.ERROR,
        "the model step returned no vector for this request",
    )


def test_priority_goes_before_arrival_from_the_next_chunk_on() -> None:
    worker = Worker(max_step_tokens=4)
    worker.add([1] * 10, "late", priority=1)
    worker.step()
    worker.add([2] * 4, "soon")
    assert [row.sequence.request_id for row in worker.step()] == ["soon"]
    assert [row.sequence.request_id for row in worker.step()] == ["late"]


def test_a_chunk_bound_lets_short_prompts_pass_and_wastes_nothing() -> None:
    worker = Worker(max_step_tokens=16, max_chunk_tokens=8)
    worker.add([1] * 100, "long")
    worker.add([2] * 3, "short")
    assert shape(worker.plan()) == [("long", 0, 13, False), ("short", 0, 3, True)]


def test_a_cached_prefix_is_skipped_except_for_the_last_token() -> None:
    worker = Worker(max_step_tokens=100)
    prompt = list(range(8))
    first = worker.add(prompt, "a")
    worker.step()
    same = worker.add(prompt, "b")
    longer = worker.add([*prompt, 9], "c")
    plan = worker.plan()
    assert shape(plan) == [("b", 4, 4, True), ("c", 8, 1, True)]
    assert same.page_table[0] == longer.page_table[0] == first.page_table[0]
    assert same.page_table[1] != first.page_table[1]
    assert longer.page_table[1] == first.page_table[1]
    rows = worker.scheduler.commit(plan, worker.runner.run(plan)).rows
    assert [row.new_pages for row in rows] == [range(2), range(2)]
    assert [row.sampled for row in rows] == [Sampled(fake_next_token(prompt)), Sampled(fake_next_token([*prompt, 9]))]
    assert (worker.cache.query_tokens, worker.cache.hit_tokens) == (8 + 8 + 9, 4 + 8)


def test_a_prompt_profits_from_one_before_it_that_is_still_computing() -> None:
    worker = Worker(max_step_tokens=8)
    prompt = list(range(16))
    worker.add(prompt, "a")
    worker.add([*prompt, 99], "b")
    worker.step()
    worker.step()
    assert shape(worker.plan()) == [("b", 16, 1, True)]


def test_tenants_do_not_share() -> None:
    worker = Worker()
    worker.add(list(range(9)), "a", cache_salt="one")
    worker.step()
    worker.add(list(range(9)), "b", cache_salt="two")
    assert shape(worker.plan()) == [("b", 0, 9, True)]


def test_the_first_in_line_waits_for_pages_and_nobody_passes() -> None:
    worker = Worker(num_pages=6, max_step_tokens=100)
    holder = worker.add([1] * 16, "holder")
    worker.step()
    worker.add([2] * 12, "big")
    worker.add([3] * 4, "small")
    assert worker.scheduler.schedule() is None
    assert worker.scheduler.num_waiting == 2
    worker.pool.check()
    worker.scheduler.release(holder)
    assert shape(worker.plan()) == [("big", 0, 12, True), ("small", 0, 4, True)]


def test_seats_bound_partly_computed_prompts() -> None:
    worker = Worker(max_step_tokens=100, seats=2)
    for name in "abc":
        worker.add([ord(name)] * 4, name)
    assert [row.sequence.request_id for row in worker.step()] == ["a", "b"]
    assert [row.sequence.request_id for row in worker.step()] == ["c"]


def test_what_could_never_run_is_refused() -> None:
    worker = Worker(num_pages=4)
    with pytest.raises(SequenceTooLong, match="17 tokens exceeds this worker's 4 pages of 4"):
        worker.add([1] * 17, "a")
    with pytest.raises(SequenceTooLong, match="no room for output within 200"):
        Worker().add([1] * 200, "a")
    worker.add([1] * 16, "a")
    with pytest.raises(DuplicateSequence):
        worker.add([1] * 16, "a")
    worker.add([1] * 16, "a", epoch=1)
    assert worker.scheduler.num_waiting == 2


@pytest.mark.parametrize(
    ("params", "reason"),
    [
        (SamplingParams(max_tokens=1), FinishReason.LENGTH),
        (SamplingParams(max_tokens=9, stop_token_ids=(fake_next_token([1, 2, 3]),)), FinishReason.STOP),
    ],
)
def test_a_first_token_may_be_the_last(params: SamplingParams, reason: FinishReason) -> None:
    worker = Worker()
    sequence = worker.add([1, 2, 3], "a", params=params)
    (row,) = worker.step()
    assert (row.finish, row.sampled, row.index) == (reason, Sampled(fake_next_token([1, 2, 3])), 0)
    assert sequence.phase is Phase.DONE
    assert worker.pool.num_used == 0
    assert not list(worker.scheduler.sequences())


def test_a_replay_is_a_longer_prompt() -> None:
    worker = Worker()
    params = SamplingParams(max_tokens=6)
    prompt = [1, 2, 3]
    output, _ = fake_output(prompt, params, max_model_len=200)
    worker.add([*prompt, *output[:4]], "a", epoch=1, prompt_len=3, params=params)
    (row,) = worker.step()
    assert (row.index, row.sampled, row.finish) == (4, Sampled(output[4]), None)
    worker.add([*prompt, *output[:5]], "a", epoch=2, prompt_len=3, params=params)
    (row,) = worker.step()
    assert (row.index, row.sampled, row.finish) == (5, Sampled(output[5]), FinishReason.LENGTH)
    with pytest.raises(AlreadyFinished) as raised:
        worker.add([*prompt, *output], "a", epoch=3, prompt_len=3, params=params)
    assert raised.value.reason is FinishReason.LENGTH


def test_abort_reaches_every_phase_and_older_epochs_only() -> None:
    worker = Worker(max_step_tokens=8)
    prefilled = worker.add([1] * 4, "a")
    worker.step()
    running = worker.add([2] * 20, "a", epoch=1)
    worker.step()
    waiting = worker.add([3] * 20, "a", epoch=2)
    newer = worker.add([4] * 4, "a", epoch=3)
    other = worker.add([5] * 4, "b")
    assert worker.scheduler.abort("a", 2) == [prefilled, running, waiting]
    assert worker.scheduler.abort("a", 2) == []
    assert worker.scheduler.abort("nobody", 9) == []
    assert worker.pool.num_used == 0
    assert [row.sequence for row in worker.step()] == [newer, other]


def test_abort_during_a_step_frees_pages_at_commit() -> None:
    worker = Worker()
    gone = worker.add([1] * 6, "a")
    stays = worker.add([2] * 6, "b")
    plan = worker.plan()
    assert worker.scheduler.abort("a", 0) == [gone]
    assert worker.pool.num_used == 4
    rows = worker.scheduler.commit(plan, worker.runner.run(plan)).rows
    assert [row.sequence for row in rows] == [stays]
    assert worker.pool.num_used == 2
    assert len(gone.token_ids) == 6
    worker.pool.check()


def test_a_failed_row_fails_alone() -> None:
    worker = Worker()
    worker.runner = FakeRunner(64, PAGE_SIZE, fail=lambda row: "no" if row.sequence.request_id == "bad" else None)
    worker.add([1] * 6, "bad")
    worker.add([2] * 6, "good")
    bad, good = worker.step()
    assert (bad.finish, bad.error, bad.sampled) == (FinishReason.ERROR, "no", None)
    assert (good.finish, good.sampled) == (None, Sampled(fake_next_token([2] * 6)))
    assert worker.pool.num_used == 2


def test_a_row_without_its_token_fails_alone() -> None:
    worker = Worker()
    worker.add([1] * 6, "a")
    plan = worker.plan()
    (row,) = worker.scheduler.commit(plan, StepOutput((None,))).rows
    assert row.finish is FinishReason.ERROR
    assert row.error is not None
    assert worker.pool.num_used == 0


def test_log_probabilities_travel_with_the_token() -> None:
    worker = Worker()
    worker.add([1] * 6, "a", params=SamplingParams(max_tokens=2, logprobs=2))
    (row,) = worker.step()
    token = fake_next_token([1] * 6)
    assert row.sampled == Sampled(token, fake_logprob(token, num_top=2))


def test_schedule_and_commit_must_alternate() -> None:
    worker = Worker()
    worker.add([1] * 6, "a")
    plan = worker.plan()
    with pytest.raises(StepOutOfOrder):
        worker.scheduler.schedule()
    with pytest.raises(StepOutOfOrder):
        worker.scheduler.commit(StepPlan(plan.rows), StepOutput((None,)))
    with pytest.raises(BrokenInvariant, match="0 results for 1 rows"):
        worker.scheduler.commit(plan, StepOutput(()))
    worker.scheduler.commit(plan, StepOutput((Failed("whole step failed"),)))
    with pytest.raises(StepOutOfOrder):
        worker.scheduler.commit(plan, StepOutput((None,)))
    assert worker.pool.num_used == 0


def test_what_one_prompt_computes_others_with_its_beginning_wait_for() -> None:
    worker = Worker(max_step_tokens=100)
    shared = list(range(1, 15))
    worker.add(shared, "first")
    worker.add(shared, "twin")
    worker.add([*shared[:9], 50, 51, 52, 53], "cousin")
    worker.add([90, 91, 92], "stranger")
    assert shape(worker.plan_and_commit()) == [("first", 0, 14, True), ("stranger", 0, 3, True)]
    assert shape(worker.plan_and_commit()) == [("twin", 12, 2, True), ("cousin", 8, 5, True)]
    assert (worker.cache.query_tokens, worker.cache.hit_tokens) == (14 + 3 + 14 + 13, 12 + 8)


def test_nobody_waits_for_a_page_that_a_later_prompt_another_tenant_or_an_aborted_one_computes() -> None:
    worker = Worker(max_step_tokens=8)
    shared = list(range(1, 15))
    slow = worker.add(shared, "slow", priority=5)
    assert shape(worker.plan_and_commit()) == [("slow", 0, 8, False)]
    worker.add([*shared[:8], 70, 71, 72, 73, 74], "urgent")
    assert shape(worker.plan_and_commit()) == [("urgent", 8, 5, True), ("slow", 8, 3, False)]
    worker.add(shared, "salted", cache_salt="other", priority=9)
    worker.add(shared, "twin", priority=9)
    assert shape(worker.plan_and_commit()) == [("slow", 11, 3, True), ("salted", 0, 5, False)]
    worker.scheduler.release(slow)
    assert shape(worker.plan_and_commit()) == [("salted", 5, 8, False)]
    worker = Worker(max_step_tokens=4)
    worker.add(shared, "first")
    worker.add(shared, "twin")
    worker.plan_and_commit()
    worker.scheduler.abort("first", 0)
    assert shape(worker.plan_and_commit()) == [("twin", 4, 4, False)]


def test_without_a_prefix_cache_nobody_waits_for_anybody() -> None:
    worker = Worker(max_step_tokens=100, prefix_cache=False)
    for name in ("first", "twin"):
        worker.add(list(range(1, 15)), name)
    assert shape(worker.plan_and_commit()) == [("first", 0, 14, True), ("twin", 0, 14, True)]
