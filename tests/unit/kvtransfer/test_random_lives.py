"""Givers and takers in a world that loses, repeats and reorders messages, cancels, and kills: nothing leaks or doubles.

The machines do no input or output, so the whole world is a seeded simulation: a clock, a bag of messages, copies that
take time, and processes that may die.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st
from support.hand_off_side import passport
from support.page_bank import FINGERPRINT, PAGE_BYTES, PoolBank

from fleet.hand_off_messages import HandOffMessage, PoolRef
from fleet.types import PeerRef
from kvtransfer.actions import (
    Action,
    Adopted,
    Given,
    HandOffFailed,
    ReleasePages,
    Send,
    Store,
    Write,
)
from kvtransfer.copying import write_granted
from kvtransfer.desk import HandOffDesk
from kvtransfer.errors import GrantRevoked, TransferError
from kvtransfer.giver import Giver
from kvtransfer.host import ProcessIdentity
from kvtransfer.limits import HandOffLimits
from kvtransfer.outgoing_book import GiverConfig
from kvtransfer.pulse import Pulse
from kvtransfer.region import PoolRegion
from kvtransfer.taker import Taker, TakerConfig
from kvtransfer.tcp import TcpTransport

LIMITS = HandOffLimits(liveness_s=1.0, write_bytes=2 * PAGE_BYTES, window_bytes=6 * PAGE_BYTES)
NUM_PAGES = 24


class DirectStub:
    """A direct transport whose bytes the simulation itself moves."""

    name = "direct"

    def can_take(self, _offer: object) -> bool:
        return True

    def write(self, *_: object) -> None:
        raise AssertionError("the simulation writes")

    def forget(self, _address: str) -> None:
        pass

    def close(self) -> None:
        pass


@dataclass
class Node:
    """One process of the simulation."""

    peer: PeerRef
    process: ProcessIdentity
    bank: PoolBank
    region: PoolRegion
    desk: HandOffDesk
    alive: bool = True
    started: set[tuple[str, int]] = field(default_factory=set)
    ended: list[tuple[str, int]] = field(default_factory=list)
    released: list[tuple[str, int]] = field(default_factory=list)


class World:
    """A giver `p`, takers `d1` and `d2`, and everything that can go wrong between them."""

    def __init__(self, seed: int, *, loss: float, carried: bool) -> None:
        self.luck = random.Random(seed)
        self.loss = loss
        self.now_s = 0.0
        self.bag: list[tuple[float, PeerRef, HandOffMessage, list[memoryview]]] = []
        self.copies: list[tuple[float, Node, Write | Store]] = []
        self.adoptions: list[tuple[str, int]] = []
        self.content: dict[tuple[str, int], list[bytes]] = {}
        self.carried = carried
        self.nodes = {name: self._node(name, number) for number, name in enumerate(("p", "d1", "d2"), start=1)}

    def is_gone(self, process: ProcessIdentity) -> bool:
        return any(node.process == process and not node.alive for node in self.nodes.values())

    def _node(self, name: str, number: int) -> Node:
        peer = PeerRef(name, number, f"tcp://{name}")
        bank = PoolBank(NUM_PAGES)
        region = PoolRegion.create(name, num_pages=NUM_PAGES, page_bytes=PAGE_BYTES, shared=False)
        process = ProcessIdentity(number, number)
        transport = TcpTransport() if self.carried else DirectStub()
        giver = Giver(
            GiverConfig(
                peer=peer,
                fingerprint=FINGERPRINT,
                page_bytes=PAGE_BYTES,
                transports={transport.name: not self.carried},
                host="h",
                process=process,
                limits=LIMITS,
                rng=random.Random(number),
            )
        )
        taker = Taker(
            TakerConfig(
                peer=peer,
                fingerprint=FINGERPRINT,
                pool=PoolRef(name="", num_pages=NUM_PAGES, page_bytes=PAGE_BYTES),
                transports={transport.name: transport},
                bank=bank,
                gate=region,
                watch=self,
                limits=LIMITS,
            )
        )
        return Node(peer, process, bank, region, HandOffDesk(giver, taker, Pulse(peer, LIMITS), Counter()))

    # execution

    def do(self, node: Node, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Send(to=to, message=message, page_ids=page_ids):
                    # The bus copies at send time.
                    frames = [memoryview(bytes(node.region.page(page_id))) for page_id in page_ids]
                    copies = self.luck.choices((0, 1, 2), (self.loss, 1 - 1.5 * self.loss, self.loss / 2))[0]
                    for _ in range(copies):
                        self.bag.append((self.now_s + self.luck.uniform(0, 0.05), to, message, frames))
                case Write() | Store():
                    self.copies.append((self.now_s + self.luck.uniform(0, 0.2), node, action))
                case Adopted(passport=arrived):
                    key = (arrived.request_id, arrived.epoch)
                    self.adoptions.append(key)
                    pages = node.bank.adopted[-1][1]
                    got = [bytes(node.region.page(page_id)) for page_id in pages]
                    assert got == self.content[key], "adopted pages are not the ones that were given"
                case Given() | HandOffFailed():
                    node.ended.append((action.request_id, action.epoch))
                case ReleasePages(request_id=request_id, epoch=epoch):
                    node.released.append((request_id, epoch))
                case _:
                    pass

    def give(self, request_id: str, epoch: int) -> None:
        node = self.nodes["p"]
        num_tokens = self.luck.randint(1, 30)
        sent = passport(request_id, num_tokens, epoch=epoch)
        num_pages = -(-num_tokens // FINGERPRINT.page_size)
        pages = self.luck.sample(range(NUM_PAGES), num_pages)
        for page_id in pages:
            node.region.page(page_id)[:] = bytes([(hash((num_tokens, page_id)) % 251)]) * PAGE_BYTES
        self.content[request_id, epoch] = [bytes(node.region.page(page_id)) for page_id in pages]
        node.started.add((request_id, epoch))
        targets = [self.nodes["d1"].peer, self.nodes["d2"].peer]
        # Every sequence has content of its own here, so nothing may be found in a cache: no page is named.
        started = node.desk.giver.start(sent, page_hashes=[], num_pages=num_pages, targets=targets, now_s=self.now_s)
        self.do(node, started)
        if self.luck.random() < 0.5:
            self.do(node, node.desk.giver.pages_ready(request_id, epoch, pages[: num_pages // 2], self.now_s))
        committed = node.desk.giver.commit(sent, page_ids=pages, num_computed_tokens=num_tokens, now_s=self.now_s)
        self.do(node, committed)

    def step(self) -> None:
        self.now_s += 0.02
        due = [entry for entry in self.bag if entry[0] <= self.now_s]
        self.bag = [entry for entry in self.bag if entry[0] > self.now_s]
        self.luck.shuffle(due)
        for _, to, message, frames in due:
            node = self.nodes[to.name]
            if node.alive:
                self.do(node, node.desk.on_message(message, frames, self.now_s))
        finished = [entry for entry in self.copies if entry[0] <= self.now_s]
        self.copies = [entry for entry in self.copies if entry[0] > self.now_s]
        for _, node, copy in finished:
            if node.alive:
                self.do(node, self._copied(node, copy))
        for node in self.nodes.values():
            if node.alive:
                self.do(node, node.desk.tick(self.now_s))

    def _copied(self, node: Node, copy: Write | Store) -> list[Action]:
        if isinstance(copy, Store):
            for page_id, frame in zip(copy.page_ids, copy.frames, strict=True):
                node.region.store(page_id, frame)
            return node.desk.taker.on_stored(copy.ticket, self.now_s)
        taker = self.nodes[copy.grant.taker.name]
        pages = [node.region.page(page_id) for page_id in copy.page_ids]
        chosen = copy.grant.page_ids[copy.first : copy.first + len(pages)]
        error: TransferError | None = None
        try:
            write_granted(taker.region, chosen, copy.grant.generation, pages)
        except GrantRevoked as revoked:
            error = revoked
        return node.desk.giver.on_written(copy.ticket, error, self.now_s)

    def kill(self, name: str) -> None:
        dead = self.nodes[name]
        dead.alive = False
        self.copies = [entry for entry in self.copies if entry[1] is not dead]
        for node in self.nodes.values():
            if node.alive:
                self.do(node, node.desk.peer_lost(dead.peer.address, self.now_s))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    loss=st.sampled_from([0.0, 0.05, 0.3]),
    carried=st.booleans(),
    killed=st.sampled_from([None, None, "p", "d1"]),
    cancels=st.booleans(),
)
def test_nothing_leaks_or_doubles(seed: int, loss: float, carried: bool, killed: str | None, cancels: bool) -> None:
    world = World(seed, loss=loss, carried=carried)
    giver = world.nodes["p"]
    # One sequence after the other reuses the giver's pages only once the last has let go of them.
    for number in range(4):
        world.give(f"r{number}", epoch=world.luck.choice((0, 0, 3)))
        for step in range(world.luck.randint(5, 60)):
            world.step()
            if cancels and step == 10:
                world.do(giver, giver.desk.cancel(f"r{number}", 9, world.now_s))
            if killed and number == 1 and step == 5:
                world.kill(killed)
                killed = None
        if not giver.alive:
            break
        for _ in range(3000):
            if giver.released and set(giver.released) >= giver.started:
                break
            world.step()
    world.loss = 0.0
    for _ in range(int(6 * LIMITS.liveness_s / 0.02)):
        world.step()
    assert len(world.adoptions) == len(set(world.adoptions)), "adopted twice"
    if giver.alive:
        assert sorted(giver.ended) == sorted(giver.started)
        assert sorted(giver.released) == sorted(giver.started)
    for node in world.nodes.values():
        if node.alive:
            node.bank.end_adopted()
            assert node.bank.is_whole, f"{node.peer.name} leaks pages"
            assert node.desk.taker.num_open == node.desk.taker.num_quarantined == 0
