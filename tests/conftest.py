"""For all tests: a real Redis on a socket of its own, and an option."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from support.redis_server import RedisServer

from fleet.redis_client import Redis, connect


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--schemas 5000`: a long run of the structured output suite."""
    parser.addoption("--schemas", type=int, default=330, help="how many generated JSON schemas are answered")


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """One embedded Redis for the session; tests keep apart by flushing it."""
    directory: Path = tmp_path_factory.mktemp("redis")
    with RedisServer(directory) as server:
        yield server


@pytest.fixture
async def redis(redis_server: RedisServer) -> AsyncIterator[Redis]:
    """A client on an empty Redis."""
    client = connect(redis_server.url)
    await client.flushall()
    yield client
    await client.aclose()
