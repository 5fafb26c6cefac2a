"""A live request: reassembles one exactly-once token stream out of what several workers say over several epochs.

A token is accepted only as (current epoch, next index). An early one waits, since at a hand-off two workers speak and
index 1 may overtake index 0; a late one, or one of an old epoch, is dropped.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from enum import StrEnum

import msgspec

from fleet.hops import HopLog
from fleet.messages import (
    Embedded,
    HandedOff,
    HandingOff,
    MoveReason,
    PromptLogprobs,
    RequestFinished,
    RequestStarted,
    TokenChunk,
)
from fleet.types import FinishReason, Passport, PeerRef, TokenLogprob
from gateway.pipeline import Tokens


class Stage(StrEnum):
    """Where the gateway believes a request to be. Names equal the states in Redis where both exist."""

    QUEUED = "queued"
    PREFILLING = "prefilling"
    HANDING_OFF = "handing_off"
    DECODING = "decoding"
    ENDED = "ended"


class LiveRequest:
    """One sequence under way, as the client's side reads it (`gateway.pipeline.Generation`) and the fleet feeds it.

    Attributes:
        passport: as first sent: prompt, parameters, owner, and output if another gateway began it. Epoch and output
            live here, not in it.
        affinity: see `gateway.router.Router.pick`.
        holders: the workers that matter to it now; one, two at a hand-off, none while it waits.
        moving_for: why it is on its way from one decode worker to another, if it is.
        hops: the workers it has been on.
        replayed_for: why the current epoch began; None in the first.
        speaker: who said the last accepted token of this epoch.
        displaced: it ended for a more urgent request that took its place in the queue.
        first_token_s, first_token_at_s: when the first token came, monotonic and Unix time.
        touched_s: monotonic time of the last dispatch or event; stalls are measured from it.
    """

    def __init__(
        self, passport: Passport, *, on_let_go: Callable[[LiveRequest, FinishReason], None], affinity: str = ""
    ) -> None:
        self.passport = passport
        self.affinity = affinity
        self.epoch = passport.epoch
        self.stage = Stage.QUEUED
        self.holders: list[PeerRef] = []
        self.prefill_peer: PeerRef | None = None
        self.decode_peer: PeerRef | None = None
        self.moving_for: MoveReason | None = None
        self.speaker: PeerRef | None = None
        self.hops = HopLog()
        self.replayed_for: str | None = None
        self.created_s = self.touched_s = time.monotonic()
        self.first_token_s: float | None = None
        self.first_token_at_s: float | None = None
        self.last_token_s: float | None = None
        self.cached_tokens = 0
        self.num_lost = 0
        self.missing_beats = 0
        self.finish: FinishReason | None = None
        self.error: str | None = None
        self.retry_after_s: float | None = None
        self.displaced = False
        self.output: list[int] = passport.token_ids[passport.prompt_len :]
        self._num_given = self._num_read = len(self.output)  # of an earlier life: not read again
        self._logprobs: list[TokenLogprob] = []  # of what came after it
        self._prompt_logprobs: list[TokenLogprob] = []  # of the prompt tokens from the second on
        self._num_prompt_logprobs_read = 0
        self._vector: bytes | None = None
        self._finish_read = False
        self._early: dict[int, TokenChunk] = {}
        self._adopted_at = 0
        self._ending: RequestFinished | None = None
        self._ready = asyncio.Event()
        self._on_let_go = on_let_go

    # the client's side

    @property
    def request_id(self) -> str:
        """Minted by the gateway."""
        return self.passport.request_id

    @property
    def prompt_len(self) -> int:
        """Number of prompt tokens."""
        return self.passport.prompt_len

    @property
    def ended(self) -> bool:
        """Whether nothing more will come."""
        return self.stage is Stage.ENDED

    async def __aiter__(self) -> AsyncIterator[Tokens]:
        """Yield what has arrived since the last item, merged into one; ends after the item with `finish`."""
        while not self._finish_read:
            await self._ready.wait()
            self._ready.clear()
            yield self._take()

    def _take(self) -> Tokens:
        begin, self._num_read = self._num_read, len(self.output)
        first, self._num_prompt_logprobs_read = self._num_prompt_logprobs_read, len(self._prompt_logprobs)
        asked = self.passport.params.logprobs is not None
        self._finish_read = self.finish is not None
        return Tokens(
            token_ids=self.output[begin:],
            logprobs=self._logprobs[begin - self._num_given :] if asked else None,
            prompt_logprobs=self._prompt_logprobs[first:],
            vector=self._vector,
            finish=self.finish,
            cached_tokens=self.cached_tokens,
            error=self.error,
            retry_after_s=self.retry_after_s,
            displaced=self.displaced,
        )

    def stop(self, num_output_tokens: int) -> None:
        """A stop string was completed by output token number `num_output_tokens`; later tokens never happened."""
        if not self.ended:
            del self.output[num_output_tokens:]
            self._on_let_go(self, FinishReason.STOP)

    async def aclose(self) -> None:
        """The client is done with it; if it has not ended it is cancelled. Idempotent."""
        if not self.ended:
            self._on_let_go(self, FinishReason.CANCELLED)

    # the fleet's side

    def next_passport(self) -> Passport:
        """The passport for the current epoch: prompt and all tokens accepted so far."""
        arrived = self.passport
        params = arrived.params
        if params.prompt_logprobs is not None and self._num_missing_prompt_logprobs() == 0:
            params = msgspec.structs.replace(params, prompt_logprobs=None)
        return msgspec.structs.replace(
            arrived, epoch=self.epoch, token_ids=arrived.token_ids[: arrived.prompt_len] + self.output, params=params
        )

    def begin_epoch(self) -> None:
        """Start over elsewhere: whatever older epochs still say is void from now on."""
        self.epoch += 1
        self.stage = Stage.QUEUED
        self.holders = []
        self.prefill_peer = self.decode_peer = None
        self.moving_for = self.speaker = None
        self.missing_beats = 0
        self._adopted_at = 0
        self._early.clear()
        self._ending = None

    def accept_started(self, event: RequestStarted) -> None:
        """A prefill worker computes. Only the first epoch's cache hits are the client's."""
        if self.epoch == 0:
            self.cached_tokens = min(event.cached_tokens, self.prompt_len - 1)

    def accept_handing_off(self, event: HandingOff, worker: PeerRef) -> bool:
        """A second worker begins to matter. False when the taker, or one after it, has already spoken."""
        if worker not in self.holders:
            return False
        if self.stage is not Stage.PREFILLING:
            self.moving_for = event.reason
        self.stage = Stage.HANDING_OFF
        self.decode_peer = event.taker
        self.holders = [worker, event.taker]
        return True

    def accept_handed_off(self, event: HandedOff, worker: PeerRef) -> bool:
        """The taker alone holds it. False when that was long ago and another has taken it since."""
        if event.next_index < self._adopted_at:
            return False
        self._adopted_at = event.next_index
        self.stage = Stage.DECODING
        self.decode_peer = worker
        self.holders = [worker]
        return True

    def leave(self, worker: PeerRef) -> bool:
        """A holder left in order. True if another one goes on, whose word that it has taken over may yet come."""
        if worker in self.holders and len(self.holders) > 1:
            self.holders.remove(worker)
            return True
        return False

    def accept_tokens(self, chunk: TokenChunk) -> int:
        """Take a chunk of the current epoch; returns how many tokens became part of the stream."""
        before = len(self.output)
        waiting = self._early.get(chunk.index)
        if waiting is None or len(waiting.token_ids) < len(chunk.token_ids):
            self._early[chunk.index] = chunk
        while (ready := self._due()) is not None:
            skip = len(self.output) - ready.index
            self.output.extend(ready.token_ids[skip:])
            if ready.logprobs is not None:
                self._logprobs.extend(ready.logprobs[skip:])
        fresh = len(self.output) - before
        if fresh:
            self.last_token_s = time.monotonic()
            if self.first_token_s is None:
                self.first_token_s = self.last_token_s
            self._ready.set()
        return fresh

    def accept_prompt_logprobs(self, event: PromptLogprobs) -> None:
        """Take those that are new. A worker that starts over after a replay sends the first ones again."""
        skip = len(self._prompt_logprobs) + 1 - event.position
        if skip >= 0:
            self._prompt_logprobs.extend(event.logprobs[skip:])

    def accept_vector(self, event: Embedded) -> None:
        """Take the vector; the reader gets it with the end."""
        self._vector = event.vector

    def _num_missing_prompt_logprobs(self) -> int:
        asked = self.passport.params.prompt_logprobs is not None
        return self.prompt_len - 1 - len(self._prompt_logprobs) if asked else 0

    def _due(self) -> TokenChunk | None:
        """Take out a waiting chunk that holds the next index; drop those that hold only old ones."""
        position = len(self.output)
        for index in sorted(self._early):
            if index > position:
                return None
            chunk = self._early.pop(index)
            if index + len(chunk.token_ids) > position:
                return chunk
        return None

    def accept_finished(self, event: RequestFinished) -> bool:
        """Take the terminal message; True once all its tokens are here, False while some are on their way."""
        self._ending = event
        return self.is_complete()

    def is_complete(self) -> bool:
        """Whether a terminal message has come and nothing before it is missing."""
        ending = self._ending
        if ending is None:
            return False
        if ending.reason is FinishReason.ERROR:
            return True
        has_vector = self.passport.pooling is None or self._vector is not None
        has_tokens = len(self.output) >= ending.num_output_tokens
        return has_tokens and has_vector and self._num_missing_prompt_logprobs() == 0

    @property
    def ending(self) -> RequestFinished | None:
        """The terminal message of this epoch, if it has come."""
        return self._ending

    def reason_by_tokens(self) -> FinishReason | None:
        """Why the output so far is a whole answer, if it is: the worker that knew may be gone."""
        params = self.passport.params
        if not self.output:
            return None
        if self.output[-1] in params.stop_token_ids and len(self.output) > params.min_tokens:
            return FinishReason.STOP
        return FinishReason.LENGTH if len(self.output) >= params.max_tokens else None

    def end(self, reason: FinishReason, *, error: str | None = None, retry_after_s: float | None = None) -> None:
        """Close the stream. Idempotent: the first reason stands."""
        if self.ended:
            return
        self.stage = Stage.ENDED
        self.finish = reason
        self.error = error
        self.retry_after_s = retry_after_s
        self.holders = []
        self._early.clear()
        self._ready.set()
