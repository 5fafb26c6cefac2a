"""Redis behind passwords, access lists and TLS: the forms of `BATON_REDIS_URL` that docs/security.md names."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
import trustme
from redis.exceptions import NoPermissionError, RedisError
from support.redis_server import RedisServer

from fleet.keys import KeyRegistry
from fleet.lifecycle import new_peer
from fleet.redis_client import connect
from fleet.registry import Registry

PASSWORD = "open-sesame"
ACL = ("--user", "baton", "on", f">{PASSWORD}", "~baton:*", "~LIMITS:*", "+@all", "-@dangerous")


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """Nobody gets in without a password; the user `baton` has the fleet's keys and no dangerous commands."""
    options = ("--requirepass", "the-administrators", *ACL)
    with RedisServer(tmp_path_factory.mktemp("locked"), options=options) as server:
        yield server


@asynccontextmanager
async def behind_tls(socket_path: str, context: ssl.SSLContext) -> AsyncIterator[int]:
    """Terminate TLS before a Redis server's Unix socket; yields the port on 127.0.0.1."""

    async def copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await source.read(65536):
                sink.write(data)
                await sink.drain()
        sink.close()

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_reader, inner_writer = await asyncio.open_unix_connection(socket_path)
        await asyncio.gather(copy(reader, inner_writer), copy(inner_reader, writer))

    async with await asyncio.start_server(forward, "127.0.0.1", 0, ssl=context) as server:
        yield server.sockets[0].getsockname()[1]


def url_of(server: RedisServer, *, user: str = "", password: str = "") -> str:
    return f"unix://{user}:{password}@{server.socket_path}"


async def test_the_access_list_of_the_docs_is_enough_for_the_fleet(locked: RedisServer) -> None:
    async with connect(url_of(locked, user="baton", password=PASSWORD)) as redis:
        registry = Registry(redis, namespace="baton", lease_s=3)
        await registry.announce_gateway(new_peer(name="g", kind="gateway", address="tcp://127.0.0.1:1"))
        keys = KeyRegistry(redis, namespace="baton")
        await keys.create("alice")
        assert [key.name for key in await keys.list()] == ["alice"]
        with pytest.raises(NoPermissionError):
            await redis.get("others:secret")
        with pytest.raises(NoPermissionError):
            await redis.flushall()


@pytest.mark.parametrize(("user", "password"), [("", ""), ("baton", "wrong"), ("nobody", PASSWORD)])
async def test_without_the_right_password_there_is_no_redis(locked: RedisServer, user: str, password: str) -> None:
    url = url_of(locked, user=user, password=password) if user else locked.url
    async with connect(url) as redis:
        with pytest.raises(RedisError, match=r"(?i)authenticat|invalid username-password") as caught:
            await redis.ping()
    assert PASSWORD not in str(caught.value)


async def test_tls_is_checked_against_the_authority_in_the_url(locked: RedisServer, tmp_path: Path) -> None:
    ours, another = trustme.CA(), trustme.CA()
    files = {name: tmp_path / f"{name}.pem" for name in ("ours", "another")}
    ours.cert_pem.write_to_path(str(files["ours"]))
    another.cert_pem.write_to_path(str(files["another"]))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    ours.issue_cert("localhost").configure_cert(context)
    async with behind_tls(locked.socket_path, context) as port:
        account = f"baton:{PASSWORD}@"
        async with connect(f"rediss://{account}localhost:{port}?ssl_ca_certs={files['ours']}") as redis:
            assert await redis.ping()
            assert await redis.set("baton:through-tls", "yes")
            assert await redis.get("baton:through-tls") == b"yes"
        for refused, why in (
            (f"rediss://{account}localhost:{port}?ssl_ca_certs={files['another']}", "CERTIFICATE_VERIFY_FAILED"),
            (f"rediss://{account}localhost:{port}", "CERTIFICATE_VERIFY_FAILED"),
            (f"rediss://{account}127.0.0.1:{port}?ssl_ca_certs={files['ours']}", "IP address mismatch"),
            (f"redis://{account}localhost:{port}", "closed|reset|Timeout"),
        ):
            async with connect(refused) as redis:
                with pytest.raises(RedisError, match=why) as caught:
                    await redis.ping()
            assert PASSWORD not in str(caught.value)
