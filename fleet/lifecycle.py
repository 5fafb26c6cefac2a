"""How a service process begins and ends: uvloop, signals, exit codes."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import secrets
import signal
import sys
from collections.abc import Awaitable, Callable
from typing import TypeVar

import uvloop

from fleet.errors import BatonError, SettingsError
from fleet.logs import configure, get_logger
from fleet.service_settings import SERVICES
from fleet.settings import FleetSettings, load
from fleet.types import PeerRef

S = TypeVar("S", bound=FleetSettings)

GC_THRESHOLDS = (10_000, 10, 20)
"""Objects made and not yet gone before the youngest are looked at, how often that before the middle ones are, and how
often those before all are: every two million objects, where Python's own (700, 10, 10) look every 70,000."""

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_BAD_SETTINGS = 2

_log = get_logger("lifecycle")


def new_peer(*, name: str, kind: str, address: str) -> PeerRef:
    """This process's identity; a missing name is drawn."""
    return PeerRef(name or f"{kind}-{secrets.token_hex(3)}", secrets.randbits(63), address)


def calm_collector() -> None:
    """Make full garbage collections rare and short; called once, when a service is about to be ready.

    Such a collection walks every object with the interpreter lock held: no message is heard and no step begins for 0.1
    to 0.3 s of computing at 2,000 streams. What the start made (modules, routes, weights) lives as long as the process
    and is exempt from now on; what streams hold is counted off when they end, and hardly ever in cycles.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)


def give_back_freed_memory() -> None:
    """Return to the system what the start has freed; called once, when a service is about to be ready.

    glibc keeps freed memory that lies below memory in use, in pieces of up to 32 MiB. A model's tensors as they come
    from disk, before they are packed, leave hundreds of MiB that nothing asks for again. Other C libraries have no such
    call.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def run_from_settings(kind: type[S], serve: Callable[[S, asyncio.Event], Awaitable[None]], *, service: str) -> int:
    """Read settings, set up logs, and run `serve(settings, stop)`; SIGTERM and SIGINT set `stop`.

    Returns the process's exit code: 0 after an orderly end, 2 for bad settings, 1 for any other failure of ours.
    """

    async def supervised() -> None:
        settings = load(kind, known=SERVICES)
        configure(service=service, level=settings.log_level, log_format=settings.log_format)
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signum, stop.set)
        await serve(settings, stop)
        # A second signal while the interpreter winds down must not spoil an orderly end.
        for signum in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(signum)
            signal.signal(signum, signal.SIG_IGN)

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
