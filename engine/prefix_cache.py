"""Names of full pages, and which page holds what name.

A full page is named by a hash chain: `H(parent's name, its token ids)`, keyed by a salt that mixes the model's
fingerprint and the passport's `cache_salt`. Equal names mean equal token prefixes under the same model and tenant,
so a page found by name can be shared as it is, without a copy. The same names skip pages in a hand-off and guide
routing. The hash is BLAKE2b in keyed mode (RFC 7693); at 32 bytes nobody finds two prompts with one name, which
would serve one client another's prefix.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from hashlib import blake2b

import msgspec

from engine.pages import PagePool
from fleet.types import Fingerprint

NAME_BYTES = 32
_ROOT = b""  # parent of a first page


def name_salt(fingerprint: Fingerprint, cache_salt: str) -> bytes:
    """The key of all names of one model and tenant. Equal on every worker with this fingerprint."""
    key = blake2b(msgspec.msgpack.encode(fingerprint), digest_size=NAME_BYTES).digest()
    return blake2b(cache_salt.encode(), key=key, digest_size=NAME_BYTES).digest()


def page_hashes(token_ids: Sequence[int], *, page_size: int, salt: bytes, parent: bytes = _ROOT) -> list[bytes]:
    """Names of the full pages of `token_ids`, in order; a last partial page has none.

    Args:
        token_ids: each in [0, 2**32); begins at a page boundary.
        page_size: tokens per page.
        salt: from `name_salt`; at most 64 bytes.
        parent: name of the page before the first one; empty at the start of a sequence.
    """
    pack = struct.Struct(f"<{page_size}I").pack
    names = []
    for start in range(0, len(token_ids) - page_size + 1, page_size):
        packed = pack(*token_ids[start : start + page_size])
        parent = blake2b(parent + packed, key=salt, digest_size=NAME_BYTES).digest()
        names.append(parent)
    return names


class HashChain:
    """The names of one sequence's full pages, extended as pages fill; nothing is hashed twice.

    Attributes:
        hashes: names so far, one per full page from the first on. Grows; callers do not mutate it.
    """

    __slots__ = ("_page_size", "_salt", "hashes")

    def __init__(self, *, page_size: int, salt: bytes, hashes: Sequence[bytes] = ()) -> None:
        self.hashes = list(hashes)
        self._page_size = page_size
        self._salt = salt

    def extend(self, token_ids: Sequence[int], num_tokens: int) -> None:
        """Name the pages that `token_ids[:num_tokens]` fills and that have no name yet. Mutates: `hashes`."""
        first = len(self.hashes)
        last = num_tokens // self._page_size
        if last > first:
            self.hashes += page_hashes(
                token_ids[first * self._page_size : last * self._page_size],
                page_size=self._page_size,
                salt=self._salt,
                parent=self.hashes[-1] if self.hashes else _ROOT,
            )


class PrefixCache:
    """Which page of a pool holds which name.

    Two sequences may compute the same page at the same time: the first name wins, and the other page stays
    anonymous and becomes free with its sequence. Eviction is the pool's: it takes the least recently used idle page
    and tells us. A chain's tail goes before its head, unless its head was such an anonymous duplicate; an orphaned
    tail is merely not found until its head is computed again.

    Attributes:
        query_tokens: prompt tokens of all sequences that were admitted with this cache.
        hit_tokens: how many of them it held.

    Args:
        pool: whose pages are named; serves one cache only.
        fingerprint: of the pages; separates models.
        enabled: False finds and names nothing, for measurements.
    """

    def __init__(self, pool: PagePool, fingerprint: Fingerprint, *, enabled: bool = True) -> None:
        self.query_tokens = 0
        self.hit_tokens = 0
        self._pool = pool
        self._fingerprint = fingerprint
        self._enabled = enabled
        self._page_of: dict[bytes, int] = {}
        self._name_of: dict[int, bytes] = {}
        pool.set_evict_hook(self._forget)

    def __len__(self) -> int:
        return len(self._page_of)

    @property
    def enabled(self) -> bool:
        """Whether anything is ever found."""
        return self._enabled

    def __contains__(self, page_hash: bytes) -> bool:
        return page_hash in self._page_of

    def chain(self, cache_salt: str, hashes: Sequence[bytes] = ()) -> HashChain:
        """A hash chain for a sequence of this tenant, going on from `hashes`."""
        salt = name_salt(self._fingerprint, cache_salt)
        return HashChain(page_size=self._pool.page_size, salt=salt, hashes=hashes)

    def match(self, hashes: Sequence[bytes]) -> list[int]:
        """Pages that hold the longest leading run of these names, shared: the caller releases them.

        Mutates: one reference more on each page returned. Does not count as a query; see `record`.
        """
        page_ids = []
        for page_hash in hashes:
            page_id = self._page_of.get(page_hash)
            if page_id is None:
                break
            page_ids.append(page_id)
        self._pool.share(page_ids)
        return page_ids

    def insert(self, hashes: Sequence[bytes], page_ids: Sequence[int]) -> None:
        """Name these used, fully computed pages, as many hashes as pages. Taken names and named pages stay."""
        if not self._enabled:
            return
        for page_hash, page_id in zip(hashes, page_ids, strict=True):
            if page_hash not in self._page_of and not self._pool.is_named(page_id):
                self._pool.mark_named(page_id)
                self._page_of[page_hash] = page_id
                self._name_of[page_id] = page_hash

    def record(self, *, query_tokens: int, hit_tokens: int) -> None:
        """Count one admitted sequence. Apart from `match`, which a waiting sequence may call many times."""
        self.query_tokens += query_tokens
        self.hit_tokens += hit_tokens

    def _forget(self, page_id: int) -> None:
        del self._page_of[self._name_of.pop(page_id)]
