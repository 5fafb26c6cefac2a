"""Cuts the network between processes of one machine: a TCP proxy before every inbox, in a thread of its own.

Each process advertises a loopback address of its own, on which nobody listens but this. A cut of a process covers its
inbox and, found by their local ports, the connections that it made to the inboxes of others.
"""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from types import TracebackType
from typing import Self

import psutil

CHUNK_BYTES = 1 << 16


class Cut(StrEnum):
    """How a link is broken."""

    RESET = "reset"
    """Connections break, and none can be made."""
    SILENT = "silent"
    """Connections stay, and no byte arrives."""


@dataclass(eq=False)
class _Link:
    """One proxied connection."""

    owner: str
    client_port: int
    server: tuple[str, int]
    writers: tuple[asyncio.StreamWriter, asyncio.StreamWriter]
    flows: asyncio.Event = field(default_factory=asyncio.Event)

    def abort(self) -> None:
        for writer in self.writers:
            writer.transport.abort()


class Wires:
    """All proxied inboxes of a fleet. A context manager; its methods may be called from any thread."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="wires", daemon=True)
        self._servers: dict[str, asyncio.Server] = {}
        self._links: set[_Link] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._cuts: dict[str, tuple[Cut, psutil.Process]] = {}

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._run(self._close()).result(timeout=10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)
        self._loop.close()

    def _run(self, work: object) -> Future[None]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)  # type: ignore[arg-type]

    def lead(self, name: str, host: str, port: int) -> None:
        """Lead `host:port` to the inbox of the process `name`, at the same port of 127.0.0.1."""
        self._run(self._lead(name, host, port)).result(timeout=10)

    async def _lead(self, name: str, host: str, port: int) -> None:
        async def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await self._carry(name, port, reader, writer)

        self._servers[name] = await asyncio.start_server(accepted, host, port)

    def drop(self, name: str) -> None:
        """The process is gone for good: nobody listens at its address any more."""
        self._run(self._drop(name)).result(timeout=10)

    async def _drop(self, name: str) -> None:
        server = self._servers.pop(name, None)
        if server is not None:
            server.close()
        for link in [link for link in self._links if link.owner == name]:
            link.abort()

    def cut(self, name: str, pid: int, how: Cut) -> None:
        """Break every connection from and to this process until `heal`."""
        self._run(self._cut(name, pid, how)).result(timeout=10)

    async def _cut(self, name: str, pid: int, how: Cut) -> None:
        self._cuts[name] = (how, psutil.Process(pid))
        for link in list(self._links):
            if self._is_cut(link) is Cut.RESET:
                link.abort()
            elif self._is_cut(link) is Cut.SILENT:
                link.flows.clear()

    def heal(self, name: str) -> None:
        """Let it all flow again, what waited included."""
        self._run(self._heal(name)).result(timeout=10)

    async def _heal(self, name: str) -> None:
        self._cuts.pop(name, None)
        for link in self._links:
            link.flows.set()

    def _is_cut(self, link: _Link) -> Cut | None:
        for name, (how, process) in self._cuts.items():
            if link.owner == name or (link.client_port, link.server) in _connections(process):
                return how
        return None

    async def _carry(self, name: str, port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            writer.transport.abort()
            self._tasks.discard(task)
            return
        client, server = (writer.get_extra_info(key) for key in ("peername", "sockname"))
        link = _Link(name, client[1], server[:2], (writer, inner_writer))
        link.flows.set()
        self._links.add(link)
        if self._cuts and (how := self._is_cut(link)):
            link.abort() if how is Cut.RESET else link.flows.clear()
        try:
            with suppress(OSError):
                await _first_of(_pump(reader, inner_writer, link), _pump(inner_reader, writer, link))
        finally:
            link.abort()
            self._links.discard(link)
            self._tasks.discard(task)

    async def _close(self) -> None:
        for server in self._servers.values():
            server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def _first_of(*works: object) -> None:
    tasks = [asyncio.ensure_future(work) for work in works]  # type: ignore[call-overload]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, link: _Link) -> None:
    while data := await reader.read(CHUNK_BYTES):
        await link.flows.wait()
        writer.write(data)
        await writer.drain()


def _connections(process: psutil.Process) -> set[tuple[int, tuple[str, int]]]:
    """Local port and remote address of each; the same port may serve several remote addresses."""
    try:
        made = process.net_connections("tcp")
    except psutil.Error:
        return set()
    return {(one.laddr.port, (one.raddr.ip, one.raddr.port)) for one in made if one.raddr}
