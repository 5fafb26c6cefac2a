"""Choosing a prefill worker and decode workers for a request, by booked load and by who has seen its prefix."""

from __future__ import annotations

import random
from dataclasses import dataclass

from fleet.types import Fingerprint, Passport, Role
from gateway.affinity import PrefixAffinity
from gateway.directory import Directory, Worker

MAX_TARGETS = 3
GROWTH_TOKENS = 128
"""Output for which a decode worker should have pages left when it gets a request."""


@dataclass(frozen=True, slots=True)
class Route:
    """A prefill worker and the decode workers it may hand to, best first; none for a prompt without output."""

    prefill: Worker
    targets: list[Worker]


class Router:
    """Picks routes. Ties are broken by chance, so that equal workers share the work."""

    def __init__(self, directory: Directory, *, seed: int | None = None) -> None:
        self._directory = directory
        self._affinity = PrefixAffinity()
        self._random = random.Random(seed)  # noqa: S311 - tie-breaking, not a secret

    def has_route(self, passport: Passport) -> bool:
        """Whether a prefill worker and, if needed, a decode worker that matches it take requests for its model."""
        model = passport.model
        if passport.is_prompt_only:
            return bool(self._directory.workers(model=model, role=Role.PREFILL))
        decoders = {w.record.fingerprint for w in self._directory.workers(model=model, role=Role.DECODE)}
        return any(w.record.fingerprint in decoders for w in self._directory.workers(model=model, role=Role.PREFILL))

    def pick(self, passport: Passport) -> Route | None:
        """The cheapest route now, or None when there is none, or no decode worker on it has room.

        A prefill worker costs what is booked on it plus what it would have to compute of this prompt; a decode worker
        costs the tokens booked on it relative to its pool, and one without room comes last.
        """
        model, token_ids = passport.model, passport.token_ids
        num_to_come = passport.params.max_tokens - passport.next_index
        num_tokens = len(token_ids) + min(GROWTH_TOKENS, num_to_come)
        decoders = self._directory.workers(model=model, role=Role.DECODE)
        shapes: set[Fingerprint] = {w.record.fingerprint for w in decoders if w.has_room(num_tokens)}
        givers = self._directory.workers(model=model, role=Role.PREFILL)
        if not passport.is_prompt_only:
            givers = [w for w in givers if w.record.fingerprint in shapes]
        if not givers:
            return None
        chain = self._affinity.chain(token_ids, salt=f"{model}\0{passport.cache_salt}")
        seen = self._affinity.seen_tokens(chain)

        def prefill_cost(worker: Worker) -> tuple[float, float]:
            fresh = len(token_ids) - seen.get(worker.peer, 0)
            return worker.booked_tokens + fresh, self._random.random()

        prefill = min(givers, key=prefill_cost)
        self._affinity.remember(chain, prefill.peer)

        if passport.is_prompt_only:
            return Route(prefill, [])

        def decode_cost(worker: Worker) -> tuple[bool, float, float]:
            pool_tokens = max(1, worker.record.num_pages * worker.record.page_size)
            return not worker.has_room(num_tokens), worker.booked_tokens / pool_tokens, self._random.random()

        matching = [w for w in decoders if w.record.fingerprint == prefill.record.fingerprint]
        return Route(prefill, sorted(matching, key=decode_cost)[:MAX_TARGETS])
