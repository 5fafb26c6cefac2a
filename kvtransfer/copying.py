"""Copying pages into a taker's memory while it allows it."""

from __future__ import annotations

from collections.abc import Sequence

from kvtransfer.errors import GrantRevoked
from kvtransfer.region import PoolRegion


def write_granted(region: PoolRegion, page_ids: Sequence[int], generation: int, pages: Sequence[memoryview]) -> None:
    """Copy pages into a taker's region, each only while its generation word names this grant.

    Raises:
        GrantRevoked: a word names another grant or none; that page and later ones were not written.
    """
    for page_id, page in zip(page_ids, pages, strict=True):
        if region.writer(page_id) != generation:
            raise GrantRevoked(f"page {page_id} is no longer granted to generation {generation}")
        region.store(page_id, page)
