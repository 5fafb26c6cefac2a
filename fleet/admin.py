"""A worker's admin socket: a small HTTP endpoint that shows how it stands and asks it to leave.

    GET  /status   who it is and what it runs
    POST /drain    {"reason": "…", "within_s": 20}: leave, within this time or the usual grace period

On loopback and Unix sockets everybody on the machine may ask. Beyond them the socket needs the cluster secret, and
each request a bearer token made from it: `printf 'baton admin' | openssl dgst -sha256 -hmac "$BATON_CLUSTER_SECRET"`.
"""

from __future__ import annotations

import hashlib
import hmac
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import msgspec
import uvicorn
from litestar import Litestar, get, post
from litestar.connection import ASGIConnection
from litestar.exceptions import NotAuthorizedException
from litestar.handlers import BaseRouteHandler
from litestar.params import JSONBody

from fleet.bus import is_loopback
from fleet.departure import Departure
from fleet.errors import SettingsError
from fleet.messages import MoveReason
from fleet.service_settings import WorkerSettings
from fleet.types import WorkerRecord

UNIX = "unix:"
_BEARER = "bearer "


class DrainOrder(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Body of POST /drain. `reclaim`: the provider takes the machine, which `baton_migrations_total` tells apart."""

    reason: str = "admin socket"
    within_s: Annotated[float, msgspec.Meta(ge=0)] | None = None
    reclaim: bool = False


class Standing(msgspec.Struct, frozen=True):
    """Answer of both routes."""

    worker: str
    role: str
    model: str
    draining: bool
    num_running: int
    num_waiting: int
    left_s: float | None


def admin_token(cluster_secret: str) -> str:
    """What a caller beyond this machine must bear."""
    return hmac.new(cluster_secret.encode(), b"baton admin", hashlib.sha256).hexdigest()


def build_app(record: Callable[[], WorkerRecord], departure: Departure, *, token: str) -> Litestar:
    """The endpoint; an empty `token` lets everybody in."""

    def guard(connection: ASGIConnection[BaseRouteHandler, Any, Any, Any], _: BaseRouteHandler) -> None:
        given = connection.headers.get("authorization", "")
        borne = given[len(_BEARER) :] if given[: len(_BEARER)].lower() == _BEARER else ""
        if token and not hmac.compare_digest(borne.encode(), token.encode()):
            raise NotAuthorizedException("send 'Authorization: Bearer' with the token made from the cluster secret")

    def standing() -> Standing:
        now = record()
        left_s = round(departure.left_s, 1) if departure.is_asked else None
        return Standing(
            worker=now.peer.name,
            role=now.role.value,
            model=now.model,
            draining=departure.is_asked,
            num_running=now.load.num_running,
            num_waiting=now.load.num_waiting,
            left_s=left_s,
        )

    @get("/status", sync_to_thread=False)
    def status() -> Standing:
        return standing()

    @post("/drain", status_code=202, sync_to_thread=False)
    def drain(data: JSONBody[DrainOrder | None] = None) -> Standing:
        order = data or DrainOrder()
        reason = MoveReason.RECLAIM if order.reclaim else MoveReason.DRAIN
        departure.ask(order.reason, reason=reason, within_s=order.within_s)
        return standing()

    return Litestar([status, drain], guards=[guard], openapi_config=None)


class _Server(uvicorn.Server):
    """Leaves signals to the service."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield


async def serve_admin(settings: WorkerSettings, record: Callable[[], WorkerRecord], departure: Departure) -> None:
    """Serve until cancelled; a task of the service's group.

    Raises:
        SettingsError: the address cannot be had.
    """
    listener, token = _listen(settings)
    config = uvicorn.Config(
        build_app(record, departure, token=token),
        loop="none",
        http="httptools",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
    )
    try:
        await _Server(config).serve(sockets=[listener])
    finally:
        _close(listener, settings.admin_address)


def _close(listener: socket.socket, address: str) -> None:
    listener.close()
    if address.startswith(UNIX):
        Path(address.removeprefix(UNIX)).unlink(missing_ok=True)


def _listen(settings: WorkerSettings) -> tuple[socket.socket, str]:
    """The listening socket, and the token that callers need."""
    address = settings.admin_address
    if address.startswith(UNIX):
        path = address.removeprefix(UNIX)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        Path(path).unlink(missing_ok=True)
        target: Any = path
        token = ""
    else:
        host, _, port = address.rpartition(":")
        host = host.strip("[]")
        if not host or not port.isdigit():
            raise SettingsError(f"BATON_ADMIN_ADDRESS = {address!r} is neither HOST:PORT nor unix:PATH")
        loopback = is_loopback(host)
        if not loopback and not settings.cluster_secret:
            raise SettingsError(f"BATON_ADMIN_ADDRESS = {address!r} is beyond loopback and needs BATON_CLUSTER_SECRET")
        token = "" if loopback else admin_token(settings.cluster_secret)
        listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        target = (host, int(port))
    try:
        listener.bind(target)
        if address.startswith(UNIX):
            Path(path).chmod(0o600)
    except OSError as error:
        listener.close()
        raise SettingsError(f"BATON_ADMIN_ADDRESS: cannot listen on {address}: {error.strerror}") from error
    listener.setblocking(False)
    return listener, token
