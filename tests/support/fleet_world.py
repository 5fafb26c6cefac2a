"""A whole fleet without processes: real gateway table, workers, schedulers and hand-offs over a network the test plays.

Each node has an event loop of its own that runs only when the world lets it, and all share the world's clock, so a
life is the same each time, and may be ended or stopped between any two messages. The model is `FakeRunner`, whose
tokens depend on every byte of the pages.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self
from unittest.mock import patch

from fleet.types import PeerRef
from kvtransfer.host import ProcessIdentity
from kvtransfer.region import PoolRegion
from support.world_nodes import LEASE_S, DecodeNode, Flight, GatewayNode, Node, PrefillNode, WorkerNode

QUANTUM_S = 0.1
NUM_PASSES = 2
"""Turns that each event loop gets between two messages: one for what has happened, one for what follows from it."""


class World:
    """Gateway `g`, prefill workers `p1` and `p2`, decode workers `d1` to `d3`, network and clock."""

    def __init__(self, *, direct: bool, max_per_gateway: int = 0) -> None:
        self.direct = direct
        self.max_per_gateway = max_per_gateway
        self.now_s = 100.0
        self.network: list[Flight] = []
        self.regions: dict[PeerRef, PoolRegion] = {}
        self.nodes: dict[str, Node] = {}

    @contextmanager
    def run(self) -> Iterator[Self]:
        """Start all nodes and wait until the gateway knows the workers; end them behind it.

        Memory of the dead lasts as long: who has mapped it may write it.
        """
        with patch("time.monotonic", lambda: self.now_s):
            self.gateway = GatewayNode(self, "g", 1)
            self.nodes["g"] = self.gateway
            for number, name in enumerate(("p1", "p2", "d1", "d2", "d3"), start=2):
                kind = PrefillNode if name.startswith("p") else DecodeNode
                self.nodes[name] = kind(self, name, number)
            self.gateway.directory.introduce(node.worker.record() for node in self.workers())
            try:
                self.settle(LEASE_S)
                yield self
            finally:
                for node in self.nodes.values():
                    if node.alive:
                        node.end()
                for worker in self.workers():
                    worker.region.close()

    def workers(self) -> list[WorkerNode]:
        """All of them, dead ones too."""
        return [node for node in self.nodes.values() if isinstance(node, WorkerNode)]

    def decode_nodes(self) -> list[DecodeNode]:
        """Those that take sequences."""
        return [node for node in self.nodes.values() if isinstance(node, DecodeNode)]

    def is_gone(self, process: ProcessIdentity) -> bool:
        """Implements `kvtransfer.host.ProcessWatch`."""
        return not any(node.alive for node in self.workers() if node.peer.incarnation == process.pid)

    # faults

    def kill(self, name: str, *, loses: bool) -> None:
        """End a node; `loses`: with what it has sent and nobody has read yet. Everybody's connection to it breaks."""
        node = self.nodes[name]
        node.alive = False
        node.end()
        self.network = [f for f in self.network if f.to != name and not (loses and f.sender == name)]
        for other in self.nodes.values():
            if other.alive:
                for callback in other.bus.lost:
                    callback(node.peer.address)

    # time

    def next_flight(self) -> Flight | None:
        """The oldest message that can arrive now."""
        return next((f for f in self.network if self.nodes[f.to].runs), None)

    def deliver(self, flight: Flight) -> None:
        """Let it arrive, and everybody act."""
        self.network.remove(flight)
        self.nodes[flight.to].handle(flight)
        self.turn()

    def turn(self) -> None:
        """Every node acts on what is ready."""
        running = [node for node in self.nodes.values() if node.runs]
        for node in running:
            node.loop.work()
        for _ in range(NUM_PASSES):
            for node in running:
                node.turn()

    def advance(self) -> None:
        """Threads get on; if there are none at work, a quantum of time passes."""
        if not any(node.loop.works for node in self.nodes.values() if node.runs):
            self.now_s += QUANTUM_S
            for node in self.nodes.values():
                if node.runs:
                    node.tick()
        self.turn()
        self.network = [flight for flight in self.network if self.nodes[flight.to].alive]

    def settle(self, for_s: float) -> None:
        """Everything moves for so long."""
        end_s = self.now_s + for_s
        while self.now_s < end_s:
            while flight := self.next_flight():
                self.deliver(flight)
            self.advance()
