"""One worker's hand-off side on a real bus, with real memory and a list of the news it heard."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from typing import Any, Self

import msgspec

from fleet.bus import Bus, BusConfig
from fleet.types import Fingerprint, Passport, PeerRef, SamplingParams
from kvtransfer.device_region import DeviceRegion
from kvtransfer.endpoint import EndpointConfig, HandOffEndpoint
from kvtransfer.limits import HandOffLimits
from kvtransfer.loopback import LoopbackTransport
from kvtransfer.pool_memory import Region
from kvtransfer.region import PoolRegion
from kvtransfer.transport import Transport
from kvtransfer.transports import build_transports
from support.host_device import HostDevice
from support.page_bank import FINGERPRINT, PAGE_BYTES, PoolBank

LIMITS = HandOffLimits(liveness_s=0.6, write_bytes=2 * PAGE_BYTES, window_bytes=4 * PAGE_BYTES)
GATEWAY = PeerRef("g", 1, "tcp://127.0.0.1:1")


class News:
    """Implements `kvtransfer.events.HandOffEvents` by remembering."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, Any]] = []

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("_"):
            raise AttributeError(name)
        return lambda *news: self.heard.append((name, news[0] if len(news) == 1 else news))

    def of(self, kind: str) -> list[Any]:
        return [news for name, news in self.heard if name == kind]


class Side:
    """A worker that can give and take; an async context manager."""

    def __init__(
        self,
        name: str,
        transport: str,
        directory: dict[PeerRef, PoolRegion],
        *,
        num_pages: int = 16,
        fingerprint: Fingerprint = FINGERPRINT,
        incarnation: int | None = None,
    ) -> None:
        self.bank = PoolBank(num_pages, fingerprint)
        self.region: Region = (
            DeviceRegion.create(name, num_pages=num_pages, page_bytes=PAGE_BYTES, memory=HostDevice())
            if transport == "cuda_ipc"
            else PoolRegion.create(name, num_pages=num_pages, page_bytes=PAGE_BYTES, shared=transport == "shm")
        )
        self.bus = Bus(BusConfig(silence_s=0.6))
        self.peer = PeerRef(name, incarnation or secrets.randbits(62), self.bus.address)
        transports: dict[str, Transport] = (
            {"loopback": LoopbackTransport(self.peer, self.region, directory)}
            if transport == "loopback" and isinstance(self.region, PoolRegion)
            else dict(build_transports([transport], self.region))
        )
        self.transports = transports
        self.news = News()
        self.endpoint = HandOffEndpoint(
            EndpointConfig(
                peer=self.peer,
                region=self.region,
                fingerprint=fingerprint,
                bank=self.bank,
                transports=transports,
                send=self.bus.send,
                events=self.news,
                limits=LIMITS,
            )
        )
        self.bus.on_peer_lost(self.endpoint.on_peer_lost)
        self._tasks: list[asyncio.Task[None]] = []
        self._stack = AsyncExitStack()

    async def _listen(self) -> None:
        async for delivery in self.bus.receive():
            self.endpoint.on_message(delivery.message, delivery.payload)  # type: ignore[arg-type]

    async def __aenter__(self) -> Self:
        group = await self._stack.enter_async_context(asyncio.TaskGroup())
        parts = (self._listen(), self.bus.watch_peers(), self.endpoint.run())
        self._tasks = [group.create_task(part) for part in parts]
        return self

    async def vanish(self) -> None:
        """Stop without a word: tasks end, sockets close, memory stays as it is."""
        for task in self._tasks:
            task.cancel()
        await self._stack.aclose()
        self.bus.close()

    async def __aexit__(self, *_: object) -> None:
        await self.vanish()
        for transport in self.transports.values():
            transport.close()
        self.region.unlink()
        self.region.close()

    def fill(self, pages: Sequence[int], seed: int) -> None:
        """Put recognisable bytes into pages."""
        for at, page_id in enumerate(pages):
            self.region.store(page_id, memoryview(bytes((seed * 31 + at * 7 + i) % 251 for i in range(PAGE_BYTES))))


def passport(request_id: str, num_tokens: int, *, epoch: int = 0) -> Passport:
    return Passport(
        request_id=request_id,
        epoch=epoch,
        model="m",
        token_ids=[(i * 5) % 97 for i in range(num_tokens)],
        prompt_len=num_tokens,
        params=SamplingParams(max_tokens=50),
        gateway=GATEWAY,
    )


async def until(condition: Callable[[], Any], *, within_s: float = 5.0, what: str = "") -> None:
    """Wait until true."""
    deadline = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(what or "condition")
        await asyncio.sleep(0.005)


class Gift:
    """A sequence on a giver, its pages filled, to be handed off step by step as a prefill worker would."""

    def __init__(self, giver: Side, request_id: str, num_tokens: int, *, epoch: int = 0, seed: int = 1) -> None:
        self.giver = giver
        self.passport = passport(request_id, num_tokens, epoch=epoch)
        self.num_tokens = num_tokens
        page_size = giver.bank.pool.page_size
        self.pages = giver.bank.pool.allocate(-(-num_tokens // page_size))
        giver.fill(self.pages, seed)
        chain = giver.bank.cache.chain("")
        chain.extend(self.passport.token_ids, num_tokens)
        self.hashes = list(chain.hashes)

    def offer(self, *targets: Side) -> None:
        self.giver.endpoint.offer(
            self.passport,
            page_hashes=self.hashes,
            num_pages=len(self.pages),
            targets=[target.peer for target in targets],
        )

    def chunk(self, num_pages: int) -> None:
        self.giver.endpoint.pages_ready(self.passport.request_id, self.passport.epoch, self.pages[:num_pages])

    def commit(self) -> None:
        after = msgspec.structs.replace(self.passport, token_ids=[*self.passport.token_ids, 42])
        self.giver.endpoint.commit(
            after,
            page_ids=self.pages,
            num_computed_tokens=self.num_tokens,
        )

    def bytes_at(self, taker: Side, pages: Sequence[int]) -> bool:
        """Whether the taker's pages hold exactly ours."""
        return all(
            bytes(taker.region.frame(theirs)) == bytes(self.giver.region.frame(ours))
            for ours, theirs in zip(self.pages, pages, strict=True)
        )
