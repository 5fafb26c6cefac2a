"""What one gateway may have on a worker is bounded, and a stranger's requests end with its silence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from support.fleet_world import World
from support.world_nodes import LEASE_S, DecodeNode, Flight, Node, PrefillNode

from fleet.messages import OVER_SHARE, Message, PrefillRequest, Publication, Returned, TokenChunk
from fleet.types import Passport, PeerRef, SamplingParams

BOUND = 2
T = TypeVar("T")


class Stranger(Node):
    """A gateway that asks and never greets."""

    def __init__(self, world: World) -> None:
        super().__init__(world, "stranger", 99)
        self.heard: list[Message] = []

    def handle(self, flight: Flight) -> None:
        self.heard.append(flight.message)

    def asks(self, name: str, number: int, targets: list[PeerRef]) -> None:
        """Send a prompt to a prefill worker, whatever its share."""
        passport = Passport(
            request_id=f"s{number}",
            epoch=0,
            model="m",
            token_ids=[number, 2, 3],
            prompt_len=3,
            params=SamplingParams(max_tokens=40),
            gateway=self.peer,
        )
        self.bus.send(f"sim://{name}", PrefillRequest(passport=passport, targets=targets))

    def told(self, kind: type[T]) -> list[T]:
        """The events of one kind that it has heard."""
        publications = [message for message in self.heard if isinstance(message, Publication)]
        return [event for publication in publications for event in publication.events if isinstance(event, kind)]


@contextmanager
def world_with_stranger() -> Iterator[tuple[World, Stranger]]:
    with World(direct=True, max_per_gateway=BOUND).run() as world:
        stranger = Stranger(world)
        world.nodes["stranger"] = stranger
        yield world, stranger


def arrive(world: World) -> None:
    while (flight := world.next_flight()) and world.nodes[flight.to].alive:
        world.deliver(flight)


def test_a_prefill_worker_gives_back_what_is_beyond_a_gateways_share() -> None:
    with world_with_stranger() as (world, stranger):
        node = world.nodes["p1"]
        assert isinstance(node, PrefillNode)
        for number in range(5):
            stranger.asks("p1", number, [])
        requests = [flight for flight in world.network if flight.to == "p1"]
        for flight in requests:  # all at once, before a step could end any
            world.network.remove(flight)
            node.handle(flight)
        assert node.held()["sequences"] == BOUND
        assert node.metrics.over_share._value.get() == 3
        arrive(world)
        returned = [event for event in stranger.told(Returned) if event.reason == OVER_SHARE]
        assert [event.request_id for event in returned] == ["s2", "s3", "s4"]
        live = world.gateway.ask([7, 8, 9], max_tokens=2)  # others are served
        world.settle(LEASE_S / 2)
        assert live.finish is not None
        world.settle(3 * LEASE_S)
        assert not any(node.held().values())


def test_a_decode_worker_refuses_what_is_beyond_and_the_giver_asks_another() -> None:
    with world_with_stranger() as (world, stranger):
        first, second = world.nodes["d1"], world.nodes["d2"]
        assert isinstance(first, DecodeNode)
        assert isinstance(second, DecodeNode)
        for number, name in enumerate(("p1", "p1", "p2", "p2")):
            stranger.asks(name, number, [first.peer, second.peer])
        most = 0
        for _ in range(200):
            flight = world.next_flight()
            if flight is None:
                world.advance()
            else:
                world.deliver(flight)
            most = max(most, len(list(first.scheduler.sequences())))
        assert most == BOUND
        assert first.metrics.over_share._value.get() >= 1
        assert {event.request_id for event in stranger.told(TokenChunk)} == {"s0", "s1", "s2", "s3"}
        world.settle(4 * LEASE_S)
        assert not any(value for node in world.workers() for value in node.held().values())
