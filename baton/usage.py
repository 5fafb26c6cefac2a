"""`baton usage`: hourly usage per key and model, as CSV or JSON, out of the fleet's Redis."""

from __future__ import annotations

import argparse
import asyncio
import csv
import datetime as dt
import io
import time
from typing import Any

import msgspec
from rich.console import Console

from baton.errors import CommandError, RedisUnusable
from baton.keys import add_redis_arguments, find_redis
from baton.settings import Surroundings, without_password
from fleet.keys import KeyRegistry
from fleet.redis_client import UNAVAILABLE, connect
from fleet.usage import BUCKETS, RedisUsage, UsageRow, bucketed, of_key, span

COLUMNS = ("start", "key_id", "key_name", "model", "requests", "prompt_tokens", "cached_tokens", "completion_tokens")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its flags."""
    parser.add_argument("--format", choices=("csv", "json"), default="csv", help="default: csv")
    parser.add_argument(
        "--from", dest="from_time", metavar="TIME", help="Unix seconds or ISO 8601 (default: a day ago)"
    )
    parser.add_argument("--to", dest="to_time", metavar="TIME", help="likewise (default: now)")
    parser.add_argument("--bucket", choices=tuple(BUCKETS), default="hour", help="one line per hour (default) or day")
    parser.add_argument("--key", metavar="KEY_ID", help="of this key alone, see `baton keys list`")
    add_redis_arguments(parser)


def run(arguments: argparse.Namespace, around: Surroundings, console: Console) -> int:
    """Print the report; returns the exit code.

    Raises:
        CommandError: a bad time, or no Redis to read from.
        SettingsError: a bad variable or `baton.toml`.
    """
    try:
        from_s, to_s = span(arguments.from_time, arguments.to_time, now_s=time.time())
    except ValueError as error:
        name, problem = error.args
        raise CommandError(f"--{name} {problem}") from error
    url, namespace = find_redis(arguments.redis_url, arguments.namespace, around)
    rows, names = asyncio.run(_read(url, namespace, from_s, to_s))
    table = [_record(row, names) for row in bucketed(of_key(rows, arguments.key), BUCKETS[arguments.bucket])]
    text = msgspec.json.encode(table).decode() + "\n" if arguments.format == "json" else _csv(table)
    console.out(text, end="", highlight=False)
    return 0


async def _read(url: str, namespace: str, from_s: int, to_s: int) -> tuple[list[UsageRow], dict[str, str]]:
    """Hourly rows, and the keys' names by id."""
    redis = connect(url)
    try:
        keys = await KeyRegistry(redis, namespace=namespace).list()
        return await RedisUsage(redis, namespace=namespace).read(from_s, to_s), {key.key_id: key.name for key in keys}
    except UNAVAILABLE as error:
        raise RedisUnusable(f"Redis at {without_password(url)} does not answer: {error}") from error
    finally:
        await redis.aclose()


def _record(row: UsageRow, names: dict[str, str]) -> dict[str, Any]:
    start = dt.datetime.fromtimestamp(row.start_s, dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    who = {"start": start, "key_id": row.key_id, "key_name": names.get(row.key_id, ""), "model": row.model}
    return {**who, **msgspec.structs.asdict(row.counts)}


def _csv(table: list[dict[str, Any]]) -> str:
    written = io.StringIO()
    writer = csv.DictWriter(written, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return written.getvalue()
