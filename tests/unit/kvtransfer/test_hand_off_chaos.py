"""Random loss, repetition, reordering, kills, stops and cancels: no page leaks, none is written after reuse.

The world itself checks each copy against the owner of its page, and each adoption against the bytes it should find.
"""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from support.hand_off_process import LIMITS, PAGE_SIZE, Process
from support.hand_off_world import World

from kvtransfer.actions import FailReason, Given, HandOffFailed

REQUESTS = st.sampled_from(["r0", "r1", "r2"])
NAMES = st.sampled_from(["giver-0", "giver-1", "taker-0", "taker-1"])
INDEX = st.integers(0, 1000)
NUM_TOKENS = {"r0": 3, "r1": 3 * PAGE_SIZE, "r2": 4 * PAGE_SIZE + 1}


class HandOffChaos(RuleBasedStateMachine):
    """Two givers, two takers, three requests. Each epoch of a request is started once."""

    transport = ""

    def __init__(self) -> None:
        super().__init__()
        self.world: World
        self.epochs: dict[str, int] = {}

    @initialize()
    def boot(self) -> None:
        self.world = World(transport=self.transport, givers=2, takers=2, num_pages=6)

    def living(self, name: str) -> Process | None:
        process = self.world.processes[name]
        return process if process.alive and not process.stopped else None

    @rule(request=REQUESTS, giver=st.sampled_from(["giver-0", "giver-1"]), turned=st.booleans())
    def start(self, request: str, giver: str, *, turned: bool) -> None:
        process = self.living(giver)
        if process is None:
            return
        epoch = self.epochs.get(request, -1) + 1
        self.epochs[request] = epoch
        targets = [self.world.processes[name] for name in ("taker-0", "taker-1")]
        self.world.start(process, request, epoch, NUM_TOKENS[request], targets[::-1] if turned else targets)

    @rule(request=REQUESTS, num_pages=st.integers(1, 4))
    def ready(self, request: str, num_pages: int) -> None:
        giver = self.giver_of(request)
        if giver is not None:
            num_full = NUM_TOKENS[request] // PAGE_SIZE
            self.world.ready(request, self.epochs[request], min(num_pages, num_full))

    @rule(request=REQUESTS)
    def commit(self, request: str) -> None:
        if self.giver_of(request) is not None:
            self.world.commit(request, self.epochs[request], NUM_TOKENS[request])

    def giver_of(self, request: str) -> Process | None:
        giver = self.world.started.get((request, self.epochs.get(request, -1)))
        return giver if giver is not None and giver.alive and not giver.stopped else None

    @rule(name=NAMES, request=REQUESTS)
    def cancel(self, name: str, request: str) -> None:
        process = self.living(name)
        if process is not None and request in self.epochs:
            self.world.cancel(process, request, self.epochs[request])

    @rule(request=REQUESTS)
    def finish(self, request: str) -> None:
        for life in self.world.lives:
            for key in [key for key in life.bank.adopted if key[0] == request]:
                life.bank.finish(key)

    @precondition(lambda self: self.world.network)
    @rule(index=INDEX, fate=st.sampled_from(["deliver", "deliver", "deliver", "deliver", "repeat", "lose"]))
    def message(self, index: int, fate: str) -> None:
        index %= len(self.world.network)
        if fate == "lose":
            del self.world.network[index]
        else:
            self.world.deliver(index, keep=fate == "repeat")

    @precondition(lambda self: self.world.network or self.world.jobs)
    @rule(count=st.integers(1, 8))
    def in_order(self, count: int) -> None:
        for _ in range(count):
            self.world.step()

    @precondition(lambda self: self.world.jobs)
    @rule(index=INDEX)
    def copy(self, index: int) -> None:
        self.world.step_job(index % len(self.world.jobs))

    @rule(beats=st.sampled_from([0.05, 0.5, 1.0, 1.0, 1.0]))
    def time_passes(self, beats: float) -> None:
        self.world.advance(beats * LIMITS.beat_s)

    @rule(name=NAMES, fate=st.sampled_from(["kill", "restart", "stop", "go on", "go on"]))
    def process(self, name: str, fate: str) -> None:
        process = self.world.processes[name]
        if fate == "kill":
            self.world.kill(process)
        elif fate == "restart":
            self.world.kill(process)
            self.world.boot(name)
        else:
            process.stopped = fate == "stop"

    @invariant()
    def at_most_one_adoption(self) -> None:
        for request, epoch in self.world.started if hasattr(self, "world") else ():
            assert self.world.adoptions((request, epoch)) <= 1, (request, epoch)

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        world = self.world
        for process in world.processes.values():
            process.stopped = False
        for (request, epoch), giver in world.started.items():
            if giver.alive:
                world.commit(request, epoch, NUM_TOKENS[request])
        for _ in range(6):
            world.run(for_s=LIMITS.liveness_s)
            for request in NUM_TOKENS:
                self.finish(request)
        world.started = {key: giver for key, giver in world.started.items() if giver.alive}
        world.check_settled()
        self.at_most_one_adoption()
        for (request, epoch), giver in world.started.items():
            key = (request, epoch)
            if any((news.request_id, news.epoch) == key for news in world.news_of(giver, Given)):
                assert world.adoptions(key) == 1
            for failed in world.news_of(giver, HandOffFailed):
                if (failed.request_id, failed.epoch) == key and failed.reason is FailReason.REFUSED:
                    assert world.adoptions(key) == 0


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_chaos(transport: str) -> None:
    machine = type("Chaos", (HandOffChaos,), {"transport": transport})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=120,
            stateful_step_count=60,
            deadline=None,
            derandomize=True,
            suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
        ),
    )
