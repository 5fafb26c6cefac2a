"""How sequences leave a decode worker, against hand-offs that the test plays."""

from __future__ import annotations

from typing import cast

import pytest
from support.fake_runner import FakeRunner
from support.late_runner import LateRunner
from support.passports import make_fingerprint, make_passport

from decode_svc.mover import MAX_MOVING, OFFER_S, PRE_COPY_S, SLACK_PAGES, Consequences, Mover
from engine.decode_scheduler import DecodeScheduler
from engine.limits import DecodeLimits
from engine.pages import PagePool
from engine.plan import StepOutput
from engine.prefix_cache import PrefixCache
from engine.sequence import Phase, Sequence
from fleet.messages import MoveReason
from fleet.types import Passport, PeerRef, SamplingParams
from fleet.worker_metrics import WorkerMetrics
from kvtransfer.actions import Committing, FailReason, Given, Granted, HandOffFailed
from kvtransfer.endpoint import HandOffEndpoint

PAGE_SIZE = 4
NUM_PAGES = 64
PEER = PeerRef("d2", 2, "tcp://d2")

Key = tuple[str, int]


class FakeEndpoint:
    """Remembers what the mover asks; `lags` holds an entry for each hand-off that has a grant."""

    def __init__(self) -> None:
        self.mover: Mover
        self.offers: dict[Key, tuple[Passport, int, list[PeerRef]]] = {}
        self.ready: dict[Key, list[int]] = {}
        self.lags: dict[Key, int] = {}
        self.commits: dict[Key, tuple[Passport, list[int], int]] = {}
        self.cancelled: list[Key] = []
        self.drain_slowly = False

    def offer(self, passport: Passport, *, page_hashes: list[bytes], num_pages: int, targets: list[PeerRef]) -> None:
        key = (passport.request_id, passport.epoch)
        assert key not in self.offers, "the former hand-off has not ended"
        assert len(page_hashes) <= num_pages
        self.offers[key] = (passport, num_pages, targets)

    def pages_ready(self, request_id: str, epoch: int, page_ids: list[int]) -> None:
        self.ready[request_id, epoch] = list(page_ids)

    def lag(self, request_id: str, epoch: int) -> int | None:
        return self.lags.get((request_id, epoch))

    def commit(self, passport: Passport, *, page_ids: list[int], num_computed_tokens: int) -> None:
        self.commits[passport.request_id, passport.epoch] = (passport, list(page_ids), num_computed_tokens)

    def cancel(self, request_id: str, epoch: int) -> None:
        """As the giver does: it fails at once, or once the write in flight has returned."""
        key = (request_id, epoch)
        if key in self.offers:
            self.cancelled.append(key)
            if not self.drain_slowly:
                self.fail(key, FailReason.CANCELLED)

    # what the test plays

    def grant(self, key: Key, lag: int = 0) -> None:
        self.lags[key] = lag
        self.mover.granted(Granted(*key, PEER, "shm", 0))

    def accept(self, key: Key) -> None:
        """All pages are there: the Commit goes out."""
        self.mover.committing(Committing(*key, PEER, "shm"))

    def ack(self, key: Key) -> None:
        self._end(key)
        self.mover.given(Given(*key, PEER, "shm", 3, 1, 0.01))
        self.mover.release_pages(*key)

    def fail(self, key: Key, reason: FailReason) -> None:
        self._end(key)
        self.mover.failed(HandOffFailed(*key, reason, "told so"))
        self.mover.release_pages(*key)

    def _end(self, key: Key) -> None:
        del self.offers[key]
        self.lags.pop(key, None)


class Bench:
    """A scheduler with sequences that decode, and a mover whose consequences are written down."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.pool = PagePool(NUM_PAGES, PAGE_SIZE)
        cache = PrefixCache(self.pool, make_fingerprint(), enabled=False)
        limits = DecodeLimits(max_model_len=NUM_PAGES * PAGE_SIZE, lookahead_tokens=0)
        self.runner = FakeRunner(NUM_PAGES, PAGE_SIZE)
        self.device = LateRunner(self.runner)
        self.scheduler = DecodeScheduler(self.pool, cache, limits, feeds_next=self.device.feeds_next)
        self.peers = [PEER]
        self.turns: list[int] = []
        self.endpoint = FakeEndpoint()
        self.committing: list[str] = []
        self.given_back: list[tuple[str, str]] = []
        self.mover = self.endpoint.mover = Mover(
            pool=self.pool,
            scheduler=self.scheduler,
            metrics=WorkerMetrics(),
            page_bytes=32,
            max_model_len=limits.max_model_len,
            pick=self._pick,
            clock=lambda: self.now_s,
        )
        self.mover.endpoint = cast("HandOffEndpoint", self.endpoint)
        self.mover.do = Consequences(
            committing=lambda sequence, _taker, _transport, _reason: self.committing.append(sequence.request_id),
            give_back=lambda sequence, reason: self.given_back.append((sequence.request_id, reason)),
            freed=lambda: None,
        )

    def _pick(self, turn: int) -> list[PeerRef]:
        self.turns.append(turn)
        return list(self.peers)

    def start(self, request_id: str, *, prompt: int = 6, max_tokens: int = 100, epoch: int = 0) -> Sequence:
        params = SamplingParams(max_tokens=max_tokens)
        passport = make_passport(
            list(range(prompt + 1)), request_id=request_id, params=params, prompt_len=prompt, epoch=epoch
        )
        reservation = self.scheduler.reserve(passport, [])
        assert reservation is not None
        return self.scheduler.adopt(reservation, passport, prompt)

    def step(self) -> None:
        """One step as the worker makes it, and the look at the moves after it."""
        plan = self.scheduler.schedule()
        if plan is not None:
            for row in self.scheduler.commit(plan, self.runner.run(plan)).rows:
                if row.finish is not None:
                    self.mover.forget(row.sequence)
        self.mover.on_booked()

    def pass_s(self, seconds: float) -> None:
        self.now_s += seconds
        self.mover.tick(MoveReason.DRAIN)

    def finish(self) -> None:
        """Whatever happened, nothing is left of it."""
        for sequence in list(self.scheduler.sequences()):
            self.scheduler.release(sequence)
            self.mover.forget(sequence)
        assert self.mover.num_moving == 0
        assert self.pool.num_used == 0
        self.pool.check()


@pytest.fixture
def bench() -> Bench:
    return Bench()


A = ("a", 0)


def test_a_sequence_decodes_on_until_little_is_left_and_then_leaves_whole(bench: Bench) -> None:
    sequence = bench.start("a")
    bench.step()
    bench.mover.tick(MoveReason.DRAIN)
    passport, num_pages, targets = bench.endpoint.offers[A]
    assert (passport.token_ids, targets) == (sequence.token_ids, [PEER])
    assert num_pages == len(sequence.page_table) + SLACK_PAGES
    bench.endpoint.grant(A, lag=5)
    for _ in range(3):
        bench.step()
    assert sequence.phase is Phase.RUNNING
    assert bench.endpoint.ready[A] == sequence.page_table[: sequence.num_computed_tokens // PAGE_SIZE]
    bench.endpoint.lags[A] = 1
    bench.step()
    assert sequence.phase is Phase.PAUSED
    passport, page_ids, num_computed = bench.endpoint.commits[A]
    assert passport.token_ids == sequence.token_ids
    assert num_computed == sequence.num_computed_tokens == len(passport.token_ids) - 1
    assert page_ids == sequence.page_table[: -(-num_computed // PAGE_SIZE)]
    num_tokens = len(sequence.token_ids)
    bench.step()
    assert len(sequence.token_ids) == num_tokens, "it stands still"
    bench.endpoint.accept(A)
    assert bench.committing == ["a"]
    bench.endpoint.ack(A)
    assert sequence.phase is Phase.DONE
    assert bench.given_back == []
    bench.finish()


def test_a_sequence_whose_next_step_runs_already_leaves_with_that_token_too(bench: Bench) -> None:
    sequence = bench.start("a")
    bench.mover.tick(MoveReason.DRAIN)
    bench.endpoint.grant(A)
    plan = bench.scheduler.schedule()
    assert plan is not None
    first = bench.device.launch(plan)
    ahead = bench.scheduler.schedule_ahead()
    assert ahead is not None
    second = bench.device.launch(ahead)
    assert not isinstance(first, StepOutput)
    assert not isinstance(second, StepOutput)
    bench.scheduler.commit(plan, first.wait())
    bench.mover.on_booked()
    assert sequence.phase is Phase.PAUSED
    assert bench.endpoint.commits == {}, "a token is on its way"
    assert bench.scheduler.schedule_ahead() is None
    (row,) = bench.scheduler.commit(ahead, second.wait()).rows
    assert row.sampled is not None
    bench.mover.on_booked()
    passport, _, num_computed = bench.endpoint.commits[A]
    assert passport.token_ids == sequence.token_ids
    assert passport.token_ids[-1] == row.sampled.token_id
    assert num_computed == len(passport.token_ids) - 1
    bench.endpoint.accept(A)
    bench.endpoint.ack(A)
    bench.finish()


def test_nobody_moves_before_it_has_said_a_token_here(bench: Bench) -> None:
    sequence = bench.start("a")
    bench.mover.tick(MoveReason.DRAIN)
    bench.endpoint.grant(A)
    bench.mover.on_booked()
    assert bench.endpoint.commits == {}
    bench.step()
    assert sequence.phase is Phase.PAUSED
    bench.endpoint.fail(A, FailReason.REFUSED)
    bench.finish()


def test_a_growing_backlog_is_cut_short(bench: Bench) -> None:
    sequence = bench.start("a")
    bench.mover.tick(MoveReason.DRAIN)
    bench.endpoint.grant(A, lag=9)
    bench.step()
    assert sequence.phase is Phase.RUNNING
    bench.now_s += PRE_COPY_S
    bench.step()
    assert sequence.phase is Phase.PAUSED
    bench.finish()


def test_the_longest_way_to_go_leaves_first_and_few_at_once(bench: Bench) -> None:
    for number in range(MAX_MOVING + 2):
        bench.start(f"r{number}", max_tokens=10 + number, prompt=3)
    bench.mover.tick(MoveReason.DRAIN)
    bench.mover.tick(MoveReason.DRAIN)
    assert [key[0] for key in bench.endpoint.offers] == [f"r{MAX_MOVING + 1 - place}" for place in range(MAX_MOVING)]
    bench.endpoint.grant(("r5", 0))
    bench.step()
    bench.endpoint.accept(("r5", 0))
    bench.endpoint.ack(("r5", 0))
    bench.mover.tick(MoveReason.DRAIN)
    assert ("r1", 0) in bench.endpoint.offers
    bench.finish()


def test_no_more_pages_are_asked_for_than_it_can_ever_want(bench: Bench) -> None:
    bench.start("a", prompt=6, max_tokens=3)
    bench.mover.tick(MoveReason.DRAIN)
    assert bench.endpoint.offers[A][1] == 3
    bench.finish()


def test_an_offer_that_nobody_grants_is_made_anew(bench: Bench) -> None:
    sequence = bench.start("a")
    bench.start("b", max_tokens=5)
    bench.mover.tick(MoveReason.DRAIN)
    bench.pass_s(OFFER_S / 2)
    assert bench.endpoint.cancelled == []
    bench.step()
    bench.pass_s(OFFER_S / 2)
    assert set(bench.endpoint.cancelled) == {A, ("b", 0)}
    assert bench.endpoint.offers[A][0].token_ids == sequence.token_ids
    assert bench.turns == [0, 0, 1, 1]
    assert sequence.phase is Phase.RUNNING
    bench.finish()


def test_without_peers_everything_decodes_on(bench: Bench) -> None:
    bench.peers = []
    sequence = bench.start("a", max_tokens=3)
    for _ in range(5):
        bench.mover.tick(MoveReason.DRAIN)
        bench.step()
    assert (bench.endpoint.offers, sequence.phase) == ({}, Phase.DONE)
    bench.finish()


def test_a_grant_that_it_has_outgrown_is_sent_back(bench: Bench) -> None:
    sequence = bench.start("a")
    bench.mover.tick(MoveReason.DRAIN)
    for _ in range((SLACK_PAGES + 1) * PAGE_SIZE):
        bench.step()
    bench.endpoint.grant(A)
    assert bench.endpoint.cancelled == [A]
    bench.mover.tick(MoveReason.DRAIN)
    assert bench.endpoint.offers[A][1] == len(sequence.page_table) + SLACK_PAGES
    bench.finish()


@pytest.mark.parametrize("slowly", [False, True])
def test_a_taker_lost_before_the_commit_lets_it_run_on(bench: Bench, slowly: bool) -> None:
    sequence = bench.start("a")
    bench.mover.tick(MoveReason.DRAIN)
    bench.endpoint.grant(A)
    bench.step()
    assert sequence.phase is Phase.PAUSED
    bench.endpoint.drain_slowly = slowly
    del bench.endpoint.lags[A]
    bench.pass_s(0.05)
    if slowly:
        # A write is in flight: the pages belong to the hand-off, the sequence waits, and nothing is asked twice.
        bench.pass_s(0.05)
        assert (bench.endpoint.cancelled, sequence.phase) == ([A], Phase.PAUSED)
        bench.endpoint.drain_slowly = False
        bench.endpoint.fail(A, FailReason.CANCELLED)
    num_tokens = len(sequence.token_ids)
    bench.step()
    assert len(sequence.token_ids) == num_tokens + 1
    assert bench.given_back == []
    bench.finish()


def test_after_the_commit_only_a_replay_may_go_on(bench: Bench) -> None:
    sequence = bench.start("a")
    bench.mover.tick(MoveReason.DRAIN)
    bench.endpoint.grant(A)
    bench.step()
    bench.endpoint.accept(A)
    bench.pass_s(60.0)
    assert bench.endpoint.cancelled == [], "what is committed is not called off"
    bench.endpoint.fail(A, FailReason.UNCERTAIN)
    assert bench.given_back == [("a", "hand_off_uncertain")]
    assert sequence.phase is Phase.DONE
    bench.finish()


@pytest.mark.parametrize("reason", [FailReason.CANCELLED, FailReason.STALE])
def test_a_request_that_is_over_elsewhere_is_dropped_in_silence(bench: Bench, reason: FailReason) -> None:
    sequence = bench.start("a")
    bench.mover.tick(MoveReason.DRAIN)
    bench.endpoint.fail(A, reason)
    assert (sequence.phase, bench.given_back) == (Phase.DONE, [])
    bench.finish()


def test_a_refusal_for_good_is_no_end(bench: Bench) -> None:
    sequence = bench.start("a")
    bench.mover.tick(MoveReason.DRAIN)
    bench.endpoint.fail(A, FailReason.REFUSED)
    assert sequence.phase is Phase.RUNNING
    bench.mover.tick(MoveReason.DRAIN)
    assert A in bench.endpoint.offers
    bench.finish()


def test_an_end_here_calls_the_move_off(bench: Bench) -> None:
    sequence = bench.start("a", max_tokens=3)
    bench.mover.tick(MoveReason.DRAIN)
    bench.endpoint.grant(A, lag=9)
    bench.step()
    bench.step()
    assert sequence.phase is Phase.DONE
    assert bench.endpoint.cancelled == [A]
    bench.finish()


def test_pages_of_a_cancelled_sequence_outlive_it_until_nobody_reads_them(bench: Bench) -> None:
    sequence = bench.start("a", prompt=12)
    bench.step()
    bench.mover.tick(MoveReason.DRAIN)
    bench.endpoint.grant(A, lag=3)
    bench.endpoint.drain_slowly = True
    bench.step()
    num_shared = len(bench.endpoint.ready[A])
    assert num_shared == 3
    bench.scheduler.abort(*A)
    bench.mover.forget(sequence)
    assert bench.pool.num_used == num_shared
    bench.endpoint.drain_slowly = False
    bench.endpoint.fail(A, FailReason.CANCELLED)
    bench.finish()


def test_one_epoch_of_a_request_moves_at_a_time(bench: Bench) -> None:
    bench.start("a", epoch=0)
    bench.start("a", epoch=1)
    bench.mover.tick(MoveReason.DRAIN)
    bench.mover.tick(MoveReason.DRAIN)
    assert len(bench.endpoint.offers) == 1
    for sequence in list(bench.scheduler.sequences()):
        bench.mover.offer(sequence, [PEER], MoveReason.REBALANCE)
    assert len(bench.endpoint.offers) == 1
    bench.finish()
