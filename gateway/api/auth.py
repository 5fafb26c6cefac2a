"""API keys: who calls, decided before the body is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from litestar.connection import ASGIConnection
from litestar.handlers import BaseRouteHandler

from fleet.keys import ApiKey, hash_secret
from gateway.errors import InvalidKey, Unavailable

BEARER = "bearer "
KEY_HEADER = "x-api-key"
STATE_KEY = "api_key"
MAX_SECRET_CHARS = 512
OPEN = "open"  # route option: no key is asked for


class KeyStoreUnavailable(Exception):
    """The keys cannot be looked up now."""


class KeyStore(Protocol):
    """Where API keys are known."""

    @property
    def required(self) -> bool:
        """Whether requests must carry a key now."""
        ...

    async def lookup(self, secret: str) -> ApiKey | None:
        """The key that a secret belongs to, or None. Raises: KeyStoreUnavailable."""
        ...


class MemoryKeyStore:
    """Keys in memory, by the hash of their secret as `fleet.keys.KeyRegistry.by_hash` returns them."""

    def __init__(self, by_hash: Mapping[str, ApiKey], *, required: bool = True) -> None:
        self._by_hash = dict(by_hash)
        self.required = required

    async def lookup(self, secret: str) -> ApiKey | None:
        """See `KeyStore`."""
        return self._by_hash.get(hash_secret(secret))


class KeyGuard:
    """A Litestar guard: runs before the body is read and puts the caller's key into the connection's state.

    Routes with the option `open` pass. Without a store, or while it requires none, everybody passes.
    """

    def __init__(self, store: KeyStore | None) -> None:
        self._store = store

    async def __call__(
        self, connection: ASGIConnection[BaseRouteHandler, Any, Any, Any], handler: BaseRouteHandler
    ) -> None:
        """Raises: InvalidKey; Unavailable if the keys cannot be looked up."""
        if handler.opt.get(OPEN) or self._store is None or not self._store.required:
            return
        headers = connection.headers
        secret = _bearer(headers.get("authorization")) or _bounded(headers.get(KEY_HEADER, ""))
        if secret is None:
            raise InvalidKey(
                "You didn't provide an API key. Send it as 'Authorization: Bearer YOUR_KEY' or 'x-api-key: YOUR_KEY'."
            )
        try:
            key = await self._store.lookup(secret)
        except KeyStoreUnavailable as error:
            raise Unavailable("API keys cannot be checked at the moment.", retry_after_s=1) from error
        if key is None:
            raise InvalidKey("Incorrect API key provided.")
        connection.scope["state"][STATE_KEY] = key


def _bearer(header: str | None) -> str | None:
    if header is None or header[: len(BEARER)].lower() != BEARER:
        return None
    return _bounded(header[len(BEARER) :])


def _bounded(text: str) -> str | None:
    secret = text.strip()
    return secret if 0 < len(secret) <= MAX_SECRET_CHARS else None
