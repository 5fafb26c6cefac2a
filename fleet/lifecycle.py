"""How a service process begins and ends: uvloop, signals, exit codes."""

from __future__ import annotations

import asyncio
import secrets
import signal
import sys
from collections.abc import Awaitable, Callable

import uvloop

from fleet.errors import BatonError, SettingsError
from fleet.logs import get_logger
from fleet.types import PeerRef

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_BAD_SETTINGS = 2

_log = get_logger("lifecycle")


def new_peer(*, name: str, kind: str, address: str) -> PeerRef:
    """This process's identity; a missing name is drawn."""
    return PeerRef(name or f"{kind}-{secrets.token_hex(3)}", secrets.randbits(63), address)


def run_service(main: Callable[[asyncio.Event], Awaitable[None]]) -> int:
    """Run `main(stop)` on a fresh loop; SIGTERM and SIGINT set `stop`. Returns the process's exit code."""

    async def supervised() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signum, stop.set)
        await main(stop)

    code = EXIT_OK
    try:
        uvloop.run(supervised())
    except* SettingsError as group:
        code = EXIT_BAD_SETTINGS
        for error in _leaves(group):
            print(f"baton: {error}", file=sys.stderr)  # noqa: T201 - the start's last word, before or without logs
    except* BatonError as group:
        code = EXIT_FAILED
        for error in _leaves(group):
            _log.error("service failed", error=str(error), kind=type(error).__name__)
    return code


def _leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    found: list[BaseException] = []
    for error in group.exceptions:
        found.extend(_leaves(error) if isinstance(error, BaseExceptionGroup) else [error])
    return found
