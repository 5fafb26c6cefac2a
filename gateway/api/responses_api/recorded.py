"""A generation that remembers what it said, and can say it again before it goes on."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

import msgspec

from fleet.types import FinishReason
from gateway.api.context import ApiContext
from gateway.api.jobs import Job, Run
from gateway.pipeline import Generation, Tokens


class RecordedGeneration:
    """Implements `gateway.pipeline.Generation`: first what an earlier life said, in the same portions, then the rest.

    Args:
        known: what was said before; may hold the whole output.
        live: what goes on after it; None if nothing does.

    Attributes:
        fresh: what `live` added, without failures.
    """

    def __init__(self, request_id: str, prompt_len: int, known: Sequence[Tokens], live: Generation | None) -> None:
        self.request_id = request_id
        self.prompt_len = prompt_len
        self._known = known
        self._live = live
        self.fresh: list[Tokens] = []

    async def __aiter__(self) -> AsyncIterator[Tokens]:
        """See the Protocol."""
        for tokens in self._known:
            yield tokens
        if self._live is None:
            return
        async for tokens in self._live:
            told = tokens
            if self._known:
                told = msgspec.structs.replace(tokens, cached_tokens=0)  # cache hits of a replay are not the client's
            if tokens.finish not in {FinishReason.ERROR, FinishReason.CANCELLED}:
                self.fresh.append(told)
            yield told

    def stop(self, num_output_tokens: int) -> None:
        """See the Protocol."""
        if self._live is not None:
            self._live.stop(num_output_tokens)

    async def aclose(self) -> None:
        """See the Protocol."""
        if self._live is not None:
            await self._live.aclose()


class RecordedRun(Run):
    """A run of one output that goes on from `known`."""

    def __init__(self, api: ApiContext, job: Job, known: Sequence[Tokens]) -> None:
        super().__init__(api, job)
        self._known = known
        self.generation: RecordedGeneration | None = None

    async def _submit(self, index: int, request_id: str) -> Generation:
        """Start or continue the only output. Raises: PipelineError."""
        assert index == 0, "a response has one output"  # noqa: S101 (our own invariant)
        job, known = self._job, self._known
        live: Generation | None = None
        if not any(tokens.finish is not None for tokens in known):
            live = await self._api.pipeline.submit(
                model=job.model,
                prompt_ids=job.prompts[0],
                params=job.params[0],
                request_id=request_id,
                cache_salt=job.cache_salt,
                priority=job.priority,
                output_ids=[token_id for tokens in known for token_id in tokens.token_ids],
            )
        self.generation = RecordedGeneration(request_id, len(job.prompts[0]), known, live)
        return self.generation

    def take_fresh(self) -> list[Tokens]:
        """What came from the fleet since the last call."""
        if self.generation is None:
            return []
        fresh, self.generation.fresh = self.generation.fresh, []
        return fresh
