"""Whoever dies or freezes at whatever message of a request's life: one end, every token right, and nothing is kept.

Not sampled: the undisturbed life is played once to count its messages, and then once more for each message, each of
its workers and the gateway, and each way to fail, just before that message arrives.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import pytest
import structlog
from support.fake_runner import fake_output
from support.fleet_world import World
from support.world_nodes import LEASE_S, MAX_MODEL_LEN, DecodeNode, Flight

from fleet.hand_off_messages import Ack, Alive, Commit, Grant, Offer
from fleet.messages import (
    GatewayHello,
    Goodbye,
    HandedOff,
    HandingOff,
    Heartbeat,
    PrefillRequest,
    RequestFinished,
    RequestStarted,
    TokenChunk,
)
from fleet.types import FinishReason, SamplingParams
from gateway.live import LiveRequest

CHATTER = (GatewayHello, Heartbeat, Alive)
PROMPT = [1, 2, 3, 4, 5, 6, 7, 8, 9]
"""Two full pages and a partial one, in two chunks."""
NUM_TOKENS = 12
MIDDLE = 3
NUM_HAND_OFFS = 2
QUIET_S = 3 * LEASE_S
"""All that a failure makes others do is done by then: the lease has told, and every stale grant has been closed."""
AWAKE_S = 2 * LEASE_S
AFTER_S = LEASE_S / 3
LIFE = {
    PrefillRequest, Offer, Grant, Commit, Ack, RequestStarted, TokenChunk, HandingOff, HandedOff, RequestFinished,
    Goodbye,
}  # fmt: skip
DIRECT = pytest.mark.parametrize("direct", [True, False], ids=["direct", "carried"])
EXPECTED, REASON = fake_output(PROMPT, SamplingParams(max_tokens=NUM_TOKENS), max_model_len=MAX_MODEL_LEN)


@pytest.fixture(autouse=True)
def _silent() -> Iterator[None]:
    """Hundreds of lives have little to say that the failure's own message does not."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    yield
    structlog.reset_defaults()


def leave(world: World, live: LiveRequest) -> None:
    """The worker that decodes is asked to leave: its sequence moves."""
    holder = world.nodes[live.holders[0].name]
    if isinstance(holder, DecodeNode) and holder.runs:
        holder.leave()


def play(
    position: int, strike: Callable[[World, LiveRequest], None], *, direct: bool
) -> tuple[World, LiveRequest, list[Flight]]:
    """One request that is prefilled, decoded and then moved; `strike` comes before the message at `position`.

    Goes on until all is quiet. Returns the messages that arrived, too.
    """
    passed: list[Flight] = []
    moves = struck = False
    with World(direct=direct).run() as world:
        live = world.gateway.ask(PROMPT, max_tokens=NUM_TOKENS)
        world.turn()
        end_s = world.now_s + QUIET_S
        while world.now_s < end_s and not is_over(world, live):
            while flight := world.next_flight():
                if not isinstance(flight.message, CHATTER):
                    if len(passed) == position and not struck:
                        struck = True
                        strike(world, live)
                        continue
                    passed.append(flight)
                world.deliver(flight)
                if not moves and len(live.output) >= MIDDLE and live.holders and world.gateway.runs:
                    moves = True
                    leave(world, live)
            world.advance()
        if any(node.frozen for node in world.nodes.values()):
            for node in world.nodes.values():
                node.frozen = False
            world.settle(AWAKE_S)
        world.settle(AFTER_S)
        check(world, live)
    return world, live, passed


def is_over(world: World, live: LiveRequest) -> bool:
    """Nobody has anything to do any more, and nobody is frozen who might."""
    nodes = world.nodes.values()
    idle = not world.network and not any(node.loop.works or node.frozen for node in nodes)
    done = live.ended or not world.gateway.alive
    return idle and done and not any(any(worker.held().values()) for worker in world.workers() if worker.alive)


def check(world: World, live: LiveRequest) -> None:
    """What must hold, whatever happened."""
    if world.gateway.alive:
        if live.finish is FinishReason.CANCELLED:
            assert live.output == EXPECTED[: len(live.output)]
        else:
            assert (live.output, live.finish) == (EXPECTED, REASON)
        assert world.gateway.num_ends() == 1
        assert (world.gateway.table.num_live, world.gateway.table.num_queued) == (0, 0)
    for worker in world.workers():
        held = worker.held() if worker.alive else {}
        assert not any(held.values()), (worker.name, held)


def names(flight: Flight) -> str:
    """What a message says, for a failure's sake."""
    events = [type(event).__name__ for event in getattr(flight.message, "events", [])]
    return f"{flight.sender} to {flight.to}: {type(flight.message).__name__} {' '.join(events)}"


FATES: dict[str, Callable[[World, str], None]] = {
    "killed": lambda world, name: world.kill(name, loses=False),
    "killed with what it sent": lambda world, name: world.kill(name, loses=True),
    "frozen": lambda world, name: setattr(world.nodes[name], "frozen", True),
}


def positions(*, direct: bool) -> tuple[list[str], list[str]]:
    """What every message of the undisturbed life says, and the nodes between which they pass."""
    _, live, passed = play(-1, lambda _world, _live: None, direct=direct)
    assert (live.output, live.epoch) == (EXPECTED, 0)
    kinds = {type(event) for flight in passed for event in (flight.message, *getattr(flight.message, "events", []))}
    assert kinds >= LIFE
    assert sum(isinstance(flight.message, Commit) for flight in passed) == NUM_HAND_OFFS
    return [names(flight) for flight in passed], sorted({n for flight in passed for n in (flight.sender, flight.to)})


@DIRECT
@pytest.mark.parametrize("fate", FATES)
def test_death_at_every_message(fate: str, *, direct: bool) -> None:
    messages, involved = positions(direct=direct)
    num_replays = 0
    for victim in involved:
        for position, message in enumerate(messages):

            def strike(world: World, _live: LiveRequest, victim: str = victim) -> None:
                FATES[fate](world, victim)

            try:
                _, live, _ = play(position, strike, direct=direct)
            except Exception as error:
                raise AssertionError(f"{victim} {fate} before {position}, {message}: {error}") from error
            num_replays += live.epoch
    print(f"{fate}, {'direct' if direct else 'carried'}: {len(messages)} messages, {len(involved)} victims each")
    assert num_replays > len(messages)


@DIRECT
def test_the_client_leaves_at_every_message(*, direct: bool) -> None:
    messages, _ = positions(direct=direct)

    def part(world: World, live: LiveRequest) -> None:
        world.gateway.loop.run_until_complete(live.aclose())

    for position, message in enumerate(messages):
        try:
            _, live, _ = play(position, part, direct=direct)
        except Exception as error:
            raise AssertionError(f"the client leaves before {position}, {message}: {error}") from error
        assert live.finish in (FinishReason.CANCELLED, REASON)
