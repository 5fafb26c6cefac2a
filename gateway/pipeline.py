"""The narrow waist of the gateway: token ids go down, token ids come up.

`gateway.api` (HTTP and text) is written against these Protocols alone; `gateway.service` supplies the parts that
know the fleet. Nothing on this side of the waist knows workers, epochs or messages.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Protocol

import msgspec

from fleet.types import FinishReason, Pooling, SamplingParams, TokenLogprob
from gateway.text.card import ModelCard


class Tokens(msgspec.Struct, frozen=True, kw_only=True):
    """Output tokens of one generation that became available together, in order, each exactly once.

    Attributes:
        token_ids: may be empty, in a last item only.
        logprobs: as long as `token_ids` if `SamplingParams.logprobs` was set, else None.
        prompt_logprobs: of prompt tokens, in order from the second one on; with `SamplingParams.prompt_logprobs` all of
            them have come by the first item with a token or `finish`.
        vector: with `pooling`, in the last item: little-endian float32 of length 1.
        finish: set on exactly one item, the last of the generation.
        cached_tokens: prompt tokens that came from a prefix cache. The largest value seen counts. Pages handed from
            prefill to decode are no cache hit.
        error: a sentence for the client when `finish` is `error`.
        retry_after_s: with `finish` `error`: the failure is for want of workers and worth a retry after so long
            (answered 503). None: an internal error (answered 500).
        displaced: with `finish` `error`: a more urgent request took its place in a full queue (answered 429).
    """

    token_ids: list[int]
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob] = []
    vector: bytes | None = None
    finish: FinishReason | None = None
    cached_tokens: int = 0
    error: str | None = None
    retry_after_s: float | None = None
    displaced: bool = False


class Generation(Protocol):
    """One sequence under way. Its owner iterates it once and calls `aclose` in every case.

    Iterating hands out whatever has arrived since the last item, merged into one, so that a reader that is slow costs
    no more memory than the tokens themselves.
    """

    @property
    def request_id(self) -> str:
        """The id given to `submit`."""
        ...

    @property
    def prompt_len(self) -> int:
        """Number of prompt tokens."""
        ...

    def __aiter__(self) -> AsyncIterator[Tokens]:
        """Iterate the output. Ends after the item that has `finish` set; raises nothing of its own."""
        ...

    def stop(self, num_output_tokens: int) -> None:
        """End it now on its worker: a stop string was completed by output token number `num_output_tokens`.

        Never blocks. Counts as finished by `stop`, not as cancelled. The caller does not iterate on.
        """
        ...

    async def aclose(self) -> None:
        """Let go. If it has neither ended nor been stopped it is cancelled on its worker. Idempotent."""
        ...


class ServedModel(msgspec.Struct, frozen=True, kw_only=True):
    """A model as clients see it.

    Attributes:
        name: what clients put in `model`; `aliases` are further names.
        created: Unix time in seconds.
        max_model_len: longest prompt plus output in tokens.
        card: its tokenizer, chat template and defaults.
        ready: a prefill and a decode worker that match each other are there.
    """

    name: str
    created: int
    max_model_len: int
    card: ModelCard
    aliases: tuple[str, ...] = ()
    ready: bool = True


class ModelReadiness(msgspec.Struct, frozen=True, kw_only=True):
    """Live, not draining workers of one model."""

    model: str
    num_prefill: int
    num_decode: int

    @property
    def ready(self) -> bool:
        """Whether a request can be served from end to end."""
        return self.num_prefill > 0 and self.num_decode > 0


class Readiness(msgspec.Struct, frozen=True, kw_only=True):
    """What the fleet could do now."""

    models: tuple[ModelReadiness, ...] = ()

    @property
    def ready(self) -> bool:
        """Whether at least one model can be served from end to end."""
        return any(model.ready for model in self.models)


class Pipeline(Protocol):
    """The fleet as the HTTP half sees it. All methods are called on the event-loop thread."""

    def models(self) -> Sequence[ServedModel]:
        """Every model known, ready or not, in a stable order."""
        ...

    def model(self, name: str) -> ServedModel | None:
        """The model of this name or alias."""
        ...

    def check_room(self, model: ServedModel, num_sequences: int, *, priority: int) -> None:
        """Refuse what would not be admitted now, before any work is done for it. Changes nothing.

        Raises: gateway.errors.Overloaded.
        """
        ...

    def require_room(self, model: ServedModel, num_sequences: int, *, priority: int) -> None:
        """See that so many sequences would be admitted now, so that a batch is refused whole before any of it starts.

        Less urgent ones may be pushed out for them.
        Raises: gateway.errors.Overloaded.
        """
        ...

    async def submit(
        self,
        *,
        model: ServedModel,
        prompt_ids: list[int],
        params: SamplingParams,
        request_id: str,
        cache_salt: str = "",
        priority: int = 0,
        pooling: Pooling | None = None,
        output_ids: Sequence[int] = (),
        affinity: str = "",
    ) -> Generation:
        """Admit one sequence and start it, or go on after `output_ids`, which another gateway was given.

        Sequences with an equal `affinity` go to one prefill worker, load permitting.

        What the generation hands out comes after them; its counts include them.
        Requires: `prompt_ids` not empty, `len(prompt_ids) + params.max_tokens <= model.max_model_len`, `request_id`
        unique, `params.max_tokens` 0 with `pooling`.
        Returns as soon as the sequence is admitted, before its first token.
        Raises: gateway.errors.Overloaded at once when its first token would come too late; gateway.errors.NoWorkers
        when no worker can serve the model and none came within the bounded wait.
        """
        ...

    def readiness(self) -> Readiness:
        """Worker counts per model, for `/health/ready`."""
        ...
