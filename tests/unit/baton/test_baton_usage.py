"""`baton usage` on a real Redis."""

from __future__ import annotations

import asyncio
import csv
import io
import json
from pathlib import Path

import pytest
import redis as blocking_redis
from support.redis_server import RedisServer

from baton.cli import main
from fleet.keys import KeyRegistry
from fleet.redis_client import connect
from fleet.usage import Counts, RedisUsage

COUNTS = Counts(requests=2, prompt_tokens=20, cached_tokens=16, completion_tokens=7)


@pytest.fixture
def url(redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    monkeypatch.chdir(tmp_path)
    with blocking_redis.Redis.from_url(redis_server.url) as client:
        client.flushall()
    return redis_server.url


def _fill(url: str) -> str:
    async def fill() -> str:
        client = connect(url)
        try:
            key, _ = await KeyRegistry(client, namespace="baton").create("alice, the first")
            usage = RedisUsage(client, namespace="baton", clock=lambda: 7200.0)
            usage.add(key.key_id, "demo", COUNTS)
            usage.add("", "demo", COUNTS)
            await usage.flush()
            return key.key_id
        finally:
            await client.aclose()

    return asyncio.run(fill())


def test_usage_as_csv_and_json(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    key_id = _fill(url)
    arguments = ["usage", "--redis-url", url, "--from", "0", "--to", "1970-01-02"]
    assert main(arguments) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["key_id"] for row in rows] == ["", key_id]
    assert rows[1] == {
        "start": "1970-01-01T02:00:00Z",
        "key_id": key_id,
        "key_name": "alice, the first",
        "model": "demo",
        "requests": "2",
        "prompt_tokens": "20",
        "cached_tokens": "16",
        "completion_tokens": "7",
    }
    assert main([*arguments, "--format", "json", "--bucket", "day", "--key", key_id]) == 0
    (entry,) = json.loads(capsys.readouterr().out)
    assert (entry["start"], entry["requests"]) == ("1970-01-01T00:00:00Z", 2)
    assert main(["usage", "--redis-url", url]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1, "nothing in the last day but the head of the table"


def test_bad_times_and_no_redis_are_told(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["usage", "--redis-url", url, "--from", "yesterday"]) != 0
    assert "--from" in capsys.readouterr().err
    assert main(["usage", "--redis-url", "redis://127.0.0.1:1/0"]) == 1
    assert "does not answer" in capsys.readouterr().err
