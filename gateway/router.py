"""Choosing a prefill worker and decode workers for a request, by booked load and by who has seen its prefix."""

from __future__ import annotations

import random
from dataclasses import dataclass

from fleet.types import Fingerprint, Passport, Role
from gateway.affinity import Homes, PrefixAffinity
from gateway.directory import Directory, Worker

MAX_TARGETS = 3
GROWTH_TOKENS = 128
"""Output for which a decode worker should have pages left when it gets a request."""
AFFINITY_TOKENS = 4096
"""How many more booked tokens a worker may have than others and still get the requests of an affinity it serves."""


@dataclass(frozen=True, slots=True)
class Route:
    """A prefill worker and the decode workers it may hand to, best first; none for a prompt without output.

    `fresh_tokens` of the prompt are new to the prefill worker, as far as is known here.
    """

    prefill: Worker
    targets: list[Worker]
    fresh_tokens: int


class Router:
    """Picks routes. Ties are broken by chance, so that equal workers share the work."""

    def __init__(self, directory: Directory, *, seed: int | None = None) -> None:
        self._directory = directory
        self._prefixes = PrefixAffinity()
        self._homes = Homes()
        self._random = random.Random(seed)  # noqa: S311 - tie-breaking, not a secret

    def has_route(self, passport: Passport) -> bool:
        """Whether a prefill worker and, if needed, a decode worker that matches it take requests for its model."""
        model = passport.model
        if passport.is_prompt_only:
            return bool(self._directory.workers(model=model, role=Role.PREFILL))
        decoders = {w.record.fingerprint for w in self._directory.workers(model=model, role=Role.DECODE)}
        return any(w.record.fingerprint in decoders for w in self._directory.workers(model=model, role=Role.PREFILL))

    def mismatch(self, model: str) -> str:
        """How pages of the model's workers differ, as the end of a sentence; empty where some pair matches."""
        roles = (Role.PREFILL, Role.DECODE)
        ours, theirs = ({w.record.fingerprint for w in self._directory.workers(model=model, role=r)} for r in roles)
        if not ours or not theirs or ours & theirs:
            return ""
        differing = "; ".join(
            f"{field} is {', '.join(map(str, sorted(left)))} and {', '.join(map(str, sorted(right)))}"
            for field in Fingerprint.__struct_fields__
            if (left := {getattr(one, field) for one in ours}) != (right := {getattr(one, field) for one in theirs})
        )
        return f": pages of its prefill and decode workers differ: {differing}"

    def pick(self, passport: Passport, *, affinity: str = "") -> Route | None:
        """The cheapest route now, or None when there is none, or no decode worker on it has room.

        A prefill worker costs what is booked on it plus what it would have to compute of this prompt; a decode worker
        costs the tokens booked on it relative to its pool, and one without room comes last. Requests of an `affinity`
        stay with the prefill worker that got the last of them, unless it has `AFFINITY_TOKENS` more to do than
        another.
        """
        model, token_ids = passport.model, passport.token_ids
        num_to_come = passport.params.max_tokens - passport.next_index
        num_tokens = len(token_ids) + min(GROWTH_TOKENS, num_to_come)
        decoders = self._directory.workers(model=model, role=Role.DECODE)
        shapes: set[Fingerprint] = {w.record.fingerprint for w in decoders if w.has_room(num_tokens)}
        givers = [w for w in self._directory.workers(model=model, role=Role.PREFILL) if w.takes_more]
        if not passport.is_prompt_only:
            givers = [w for w in givers if w.record.fingerprint in shapes]
        if not givers:
            return None
        chain = self._prefixes.chain(token_ids, salt=f"{model}\0{passport.cache_salt}")
        seen = self._prefixes.seen_tokens(chain)
        home = self._homes.of(affinity)

        def prefill_cost(worker: Worker) -> tuple[float, float]:
            fresh = len(token_ids) - seen.get(worker.peer, 0)
            bonus = AFFINITY_TOKENS if worker.peer == home else 0
            tie = self._homes.rank(affinity, worker.peer) if affinity else self._random.random()
            return worker.booked_tokens + fresh - bonus, tie

        prefill = min(givers, key=prefill_cost)
        self._prefixes.remember(chain, prefill.peer)
        self._homes.remember(affinity, prefill.peer)

        fresh_tokens = len(token_ids) - seen.get(prefill.peer, 0)
        if passport.is_prompt_only:
            return Route(prefill, [], fresh_tokens)

        def decode_cost(worker: Worker) -> tuple[bool, float, float]:
            pool_tokens = max(1, worker.record.num_pages * worker.record.page_size)
            return not worker.has_room(num_tokens), worker.booked_tokens / pool_tokens, self._random.random()

        matching = [w for w in decoders if w.record.fingerprint == prefill.record.fingerprint]
        return Route(prefill, sorted(matching, key=decode_cost)[:MAX_TARGETS], fresh_tokens)
