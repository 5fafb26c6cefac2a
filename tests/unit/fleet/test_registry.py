"""Registry, request state, keys and model files on a real Redis."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import pytest
from support.records import make_record

from fleet import model_files
from fleet.errors import NameTaken
from fleet.keys import KeyRegistry, hash_secret
from fleet.model_files import ModelFiles
from fleet.redis_client import Redis
from fleet.registry import Registry
from fleet.request_state import RequestStateWriter, Transition
from fleet.types import PeerRef, RequestState, Role, WorkerRecord


def record(name: str, incarnation: int = 1) -> WorkerRecord:
    return make_record(PeerRef(name, incarnation, "tcp://127.0.0.1:1"), Role.PREFILL)


async def test_a_lease_runs_out_when_it_is_not_renewed(redis: Redis) -> None:
    registry = Registry(redis, namespace="t", lease_s=0.3)
    await registry.announce_worker(record("a"))
    assert [w.peer.name for w in await registry.workers()] == ["a"]
    await asyncio.sleep(0.4)
    assert await registry.workers() == []
    assert await redis.exists("t:workers") == 0


async def test_a_name_has_one_live_incarnation(redis: Redis) -> None:
    registry = Registry(redis, namespace="t", lease_s=5)
    await registry.announce_worker(record("a", 1))
    await registry.announce_worker(record("a", 1))
    with pytest.raises(NameTaken, match="BATON_NAME"):
        await registry.announce_worker(record("a", 2))
    await registry.withdraw_worker(record("a", 2).peer)
    assert len(await registry.workers()) == 1
    await registry.withdraw_worker(record("a", 1).peer)
    await registry.announce_worker(record("a", 2))
    assert [w.peer.incarnation for w in await registry.workers()] == [2]


async def test_gateways_and_fleets_keep_apart(redis: Redis) -> None:
    one, two = (Registry(redis, namespace=name, lease_s=5) for name in ("one", "two"))
    await one.announce_gateway(PeerRef("g", 1, "tcp://127.0.0.1:2"))
    assert await one.workers() == []
    assert await two.gateways() == []
    assert await one.gateways() == [PeerRef("g", 1, "tcp://127.0.0.1:2")]
    await one.withdraw_gateway(PeerRef("g", 1, ""))
    assert await one.gateways() == []


async def test_a_record_of_another_version_is_skipped(redis: Redis) -> None:
    registry = Registry(redis, namespace="t", lease_s=5)
    await registry.announce_worker(record("a"))
    await redis.hset("t:worker:b", mapping={"incarnation": "1", "record": b"\xc1"})
    await redis.sadd("t:workers", "b")
    assert [w.peer.name for w in await registry.workers()] == ["a"]


async def test_state_moves_forward_only(redis: Redis) -> None:
    writer = RequestStateWriter(redis, namespace="t")
    for state, epoch in [
        (RequestState.QUEUED, 0),
        (RequestState.DECODING, 0),
        (RequestState.PREFILLING, 0),  # late: refused
        (RequestState.QUEUED, 1),  # replayed: taken
        (RequestState.DECODING, 0),  # old epoch: refused
        (RequestState.FINISHED, 1),
        (RequestState.QUEUED, 2),  # ended: refused
    ]:
        writer.record(Transition("r", epoch, state, {"last": state.value}))
    await writer.flush()
    stored = await redis.hgetall("t:request:r")
    assert stored[b"state"] == b"finished"
    assert stored[b"last"] == b"finished"
    assert stored[b"epoch"] == b"1"
    assert float(stored[b"created"]) <= float(stored[b"updated"])
    assert writer.refused == 3
    assert writer.num_pending == 0
    assert 0 < await redis.ttl("t:request:r") <= 900


async def test_the_writer_catches_up_after_an_outage(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = RequestStateWriter(redis, namespace="t")
    flush, failures = writer.flush, [ConnectionRefusedError(), ConnectionRefusedError()]

    async def unlucky() -> None:
        if failures:
            raise failures.pop()
        await flush()

    monkeypatch.setattr(writer, "flush", unlucky)
    monkeypatch.setattr("fleet.request_state.RETRY_S", 0.01)
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(writer.run())
        writer.record(Transition("r", 0, RequestState.QUEUED))
        async with asyncio.timeout(5):
            while writer.num_pending:  # noqa: ASYNC110 - the writer has no event for it, and needs none
                await asyncio.sleep(0.01)
        running.cancel()
    assert await redis.hget("t:request:r", "state") == b"queued"
    assert not failures


async def test_keys_are_stored_hashed_and_can_be_revoked(redis: Redis) -> None:
    keys = KeyRegistry(redis, namespace="t")
    key, secret = await keys.create("alice", requests_per_minute=3, models=("m",))
    assert [k.name for k in await keys.list()] == ["alice"]
    assert (await keys.by_hash())[hash_secret(secret)] == key
    assert secret.encode() not in b"".join((await redis.hgetall("t:keys")).values())
    assert await keys.revoke(key.key_id)
    assert not await keys.revoke(key.key_id)
    assert await keys.list() == []


async def test_model_files_travel_by_digest(redis: Redis, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights stay here")
    files = model_files.read(tmp_path)
    assert files == {"config.json": b"{}"}
    digest = model_files.digest_of(files)
    assert digest != model_files.digest_of({"config.json": b"{ }"})
    store = ModelFiles(redis, namespace="t")
    assert await store.fetch(digest) == {}
    await store.ensure(digest, files)
    await store.ensure(digest, files)
    assert await store.fetch(digest) == files


def test_records_fit_the_wire() -> None:
    raw = msgspec.msgpack.encode(record("a"))
    assert msgspec.msgpack.decode(raw, type=WorkerRecord) == record("a")
