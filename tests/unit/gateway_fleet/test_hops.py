"""A request's path over the workers, as the gateway notes it and as it is read back out of Redis."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.redis_server import RedisServer
from support.request_fleet import Fleet, handing, tokens

from fleet.hops import MAX_HOPS, Hop, HopLog, decode_hops
from fleet.messages import HandedOff, MoveReason, RequestFinished, RequestStarted
from fleet.redis_client import connect
from fleet.request_state import RequestStateWriter
from fleet.request_status import RequestStatusReader
from fleet.types import FinishReason, RequestState, Role


@pytest.fixture
def redis_url(tmp_path: Path) -> Iterator[str]:
    with RedisServer(tmp_path) as server:
        yield server.url


def brief(hops: list[Hop]) -> list[tuple[str, str, int, str, str | None]]:
    return [(hop.worker, hop.role.value, hop.epoch, hop.reason, hop.transport) for hop in hops]


async def test_replay_and_move_are_told_by_any_gateway(redis_url: str) -> None:
    fleet = Fleet()
    p, d = fleet.join("p", Role.PREFILL), fleet.join("d", Role.DECODE)
    fleet.admit()
    fleet.say(p, RequestStarted(request_id="r", epoch=0, cached_tokens=2), tokens(0, 7), handing(d))
    fleet.say(d, HandedOff(request_id="r", epoch=0), tokens(1, 8))
    e = fleet.join("e", Role.DECODE)
    fleet.bus.lost_callbacks[0](d.address)
    fleet.say(p, RequestStarted(request_id="r", epoch=1), tokens(2, 9, epoch=1), handing(e, epoch=1))
    fleet.say(e, HandedOff(request_id="r", epoch=1, next_index=3))
    f = fleet.join("f", Role.DECODE)
    fleet.say(f, HandedOff(request_id="r", epoch=1, next_index=3))  # the taker's word overtakes the giver's
    fleet.say(e, handing(f, epoch=1, reason=MoveReason.DRAIN))
    ending = RequestFinished(request_id="r", epoch=1, reason=FinishReason.STOP, num_output_tokens=3)
    fleet.say(f, ending)

    redis = connect(redis_url)
    try:
        states = RequestStateWriter(redis, namespace="n")
        for transition in fleet.states:
            states.record(transition)
        await states.flush()
        reader = RequestStatusReader(redis, namespace="n")
        status = await reader.read("r")
        assert status is not None
        assert brief(status.hops) == [
            ("p", "prefill", 0, "admitted", None),
            ("d", "decode", 0, "prefilled", "shm"),
            ("p", "prefill", 1, "worker_lost", None),
            ("e", "decode", 1, "prefilled", "shm"),
            ("f", "decode", 1, "drain", "shm"),
        ]
        assert (status.state, status.epoch, status.finish_reason) == (RequestState.FINISHED, 1, "stop")
        assert (status.model, status.gateway, status.decode_worker) == ("m", "g", "f")
        assert (status.prompt_tokens, status.cached_tokens, status.output_tokens) == (3, 2, 3)
        assert status.first_token is not None
        assert status.created <= status.first_token <= status.updated
        assert await reader.read("nobody") is None
        await redis.hset("n:request:odd", mapping={"state": "nonsense"})
        assert await reader.read("odd") is None
    finally:
        await redis.aclose()


def test_a_restless_request_keeps_its_latest_hops() -> None:
    log = HopLog()
    for number in range(3 * MAX_HOPS):
        log.announce(f"d{number}", transport="tcp", reason="drain")
        log.adopt(f"d{number}", epoch=0)
    hops = decode_hops(log.encoded().encode())
    assert [hop.worker for hop in hops] == [f"d{number}" for number in range(2 * MAX_HOPS, 3 * MAX_HOPS)]
    log.announce("gone", transport="tcp", reason="drain")
    log.send("p", epoch=1, reason="worker_lost")
    log.adopt("gone", epoch=1)
    assert brief(decode_hops(log.encoded().encode()))[-1] == ("gone", "decode", 1, "handed_off", None)
    assert decode_hops(b"{") == []


def test_a_late_word_explains_the_hop_that_it_is_about() -> None:
    log = HopLog()
    log.send("p", epoch=0, reason="admitted")
    log.announce("d", transport="shm", reason="prefilled")
    for worker in ("d", "e"):
        log.adopt(worker, epoch=0)
    log.announce("f", transport="shm", reason="drain")
    log.adopt("f", epoch=0)
    assert log.announce("e", transport="tcp", reason="reclaim")
    assert not log.announce("e", transport="shm", reason="drain"), "f moves it back"
    log.adopt("e", epoch=0)
    assert [(hop.worker, hop.reason, hop.transport) for hop in decode_hops(log.encoded().encode())] == [
        ("p", "admitted", None),
        ("d", "prefilled", "shm"),
        ("e", "reclaim", "tcp"),
        ("f", "drain", "shm"),
        ("e", "drain", "shm"),
    ]
