"""A sequence: a request inside an engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from engine.prefix_cache import HashChain
from fleet.types import Passport, Pooling, SamplingParams


class Phase(StrEnum):
    """Where a sequence is in its life inside this engine."""

    WAITING = "waiting"
    RUNNING = "running"
    PREFILLED = "prefilled"  # on a prefill worker: all computed, pages held until the taker's Ack
    PAUSED = "paused"  # on a decode worker: out of the batch while its last pages move to another worker
    DONE = "done"


@dataclass(eq=False, slots=True, weakref_slot=True)
class Sequence:
    """Token ids, how far they are computed, and where their pages lie.

    Ownership by intervals of `token_ids`: `[0, num_cached_tokens)` came from the prefix cache and its pages are
    shared; `[num_cached_tokens, num_computed_tokens)` is computed into pages of ours; the rest is not computed.

    Attributes:
        passport: as it arrived; `token_ids` below grows, the passport does not.
        token_ids: prompt, then output.
        page_table: page ids in order; covers at least `num_computed_tokens` tokens.
        arrival: rises by one per sequence; older sequences win.
        chain: names of its full pages; set by the scheduler that takes the sequence.
    """

    passport: Passport
    token_ids: list[int]
    arrival: int
    page_table: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    phase: Phase = Phase.WAITING
    chain: HashChain | None = None

    @classmethod
    def from_passport(cls, passport: Passport, *, arrival: int) -> Sequence:
        """A waiting sequence with nothing computed. Copies the ids."""
        return cls(passport=passport, token_ids=list(passport.token_ids), arrival=arrival)

    @property
    def request_id(self) -> str:
        """Minted by the gateway."""
        return self.passport.request_id

    @property
    def epoch(self) -> int:
        """How often the gateway has replayed the request."""
        return self.passport.epoch

    @property
    def params(self) -> SamplingParams:
        """How to sample."""
        return self.passport.params

    @property
    def is_prompt_only(self) -> bool:
        """Whether it ends with its prompt and never samples."""
        return self.passport.is_prompt_only

    @property
    def needs_every_token(self) -> bool:
        """Whether the whole prompt must go through the model: pages hold no logits and no hidden states."""
        return self.passport.pooling is Pooling.MEAN or self.passport.params.prompt_logprobs is not None

    @property
    def page_hashes(self) -> list[bytes]:
        """Names of the leading full pages of `token_ids`, as far as known; not to be mutated."""
        return self.chain.hashes if self.chain is not None else []

    @property
    def prompt_len(self) -> int:
        """How many of `token_ids` are the prompt, whatever was replayed."""
        return self.passport.prompt_len

    @property
    def num_output_tokens(self) -> int:
        """Output tokens so far, over all epochs; also the index of the next one."""
        return len(self.token_ids) - self.passport.prompt_len

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens whose keys and values are not in pages yet."""
        return len(self.token_ids) - self.num_computed_tokens

    def to_passport(self) -> Passport:
        """The passport as of now: everything but pages that the sequence needs to go on elsewhere."""
        arrived = self.passport
        return Passport(
            request_id=arrived.request_id,
            epoch=arrived.epoch,
            model=arrived.model,
            token_ids=list(self.token_ids),
            prompt_len=arrived.prompt_len,
            params=arrived.params,
            gateway=arrived.gateway,
            cache_salt=arrived.cache_salt,
            priority=arrived.priority,
            pooling=arrived.pooling,
        )
