"""The bus: one inbox per process, one outgoing connection per peer, one-way messages.

Every process binds one ROUTER socket, its inbox, and opens one DEALER to each peer's inbox it speaks to, so order
holds per pair and direction. `send` never blocks: what does not fit into a peer's queue is dropped and counted, and
the heartbeats' request notes mend the loss. A socket monitor on each connection reports a dead peer as soon as the
kernel does; ZMTP heartbeats report a silent one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from ipaddress import ip_address
from types import TracebackType
from typing import Self

import zmq
import zmq.asyncio
from zmq.auth.asyncio import AsyncioAuthenticator

from fleet.curve import MIN_SECRET_LEN, CurveKeys
from fleet.errors import AddressInUse, BusClosed, SettingsError, WireError
from fleet.logs import get_logger
from fleet.messages import Message
from fleet.settings import FleetSettings
from fleet.socket_monitor import REFUSED, SocketMonitor
from fleet.wire import MAX_MESSAGE_BYTES, Frame, decode, encode

QUEUE_LEN = 20_000
DRAIN_LEN = 64
LINGER_MS = 300
RECONNECT_MS = 50
RECONNECT_MAX_MS = 1_000
WATCH_S = 0.03
LOST_FOR_SILENCES = 2
"""A peer that cannot be reached for so many times `silence_s` is forgotten: it costs sockets, and its address may be
another's by then. Whoever still has something to say to it connects anew."""
DOOR_QUIET_S = 30.0
"""Strangers knock again and again: a log line tells of them at most so often, the count of each time."""
_WATCHED = zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED | REFUSED

_log = get_logger("bus")


@dataclass(frozen=True, slots=True)
class Delivery:
    """A message from somebody, with views of its payload frames (they keep the bytes alive)."""

    message: Message
    payload: list[memoryview]


@dataclass(slots=True)
class BusCounters:
    """What went wrong on the bus since start; all stay zero on a healthy fleet.

    `refused_handshakes` counts the times that somebody without the cluster secret, or who spoke no ZMTP, came to the
    inbox and was sent away.
    """

    dropped: int = 0
    malformed: int = 0
    lost_peers: int = 0
    refused_handshakes: int = 0


@dataclass(frozen=True, slots=True)
class BusConfig:
    """How a bus listens.

    Attributes:
        bind_host: address of the inbox; anything but loopback needs `cluster_secret`.
        advertise_host: what others connect to; empty: `bind_host`.
        cluster_secret: turns CURVE on; empty: off.
        silence_s: a peer whose machine says nothing for this long counts as lost.
    """

    bind_host: str = "127.0.0.1"
    advertise_host: str = ""
    cluster_secret: str = ""
    silence_s: float = 3.0

    @classmethod
    def of(cls, settings: FleetSettings) -> BusConfig:
        """As a service's settings say."""
        return cls(
            bind_host=settings.bind_host,
            advertise_host=settings.advertise_host,
            cluster_secret=settings.cluster_secret,
            silence_s=settings.lease_s,
        )

    def check(self) -> None:
        """Whether these settings fit together.

        Raises:
            SettingsError: an inbox beyond loopback without a usable cluster secret.
        """
        if not is_loopback(self.bind_host) and not self.cluster_secret:
            raise SettingsError(
                f"BATON_BIND_HOST = {self.bind_host}: an inbox beyond loopback needs BATON_CLUSTER_SECRET, "
                "the same for the whole fleet"
            )
        if self.cluster_secret and len(self.cluster_secret) < MIN_SECRET_LEN:
            raise SettingsError(f"BATON_CLUSTER_SECRET is shorter than {MIN_SECRET_LEN} characters")


def is_loopback(host: str) -> bool:
    """Whether this address is reachable from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


class Bus(AbstractAsyncContextManager["Bus"]):
    """One process's place on the bus. Not thread-safe: everything happens on the event loop's thread.

    Raises:
        SettingsError: an inbox beyond loopback without a usable cluster secret.
        AddressInUse: the inbox could not bind.
    """

    def __init__(self, config: BusConfig) -> None:
        config.check()
        self.counters = BusCounters()
        self._config = config
        self._keys = CurveKeys.derive(config.cluster_secret) if config.cluster_secret else None
        self._context = zmq.asyncio.Context()
        self._peers: dict[str, zmq.Socket[bytes]] = {}
        self._monitors: dict[str, SocketMonitor] = {}
        self._refused_by: set[str] = set()
        self._away_since_s: dict[str, float] = {}
        self._lost_callbacks: list[Callable[[str], None]] = []
        self._closed = False
        self._authenticator: AsyncioAuthenticator | None = None
        self._inbox = self._open_inbox()
        self._door = SocketMonitor(self._context, self._inbox, events=REFUSED)
        self._door_told_s = -DOOR_QUIET_S
        self.address = self._bind()

    def _open_inbox(self) -> zmq.asyncio.Socket:
        inbox = self._context.socket(zmq.ROUTER)
        inbox.setsockopt(zmq.RCVHWM, QUEUE_LEN)
        inbox.setsockopt(zmq.LINGER, 0)
        inbox.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        inbox.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self._set_heartbeats(inbox)
        if self._keys is not None:
            self._authenticator = AsyncioAuthenticator(self._context)
            self._authenticator.start()
            self._authenticator.configure_curve_callback("*", credentials_provider=self)
            inbox.curve_server = True
            inbox.curve_secretkey = self._keys.server.secret
            inbox.curve_publickey = self._keys.server.public
        return inbox

    def callback(self, domain: str, key: bytes) -> bool:  # noqa: ARG002 - pyzmq's name and signature
        """ZAP: let in exactly the fleet's client key."""
        return self._keys is not None and key == self._keys.client.public

    def _bind(self) -> str:
        host = self._config.bind_host
        bracketed = f"[{host}]" if ":" in host else host
        if ":" in host:
            self._inbox.setsockopt(zmq.IPV6, 1)
        try:
            port = self._inbox.bind_to_random_port(f"tcp://{bracketed}")
        except zmq.ZMQError as error:
            self.close()
            raise AddressInUse(f"cannot listen on {host}: {error}") from error
        return f"tcp://{self._config.advertise_host or bracketed}:{port}"

    def _set_heartbeats(self, sock: zmq.Socket[bytes] | zmq.asyncio.Socket) -> None:
        silence_ms = int(self._config.silence_s * 1000)
        sock.setsockopt(zmq.HEARTBEAT_IVL, max(50, silence_ms // 3))
        sock.setsockopt(zmq.HEARTBEAT_TIMEOUT, silence_ms)

    @property
    def num_peers(self) -> int:
        """Outgoing connections, those included that are being made."""
        return len(self._peers)

    def on_peer_lost(self, callback: Callable[[str], None]) -> None:
        """Call `callback(address)` when the connection to a peer breaks. It may come back by itself."""
        self._lost_callbacks.append(callback)

    def send(self, address: str, message: Message, payload: Sequence[Frame] = ()) -> bool:
        """Queue a message for a peer; False when it was dropped: its queue is full, or its address is none.

        Payload is copied: when this returns, its memory may be written anew.

        Raises:
            BusClosed: after `close()`.
        """
        if self._closed:
            raise BusClosed("the bus is closed")
        try:
            sock = self._peers.get(address) or self._connect(address)
            sock.send_multipart(encode(message, payload), flags=zmq.NOBLOCK, copy=True)
        except zmq.Again:
            return self._drop(message, address, "the peer's queue is full")
        except zmq.ZMQError as error:  # addresses come in messages
            return self._drop(message, address, f"its address is none: {error.strerror}")
        return True

    def _drop(self, message: Message, address: str, why: str) -> bool:
        self.counters.dropped += 1
        _log.warning("message dropped", why=why, peer=address, kind=type(message).__name__)
        return False

    def _connect(self, address: str) -> zmq.Socket[bytes]:
        sock: zmq.Socket[bytes] = zmq.Socket(self._context, zmq.DEALER)
        sock.setsockopt(zmq.SNDHWM, QUEUE_LEN)
        sock.setsockopt(zmq.LINGER, LINGER_MS)
        sock.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS)
        sock.setsockopt(zmq.RECONNECT_IVL_MAX, RECONNECT_MAX_MS)
        sock.setsockopt(zmq.IPV6, int("[" in address))
        self._set_heartbeats(sock)
        if self._keys is not None:
            sock.curve_serverkey = self._keys.server.public
            sock.curve_secretkey = self._keys.client.secret
            sock.curve_publickey = self._keys.client.public
        monitor = SocketMonitor(self._context, sock, events=_WATCHED)
        try:
            sock.connect(address)
        except zmq.ZMQError:
            monitor.close()
            sock.close(linger=0)
            raise
        self._monitors[address] = monitor
        self._peers[address] = sock
        self._away_since_s[address] = time.monotonic()
        return sock

    def forget(self, address: str) -> None:
        """Close the connection to a peer that is gone for good; what is queued for it is dropped."""
        sock = self._peers.pop(address, None)
        if sock is None:
            return
        self._refused_by.discard(address)
        self._away_since_s.pop(address, None)
        self._monitors.pop(address).close()
        sock.close(linger=0)

    async def receive(self) -> AsyncIterator[Delivery]:
        """Yield messages as they come; what is not a message of ours is counted, logged and dropped.

        Runs until cancelled; cancel it before `close()`.
        """
        sync_inbox: zmq.Socket[bytes] = zmq.Socket.shadow(self._inbox)
        while not self._closed:
            await self._inbox.poll()
            for _ in range(DRAIN_LEN):
                try:
                    frames = sync_inbox.recv_multipart(flags=zmq.NOBLOCK, copy=False)
                except zmq.Again:
                    break
                try:
                    message, payload = decode([frame.buffer for frame in frames[1:]])
                except WireError as error:
                    self.counters.malformed += 1
                    _log.warning("message refused", error=str(error))
                    continue
                yield Delivery(message, payload)
            # A flood must not starve timers and other tasks of this loop.
            await asyncio.sleep(0)

    async def watch_peers(self) -> None:
        """Report broken connections and forget those that stay so; runs until cancelled, in the service's group.

        Looks at the monitors by the clock: awaiting a socket that is closed meanwhile, as `forget` closes them, counts
        as a cancellation in pyzmq, and would end this task without a word.
        """
        while not self._closed:
            await asyncio.sleep(WATCH_S)
            self._hear_door()
            for address, monitor in list(self._monitors.items()):
                for event in monitor.news():  # a callback may forget this peer or another
                    self._report(address, event)
            long_ago_s = time.monotonic() - LOST_FOR_SILENCES * self._config.silence_s
            for address in [a for a, since_s in self._away_since_s.items() if since_s < long_ago_s]:
                _log.info("peer stays away, forgotten", peer=address)
                self.forget(address)

    def _hear_door(self) -> None:
        """Count who came to the inbox and was sent away."""
        for _ in self._door.news():
            self.counters.refused_handshakes += 1
            now_s = time.monotonic()
            if now_s - self._door_told_s >= DOOR_QUIET_S:
                self._door_told_s = now_s
                _log.warning(
                    "somebody without our key was sent away; is BATON_CLUSTER_SECRET the same everywhere?",
                    refused=self.counters.refused_handshakes,
                )

    def _report(self, address: str, event: int) -> None:
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._away_since_s.pop(address, None)
        elif event == zmq.EVENT_DISCONNECTED:
            self._away_since_s.setdefault(address, time.monotonic())
            self.counters.lost_peers += 1
            _log.info("connection to peer lost", peer=address)
            for callback in self._lost_callbacks:
                callback(address)
        elif address not in self._refused_by:
            self._refused_by.add(address)
            _log.error("peer refuses our key; is BATON_CLUSTER_SECRET the same everywhere?", peer=address)

    def close(self) -> None:
        """Send what is queued for at most a moment, then close every socket. Idempotent."""
        if self._closed:
            return
        self._closed = True
        for address, sock in self._peers.items():
            self._monitors[address].close()
            sock.close(linger=LINGER_MS)
        self._peers.clear()
        self._monitors.clear()
        self._away_since_s.clear()
        self._door.close()
        self._inbox.close(linger=0)
        if self._authenticator is not None:
            self._authenticator.stop()
        self._context.destroy(linger=0)  # and with it a socket that no connection came of, lest this waits for ever

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
