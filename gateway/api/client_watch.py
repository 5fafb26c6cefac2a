"""Work that ends when its client leaves."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any

from litestar.types import Receive

from gateway.errors import ApiError


class ClientGone(Exception):
    """The client closed its connection before its answer was complete."""


async def while_client_stays(parts: Sequence[Coroutine[Any, Any, None]], receive: Receive) -> None:
    """Run all parts side by side to their end, at least one.

    Raises: ClientGone as soon as the client leaves; what a part raises, which ends the others.
    """
    try:
        async with asyncio.TaskGroup() as group:
            watcher = group.create_task(_watch(receive))
            await asyncio.wait([group.create_task(part) for part in parts])
            watcher.cancel()
    except BaseExceptionGroup as failures:
        raise _most_telling(failures) from failures


async def _watch(receive: Receive) -> None:
    """Raises: ClientGone once the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass
    raise ClientGone


def _most_telling(failures: BaseExceptionGroup[BaseException]) -> BaseException:
    """A client that left explains everything else; then our own errors; then whatever came first."""
    leaves: list[BaseException] = []
    stack: list[BaseException] = [failures]
    while stack:
        error = stack.pop()
        if isinstance(error, BaseExceptionGroup):
            stack.extend(reversed(error.exceptions))
        else:
            leaves.append(error)
    for kind in (ClientGone, ApiError):
        for error in leaves:
            if isinstance(error, kind):
                return error
    return leaves[0]
