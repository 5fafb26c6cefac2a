"""The nouns that cross process borders: peers, passports, sampling parameters, worker records.

Everything here is a frozen msgspec struct, so that a value read from the wire is checked once and then trusted.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Final

import msgspec

TokenId = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
Epoch = Annotated[int, msgspec.Meta(ge=0)]


class Role(StrEnum):
    """What a process is in the fleet."""

    GATEWAY = "gateway"
    PREFILL = "prefill"
    DECODE = "decode"


class FinishReason(StrEnum):
    """Why a request ended. Every accepted request ends with exactly one of these."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"


class RequestState(StrEnum):
    """States of a request as Redis shows them; `docs/redis.md` draws the transitions."""

    QUEUED = "queued"
    PREFILLING = "prefilling"
    HANDING_OFF = "handing_off"
    DECODING = "decoding"
    FINISHED = "finished"
    FAILED = "failed"


class Pooling(StrEnum):
    """How the hidden states of a prompt become one vector."""

    MEAN = "mean"
    LAST = "last"


class PeerRef(msgspec.Struct, frozen=True, omit_defaults=True):
    """One process life. A restart in place keeps the name and changes the incarnation.

    Attributes:
        name: unique in the fleet among live processes.
        incarnation: random 63-bit number drawn at process start; whatever bears another one is void.
        address: ZeroMQ endpoint of the process's inbox, `tcp://host:port` or `ipc://path`.
    """

    name: str
    incarnation: int
    address: str


class GrammarKind(StrEnum):
    """The languages in which a grammar is written."""

    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    LARK = "lark"


class Grammar(msgspec.Struct, frozen=True):
    """What an output must look like as a whole; `fleet.grammar` says what the three kinds mean.

    The state of a match is not part of it: whoever goes on with a sequence rebuilds that from the output ids.
    """

    kind: GrammarKind
    source: str


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the next token is chosen: with logits, seed and position, the whole input of the sampler.

    Attributes:
        temperature: 0 is greedy.
        top_p: nucleus mass in (0, 1]; 1 is off.
        top_k: number of candidates kept; 0 is off.
        min_p: candidates below `min_p * max probability` are dropped; 0 is off.
        repetition_penalty: over prompt and output, 1 is off (CTRL, arXiv 1909.05858).
        presence_penalty: subtracted once from every id already in the output; 0 is off.
        frequency_penalty: subtracted per occurrence in the output; 0 is off.
        logit_bias: added to the logits of these ids.
        seed: key of the counter-based noise; the gateway draws one where the client gave none.
        stop_token_ids: ids that end the sequence (the model's end-of-sequence ids are among them unless
            the client asked to ignore them). The stopping id is delivered as the last token.
        min_tokens: the stop ids cannot be sampled before this many output tokens.
        max_tokens: output tokens over all epochs, resolved by the gateway against the model's length. 0: the prompt
            alone is computed, for what it tells (log-probabilities, a vector), and no decode worker is needed.
        logprobs: None: none; k >= 0: log-probability of each chosen token and of the k likeliest.
        grammar: None: any output; else only tokens that keep the output on its way to a match can be chosen.
            It wins over bias and penalties; the sequence stops when no longer output could match.
        prompt_logprobs: likewise of each prompt token but the first, which nothing predicts.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    seed: int = 0
    stop_token_ids: tuple[TokenId, ...] = ()
    min_tokens: int = 0
    max_tokens: Annotated[int, msgspec.Meta(ge=0)] = 16
    logprobs: Annotated[int, msgspec.Meta(ge=0, le=128)] | None = None
    grammar: Grammar | None = None
    prompt_logprobs: Annotated[int, msgspec.Meta(ge=0, le=128)] | None = None


class Passport(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Everything but pages that a sequence needs to go on elsewhere.

    Attributes:
        request_id: minted by the gateway.
        epoch: how often the gateway has replayed the request; fences everything older.
        model: the served model this belongs to.
        token_ids: prompt, then the output so far.
        prompt_len: how many of `token_ids` are the prompt.
        params: how to sample; penalties are rebuilt from the ids.
        gateway: who owns the request and hears its tokens.
        cache_salt: separates prefix-cache names (tenants); empty shares.
        priority: lower is served earlier; ties go by arrival.
        pooling: how to make a vector of the prompt; None: none. Goes with `max_tokens` 0.
    """

    request_id: Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
    epoch: Epoch
    model: str
    token_ids: list[TokenId]
    prompt_len: Annotated[int, msgspec.Meta(ge=1)]
    params: SamplingParams
    gateway: PeerRef
    cache_salt: str = ""
    priority: int = 0
    pooling: Pooling | None = None

    def __post_init__(self) -> None:
        """On the wire too: without its prompt a passport says nothing, and would take down who trusts it."""
        if self.prompt_len > len(self.token_ids):
            raise ValueError(f"a passport of {len(self.token_ids)} ids cannot have a prompt of {self.prompt_len}")

    @property
    def is_prompt_only(self) -> bool:
        """Whether it ends with its prompt: no token is to come, and no decode worker is needed."""
        return self.params.max_tokens == 0

    @property
    def next_index(self) -> int:
        """Index of the next output token."""
        return len(self.token_ids) - self.prompt_len


PAGE_MAJOR: Final = "page-major-1"
"""Axis order `[num_pages, layers, 2, kv_heads, page_size, head_dim]`, row-major; 2 is keys, then values."""

PAGE_MAJOR_PAIRS: Final = "page-major-pairs-1"
"""The same with a head's keys as `[head_dim / 2, page_size, 2]` and its values as `[page_size / 2, head_dim, 2]`, for
processors that multiply pairs of numbers."""


class Fingerprint(msgspec.Struct, frozen=True):
    """What two workers must share before a page may move between them (DESIGN section 4).

    Attributes:
        model: hash of the model's configuration and weights' names and sizes, not its path.
        dtype: of keys and values, e.g. `bfloat16`.
        num_layers, num_kv_heads, head_dim, page_size: the shape of a page.
        layout: name of the axis order: `PAGE_MAJOR` or `PAGE_MAJOR_PAIRS`.
        version: of the hand-off protocol.
    """

    model: str
    dtype: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    layout: str
    version: int


class WorkerLoad(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A worker's own count of its work, as of its last heartbeat.

    `free_pages` counts pages that a new sequence could take now, cached but unreferenced ones included. Of
    `prefix_query_tokens` looked up in the prefix cache since start, `prefix_hit_tokens` were found.
    """

    num_running: int = 0
    num_waiting: int = 0
    waiting_tokens: int = 0
    total_pages: int = 0
    free_pages: int = 0
    cached_pages: int = 0
    quarantined_pages: int = 0
    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0


class WorkerRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the registry says of a worker: who it is, what it serves, what it can hold.

    Attributes:
        model: the served name, what clients put in `model`; `aliases` are further names.
        model_files: digest under which the worker published tokenizer and configuration files.
        max_model_len: longest prompt plus output in tokens.
        max_num_seqs: sequences that run at once.
        max_requests_per_gateway: requests that one gateway may have here; 0: no bound.
        fingerprint: of its pages; prefill and decode workers are matched by it.
        host: machine identity (boot id and namespace), equal where shared memory can be shared.
        transports: what it can give or take over, best first.
        draining: takes nothing new.
        started_at_s: Unix time.
    """

    peer: PeerRef
    role: Role
    model: str
    fingerprint: Fingerprint
    model_files: str
    max_model_len: int
    max_num_seqs: int
    page_size: int
    num_pages: int
    host: str
    pid: int
    transports: tuple[str, ...]
    aliases: tuple[str, ...] = ()
    draining: bool = False
    started_at_s: float = 0.0
    max_requests_per_gateway: int = 0
    load: WorkerLoad = WorkerLoad()

    def with_load(self, load: WorkerLoad, *, draining: bool) -> WorkerRecord:
        """The same record with current figures."""
        return msgspec.structs.replace(self, load=load, draining=draining)


class TopLogprob(msgspec.Struct, frozen=True, array_like=True):
    """One alternative: id and natural-log probability under the model's raw distribution."""

    token_id: int
    logprob: float


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """Log-probability of a token and of the likeliest ones, best first.

    `rank` is the token's place among all candidates, 1 the likeliest; 0 where it was not counted (output tokens).
    """

    logprob: float
    top: list[TopLogprob] = []
    rank: int = 0
