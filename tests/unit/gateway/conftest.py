"""Fixtures of the gateway's tests."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from gateway_kit import FakePipeline, make_app
from litestar import Litestar
from litestar.testing import AsyncTestClient

Client = AsyncTestClient[Litestar]


@pytest.fixture
def pipeline() -> FakePipeline:
    """A pretended fleet that says `hello world`."""
    return FakePipeline()


@pytest.fixture
async def client(pipeline: FakePipeline) -> AsyncIterator[Client]:
    """A client of an open server over `pipeline`."""
    async with AsyncTestClient(make_app(pipeline)) as opened:
        yield opened
