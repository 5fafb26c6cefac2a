"""Whose request it is, and what follows: its place in queues, whose cached prefixes it may meet, where it is sent."""

from __future__ import annotations

import hashlib
from typing import Literal

import msgspec

from fleet.keys import ApiKey
from gateway.api.requests import SamplingFields, ServiceTier

Tier = Literal["default", "flex", "priority"]

TIER_PRIORITY: dict[Tier, int] = {"priority": -100, "default": 0, "flex": 100}
"""Of a passport; lower is served earlier."""


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """A request's place among others.

    Attributes:
        tier: the service tier that it gets, or None if it did not ask; repeated in the answer.
        priority: of its passports; the tier's, plus the request's own.
        cache_salt: separates prefix-cache names.
        affinity: requests with the same one go to the same prefill worker, load permitting; empty: to any.
    """

    tier: Tier | None
    priority: int
    cache_salt: str
    affinity: str


def place_of(request: SamplingFields, key: ApiKey | None, *, shared_prefix_cache: bool) -> Place:
    """Work it out from the request's fields and its API key.

    Args:
        request: with `service_tier`, `priority`, `cache_salt` and `prompt_cache_key` (or `user`, which it replaces).
        key: the caller's, None on an open server.
        shared_prefix_cache: keys may meet each other's cached prefixes.
    """
    tier = None if request.service_tier is None else tier_of(request.service_tier)
    owner = "" if key is None else key.key_id
    cache_key = request.prompt_cache_key or request.user
    return Place(
        tier=tier,
        priority=TIER_PRIORITY[tier or "default"] + (request.priority or 0),
        cache_salt=tenant_salt(owner, request.cache_salt or "", shared=shared_prefix_cache),
        affinity=f"{owner}/{cache_key}" if cache_key else "",
    )


def tier_of(asked: ServiceTier) -> Tier:
    """`auto` is the default here, and `fast` another word for `priority`."""
    match asked:
        case "auto":
            return "default"
        case "fast":
            return "priority"
        case _:
            return asked


def tenant_salt(key_id: str, asked: str, *, shared: bool) -> str:
    """The salt of a request's page names.

    Unless tenants share, it mixes in the API key: how fast a prompt is answered then tells nobody whether another
    key has sent it before. `asked` is the client's own `cache_salt`, which separates further.
    """
    if shared or not key_id:
        return asked
    return hashlib.blake2b(f"{key_id}\0{asked}".encode(), digest_size=16, person=b"baton tenant").hexdigest()
