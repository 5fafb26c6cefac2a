"""Which worker has seen the beginning of a prompt: an approximate map, kept by the gateway from its own choices.

Prompts are cut into strides; the chain of their hashes up to each stride points to the worker that last got a prompt
with that beginning. It may be wrong when that worker has evicted the pages; then the prompt is computed, nothing worse.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence

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
