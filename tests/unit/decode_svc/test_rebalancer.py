"""Workers whose sequences outgrow their pages: with an empty peer they move, where they were given back before."""

from __future__ import annotations

from typing import cast

from support.fake_runner import FakeRunner, fake_output
from support.passports import make_fingerprint, make_passport

from decode_svc.balance import Room
from decode_svc.mover import Consequences, Mover
from decode_svc.peers import Peers
from decode_svc.rebalancer import MIN_STAY_S, Rebalancer
from engine.decode_scheduler import DecodeScheduler
from engine.limits import DecodeLimits
from engine.pages import PagePool
from engine.prefix_cache import PrefixCache
from engine.reservations import Reservation
from engine.sequence import Sequence
from fleet.messages import MoveReason
from fleet.types import Passport, PeerRef, SamplingParams
from fleet.worker_metrics import WorkerMetrics
from kvtransfer.actions import Committing, FailReason, Given, Granted, HandOffFailed
from kvtransfer.endpoint import HandOffEndpoint

PAGE_SIZE = 4
NUM_PAGES = 60
MAX_SEQS = 12
STEP_S = 0.01
LIMITS = DecodeLimits(max_model_len=200, max_num_seqs=MAX_SEQS, lookahead_tokens=16)


class Wire:
    """Hand-offs to the other workers of a world, done at once; implements what the mover asks of an endpoint."""

    def __init__(self, world: World, me: Worker) -> None:
        self._world = world
        self._me = me
        self._open: dict[tuple[str, int], tuple[Worker, Reservation] | None] = {}

    def offer(self, passport: Passport, *, page_hashes: list[bytes], num_pages: int, targets: list[PeerRef]) -> None:
        del page_hashes
        key = (passport.request_id, passport.epoch)
        taker = next(worker for worker in self._world.workers if worker.peer == targets[0])
        made = taker.scheduler.reserve(passport, (), num_pages)
        self._open[key] = None if made is None else (taker, made)
        if made is not None:
            self._me.mover.granted(Granted(*key, taker.peer, "fake", 0))

    def pages_ready(self, request_id: str, epoch: int, page_ids: list[int]) -> None:
        """They go with the Commit."""

    def lag(self, request_id: str, epoch: int) -> int | None:
        return None if self._open.get((request_id, epoch)) is None else 0

    def commit(self, passport: Passport, *, page_ids: list[int], num_computed_tokens: int) -> None:
        key = (passport.request_id, passport.epoch)
        found = self._open.pop(key)
        assert found is not None
        taker, made = found
        for ours, theirs in zip(page_ids, made.new_page_ids, strict=False):
            taker.runner.write_page(theirs, self._me.runner.read_page(ours))
        self._me.mover.committing(Committing(*key, taker.peer, "fake"))
        taker.scheduler.adopt(made, passport, num_computed_tokens)
        self._me.mover.given(Given(*key, taker.peer, "fake", len(page_ids), 0, 0.0))
        self._me.mover.release_pages(*key)

    def cancel(self, request_id: str, epoch: int) -> None:
        key = (request_id, epoch)
        if key not in self._open:
            return
        found = self._open.pop(key)
        if found is not None:
            found[0].scheduler.cancel_reservation(found[1], writer_done=True)
        self._me.mover.failed(HandOffFailed(*key, FailReason.CANCELLED, "called off"))
        self._me.mover.release_pages(*key)


class Worker:
    """A decode worker without processes: scheduler, fake runner, mover, rebalancer."""

    def __init__(self, world: World, name: str) -> None:
        self.peer = PeerRef(name, 1, f"tcp://{name}")
        self.world = world
        self.pool = PagePool(NUM_PAGES, PAGE_SIZE)
        cache = PrefixCache(self.pool, make_fingerprint(), enabled=False)
        self.scheduler = DecodeScheduler(self.pool, cache, LIMITS)
        self.runner = FakeRunner(NUM_PAGES, PAGE_SIZE)
        self.reasons: list[tuple[str, MoveReason]] = []
        self.mover = Mover(
            pool=self.pool,
            scheduler=self.scheduler,
            metrics=WorkerMetrics(),
            page_bytes=self.runner.page_bytes,
            max_model_len=LIMITS.max_model_len,
            pick=lambda _: [],
            clock=lambda: world.now_s,
        )
        self.mover.endpoint = cast("HandOffEndpoint", Wire(world, self))
        self.mover.do = Consequences(
            committing=lambda sequence, _taker, _transport, why: self.reasons.append((sequence.request_id, why)),
            give_back=lambda sequence, why: world.returned.append(f"{sequence.request_id} {why}"),
            freed=lambda: None,
        )
        self.rebalancer = Rebalancer(
            scheduler=self.scheduler,
            pool=self.pool,
            mover=self.mover,
            peers=cast("Peers", self),
            max_num_seqs=MAX_SEQS,
            gap=0.4,
            clock=lambda: world.now_s,
        )

    def rooms(self) -> dict[PeerRef, Room]:
        """As `Peers` does, of figures that are never stale."""
        return {
            worker.peer: Room(
                worker.scheduler.num_running + worker.scheduler.num_reserved,
                MAX_SEQS,
                worker.pool.num_used,
                NUM_PAGES,
            )
            for worker in self.world.workers
            if worker is not self
        }

    def book(self, peer: PeerRef, num_pages: int) -> None:
        """The reservation shows it."""

    def start(self, passport: Passport) -> bool:
        """A prompt's hand-off, if there is room."""
        made = self.scheduler.reserve(passport, [])
        if made is None:
            return False
        self.scheduler.adopt(made, passport, 0)
        return True

    def step(self) -> None:
        plan = self.scheduler.schedule()
        for sequence in self.scheduler.take_returned():
            self.mover.forget(sequence)
            self.world.returned.append(sequence.request_id)
            self.world.waiting.append(sequence.to_passport())
        if plan is not None:
            for row in self.scheduler.commit(plan, self.runner.run(plan)).rows:
                if row.finish is not None:
                    self.mover.forget(row.sequence)
                    self.world.finished[row.sequence.request_id] = row.sequence
        self.mover.on_booked()


class World:
    """Workers that step in turn on one clock, and what waits for room."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.workers: list[Worker] = []
        self.waiting: list[Passport] = []
        self.returned: list[str] = []
        self.finished: dict[str, Sequence] = {}

    def join(self, name: str) -> Worker:
        worker = Worker(self, name)
        self.workers.append(worker)
        return worker

    def run(self, num_steps: int, *, balancing: bool = True) -> None:
        for _ in range(num_steps):
            self.now_s += STEP_S
            for worker in self.workers:
                if balancing:
                    worker.rebalancer.look()
                worker.step()
            emptiest = min(self.workers, key=lambda worker: worker.pool.num_used)
            if self.waiting and emptiest.start(self.waiting[0]):
                del self.waiting[0]

    @property
    def moved(self) -> list[tuple[str, MoveReason]]:
        return [one for worker in self.workers for one in worker.reasons]


def prompts(count: int) -> list[Passport]:
    params = SamplingParams(max_tokens=72)
    return [make_passport([at, 7, at + 3, 9], request_id=f"r{at}", params=params) for at in range(count)]


def outcome(*, newcomer: bool) -> World:
    """Five sequences that end with 19 pages each, on one worker of 60, and maybe an empty one from step 20 on."""
    world = World()
    world.join("full")
    world.waiting = prompts(5)
    world.run(20)
    if newcomer:
        world.join("new")
    world.run(400)
    assert world.waiting == []
    assert len(world.finished) == 5
    for number, passport in enumerate(prompts(5)):
        ids = world.finished[f"r{number}"].token_ids[passport.prompt_len :]
        expected, _ = fake_output(passport.token_ids, passport.params, max_model_len=LIMITS.max_model_len)
        assert ids == expected, "moved or replayed, it says the same"
    for worker in world.workers:
        assert worker.pool.num_used == 0
        worker.pool.check()
    return world


def test_under_page_pressure_a_newcomer_takes_sequences_and_fewer_are_given_back() -> None:
    alone, together = outcome(newcomer=False), outcome(newcomer=True)
    assert alone.moved == []
    assert len(alone.returned) > 1
    assert together.returned == []
    assert {reason for _, reason in together.moved} == {MoveReason.REBALANCE}
    print(f"given back alone {len(alone.returned)}, with a newcomer {len(together.returned)}; moved {together.moved}")


def test_what_has_moved_stays_for_a_while() -> None:
    world = World()
    full = world.join("full")
    for passport in prompts(10):
        assert full.start(passport)
    world.run(2)
    new = world.join("new")
    world.run(20)
    moved = [name for name, _ in full.reasons]
    assert moved
    assert new.reasons == []
    # Turn the tables: what came cannot go back at once, whoever is emptier now.
    for sequence in list(full.scheduler.sequences()):
        full.scheduler.release(sequence)
    world.run(20)
    assert new.reasons == []
    world.now_s += MIN_STAY_S
    world.run(5)
    assert {name for name, _ in new.reasons} <= set(moved)


def test_nothing_moves_once_it_is_stopped() -> None:
    world = World()
    full = world.join("full")
    for passport in prompts(10):
        assert full.start(passport)
    world.join("new")
    full.rebalancer.stop()
    world.run(20)
    assert full.reasons == []
