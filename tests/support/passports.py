"""Passports and fingerprints for tests that do not care about them."""

from __future__ import annotations

from fleet.types import Fingerprint, Passport, PeerRef, Pooling, SamplingParams

GATEWAY = PeerRef(name="gateway-0", incarnation=1, address="ipc:///nowhere")


def make_fingerprint(*, page_size: int = 4, model: str = "fake") -> Fingerprint:
    """The fingerprint of a `FakeRunner`'s pages: one 8-byte number per slot."""
    return Fingerprint(
        model=model,
        dtype="uint64",
        num_layers=1,
        num_kv_heads=1,
        head_dim=1,
        page_size=page_size,
        layout="fake-1",
        version=1,
    )


def make_passport(
    token_ids: list[int],
    *,
    request_id: str = "r0",
    epoch: int = 0,
    prompt_len: int | None = None,
    params: SamplingParams | None = None,
    cache_salt: str = "",
    priority: int = 0,
    pooling: Pooling | None = None,
) -> Passport:
    """A passport whose ids are all prompt unless `prompt_len` says otherwise."""
    return Passport(
        request_id=request_id,
        epoch=epoch,
        model="fake",
        token_ids=token_ids,
        prompt_len=len(token_ids) if prompt_len is None else prompt_len,
        params=params or SamplingParams(),
        gateway=GATEWAY,
        cache_salt=cache_salt,
        priority=priority,
        pooling=pooling,
    )
