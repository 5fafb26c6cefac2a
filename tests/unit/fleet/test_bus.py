"""The bus on real sockets: order, broken peers, locked doors, poison."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import zmq
from support.fleet import DEMO

from fleet.bus import Bus, BusConfig, Delivery
from fleet.curve import CurveKeys
from fleet.errors import AddressInUse, BusClosed, SettingsError
from fleet.messages import Cancel
from fleet.wire import encode

SECRET = "correct horse battery"


async def take(bus: Bus, count: int, *, within_s: float = 5.0) -> list[Delivery]:
    """The next `count` deliveries, or fewer when time runs out."""
    taken: list[Delivery] = []
    with suppress(TimeoutError):
        async with asyncio.timeout(within_s):
            async for delivery in bus.receive():
                taken.append(delivery)
                if len(taken) == count:
                    break
    return taken


@pytest.mark.parametrize("secret", ["", SECRET])
async def test_messages_arrive_in_order_with_their_payload(secret: str) -> None:
    async with Bus(BusConfig(cluster_secret=secret)) as a, Bus(BusConfig(cluster_secret=secret)) as b:
        for epoch in range(100):
            assert a.send(b.address, Cancel(request_id="r", epoch=epoch), [b"page %d" % epoch])
        taken = await take(b, 100)
    assert [d.message for d in taken] == [Cancel(request_id="r", epoch=epoch) for epoch in range(100)]
    assert [bytes(d.payload[0]) for d in taken] == [b"page %d" % epoch for epoch in range(100)]


async def test_a_peer_may_be_forgotten_and_spoken_to_again_at_once() -> None:
    """A monitor's endpoint was named by its socket's place in memory, which the next socket found taken."""
    async with Bus(BusConfig()) as a, Bus(BusConfig()) as b:
        for epoch in range(50):
            a.send(b.address, Cancel(request_id="r", epoch=epoch))
            assert a.num_peers == 1
            a.forget(b.address)
        a.send(b.address, Cancel(request_id="last", epoch=0))
        async with asyncio.timeout(5):
            async for delivery in b.receive():
                if delivery.message == Cancel(request_id="last", epoch=0):
                    break


async def test_an_address_that_is_none_costs_the_message_and_nothing_else() -> None:
    async with Bus(BusConfig()) as bus:
        for address in ("nonsense", "tcp://127.0.0.1", "tcp://*:5", "gopher://127.0.0.1:70", ""):
            assert not bus.send(address, Cancel(request_id="r", epoch=0))
        assert (bus.num_peers, bus.counters.dropped) == (0, 5)


async def test_a_dead_peer_is_reported_within_a_second() -> None:
    lost: asyncio.Queue[str] = asyncio.Queue()
    async with Bus(BusConfig()) as a, asyncio.TaskGroup() as tasks:
        a.on_peer_lost(lost.put_nowait)
        watcher = tasks.create_task(a.watch_peers())
        async with Bus(BusConfig()) as b:
            a.send(b.address, Cancel(request_id="r", epoch=0))
            assert len(await take(b, 1)) == 1
        died_s = time.monotonic()
        async with asyncio.timeout(5):
            assert await lost.get() == b.address
        watcher.cancel()
        assert time.monotonic() - died_s < 1


async def test_the_watch_goes_on_when_peers_are_forgotten_amid_it() -> None:
    lost: asyncio.Queue[str] = asyncio.Queue()
    async with Bus(BusConfig()) as a, asyncio.TaskGroup() as tasks:
        a.on_peer_lost(lost.put_nowait)
        watcher = tasks.create_task(a.watch_peers())
        for _ in range(3):
            async with Bus(BusConfig()) as b, Bus(BusConfig()) as c:
                for peer in (b, c):
                    a.send(peer.address, Cancel(request_id="r", epoch=0))
                    assert len(await take(peer, 1)) == 1
                a.forget(c.address)
            async with asyncio.timeout(5):
                assert await lost.get() == b.address
            a.forget(b.address)
        assert not watcher.done()
        watcher.cancel()


async def test_a_peer_that_stays_away_is_forgotten_and_one_that_comes_back_is_not() -> None:
    async with Bus(BusConfig(silence_s=0.15)) as a, Bus(BusConfig()) as here, asyncio.TaskGroup() as tasks:
        watcher = tasks.create_task(a.watch_peers())
        async with Bus(BusConfig()) as gone:
            for peer in (here, gone):
                a.send(peer.address, Cancel(request_id="r", epoch=0))
                assert len(await take(peer, 1)) == 1
            assert a.num_peers == 2
        async with asyncio.timeout(5):
            while a.num_peers > 1:  # noqa: ASYNC110 - the bus tells nobody that it forgot
                await asyncio.sleep(0.02)
        assert a.send(here.address, Cancel(request_id="r", epoch=1))
        assert len(await take(here, 1)) == 1
        watcher.cancel()


async def test_without_the_secret_nobody_gets_in() -> None:
    async with (
        Bus(BusConfig(cluster_secret=SECRET)) as inside,
        Bus(BusConfig(cluster_secret=SECRET + "!")) as other,
        Bus(BusConfig()) as bare,
        asyncio.TaskGroup() as tasks,
    ):
        watcher = tasks.create_task(inside.watch_peers())
        for stranger in (other, bare):
            seen = inside.counters.refused_handshakes
            stranger.send(inside.address, Cancel(request_id="r", epoch=0))
            assert await take(inside, 1, within_s=0.5) == []
            assert inside.counters.refused_handshakes > seen
            stranger.forget(inside.address)
        watcher.cancel()
    assert inside.counters.malformed == 0


def unknown_pair() -> tuple[bytes, bytes]:
    """A CURVE pair that the secret does not give."""
    public, secret = zmq.curve_keypair()
    return public, secret


async def test_an_inbox_beyond_loopback_hears_the_fleet_alone() -> None:
    """Bound to every address; strangers come to 127.0.0.2 bare, with PLAIN, and with the door's own public key."""
    message = encode(Cancel(request_id="stranger", epoch=0), [])
    beyond = BusConfig(bind_host="0.0.0.0", advertise_host="127.0.0.2", cluster_secret=SECRET)
    with zmq.Context() as context:
        async with Bus(beyond) as inside, Bus(BusConfig(bind_host="127.0.0.3", cluster_secret=SECRET)) as member:
            strangers = [context.socket(zmq.DEALER) for _ in range(3)]
            bare, plain, keyed = strangers
            plain.plain_username, plain.plain_password = b"baton", SECRET.encode()
            keyed.curve_serverkey = CurveKeys.derive(SECRET).server.public
            keyed.curve_publickey, keyed.curve_secretkey = unknown_pair()
            for stranger in (bare, plain, keyed):
                stranger.setsockopt(zmq.LINGER, 0)
                stranger.connect(inside.address)
                stranger.send_multipart(message)
            assert await take(inside, 1, within_s=0.5) == []
            assert member.send(inside.address, Cancel(request_id="member", epoch=0))
            assert [d.message for d in await take(inside, 1)] == [Cancel(request_id="member", epoch=0)]
            assert await take(inside, 1, within_s=0.2) == []
            for stranger in strangers:
                stranger.close()
    assert inside.counters.malformed == 0


async def test_the_fleet_tells_nothing_to_an_inbox_without_the_secret() -> None:
    """Somebody who got himself into the registry, or took over an address, is not spoken to."""
    message = Cancel(request_id="r", epoch=0)
    async with Bus(BusConfig(bind_host="127.0.0.2", cluster_secret=SECRET)) as member, Bus(BusConfig()) as bare:
        assert member.send(bare.address, message)
        with zmq.Context() as context, context.socket(zmq.ROUTER) as keyed:
            keyed.setsockopt(zmq.LINGER, 0)
            keyed.curve_server = True
            keyed.curve_publickey, keyed.curve_secretkey = unknown_pair()
            port = keyed.bind_to_random_port("tcp://127.0.0.4")
            assert member.send(f"tcp://127.0.0.4:{port}", message)
            assert await take(bare, 1, within_s=0.5) == []
            assert not keyed.poll(0)


@pytest.mark.parametrize("module", ["prefill_svc", "decode_svc"])
def test_a_worker_beyond_loopback_does_not_start_without_the_secret(module: str, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("BATON_")}
    environment |= {"BATON_BIND_HOST": "0.0.0.0", "BATON_MODEL": str(DEMO)}
    ended = subprocess.run(
        [sys.executable, "-m", module], env=environment, cwd=tmp_path, capture_output=True, timeout=60, check=False
    )
    assert ended.returncode != 0
    assert b"BATON_CLUSTER_SECRET" in ended.stdout + ended.stderr


async def test_poison_is_counted_and_the_next_message_arrives() -> None:
    async with Bus(BusConfig()) as a, Bus(BusConfig()) as b:
        with zmq.Context() as context, context.socket(zmq.DEALER) as raw:
            raw.connect(b.address)
            for frames in ([b""], [b"x", b"y"], [b"BT\x01\x00", b"\xc1"], [b"BT\x63\x00", b"\x80"], [b""] * 5000):
                raw.send_multipart(frames)
            a.send(b.address, Cancel(request_id="r", epoch=0))
            taken = await take(b, 1)
            deadline = time.monotonic() + 5
            while b.counters.malformed < 5 and time.monotonic() < deadline:
                await take(b, 1, within_s=0.05)
            raw.setsockopt(zmq.LINGER, 0)
        assert [d.message for d in taken] == [Cancel(request_id="r", epoch=0)]
        assert b.counters.malformed == 5


def test_beyond_loopback_a_secret_is_required() -> None:
    with pytest.raises(SettingsError, match="BATON_CLUSTER_SECRET"):
        Bus(BusConfig(bind_host="0.0.0.0"))
    with pytest.raises(SettingsError, match="shorter"):
        Bus(BusConfig(cluster_secret="short"))


async def test_a_closed_bus_says_so() -> None:
    bus = Bus(BusConfig())
    bus.close()
    bus.close()
    with pytest.raises(BusClosed):
        bus.send("tcp://127.0.0.1:9", Cancel(request_id="r", epoch=0))


async def test_an_address_that_is_not_ours_is_named() -> None:
    with pytest.raises(AddressInUse, match="192\\.0\\.2\\.1"):
        Bus(BusConfig(bind_host="192.0.2.1", cluster_secret=SECRET))
