"""Continuous batching: admission, growth, preemption, aborts, pausing."""

from __future__ import annotations

import pytest
from support.fake_runner import FakeRunner, fake_next_token, fake_output
from support.passports import make_fingerprint, make_passport

from engine.decode_scheduler import DecodeScheduler
from engine.errors import (
    AlreadyFinished,
    BrokenInvariant,
    DuplicateSequence,
    ReservationMismatch,
    SequenceTooLong,
    StepOutOfOrder,
)
from engine.limits import DecodeLimits
from engine.pages import PagePool
from engine.plan import Complete, Row, Sampled, StepOutput, StepPlan
from engine.prefix_cache import PrefixCache
from engine.progress import RowProgress
from engine.reservations import Reservation
from engine.sequence import Phase, Sequence
from fleet.types import FinishReason, Passport, SamplingParams

PAGE_SIZE = 4


class Worker:
    """A pool, a scheduler and a fake runner, with another one that computes prompts for it."""

    def __init__(
        self,
        *,
        num_pages: int = 64,
        seats: int = 8,
        lookahead: int = 0,
        watermark: int = 0,
        max_model_len: int | None = None,
        max_step_tokens: int = 64,
    ) -> None:
        self.max_model_len = max_model_len or num_pages * PAGE_SIZE
        self.pool = PagePool(num_pages, PAGE_SIZE)
        self.cache = PrefixCache(self.pool, make_fingerprint())
        limits = DecodeLimits(
            max_model_len=self.max_model_len,
            max_num_seqs=seats,
            max_step_tokens=max_step_tokens,
            watermark_pages=watermark,
            lookahead_tokens=lookahead,
        )
        self.scheduler = DecodeScheduler(self.pool, self.cache, limits)
        self.runner = FakeRunner(num_pages, PAGE_SIZE)

    def hashes(self, passport: Passport) -> list[bytes]:
        chain = self.cache.chain(passport.cache_salt)
        chain.extend(passport.token_ids, len(passport.token_ids))
        return chain.hashes

    def reserve(self, passport: Passport) -> Reservation | None:
        return self.scheduler.reserve(passport, self.hashes(passport))

    def fill(self, reservation: Reservation) -> None:
        """Write the new pages, as a giver would."""
        ids = reservation.passport.token_ids
        giver = FakeRunner(reservation.num_pages, PAGE_SIZE)
        prompt = Sequence.from_passport(reservation.passport, arrival=0)
        prompt.page_table = list(range(reservation.num_pages))
        giver.run(StepPlan((Row(prompt, 0, len(ids), sample=False),)))
        num_held = len(reservation.held_page_ids)
        for index, page_id in enumerate(reservation.new_page_ids, start=num_held):
            self.runner.write_page(page_id, giver.read_page(index))

    def admit(
        self,
        prompt: list[int],
        request_id: str,
        *,
        max_tokens: int = 16,
        stop: tuple[int, ...] = (),
        priority: int = 0,
        epoch: int = 0,
    ) -> Sequence:
        params = SamplingParams(max_tokens=max_tokens, stop_token_ids=stop)
        passport = make_passport(prompt, request_id=request_id, params=params, priority=priority, epoch=epoch)
        reservation = self.reserve(passport)
        assert reservation is not None
        self.fill(reservation)
        return self.scheduler.adopt(reservation, first_token_added(passport), len(prompt))

    def plan(self) -> StepPlan:
        plan = self.scheduler.schedule()
        assert plan is not None
        return plan

    def step(self) -> tuple[RowProgress, ...]:
        plan = self.plan()
        return self.scheduler.commit(plan, self.runner.run(plan)).rows


def first_token_added(passport: Passport) -> Passport:
    return make_passport(
        [*passport.token_ids, fake_next_token(passport.token_ids)],
        request_id=passport.request_id,
        epoch=passport.epoch,
        prompt_len=passport.prompt_len,
        params=passport.params,
        priority=passport.priority,
    )


def test_a_sequence_decodes_to_its_length_and_its_pages_get_names() -> None:
    worker = Worker()
    prompt = list(range(6))
    sequence = worker.admit(prompt, "a", max_tokens=8)
    expected, reason = fake_output(prompt, sequence.params, max_model_len=worker.max_model_len)
    rows = [row for _ in range(7) for row in worker.step()]
    assert [row.sampled for row in rows] == [Sampled(token) for token in expected[1:]]
    assert [row.index for row in rows] == list(range(1, 8))
    assert [row.finish for row in rows] == [None] * 6 + [reason]
    assert [page for row in rows for page in row.new_pages] == [1, 2]
    assert sequence.phase is Phase.DONE
    assert worker.scheduler.schedule() is None
    assert (worker.pool.num_used, worker.pool.num_cached) == (0, 3)
    assert all(name in worker.cache for name in worker.hashes(make_passport((prompt + expected)[:13])))
    worker.pool.check()


def test_a_stop_id_ends_and_is_delivered() -> None:
    worker = Worker()
    output, _ = fake_output([1, 2], SamplingParams(max_tokens=9), max_model_len=99)
    worker.admit([1, 2], "a", max_tokens=99, stop=(output[3],))
    rows = [row for _ in range(3) for row in worker.step()]
    assert [row.finish for row in rows] == [None, None, FinishReason.STOP]
    assert rows[-1].sampled == Sampled(output[3])


def test_a_complete_grammar_ends_with_its_last_token_or_without_one() -> None:
    worker = Worker()
    first, second = worker.admit([1, 2, 3], "a"), worker.admit([4, 5], "b")
    plan = worker.plan()
    rows = worker.scheduler.commit(plan, StepOutput((Sampled(7, ends=True), Complete()))).rows
    assert [(row.sampled, row.finish, row.error) for row in rows] == [
        (Sampled(7, ends=True), FinishReason.STOP, None),
        (None, FinishReason.STOP, None),
    ]
    assert first.token_ids[-1] == 7
    assert (first.num_output_tokens, second.num_output_tokens) == (2, 1)
    assert worker.pool.num_used == 0


def test_the_model_length_ends_too() -> None:
    worker = Worker(max_model_len=8)
    worker.admit([1, 2, 3, 4], "a", max_tokens=99)
    rows = [row for _ in range(3) for row in worker.step()]
    assert [row.finish for row in rows] == [None, None, FinishReason.LENGTH]


def test_sequences_join_and_leave_between_any_two_steps() -> None:
    worker = Worker()
    worker.admit([1], "a", max_tokens=3)
    assert [row.sequence.request_id for row in worker.step()] == ["a"]
    worker.admit([2], "b", max_tokens=3)
    assert [(row.sequence.request_id, row.finish) for row in worker.step()] == [
        ("a", FinishReason.LENGTH),
        ("b", None),
    ]
    assert [row.sequence.request_id for row in worker.step()] == ["b"]


def test_held_pages_are_shared_and_not_to_be_written() -> None:
    worker = Worker()
    prompt = list(range(10))
    first = worker.admit(prompt, "a")
    reservation = worker.reserve(make_passport(prompt, request_id="b"))
    assert reservation is not None
    assert list(reservation.held_page_ids) == first.page_table[:2]
    assert len(reservation.new_page_ids) == 1
    assert reservation.generation > 0
    worker.fill(reservation)
    second = worker.scheduler.adopt(reservation, first_token_added(reservation.passport), 10)
    rows = worker.step()
    assert rows[0].sampled == rows[1].sampled
    assert second.num_cached_tokens == 8
    assert (worker.cache.query_tokens, worker.cache.hit_tokens) == (20, 8)


def test_a_moving_sequence_never_holds_the_page_of_its_uncomputed_token() -> None:
    worker = Worker()
    ids = list(range(8))
    worker.admit(ids, "a")
    moving = worker.reserve(make_passport(ids, request_id="b", prompt_len=3))
    assert moving is not None
    assert (len(moving.held_page_ids), len(moving.new_page_ids)) == (1, 1)
    worker.fill(moving)
    sequence = worker.scheduler.adopt(moving, moving.passport, 7)
    rows = worker.step()
    assert [row.sequence for row in rows][1] is sequence
    assert rows[1].sampled == Sampled(fake_next_token(ids))


def test_a_partial_tail_is_computed_here() -> None:
    worker = Worker(max_step_tokens=4)
    prompt = list(range(11))
    reservation = worker.reserve(make_passport(prompt))
    assert reservation is not None
    worker.fill(reservation)
    for page_id in reservation.new_page_ids[1:]:
        worker.runner.write_page(page_id, bytes(worker.runner.page_bytes))
    worker.scheduler.adopt(reservation, first_token_added(reservation.passport), 4)
    plan = worker.plan()
    assert [(row.start, row.count, row.sample) for row in plan.rows] == [(4, 4, False)]
    (early,) = worker.scheduler.commit(plan, worker.runner.run(plan)).rows
    assert (early.sampled, early.new_pages, early.index) == (None, range(1, 2), 1)
    (row,) = worker.step()
    ids = first_token_added(reservation.passport).token_ids
    assert row.sampled == Sampled(fake_next_token(ids))
    assert row.new_pages == range(2, 3)


def test_tails_share_what_the_budget_leaves() -> None:
    worker = Worker(max_step_tokens=3)
    for name in "ab":
        reservation = worker.reserve(make_passport([ord(name)] * 6, request_id=name))
        assert reservation is not None
        worker.scheduler.adopt(reservation, reservation.passport, 0)
    assert [row.count for row in worker.plan().rows] == [2, 1]


def test_reserve_refuses_without_seats_or_room() -> None:
    worker = Worker(num_pages=10, seats=2, lookahead=8, watermark=2)
    assert worker.reserve(make_passport([1] * 16, params=SamplingParams(max_tokens=1))) is not None
    # 6 pages free. Promised: none to the first; 2 to the newcomer of 4 pages.
    assert worker.reserve(make_passport([2] * 20, params=SamplingParams(max_tokens=8))) is None
    assert worker.reserve(make_passport([2] * 20, params=SamplingParams(max_tokens=1))) is None
    assert worker.pool.num_used == 4
    assert worker.reserve(make_passport([2] * 16, params=SamplingParams(max_tokens=4))) is not None
    assert worker.reserve(make_passport([3], params=SamplingParams(max_tokens=1))) is None
    assert worker.scheduler.num_reserved == 2
    worker.pool.check()


def test_a_lone_sequence_may_take_the_whole_pool() -> None:
    worker = Worker(num_pages=4, lookahead=100, watermark=3)
    prompt = [1] * 10
    worker.admit(prompt, "a", max_tokens=6)
    expected, _ = fake_output(prompt, SamplingParams(max_tokens=6), max_model_len=16)
    rows = [row for _ in range(5) for row in worker.step()]
    assert [row.sampled for row in rows] == [Sampled(token) for token in expected[1:]]
    assert rows[-1].finish is FinishReason.LENGTH


def test_what_could_never_run_is_refused() -> None:
    worker = Worker(num_pages=4)
    with pytest.raises(SequenceTooLong, match="no room for output within 16"):
        worker.reserve(make_passport([1] * 16))
    with pytest.raises(SequenceTooLong, match="5 pages offered"):
        worker.scheduler.reserve(make_passport([1]), [], 5)
    with pytest.raises(ValueError, match="max_model_len is 17"):
        Worker(num_pages=4, max_model_len=17)


def test_a_reservation_cancelled_with_a_silent_writer_is_quarantined() -> None:
    worker = Worker(num_pages=8)
    reservation = worker.reserve(make_passport([1] * 16))
    assert reservation is not None
    worker.scheduler.cancel_reservation(reservation, writer_done=False)
    worker.scheduler.cancel_reservation(reservation, writer_done=False)
    assert (worker.pool.num_quarantined, worker.pool.num_free) == (4, 4)
    with pytest.raises(ReservationMismatch, match="closed"):
        worker.scheduler.adopt(reservation, first_token_added(reservation.passport), 16)
    worker.scheduler.writer_gone(reservation.generation)
    worker.scheduler.writer_gone(reservation.generation)
    worker.scheduler.writer_gone(12345)
    assert worker.pool.num_free == 8


@pytest.mark.parametrize("how", ["cancel", "gone", "cancel twice"])
def test_a_reservation_whose_writer_has_stopped_is_free_at_once(how: str) -> None:
    worker = Worker(num_pages=8)
    reservation = worker.reserve(make_passport([1] * 16))
    assert reservation is not None
    if how == "gone":
        worker.scheduler.writer_gone(reservation.generation)
    else:
        if how == "cancel twice":
            worker.scheduler.cancel_reservation(reservation, writer_done=False)
        worker.scheduler.cancel_reservation(reservation, writer_done=True)
    assert (worker.pool.num_free, worker.scheduler.num_reserved) == (8, 0)
    worker.pool.check()


def test_adopt_refuses_what_does_not_fit_and_keeps_the_reservation() -> None:
    worker = Worker()
    prompt = list(range(8))
    worker.admit(prompt, "other")
    offered = make_passport(prompt, request_id="a", params=SamplingParams(max_tokens=2))
    reservation = worker.reserve(offered)
    assert reservation is not None
    good = first_token_added(offered)
    wrong_epoch = make_passport(good.token_ids, request_id="a", epoch=1, prompt_len=8)
    with pytest.raises(ReservationMismatch, match="epoch 1"):
        worker.scheduler.adopt(reservation, wrong_epoch, 8)
    with pytest.raises(ReservationMismatch, match="continue"):
        worker.scheduler.adopt(reservation, make_passport([5] * 9, request_id="a"), 8)
    for num_computed in (7, 9):
        with pytest.raises(ReservationMismatch, match="takes 8 to 8"):
            worker.scheduler.adopt(reservation, good, num_computed)
    done = make_passport([*good.token_ids, 1], request_id="a", prompt_len=8, params=offered.params)
    with pytest.raises(AlreadyFinished):
        worker.scheduler.adopt(reservation, done, 8)
    assert worker.scheduler.num_reserved == 1
    worker.scheduler.adopt(reservation, good, 8)
    again = worker.reserve(offered)
    assert again is not None
    with pytest.raises(DuplicateSequence):
        worker.scheduler.adopt(again, good, 8)


def test_the_youngest_is_given_back_when_pages_run_out() -> None:
    worker = Worker(num_pages=6)
    old = worker.admit([1] * 7, "old", max_tokens=17)
    young = worker.admit([2] * 15, "young", max_tokens=9)
    old_ids, young_ids = list(old.token_ids), list(young.token_ids)
    worker.step()
    old_ids, young_ids = list(old.token_ids), list(young.token_ids)
    plan = worker.plan()
    assert [row.sequence for row in plan.rows] == [old]
    (returned,) = worker.scheduler.take_returned()
    assert returned is young
    assert returned.to_passport().token_ids == young_ids
    assert worker.scheduler.take_returned() == []
    assert returned.phase is Phase.DONE
    assert returned.page_table == []
    assert len(old.token_ids) == len(old_ids)
    assert worker.scheduler.num_running == 1


def test_urgent_and_often_replayed_sequences_are_kept() -> None:
    worker = Worker(num_pages=8)
    worker.admit([1] * 7, "casual", priority=1, max_tokens=99)
    worker.admit([2] * 7, "fresh", max_tokens=99)
    worker.admit([3] * 7, "replayed", epoch=2, max_tokens=99)
    returned: list[str] = []
    while len(returned) < 2:
        plan = worker.plan()
        returned += [sequence.request_id for sequence in worker.scheduler.take_returned()]
        worker.scheduler.commit(plan, worker.runner.run(plan))
    assert returned == ["casual", "fresh"]


def test_a_lone_sequence_waits_for_a_reservation_and_is_given_back_otherwise() -> None:
    worker = Worker(num_pages=4)
    lone = worker.admit([1] * 7, "a", max_tokens=9)
    reservation = worker.reserve(make_passport([2] * 8, params=SamplingParams(max_tokens=1)))
    assert reservation is not None
    worker.step()
    assert worker.scheduler.schedule() is None
    assert (worker.scheduler.num_running, worker.scheduler.take_returned()) == (1, [])
    worker.scheduler.cancel_reservation(reservation, writer_done=False)
    assert worker.scheduler.schedule() is None
    assert worker.scheduler.take_returned() == [lone]
    assert (worker.pool.num_used, worker.pool.num_quarantined) == (0, 2)


def test_abort_during_a_step_frees_pages_at_commit() -> None:
    worker = Worker()
    gone, stays = worker.admit([1] * 6, "a"), worker.admit([2] * 6, "b")
    plan = worker.plan()
    assert worker.scheduler.abort("a", 0) == [gone]
    assert worker.scheduler.abort("a", 0) == []
    assert worker.pool.num_used == 4
    rows = worker.scheduler.commit(plan, worker.runner.run(plan)).rows
    assert [row.sequence for row in rows] == [stays]
    assert worker.pool.num_used == 2
    assert worker.scheduler.abort("b", 0) == [stays]
    assert worker.pool.num_used == 0


def test_abort_spares_newer_epochs() -> None:
    worker = Worker()
    old, new = worker.admit([1] * 6, "a"), worker.admit([1] * 6, "a", epoch=1)
    assert worker.scheduler.abort("a", 0) == [old]
    assert list(worker.scheduler.sequences()) == [new]


def test_a_paused_sequence_keeps_its_pages_and_its_place() -> None:
    worker = Worker()
    first, second = worker.admit([1] * 6, "a", max_tokens=3), worker.admit([2] * 6, "b")
    plan = worker.plan()
    worker.scheduler.pause(first)
    worker.scheduler.pause(first)
    assert worker.scheduler.is_in_flight(first)
    rows = worker.scheduler.commit(plan, worker.runner.run(plan)).rows
    assert [row.sequence for row in rows] == [first, second]
    assert not worker.scheduler.is_in_flight(first)
    assert [row.sequence for row in worker.step()] == [second]
    assert (worker.scheduler.num_paused, worker.scheduler.num_running) == (1, 1)
    worker.scheduler.resume(first)
    rows = worker.step()
    assert [row.sequence for row in rows] == [first, second]
    assert rows[0].finish is FinishReason.LENGTH
    worker.scheduler.resume(first)
    worker.scheduler.pause(second)
    worker.scheduler.release(second)
    worker.scheduler.release(second)
    assert worker.pool.num_used == 0
    assert not list(worker.scheduler.sequences())


def test_a_paused_sequence_may_end_with_the_step_in_flight() -> None:
    worker = Worker()
    sequence = worker.admit([1] * 6, "a", max_tokens=2)
    plan = worker.plan()
    worker.scheduler.pause(sequence)
    (row,) = worker.scheduler.commit(plan, worker.runner.run(plan)).rows
    assert row.finish is FinishReason.LENGTH
    assert (worker.scheduler.num_paused, worker.pool.num_used) == (0, 0)


def test_a_failed_row_fails_alone() -> None:
    worker = Worker()
    worker.runner = FakeRunner(64, PAGE_SIZE, fail=lambda row: "no" if row.sequence.request_id == "bad" else None)
    worker.admit([1] * 6, "bad")
    worker.admit([2] * 6, "good")
    bad, good = worker.step()
    assert (bad.finish, bad.error) == (FinishReason.ERROR, "no")
    assert good.sampled is not None
    assert worker.pool.num_used == 2


def test_schedule_and_commit_must_alternate() -> None:
    worker = Worker()
    worker.admit([1] * 6, "a")
    plan = worker.plan()
    with pytest.raises(StepOutOfOrder):
        worker.scheduler.schedule()
    with pytest.raises(BrokenInvariant, match="0 results for 1 rows"):
        worker.scheduler.commit(plan, StepOutput(()))
    worker.scheduler.commit(plan, worker.runner.run(plan))
    with pytest.raises(StepOutOfOrder):
        worker.scheduler.commit(plan, worker.runner.run(plan))
