"""A hostile peer that is let in floods every inbox; the fleet lives, and good streams stay right."""

from __future__ import annotations

import asyncio
import random

import httpx
import pytest
import zmq
from chaos.asks import asks
from chaos.streams import Judge, ask
from support.fleet import Fleet
from support.passports import make_fingerprint

from fleet.hand_off_messages import Abort, Commit, Offer
from fleet.messages import Cancel, Message, PrefillRequest, Publication, Returned, TokenChunk
from fleet.redis_client import connect
from fleet.registry import Registry
from fleet.types import Passport, PeerRef, SamplingParams
from fleet.wire import encode

pytestmark = pytest.mark.e2e

NUM_MESSAGES = 1500
NUM_STREAMS = 8
HOSTILE = PeerRef("hostile", 666, "tcp://127.0.0.1:9")
PARAMS = [
    SamplingParams(temperature=float("nan")),
    SamplingParams(temperature=-1.0, top_p=float("inf"), top_k=-5, min_p=-1.0),
    SamplingParams(max_tokens=2**40, seed=-(2**63), stop_token_ids=(2**31 - 1,)),
    SamplingParams(logit_bias={2**40: float("nan"), -7: 1e300}, repetition_penalty=0.0),
]


def hostile_passport(luck: random.Random) -> Passport:
    ids = luck.choice([[1], [2**31 - 1] * 5, [5] * 40, list(range(3000))])
    return Passport(
        request_id=f"evil-{luck.randrange(100)}",
        epoch=luck.choice([0, 1, 2**62]),
        model=luck.choice(["demo", "?"]),
        token_ids=ids,
        prompt_len=luck.choice([1, len(ids)]),
        params=luck.choice(PARAMS),
        gateway=HOSTILE,
        priority=luck.choice([0, -(2**62)]),
    )


def hostile_message(luck: random.Random) -> Message:
    passport, number = hostile_passport(luck), luck.choice([0, 1, 2**62])
    name, epoch = passport.request_id, passport.epoch
    events = [
        TokenChunk(request_id=name, epoch=epoch, index=number, token_ids=[2**31 - 1]),
        Returned(request_id=name, epoch=epoch, reason="x" * 1000),
    ]
    return luck.choice(
        [
            PrefillRequest(passport=passport, targets=luck.choice([[], [HOSTILE] * 50])),
            Offer(
                offer=number,
                giver=HOSTILE,
                passport=passport,
                fingerprint=make_fingerprint(page_size=16),
                page_hashes=[b"x"] * luck.choice([0, 3000]),
                num_pages=luck.choice([-1, 0, 1, 2**40]),
                transports=("shm", "tcp"),
                host="?",
                pid=-1,
            ),
            Commit(giver=HOSTILE, passport=passport, generation=number, num_computed_tokens=number),
            Abort(sender=HOSTILE, request_id=name, epoch=epoch, offer=number, generation=number, reason=""),
            Publication(worker=HOSTILE, events=events),
            Cancel(request_id=name, epoch=epoch),
        ]
    )


def flood(addresses: list[str]) -> None:
    """Whole messages, cut ones, and noise, in turn, to everybody."""
    luck = random.Random(5)
    with zmq.Context() as context:
        sockets = [context.socket(zmq.DEALER) for _ in addresses]
        for sock, address in zip(sockets, addresses, strict=True):
            sock.setsockopt(zmq.LINGER, 2000)
            sock.connect(address)
        for number in range(NUM_MESSAGES):
            header, body = (bytes(frame) for frame in encode(hostile_message(luck)))
            frames = [
                [header, body],
                [header, body[: luck.randrange(len(body))]],
                [header, luck.randbytes(luck.randrange(200))],
                [b"BT\x63\x00", body, b"x"],
            ][number % 4 if number % 3 else 0]
            for sock in sockets:
                sock.send_multipart(frames)
        for sock in sockets:
            sock.close()


async def test_a_flood_of_hostile_messages_harms_nobody_else(demo_fleet: Fleet) -> None:
    redis = connect(demo_fleet.redis.url)
    registry = Registry(redis, namespace=demo_fleet.namespace, lease_s=2)
    addresses = [record.peer.address for record in await registry.workers()]
    addresses += [peer.address for peer in await registry.gateways()]
    await redis.aclose()
    assert len(addresses) == 5
    asked = [one for one in asks(NUM_STREAMS, seed=11, max_tokens=100) if not one.stops]
    async with httpx.AsyncClient() as client:
        expected = await asyncio.gather(*(ask(client, demo_fleet.url, one) for one in asked))
        judge = Judge({one.number: answer for one, answer in zip(asked, expected, strict=True)})
        flooding = asyncio.create_task(asyncio.to_thread(flood, addresses))
        answers = await asyncio.gather(*(ask(client, demo_fleet.url, one) for one in asked))
        await flooding
        answers += await asyncio.gather(*(ask(client, demo_fleet.url, one) for one in asked))
    for one, answer in zip([*asked, *asked], answers, strict=True):
        assert answer.error is None
        assert judge.differences(one, answer) == (0, 0)
    for service in demo_fleet.services.values():
        assert service.process.poll() is None, service.text()[-3000:]
        assert "Traceback" not in service.text(), service.text()[-3000:]
    assert demo_fleet.metric("baton_worker_bus_lost_messages", fate="malformed") > 0
