"""Whom a leaving worker asks: the registry's last word, least loaded first, nobody whom gateways do not know yet."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
from support.records import make_record
from support.redis_server import RedisServer

from decode_svc.peers import Peers
from fleet.redis_client import connect
from fleet.registry import Registry
from fleet.types import PeerRef, Role, WorkerLoad, WorkerRecord

LEASE_S = 2.0


def record(
    name: str, *, running: int = 0, role: Role = Role.DECODE, model: str = "m", **changes: object
) -> WorkerRecord:
    load = WorkerLoad(num_running=running)
    made = make_record(PeerRef(name, 1, f"tcp://{name}"), role, model=model, max_num_seqs=10, load=load)
    return msgspec.structs.replace(made, **changes)


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def peers_of(registry: Registry | None = None) -> tuple[Peers, Clock]:
    clock = Clock()
    # Where the test speaks for the registry nobody asks it.
    return Peers(registry, record("me"), lease_s=LEASE_S, clock=clock), clock  # type: ignore[arg-type]


def names(found: list[PeerRef]) -> list[str]:
    return [peer.name for peer in found]


def test_only_those_who_could_go_on_are_asked() -> None:
    peers, clock = peers_of()
    stranger = msgspec.structs.replace(record("me").fingerprint, page_size=32)
    records = [
        record("me"),
        record("prefill", role=Role.PREFILL),
        record("other-model", model="n"),
        record("other-pages", fingerprint=stranger),
        record("leaving", draining=True),
        record("fit"),
    ]
    peers.learn(records)
    clock.now_s += LEASE_S
    assert names(peers.pick(0)) == ["fit"]


def test_a_newcomer_waits_until_gateways_know_it() -> None:
    peers, clock = peers_of()
    peers.learn([record("old")])
    clock.now_s += LEASE_S
    peers.learn([record("old"), record("new")])
    assert names(peers.pick(0)) == ["old"]
    clock.now_s += LEASE_S / 2
    peers.learn([record("old"), record("new")])
    assert set(names(peers.pick(0))) == {"old", "new"}
    restarted = record("old", peer=PeerRef("old", 2, "tcp://old"))
    peers.learn([restarted, record("new")])
    assert names(peers.pick(0)) == ["new"]


def test_picks_count_until_the_registry_shows_them() -> None:
    peers, clock = peers_of()
    records = [record("a", running=1), record("b", running=3)]
    peers.learn(records)
    clock.now_s += LEASE_S
    firsts = [peers.pick(0)[0].name for _ in range(6)]
    assert (firsts.count("a"), firsts.count("b")) == (4, 2)
    peers.learn([record("a", running=5), record("b", running=4)])
    assert names(peers.pick(0)) == ["b", "a"]


def test_a_later_turn_begins_with_another() -> None:
    peers, clock = peers_of()
    peers.learn([record("a"), record("b", running=5)])
    clock.now_s += LEASE_S
    assert names(peers.pick(1)) == ["b", "a"]
    assert peers_of()[0].pick(3) == []


async def test_the_last_list_stands_while_redis_is_away(tmp_path: Path) -> None:
    with RedisServer(tmp_path) as server:
        redis = connect(server.url)
        registry = Registry(redis, namespace="t", lease_s=60.0)
        await registry.announce_worker(record("a"))
        peers, clock = peers_of(registry)
        async with asyncio.TaskGroup() as tasks:
            running = tasks.create_task(peers.run())
            peers.want()
            await asyncio.sleep(0.2)
            server.stop()
            await asyncio.sleep(LEASE_S / 2)
            clock.now_s += LEASE_S
            assert names(peers.pick(0)) == ["a"]
            running.cancel()
        await redis.aclose()
