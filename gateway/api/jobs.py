"""One request under way: its prompts, its generations, and driving them to the end."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Self

import msgspec
from litestar.types import Receive
from msgspec import UNSET

from fleet.keys import ApiKey
from fleet.types import FinishReason, SamplingParams, TokenLogprob
from fleet.usage import Counts
from gateway.api.client_watch import while_client_stays
from gateway.api.context import ApiContext, OwnId
from gateway.api.responses import CompletionTokensDetails, PromptTokensDetails, Usage
from gateway.api.sampling import for_sample
from gateway.errors import ApiError, GenerationFailed, RateLimited, RequestIdTaken, Unavailable
from gateway.pipeline import Generation, ServedModel, Tokens
from gateway.text.assembler import Piece, TextAssembler, TextOptions
from gateway.text.message_events import MessageEvent
from gateway.text.message_reader import MessageReader, ReadOptions


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """Everything about a request that is known before its first token.

    Attributes:
        completion_id: `chatcmpl-…` or `cmpl-…`; generations carry it in their request ids.
        model_name: as the client wrote it.
        prompts: token ids of each prompt.
        num_samples: answers per prompt that are generated.
        num_choices: how many of them the client gets, the best ones; 0: all.
        params: of each prompt's first sample; `max_tokens` may differ per prompt.
        seeded: the client gave a seed.
        options: how output becomes text.
        continues_prompt: the output reads on from the prompt (completions) instead of being a message.
        reads: how outputs are read as messages.
        chose_function: the client named the function to call.
        echo_texts: prompts as text, to be repeated before their outputs; empty without `echo`.
        echo_offsets: of each prompt, where in its text its tokens begin; empty without `scores_prompts`.
        scores_prompts: log-probabilities of the prompts are wanted.
        num_prompt_logprobs: alternatives per prompt token that vLLM's field of this name reports; None: not reported.
        generates: false for `max_tokens` 0, where nothing is computed but what `scores_prompts` asks for.
        stream, include_usage, return_token_ids, with_logprobs: of the request.
        usage_in_chunks: every chunk tells the usage so far.
        obfuscates: chunks are padded, so that their sizes tell less of the text.
        tokens_as_ids: log-probabilities name tokens `token_id:5`.
        num_top_logprobs: alternatives per token.
        cache_salt, priority, affinity: see `gateway.api.tenancy`.
        service_tier, metadata: repeated in the answer.
        client_request_id: the caller's own name for it, if it chose one.
        headers: for the answer.
    """

    completion_id: str
    created: int
    model: ServedModel
    model_name: str
    fingerprint: str
    prompts: Sequence[list[int]]
    params: Sequence[SamplingParams]
    options: TextOptions
    num_samples: int = 1
    num_choices: int = 0
    seeded: bool = False
    continues_prompt: bool = False
    reads: ReadOptions = ReadOptions()
    chose_function: bool = False
    echo_texts: Sequence[str] = ()
    echo_offsets: Sequence[list[int]] = ()
    scores_prompts: bool = False
    num_prompt_logprobs: int | None = None
    generates: bool = True
    stream: bool = False
    include_usage: bool = False
    usage_in_chunks: bool = False
    obfuscates: bool = False
    tokens_as_ids: bool = False
    return_token_ids: bool = False
    with_logprobs: bool = False
    num_top_logprobs: int = 0
    cache_salt: str = ""
    priority: int = 0
    affinity: str = ""
    service_tier: str | None = None
    metadata: dict[str, str] | None = None
    client_request_id: str | None = None
    key: ApiKey | None = None
    headers: dict[str, str] = {}

    @property
    def computes(self) -> bool:
        """Whether the fleet is needed at all."""
        return self.generates or self.scores_prompts or self.num_prompt_logprobs is not None

    @property
    def picks_best(self) -> bool:
        """Whether more is generated than the client gets."""
        return 0 < self.num_choices < self.num_samples

    @property
    def num_outputs(self) -> int:
        """Sequences to generate; unless `picks_best`, each is a choice of the answer."""
        return len(self.prompts) * self.num_samples


class Output:
    """One choice of an answer. Index `prompt * num_samples + sample`."""

    def __init__(self, job: Job, index: int, generation: Generation) -> None:
        self.index = index
        self.prompt_index = index // job.num_samples
        self.generation = generation
        prompt = job.prompts[self.prompt_index] if job.continues_prompt else ()
        self.assembler = TextAssembler(job.model.card, job.options, prompt)
        self.num_cached_tokens = 0
        self.prompt_logprobs: list[TokenLogprob] = []
        self._reader = MessageReader(job.reads)
        self._chose_function = job.chose_function
        self._think_end_id = job.model.card.think_end_id if job.reads.thinks else None
        self._num_before_answer: int | None = None
        self._keeps_logprobs = job.picks_best
        self._logprobs: list[float] = []

    @property
    def mean_logprob(self) -> float:
        """Log-probability per token, where the job picks the best by it."""
        counted = self._logprobs[: self.assembler.num_tokens]
        return sum(counted) / max(1, len(counted))

    @property
    def num_reasoning_tokens(self) -> int | None:
        """Output tokens up to the end of the reasoning; None if it has none, or an end that is no single token."""
        if not self._reader.has_thought or self._think_end_id is None:
            return None
        num_tokens = self.assembler.num_tokens
        return num_tokens if self._num_before_answer is None else min(num_tokens, self._num_before_answer)

    def read(self, piece: Piece) -> list[MessageEvent]:
        """What a piece adds to the message. Call it once for every piece, in order."""
        events = self._reader.feed(piece.text)
        return events if piece.finish is None else events + self._reader.finish()

    def finish_reason(self, finish: FinishReason) -> str:
        """OpenAI's word for the end of a message: `tool_calls` with calls, unless the client chose the function."""
        calls = finish is FinishReason.STOP and self._reader.num_calls > 0 and not self._chose_function
        return "tool_calls" if calls else finish.value

    async def run(self, sink: Sink) -> None:
        """Hand every piece to the sink; the first one even if it is empty, so that a stream can open.

        Raises: ApiError if the generation fails.
        """
        opened = False
        async for tokens in self.generation:
            self.num_cached_tokens = max(self.num_cached_tokens, tokens.cached_tokens)
            if tokens.finish in {FinishReason.ERROR, FinishReason.CANCELLED}:
                raise failure_of(tokens)
            self.prompt_logprobs += tokens.prompt_logprobs
            if self._keeps_logprobs and tokens.logprobs is not None:
                self._logprobs += [entry.logprob for entry in tokens.logprobs]
            if self._think_end_id in tokens.token_ids and self._num_before_answer is None:
                place = tokens.token_ids.index(self._think_end_id)
                self._num_before_answer = self.assembler.num_tokens + place + 1
            piece = self.assembler.push(tokens)
            if self.assembler.match is not None:
                if tokens.finish is None:
                    self.generation.stop(self.assembler.num_tokens)
                await sink(self, piece)
                return
            if piece.text or piece.tokens or piece.finish is not None or not opened:
                await sink(self, piece)
                opened = True
            if piece.finish is not None:
                return
        raise GenerationFailed("The generation ended without a reason.")


Sink = Callable[[Output, Piece], Awaitable[None]]


def failure_of(tokens: Tokens) -> ApiError:
    """What to tell the client of a generation that ended with an error."""
    message = tokens.error or "The generation was interrupted."
    if tokens.displaced:
        return RateLimited(message, retry_after_s=tokens.retry_after_s or 1.0, code="server_overloaded")
    if tokens.retry_after_s is not None:
        return Unavailable(message, retry_after_s=tokens.retry_after_s)
    return GenerationFailed(message)


class Run:
    """A job with its generations started. Use as `async with Run(api, job) as run: await run.drive(…)`.

    Leaving the block closes every generation, counts its usage, and charges the output to the caller's key.
    """

    def __init__(self, api: ApiContext, job: Job) -> None:
        self._api = api
        self._job = job
        self.outputs: list[Output] = []
        self._own_id: OwnId = (None, "")

    async def __aenter__(self) -> Self:
        """Submit all generations, or none. Raises: PipelineError; RequestIdTaken.

        Samples of one prompt are sent to one prefill worker, where the first computes it and the others find it.
        """
        job = self._job
        num_sequences = job.num_outputs if job.computes else 0
        self._take_id()
        try:
            if num_sequences > 1:
                self._api.pipeline.require_room(job.model, num_sequences, priority=job.priority)
            for index in range(num_sequences):
                request_id = f"{job.completion_id}-{index}" if index else job.completion_id
                self.outputs.append(Output(job, index, await self._submit(index, request_id)))
        except BaseException:
            await self._close()
            raise
        return self

    async def _submit(self, index: int, request_id: str) -> Generation:
        """Start the generation of one output. Raises: PipelineError."""
        job = self._job
        prompt, sample = divmod(index, job.num_samples)
        affinity = job.affinity
        if not affinity and job.num_samples > 1:
            affinity = f"{job.completion_id}/{prompt}"
        return await self._api.pipeline.submit(
            model=job.model,
            prompt_ids=job.prompts[prompt],
            params=for_sample(job.params[prompt], sample, seeded=job.seeded, scores=job.stream),
            request_id=request_id,
            cache_salt=job.cache_salt,
            priority=job.priority,
            affinity=affinity,
        )

    async def __aexit__(self, *_: object) -> None:
        """Close all generations."""
        await self._close()
        job, usage = self._job, self.usage()
        counts = Counts(
            requests=1,
            prompt_tokens=usage.prompt_tokens,
            cached_tokens=usage.prompt_tokens_details.cached_tokens,
            completion_tokens=usage.completion_tokens,
        )
        self._api.usage.add("" if job.key is None else job.key.key_id, job.model.name, counts)
        await self._api.limiter.charge_output(job.key, usage.completion_tokens)

    async def drive(self, sink: Sink, receive: Receive) -> None:
        """Run all outputs to their end; `sink` is called for one piece at a time.

        Raises: ClientGone as soon as the client leaves; ApiError when a generation fails; what the sink raises.
        """
        if not self.outputs:
            return
        one_at_a_time = asyncio.Lock()

        async def in_turn(output: Output, piece: Piece) -> None:
            async with one_at_a_time:
                await sink(output, piece)

        chosen = sink if len(self.outputs) == 1 else in_turn
        await while_client_stays([output.run(chosen) for output in self.outputs], receive)

    def usage(self) -> Usage:
        """Token counts so far. Of several samples of a prompt the first tells what the cache held."""
        job = self._job
        num_prompt_tokens = sum(map(len, job.prompts))
        num_output_tokens = sum(output.assembler.num_tokens for output in self.outputs)
        num_cached = sum(
            min(output.num_cached_tokens, len(job.prompts[output.prompt_index]) - 1)
            for output in self.outputs[:: job.num_samples]
        )
        reasoning = [n for output in self.outputs if (n := output.num_reasoning_tokens) is not None]
        return Usage(
            prompt_tokens=num_prompt_tokens,
            completion_tokens=num_output_tokens,
            total_tokens=num_prompt_tokens + num_output_tokens,
            prompt_tokens_details=PromptTokensDetails(num_cached),
            completion_tokens_details=CompletionTokensDetails(sum(reasoning)) if reasoning else UNSET,
        )

    async def _close(self) -> None:
        self._api.ids_under_way.discard(self._own_id)
        for output in self.outputs:
            await output.generation.aclose()

    def _take_id(self) -> None:
        chosen = self._job.client_request_id
        if chosen is None:
            return
        own_id = (None if self._job.key is None else self._job.key.key_id, chosen)
        if own_id in self._api.ids_under_way:
            raise RequestIdTaken(chosen)
        self._own_id = own_id
        self._api.ids_under_way.add(own_id)
