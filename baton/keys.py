"""`baton keys`: make, list and revoke API keys in the fleet's Redis."""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

import msgspec
from rich.console import Console
from rich.table import Table

from baton.errors import CommandError, RedisUnusable
from baton.notes import NoteBook
from baton.settings import Surroundings, without_password
from fleet.keys import ApiKey, KeyRegistry
from fleet.redis_client import UNAVAILABLE, connect
from fleet.service_settings import GatewaySettings

T = TypeVar("T")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`create`, `list`, `revoke`."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    create = actions.add_parser("create", help="make a key; its secret is shown once", allow_abbrev=False)
    create.add_argument("name", help="whose it is, for people")
    create.add_argument("--rpm", type=_limit, metavar="N", help="requests per minute (default: no limit)")
    create.add_argument("--tpm", type=_limit, metavar="N", help="tokens per minute (default: no limit)")
    create.add_argument("--models", default="", metavar="A,B", help="models it may use (default: all)")
    create.add_argument("--admin", action="store_true", help="it may look at the requests and the usage of all keys")
    listing = actions.add_parser("list", help="show all keys, without their secrets", allow_abbrev=False)
    revoke = actions.add_parser("revoke", help="delete a key", allow_abbrev=False)
    revoke.add_argument("key_id", help="its id, see `baton keys list`")
    for action in (create, listing, revoke):
        add_redis_arguments(action)
        action.add_argument("--json", action="store_true", help="print JSON")


def add_redis_arguments(parser: argparse.ArgumentParser) -> None:
    """Which fleet's Redis to work on; for `find_redis`."""
    parser.add_argument("--redis-url", metavar="URL", help="default: BATON_REDIS_URL, else the running `baton up`")
    parser.add_argument("--namespace", metavar="TEXT", help="default: BATON_NAMESPACE, else `baton`")


def run(arguments: argparse.Namespace, around: Surroundings, console: Console) -> int:
    """Do one action; returns the exit code.

    Raises:
        CommandError: no Redis to work on, or no such key.
        SettingsError: a bad variable or `baton.toml`.
    """
    url, namespace = find_redis(arguments.redis_url, arguments.namespace, around)

    def with_keys(action: Callable[[KeyRegistry], Awaitable[T]]) -> T:
        return asyncio.run(_with_keys(url, namespace, action))

    match arguments.action:
        case "create":
            models = tuple(model.strip() for model in arguments.models.split(",") if model.strip())
            key, secret = with_keys(
                lambda keys: keys.create(
                    arguments.name,
                    requests_per_minute=arguments.rpm,
                    tokens_per_minute=arguments.tpm,
                    models=models,
                    admin=arguments.admin,
                )
            )
            _show_new(key, secret, console, as_json=arguments.json)
        case "list":
            _show_all(with_keys(lambda keys: keys.list()), console, as_json=arguments.json)
        case _:
            if not with_keys(lambda keys: keys.revoke(arguments.key_id)):
                raise CommandError(f"there is no key {arguments.key_id}; see `baton keys list`")
            _line(console, msgspec.json.encode({"revoked": arguments.key_id}).decode() if arguments.json else "revoked")
    return 0


def find_redis(url: str | None, namespace: str | None, around: Surroundings) -> tuple[str, str]:
    """URL and namespace to work on: as given, as configured, or of the one running `baton up`.

    Raises:
        NoFleet, SeveralFleets: nothing says which.
    """
    settings = around.load(GatewaySettings, {} if namespace is None else {"namespace": namespace})
    if url is not None:
        return url, settings.namespace
    if around.is_given("redis_url"):
        return settings.redis_url, settings.namespace
    note = NoteBook(around.state_dir).only_one()
    return note.redis_url, namespace or note.namespace


async def _with_keys(url: str, namespace: str, action: Callable[[KeyRegistry], Awaitable[T]]) -> T:
    redis = connect(url)
    try:
        return await action(KeyRegistry(redis, namespace=namespace))
    except UNAVAILABLE as error:
        raise RedisUnusable(f"Redis at {without_password(url)} does not answer: {error}") from error
    finally:
        await redis.aclose()


def _show_new(key: ApiKey, secret: str, console: Console, *, as_json: bool) -> None:
    if as_json:
        _line(console, msgspec.json.encode({"secret": secret, **msgspec.structs.asdict(key)}).decode())
        return
    _line(console, secret)
    _line(console, f"key {key.key_id} for {key.name}; this is the only time it is shown")


def _show_all(keys: list[ApiKey], console: Console, *, as_json: bool) -> None:
    if as_json:
        _line(console, msgspec.json.encode(keys).decode())
        return
    if not keys:
        _line(console, "no keys: everybody who reaches the gateway may use it")
        return
    table = Table("id", "name", "made", "requests/min", "tokens/min", "models", "scope", box=None, pad_edge=False)
    for key in keys:
        made = time.strftime("%Y-%m-%d %H:%M", time.localtime(key.created_s))
        limits = ("" if limit is None else str(limit) for limit in (key.requests_per_minute, key.tokens_per_minute))
        table.add_row(key.key_id, key.name, made, *limits, ", ".join(key.models) or "all", "admin" if key.admin else "")
    console.print(table, markup=False)


def _line(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _limit(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 on")
    return int(text)
