"""Which worker has seen the beginning of a prompt: approximate maps, kept by the gateway from its own choices.

Prompts are cut into strides; the chain of their hashes up to each stride points to the worker that last got a prompt
with that beginning. It may be wrong when that worker has evicted the pages; then the prompt is computed, nothing worse.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Hashable, Sequence

from fleet.types import PeerRef

STRIDE_TOKENS = 64
MAX_ENTRIES = 100_000


class PrefixAffinity:
    """LRU map from beginnings of prompts to worker lives."""

    def __init__(self, *, stride_tokens: int = STRIDE_TOKENS, max_entries: int = MAX_ENTRIES) -> None:
        self._stride = stride_tokens
        self._max_entries = max_entries
        self._seen: OrderedDict[int, Hashable] = OrderedDict()

    def chain(self, token_ids: Sequence[int], *, salt: str) -> list[int]:
        """Hashes of the beginnings of a prompt, one per full stride."""
        hashes: list[int] = []
        parent = hash(salt)
        for end in range(self._stride, len(token_ids) + 1, self._stride):
            parent = hash((parent, *token_ids[end - self._stride : end]))
            hashes.append(parent)
        return hashes

    def seen_tokens(self, chain: Sequence[int]) -> dict[Hashable, int]:
        """For each worker that has seen a beginning of this prompt: how many tokens of it."""
        found: dict[Hashable, int] = {}
        for count, name in enumerate(chain, start=1):
            worker = self._seen.get(name)
            if worker is None:
                break
            found[worker] = count * self._stride
        return found

    def remember(self, chain: Sequence[int], worker: Hashable) -> None:
        """This worker now holds the prompt."""
        for name in chain:
            self._seen[name] = worker
            self._seen.move_to_end(name)
        while len(self._seen) > self._max_entries:
            self._seen.popitem(last=False)


class Homes:
    """LRU map from affinities (keys that clients choose, or the samples of one prompt) to worker lives."""

    def __init__(self, *, max_entries: int = MAX_ENTRIES) -> None:
        self._max_entries = max_entries
        self._homes: OrderedDict[str, PeerRef] = OrderedDict()

    def of(self, affinity: str) -> PeerRef | None:
        """Who got the last request of this affinity."""
        return self._homes.get(affinity)

    def remember(self, affinity: str, worker: PeerRef) -> None:
        """This worker got one. An empty affinity is none."""
        if not affinity:
            return
        self._homes[affinity] = worker
        self._homes.move_to_end(affinity)
        if len(self._homes) > self._max_entries:
            self._homes.popitem(last=False)

    @staticmethod
    def rank(affinity: str, worker: PeerRef) -> float:
        """A number in [0, 1) by which all gateways prefer the same of equally loaded workers (rendezvous hashing)."""
        digest = hashlib.blake2b(f"{affinity}\0{worker.name}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") / 2**64
