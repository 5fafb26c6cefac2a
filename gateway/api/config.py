"""What the HTTP half needs to be told. The service fills it from its settings."""

from __future__ import annotations

import msgspec

MAX_GENERATIONS = 1024


class ApiConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of the HTTP half.

    Attributes:
        version: of Baton, shown in `/schema` and part of `system_fingerprint`.
        max_body_bytes: larger request bodies get 413.
        max_generations: prompts times `n` that one request may start: no more than a queue has room for, or it would be
            told to come back for ever.
        lease_s: a background response whose gateway is silent so long may be taken over.
        shared_prefix_cache: prefixes that one API key's requests left in the cache serve other keys' requests too.
        cors_origins: origins that browsers may call from; empty: no CORS headers at all.
    """

    version: str = "0"
    max_body_bytes: int = 16 * 2**20
    max_generations: int = MAX_GENERATIONS
    shared_prefix_cache: bool = False
    cors_origins: tuple[str, ...] = ()
    lease_s: float = 3.0
