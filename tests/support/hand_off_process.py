"""A process of the simulated hand-off world: its desk, its pages of eight bytes, transports that the world moves."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

from fleet.hand_off_messages import Grant, Offer, PoolRef
from fleet.types import Passport, PeerRef, SamplingParams
from kvtransfer.actions import Action
from kvtransfer.desk import HandOffDesk
from kvtransfer.giver import Giver
from kvtransfer.host import ProcessIdentity, ProcessWatch
from kvtransfer.limits import HandOffLimits
from kvtransfer.outgoing_book import GiverConfig
from kvtransfer.pulse import Pulse
from kvtransfer.stats import StaleReason
from kvtransfer.taker import Taker, TakerConfig
from support.hand_off_bank import FakeBank
from support.passports import GATEWAY, make_fingerprint

PAGE_SIZE = 4
PAGE_BYTES = 8
GARBAGE = b"reused!!"
LIMITS = HandOffLimits(liveness_s=4.0, window_bytes=3 * PAGE_BYTES, write_bytes=2 * PAGE_BYTES)


def page_content(request_id: str, index: int) -> bytes:
    """What page `index` of a request must hold."""
    return blake2b(f"{request_id}:{index}".encode(), digest_size=PAGE_BYTES).digest()


def page_name(request_id: str, index: int) -> bytes:
    """The name of that page in a prefix cache."""
    return f"name:{request_id}:{index}".encode()


def sim_passport(request_id: str, epoch: int, num_tokens: int) -> Passport:
    return Passport(
        request_id=request_id,
        epoch=epoch,
        model="fake",
        token_ids=list(range(num_tokens)),
        prompt_len=num_tokens,
        params=SamplingParams(),
        gateway=GATEWAY,
    )


class SimCarried:
    """Pages ride on the simulated network."""

    name = "tcp"

    def can_take(self, offer: Offer) -> bool:  # noqa: ARG002
        return True

    def close(self) -> None:
        """Nothing."""


class SimDirect(SimCarried):
    """The world writes, step by step; it never calls `write`."""

    name = "shm"

    def write(self, grant: Grant, first: int, page_ids: Sequence[int]) -> None:
        raise AssertionError((grant, first, page_ids))

    def forget(self, address: str) -> None:
        """Nothing is mapped."""


TRANSPORTS = {"shm": SimDirect, "tcp": SimCarried}


@dataclass
class Gate:
    """Generation words."""

    words: dict[int, int] = field(default_factory=dict)

    def open_pages(self, page_ids: Iterable[int], generation: int) -> None:
        self.words.update(dict.fromkeys(page_ids, generation))

    def close_pages(self, page_ids: Iterable[int]) -> None:
        self.words.update(dict.fromkeys(page_ids, 0))


class Process:
    """One process life."""

    def __init__(self, watch: ProcessWatch, name: str, pid: int, *, transport: str, num_pages: int) -> None:
        self.peer = PeerRef(name=name, incarnation=pid * 7919 + 1, address=f"sim://{name}")
        self.pid = pid
        self.alive = True
        self.stopped = False
        self.memory = [GARBAGE] * num_pages
        self.gate = Gate()
        self.bank = FakeBank(num_pages, on_adopt=self._look)
        self.own_pages: dict[tuple[str, int], list[int]] = {}
        self.news: list[Action] = []
        fingerprint = make_fingerprint(page_size=PAGE_SIZE)
        transports = {transport: TRANSPORTS[transport]()}
        stale: Counter[StaleReason] = Counter()
        giver = Giver(
            GiverConfig(
                peer=self.peer,
                fingerprint=fingerprint,
                page_bytes=PAGE_BYTES,
                transports={transport: transport == "shm"},
                host="one",
                process=ProcessIdentity(pid, pid),
                limits=LIMITS,
                rng=random.Random(pid),
                stale=stale,
            )
        )
        taker = Taker(
            TakerConfig(
                peer=self.peer,
                fingerprint=fingerprint,
                pool=PoolRef(name="", num_pages=num_pages, page_bytes=PAGE_BYTES),
                transports=transports,
                bank=self.bank,
                gate=self.gate,
                watch=watch,
                limits=LIMITS,
                stale=stale,
            )
        )
        self.desk = HandOffDesk(giver, taker, Pulse(self.peer, LIMITS), stale)

    def _look(self, passport: Passport, table: list[int], num_computed_tokens: int) -> None:
        for index in range(-(-num_computed_tokens // PAGE_SIZE)):
            found = self.memory[table[index]]
            assert found == page_content(passport.request_id, index), (passport.request_id, index, found)
