"""Every message that crosses the bus, in the order of a request's life (DESIGN section 2).

Each struct carries its name as tag. Payload bytes (pages) travel in frames of their own beside the message and are
never copied into it. `(request_id, epoch)` addresses a request; a message of an older epoch is dropped by whoever
gets it. What giver and taker say to each other is in `fleet.hand_off_messages`.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import msgspec

from fleet.bus_message import BusMessage, Index
from fleet.hand_off_messages import HandOffMessage
from fleet.types import (
    Epoch,
    FinishReason,
    Passport,
    PeerRef,
    TokenId,
    TokenLogprob,
    WorkerRecord,
)

# gateway to workers


class GatewayHello(BusMessage, frozen=True, kw_only=True):
    """A gateway lives. Sent to every known worker each heartbeat; the worker answers with Heartbeats.

    A worker that misses it for the lease frees that gateway's requests.
    """

    gateway: PeerRef


class PrefillRequest(BusMessage, frozen=True, kw_only=True):
    """Compute this prompt, send the first token to the gateway, hand the pages to one of `targets`, best first."""

    passport: Passport
    targets: list[PeerRef]


class Cancel(BusMessage, frozen=True, kw_only=True):
    """Forget this request up to and including `epoch`. Idempotent, and remembered by the worker for a while."""

    request_id: str
    epoch: Epoch


class DrainRequest(BusMessage, frozen=True, kw_only=True):
    """Leave: take nothing new, move or finish what runs, then exit. From the command or an operator.

    `within_s` is the grace period; None leaves it to the worker's settings.
    """

    reason: str = ""
    within_s: Annotated[float, msgspec.Meta(ge=0)] | None = None


# worker to gateway


class TokenChunk(BusMessage, frozen=True, kw_only=True):
    """Output tokens `index`, `index + 1`, … of a request. `logprobs`, if asked for, is as long as `token_ids`."""

    request_id: str
    epoch: Epoch
    index: Index
    token_ids: list[TokenId]
    logprobs: list[TokenLogprob] | None = None


class PromptLogprobs(BusMessage, frozen=True, kw_only=True):
    """Log-probabilities of the prompt tokens `position`, `position + 1`, …: what one step computed of them.

    The positions of a request come in order, and before its first token.
    """

    request_id: str
    epoch: Epoch
    position: Annotated[int, msgspec.Meta(ge=1)]
    logprobs: list[TokenLogprob]


class Embedded(BusMessage, frozen=True, kw_only=True):
    """The vector of a prompt: little-endian float32, of length 1. Its RequestFinished follows."""

    request_id: str
    epoch: Epoch
    vector: bytes


class RequestStarted(BusMessage, frozen=True, kw_only=True):
    """A prefill worker began computing. `cached_tokens` of the prompt came from its prefix cache."""

    request_id: str
    epoch: Epoch
    cached_tokens: int = 0


class MoveReason(StrEnum):
    """Why a sequence is handed off."""

    PREFILLED = "prefilled"
    DRAIN = "drain"
    RECLAIM = "reclaim"
    REBALANCE = "rebalance"


class HandingOff(BusMessage, frozen=True, kw_only=True):
    """The holder is about to commit the sequence to `taker`; from now on both matter to the request."""

    request_id: str
    epoch: Epoch
    taker: PeerRef
    transport: str
    reason: MoveReason = MoveReason.PREFILLED


class HandedOff(BusMessage, frozen=True, kw_only=True):
    """Sent by the taker once it has adopted the sequence: it alone holds it now.

    `next_index` is of the token that it computes first. A holder hands on only after a token of its own, so within
    an epoch a HandedOff with a higher `next_index` is of a later holder, in whatever order the two arrive.
    """

    request_id: str
    epoch: Epoch
    next_index: Index = 0


class RequestFinished(BusMessage, frozen=True, kw_only=True):
    """The one terminal message of `(request_id, epoch)`.

    `num_output_tokens` counts over all epochs; the gateway waits until it has that many before it ends the stream.
    `error` is a sentence for the client when `reason` is `error`.
    """

    request_id: str
    epoch: Epoch
    reason: FinishReason
    num_output_tokens: Index
    error: str | None = None


OVER_SHARE = "over_share"
"""Why a request is `Returned` whose gateway has as many at the worker as it may: try another, or wait for a while."""


class Returned(BusMessage, frozen=True, kw_only=True):
    """The worker gives the request back unfinished (no pages, draining, hand-off failed): replay it."""

    request_id: str
    epoch: Epoch
    reason: str


Event = TokenChunk | PromptLogprobs | Embedded | RequestStarted | HandingOff | HandedOff | RequestFinished | Returned


class Publication(BusMessage, frozen=True, kw_only=True):
    """What one step had to say to one gateway, in order: started, prompt results, tokens, hand-offs, ends."""

    worker: PeerRef
    events: list[Event]


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


class Heartbeat(BusMessage, frozen=True, kw_only=True):
    """A worker lives; its record with current load, and the requests it holds for this gateway."""

    record: WorkerRecord
    requests: list[RequestNote]
    metrics: list[MetricFamily] = msgspec.field(default_factory=list)


class Goodbye(BusMessage, frozen=True, kw_only=True):
    """The sender leaves in order; whatever it held is given back already."""

    peer: PeerRef


Message = GatewayHello | PrefillRequest | Cancel | DrainRequest | Publication | Heartbeat | Goodbye | HandOffMessage
