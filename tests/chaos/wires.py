"""Cuts the network between processes of one machine: a TCP proxy before every inbox, in a thread of its own.

Each process advertises a loopback address of its own, on which nobody listens but this. A cut of a process covers its
inbox and, found by their sockets, the connections that it made to the inboxes of others.

A trap waits for a message: what it does, it does while the last byte of that message is held back, or right behind it.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from ipaddress import ip_address
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from chaos.zmtp import MessageReader, kinds

CHUNK_BYTES = 1 << 16
SETTLE_S = 0.05
"""In which a connection that was accepted last comes to whoever closes it."""


class Cut(StrEnum):
    """How a link is broken."""

    RESET = "reset"
    """Connections break, and none can be made."""
    SILENT = "silent"
    """Connections stay, and no byte arrives."""


class Side(StrEnum):
    """Whose message it is."""

    SENDER = "sender"
    RECEIVER = "receiver"


@dataclass(eq=False)
class Trap:
    """Strikes one side when the n-th message of a kind passes between processes of two kinds.

    Attributes:
        kind: name of a message, or of an event in a Publication.
        sender, receiver: how their names begin.
        side: whom it strikes.
        nth: from 1.
        before: before the message arrives; else right behind it.
        blow: what happens to the victim's process.
        victim: whom it struck; empty before.
        sprung: set when it has struck, at `sprung_s`, monotonic.
    """

    kind: str
    sender: str
    receiver: str
    side: Side
    nth: int
    before: bool
    blow: Callable[[psutil.Process], None]
    victim: str = ""
    sprung_s: float = 0.0
    sprung: threading.Event = field(default_factory=threading.Event)

    def spring(self, victim: str, process: psutil.Process) -> None:
        """Strike."""
        with suppress(psutil.NoSuchProcess):
            self.blow(process)
        self.victim, self.sprung_s = victim, time.monotonic()
        self.sprung.set()


@dataclass(eq=False)
class _Link:
    """One proxied connection: whose inbox, and who made it; empty for somebody who is none of ours."""

    owner: str
    client: str
    writers: tuple[asyncio.StreamWriter, asyncio.StreamWriter]
    flows: asyncio.Event = field(default_factory=asyncio.Event)
    reader: MessageReader = field(default_factory=MessageReader)

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
        self._processes: dict[str, psutil.Process] = {}
        self._cuts: dict[str, Cut] = {}
        self._trap: Trap | None = None

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

    def know(self, name: str, pid: int) -> None:
        """A process begins: its connections will be known for its own."""
        self._processes[name] = psutil.Process(pid)

    def lead(self, name: str, host: str, port: int) -> None:
        """Lead `host:port` to the inbox of the process `name`, at the same port of 127.0.0.1."""
        self._run(self._lead(name, host, port)).result(timeout=10)

    async def _lead(self, name: str, host: str, port: int) -> None:
        async def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with suppress(asyncio.CancelledError):  # `_close`
                await self._carry(name, port, reader, writer)

        self._servers[name] = await asyncio.start_server(accepted, host, port)

    def drop(self, name: str) -> None:
        """The process is gone for good: nobody listens at its address any more."""
        self._run(self._drop(name)).result(timeout=10)

    async def _drop(self, name: str) -> None:
        server = self._servers.pop(name, None)
        self._processes.pop(name, None)
        if server is not None:
            server.close()
        for link in [link for link in self._links if link.owner == name]:
            link.abort()

    def cut(self, name: str, how: Cut) -> None:
        """Break every connection from and to this process until `heal`."""
        self._run(self._cut(name, how)).result(timeout=10)

    async def _cut(self, name: str, how: Cut) -> None:
        self._cuts[name] = how
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
        for name, how in self._cuts.items():
            if name in (link.owner, link.client):
                return how
        return None

    def set_trap(self, trap: Trap | None) -> None:
        """Wait for a message, instead of for what was waited for; None: for none."""
        self._loop.call_soon_threadsafe(setattr, self, "_trap", trap)

    def _sprung_by(self, link: _Link, frames: list[bytes]) -> tuple[Trap, str] | None:
        """The trap and its victim, if this is the message that it waits for; it waits no more then."""
        trap = self._trap
        if trap is None or not link.owner.startswith(trap.receiver) or trap.kind not in kinds(frames):
            return None
        if not link.client.startswith(trap.sender):
            return None
        trap.nth -= 1
        if trap.nth > 0:
            return None
        self._trap = None
        return trap, link.client if trap.side is Side.SENDER else link.owner

    def _client(self, client: tuple[str, int], server: tuple[str, int]) -> str:
        inode = _inode(client, server)
        processes = list(self._processes.items()) if inode is not None else []
        return next((name for name, process in processes if _holds(process.pid, str(inode))), "")

    async def _carry(self, name: str, port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", port)
        except (OSError, asyncio.CancelledError):
            writer.transport.abort()
            self._tasks.discard(task)
            return
        ends = (writer.get_extra_info(key)[:2] for key in ("peername", "sockname"))
        link = _Link(name, "", (writer, inner_writer))
        link.flows.set()
        try:
            link.client = await asyncio.to_thread(self._client, *ends)
            self._links.add(link)
            if self._cuts and (how := self._is_cut(link)):
                link.abort() if how is Cut.RESET else link.flows.clear()
            with suppress(OSError):
                await _first_of(self._watch(reader, inner_writer, link), _pump(inner_reader, writer, link))
        finally:
            link.abort()
            self._links.discard(link)
            self._tasks.discard(task)

    async def _watch(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, link: _Link) -> None:
        """Carry what the client says; its peer says nothing but ZMTP's own words."""
        while data := await reader.read(CHUNK_BYTES):
            await link.flows.wait()
            done = last = 0
            for end, frames in link.reader.feed(data):
                if found := self._sprung_by(link, frames):
                    trap, victim = found
                    passed = last if trap.before else end
                    writer.write(data[done:passed])
                    await writer.drain()
                    done = passed
                    trap.spring(victim, self._processes[victim])
                last = end
            writer.write(data[done:])
            await writer.drain()

    async def _close(self) -> None:
        for server in self._servers.values():
            server.close()
        await asyncio.sleep(SETTLE_S)
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


def _inode(client: tuple[str, int], server: tuple[str, int]) -> str | None:
    """Of the client's end of a connection, as the kernel lists it (proc_pid_net(5)); None once it is closed."""
    wanted = [_as_listed(client), _as_listed(server)]
    for line in Path("/proc/net/tcp").read_text(encoding="ascii").splitlines()[1:]:
        fields = line.split()
        if fields[1:3] == wanted:
            return fields[9]
    return None


def _as_listed(address: tuple[str, int]) -> str:
    return f"{int.from_bytes(ip_address(address[0]).packed, sys.byteorder):08X}:{address[1]:04X}"


def _holds(pid: int, inode: str) -> bool:
    """Whether a process has this socket open."""
    with suppress(OSError):
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                if str(descriptor.readlink()) == f"socket:[{inode}]":
                    return True
    return False
