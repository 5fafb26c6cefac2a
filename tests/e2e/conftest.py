"""Fixtures of the end-to-end tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from support.fleet import DEMO_PREFILL, DEMO_WORKER, Fleet
from support.redis_server import RedisServer


@pytest.fixture(scope="module")
def module_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A Redis of the module's own, since fleets of several tests live on it."""
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@contextmanager
def _demo_fleet(paths: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Two prefill and two decode workers with the demo model in float32, so that answers are exactly repeatable."""
    with (
        RedisServer(paths.mktemp("redis")) as redis,
        Fleet(redis, paths.mktemp("fleet"), settings={"lease_s": "2"}) as fleet,
    ):
        for number in (1, 2):
            fleet.start("prefill_svc", f"prefill-{number}", **DEMO_PREFILL)
            fleet.start("decode_svc", f"decode-{number}", **DEMO_WORKER)
        fleet.gateway()
        fleet.wait_ready(prefill=2, decode=2)
        yield fleet


@pytest.fixture(scope="session")
def demo_fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """For tests that leave the fleet as it was; they share it."""
    with _demo_fleet(tmp_path_factory) as fleet:
        yield fleet


@pytest.fixture(scope="module")
def own_demo_fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """The same, for a module that stops some of it."""
    with _demo_fleet(tmp_path_factory) as fleet:
        yield fleet
