"""docs/api.md names every endpoint and every field."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from litestar import Litestar
from litestar.testing import AsyncTestClient

from gateway.api.anthropic_api.requests import CreateMessageRequest
from gateway.api.requests import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    TokenizeRequest,
)

DOCS = (Path(__file__).parents[3] / "docs" / "api.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "body",
    [
        ChatCompletionRequest,
        CompletionRequest,
        CreateMessageRequest,
        EmbeddingRequest,
        TokenizeRequest,
        DetokenizeRequest,
    ],
)
def test_every_field_is_described(body: type[msgspec.Struct]) -> None:
    missing = [name for name in body.__struct_encode_fields__ if f"`{name}" not in DOCS]
    assert missing == []


async def test_every_endpoint_is_listed(client: AsyncTestClient[Litestar]) -> None:
    paths = (await client.get("/schema/openapi.json")).json()["paths"]
    listed = DOCS.replace("{id}", "{}")
    for path in paths:
        shown = "/".join("{}" if part.startswith("{") else part for part in path.split("/"))
        tail = shown.partition("{}/")[2]
        assert f"{shown}`" in listed or (tail and f"…/{tail}`" in listed), path
