"""Every message that crosses the bus, in the order of a request's life (DESIGN section 2).

Each struct carries its name as tag. Payload bytes (pages) travel in frames of their own beside the message and are
never copied into it. `(request_id, epoch)` addresses a request; a message of an older epoch is dropped by whoever
gets it. `generation` numbers a grant on its taker; a write or Commit with another one is refused.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import msgspec

from fleet.types import (
    Epoch,
    Fingerprint,
    FinishReason,
    Passport,
    PeerRef,
    TokenId,
    TokenLogprob,
    WorkerRecord,
)

Index = Annotated[int, msgspec.Meta(ge=0)]


class _Message(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag=True):
    """Base of all messages: tagged with the class name."""


# gateway to workers


class GatewayHello(_Message, frozen=True, kw_only=True):
    """A gateway lives. Sent to every known worker each heartbeat; the worker answers with Heartbeats.

    A worker that misses it for the lease frees that gateway's requests.
    """

    gateway: PeerRef


class PrefillRequest(_Message, frozen=True, kw_only=True):
    """Compute this prompt, send the first token to the gateway, hand the pages to one of `targets`, best first."""

    passport: Passport
    targets: list[PeerRef]


class Cancel(_Message, frozen=True, kw_only=True):
    """Forget this request up to and including `epoch`. Idempotent, and remembered by the worker for a while."""

    request_id: str
    epoch: Epoch


class DrainRequest(_Message, frozen=True, kw_only=True):
    """Leave: take nothing new, move or finish what runs, then exit. From the command or an operator."""

    reason: str = ""


# worker to gateway


class TokenChunk(_Message, frozen=True, kw_only=True):
    """Output tokens `index`, `index + 1`, … of a request. `logprobs`, if asked for, is as long as `token_ids`."""

    request_id: str
    epoch: Epoch
    index: Index
    token_ids: list[TokenId]
    logprobs: list[TokenLogprob] | None = None


class RequestStarted(_Message, frozen=True, kw_only=True):
    """A prefill worker began computing. `cached_tokens` of the prompt came from its prefix cache."""

    request_id: str
    epoch: Epoch
    cached_tokens: int = 0


class MoveReason(StrEnum):
    """Why a sequence is handed off."""

    PREFILLED = "prefilled"
    DRAIN = "drain"


class HandingOff(_Message, frozen=True, kw_only=True):
    """The holder is about to commit the sequence to `taker`; from now on both matter to the request."""

    request_id: str
    epoch: Epoch
    taker: PeerRef
    transport: str
    reason: MoveReason = MoveReason.PREFILLED


class HandedOff(_Message, frozen=True, kw_only=True):
    """Sent by the taker once it has adopted the sequence: it alone holds it now.

    `next_index` is of the token that it computes first. A holder hands on only after a token of its own, so within
    an epoch a HandedOff with a higher `next_index` is of a later holder, in whatever order the two arrive.
    """

    request_id: str
    epoch: Epoch
    next_index: Index = 0


class RequestFinished(_Message, frozen=True, kw_only=True):
    """The one terminal message of `(request_id, epoch)`.

    `num_output_tokens` counts over all epochs; the gateway waits until it has that many before it ends the stream.
    `error` is a sentence for the client when `reason` is `error`.
    """

    request_id: str
    epoch: Epoch
    reason: FinishReason
    num_output_tokens: Index
    error: str | None = None


class Returned(_Message, frozen=True, kw_only=True):
    """The worker gives the request back unfinished (no pages, draining, hand-off failed): replay it."""

    request_id: str
    epoch: Epoch
    reason: str


class Publication(_Message, frozen=True, kw_only=True):
    """What one step had to say to one gateway, in order: started, tokens, hand-offs, ends."""

    worker: PeerRef
    events: list[TokenChunk | RequestStarted | HandingOff | HandedOff | RequestFinished | Returned]


class RequestNote(msgspec.Struct, frozen=True, array_like=True):
    """One request that a worker holds, in a heartbeat; lets both sides notice what the other forgot."""

    request_id: str
    epoch: int
    next_index: int


class MetricSample(msgspec.Struct, frozen=True, array_like=True):
    """One sample of a worker's metrics, as `prometheus_client` names them."""

    name: str
    labels: dict[str, str]
    value: float


class MetricFamily(msgspec.Struct, frozen=True, array_like=True):
    """A metric with its samples; the gateway shows it with the worker's name as a label."""

    name: str
    kind: str
    documentation: str
    samples: list[MetricSample]


class Heartbeat(_Message, frozen=True, kw_only=True):
    """A worker lives; its record with current load, and the requests it holds for this gateway."""

    record: WorkerRecord
    requests: list[RequestNote]
    metrics: list[MetricFamily] = []


class Goodbye(_Message, frozen=True, kw_only=True):
    """The sender leaves in order; whatever it held is given back already."""

    peer: PeerRef


# hand-off: giver and taker


class RefuseReason(StrEnum):
    """Why an Offer or Commit is refused."""

    FULL = "full"
    LAYOUT = "layout"
    DRAINING = "draining"
    CANCELLED = "cancelled"
    STALE = "stale"
    TRANSPORT = "transport"


class PoolRef(msgspec.Struct, frozen=True, kw_only=True):
    """Where a taker's pages lie, for transports that write straight into them.

    Attributes:
        name: of the shared-memory object (begins with `baton`); empty where there is none.
        num_pages, page_bytes: its size; page `i` starts at `i * page_bytes`.
    """

    name: str
    num_pages: int
    page_bytes: int


class Offer(_Message, frozen=True, kw_only=True):
    """Giver to taker: will you take this sequence?

    Attributes:
        offer: numbers this Offer on its giver and, holding bits of the giver's incarnation, in the fleet; answers
            echo it. The same number again is a repetition; a giver sends a higher number for the same request only
            once no write of the former is or will be in flight.
        page_hashes: names of the full pages of `passport.token_ids`, in order.
        num_pages: pages that the sequence will have at Commit, a last partial one included.
        transports: what the giver can write over to this taker, best first.
        host, pid, start_ticks: of the giver's process; `start_ticks` is its start time since boot (proc(5)), so that
            the taker can see on the same host whether that very process still lives.
    """

    offer: Index
    giver: PeerRef
    passport: Passport
    fingerprint: Fingerprint
    page_hashes: list[bytes]
    num_pages: int
    transports: tuple[str, ...]
    host: str
    pid: int
    start_ticks: int = 0


class Grant(_Message, frozen=True, kw_only=True):
    """Taker to giver: yes. Write pages `num_held_pages`, … of the sequence to `page_ids`, in order.

    The first `num_held_pages` pages lie in the taker's prefix cache already. `generation` holds bits of the taker's
    incarnation, so that no grant of an earlier process life can be mistaken for this one.
    """

    request_id: str
    epoch: Epoch
    offer: Index
    generation: int
    taker: PeerRef
    transport: str
    num_held_pages: Index
    page_ids: list[int]
    pool: PoolRef


class Refuse(_Message, frozen=True, kw_only=True):
    """Taker to giver: no. `message` explains it to a person; `retry_after_ms` is a hint when full.

    Answers an Offer (then `generation` is 0) or a Commit (then `offer` is 0).
    """

    request_id: str
    epoch: Epoch
    offer: Index = 0
    reason: RefuseReason
    message: str
    taker: PeerRef
    retry_after_ms: int = 0
    generation: int = 0


class Pages(_Message, frozen=True, kw_only=True):
    """Giver to taker: pages `first` to `first + count` of the grant ride along, one payload frame each.

    `first` indexes `Grant.page_ids`. Transports that write straight into the taker's memory send none: Commit alone
    says that all is written.
    """

    request_id: str
    epoch: Epoch
    generation: int
    first: Index
    count: Annotated[int, msgspec.Meta(ge=1)]


class PagesTaken(_Message, frozen=True, kw_only=True):
    """Taker to giver: pages up to `count` of the grant have arrived; the giver's window moves."""

    request_id: str
    epoch: Epoch
    generation: int
    count: Index


class Commit(_Message, frozen=True, kw_only=True):
    """Giver to taker: all pages are there; the sequence is yours. The giver is silent from here on."""

    giver: PeerRef
    passport: Passport
    generation: int
    num_computed_tokens: Index


class Ack(_Message, frozen=True, kw_only=True):
    """Taker to giver: adopted."""

    request_id: str
    epoch: Epoch
    generation: int


class Abort(_Message, frozen=True, kw_only=True):
    """Either side: this hand-off is off. From a giver it also says that no write of it is or will be in flight.

    `generation` is 0 where the giver never saw a Grant for `offer`.
    """

    sender: PeerRef
    request_id: str
    epoch: Epoch
    offer: Index
    generation: int
    reason: str


class Released(_Message, frozen=True, kw_only=True):
    """Giver to taker, after the taker's Abort: no write of this grant is or will be in flight."""

    request_id: str
    epoch: Epoch
    generation: int


class OpenHandOff(msgspec.Struct, frozen=True, array_like=True):
    """One hand-off that the sender of an Alive believes open."""

    request_id: str
    epoch: int
    generation: int


class Alive(_Message, frozen=True, kw_only=True):
    """Giver and taker to each other while they share hand-offs: I live, and these I believe open.

    `beat` rises with every Alive of this sender, so that a late one is known for what it is. An Offer without a Grant
    is listed with generation 0. What one side lists no longer for two beats, the other closes; silence beyond the
    liveness deadline closes all.
    """

    sender: PeerRef
    beat: Index
    hand_offs: list[OpenHandOff]


HandOffMessage = Offer | Grant | Refuse | Pages | PagesTaken | Commit | Ack | Abort | Released | Alive
Message = GatewayHello | PrefillRequest | Cancel | DrainRequest | Publication | Heartbeat | Goodbye | HandOffMessage
