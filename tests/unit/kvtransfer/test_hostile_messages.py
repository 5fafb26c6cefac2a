"""A peer with the fleet's key that says nonsense: no message raises, no page leaks, and hand-offs of others go on."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.hand_off_process import LIMITS, PAGE_SIZE, sim_passport
from support.hand_off_world import World
from support.passports import make_fingerprint

from fleet.errors import WireError
from fleet.hand_off_messages import (
    Abort,
    Ack,
    Alive,
    Commit,
    Grant,
    HandOffMessage,
    Offer,
    OpenHandOff,
    Pages,
    PagesTaken,
    PoolRef,
    Refuse,
    RefuseReason,
    Released,
)
from fleet.types import PeerRef
from fleet.wire import decode, encode
from kvtransfer.actions import Send

NUM_TOKENS = 3 * PAGE_SIZE + 1
HOSTILE = PeerRef("hostile", 666, "sim://hostile")
SIGNED = st.sampled_from([-(2**63), -1, 0, 1, 2, 7, 4096, 2**31, 2**62, 2**63 - 1])
COUNT = SIGNED.filter(lambda value: value >= 0)
NAME = st.sampled_from(["r", "s", "x" * 128])
EPOCH = st.sampled_from([0, 1, 2**62])
PASSPORT = st.builds(
    lambda name, epoch, num_tokens, prompt_len: msgspec.structs.replace(
        sim_passport(name, epoch, num_tokens), prompt_len=prompt_len
    ),
    NAME.filter(lambda name: name != "r"),
    EPOCH,
    st.sampled_from([5, 17, 9999]),
    st.sampled_from([1, 5]),
)
POOL = st.builds(PoolRef, name=st.sampled_from(["", "../etc", "baton-1-1"]), num_pages=SIGNED, page_bytes=SIGNED)
COMMON = {"request_id": NAME, "epoch": EPOCH, "generation": SIGNED}
MESSAGES: st.SearchStrategy[HandOffMessage] = st.one_of(
    st.builds(
        Offer,
        offer=COUNT,
        giver=st.just(HOSTILE),
        passport=PASSPORT,
        fingerprint=st.sampled_from([make_fingerprint(page_size=PAGE_SIZE), make_fingerprint(page_size=1)]),
        page_hashes=st.lists(st.binary(max_size=40), max_size=6),
        num_pages=SIGNED,
        transports=st.sampled_from([("shm",), ("tcp",), (), ("shm",) * 1000]),
        host=st.text(max_size=5),
        pid=st.sampled_from([-1, 0, 666, 2**62]),  # naming a process that lives keeps pages in quarantine, as it must
        start_ticks=SIGNED,
    ),
    st.builds(
        Grant,
        **COMMON,
        offer=COUNT,
        taker=st.just(HOSTILE),
        transport=st.sampled_from(["shm", "tcp", "?"]),
        num_held_pages=COUNT,
        page_ids=st.lists(SIGNED, max_size=8),
        pool=POOL,
    ),
    st.builds(
        Refuse,
        **COMMON,
        offer=COUNT,
        reason=st.sampled_from(RefuseReason),
        message=st.text(max_size=9),
        taker=st.just(HOSTILE),
        retry_after_ms=SIGNED,
    ),
    st.builds(Pages, **COMMON, first=COUNT, count=COUNT.filter(bool)),
    st.builds(PagesTaken, **COMMON, count=COUNT),
    st.builds(Commit, giver=st.just(HOSTILE), passport=PASSPORT, generation=SIGNED, num_computed_tokens=COUNT),
    st.builds(Ack, **COMMON),
    st.builds(Abort, **COMMON, sender=st.just(HOSTILE), offer=COUNT, reason=st.text(max_size=9)),
    st.builds(Released, **COMMON),
    st.builds(
        Alive,
        sender=st.just(HOSTILE),
        beat=COUNT,
        hand_offs=st.lists(st.builds(OpenHandOff, NAME, EPOCH, SIGNED), max_size=200),
    ),
)


@pytest.mark.parametrize("transport", ["shm", "tcp"])
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(messages=st.lists(MESSAGES, min_size=1, max_size=25), frames=st.integers(0, 3))
def test_nonsense_disturbs_nobody(transport: str, messages: list[HandOffMessage], frames: int) -> None:
    world = World(transport=transport, num_pages=12)
    giver, taker = world.processes["giver-0"], world.processes["taker-0"]
    world.start(giver, "r", 0, NUM_TOKENS, [taker])
    world.run()
    for message in messages:
        for process in (giver, taker):
            for action in process.desk.on_message(message, [memoryview(bytes(8))] * frames, world.now_s):
                # What is said to the hostile peer gets lost; nothing may be said to others.
                assert not isinstance(action, Send) or action.to == HOSTILE
    world.ready("r", 0, NUM_TOKENS // PAGE_SIZE)
    world.commit("r", 0, NUM_TOKENS)
    world.run()
    assert world.adoptions(("r", 0)) == 1
    taker.bank.finish(("r", 0))
    # The hostile peer dies; whatever it was granted comes back.
    world.run(for_s=3 * LIMITS.liveness_s)
    world.check_settled()


@settings(max_examples=300, deadline=None, derandomize=True)
@given(message=MESSAGES, at=st.integers(0, 400), noise=st.binary(min_size=1, max_size=8))
def test_a_mutated_message_is_refused_or_well_formed(message: HandOffMessage, at: int, noise: bytes) -> None:
    header, body = (bytes(frame) for frame in encode(message))
    at = min(at, len(body))
    for broken in (body[:at], body[:at] + noise + body[at:], body[:at] + noise + body[at + len(noise) :]):
        try:
            decoded, _ = decode([header, broken])
        except WireError:
            continue
        assert decode([bytes(frame) for frame in encode(decoded)])[0] == decoded
