"""The two forms of a text completion: one JSON object, or chunks."""

from __future__ import annotations

from collections.abc import Sequence

from litestar.types import Receive
from msgspec import UNSET

from fleet.types import FinishReason
from gateway.api.chunks import PLAIN_END, ChunkFrame
from gateway.api.jobs import Job, Output, Run
from gateway.api.logprobs import TokenSpeller, completion_logprobs, echoed_logprobs, prompt_logprobs
from gateway.api.responses import Completion, CompletionChoice, CompletionLogprobs
from gateway.api.sse import DONE, EventStream, json_text, json_value
from gateway.text.assembler import Piece, TextToken


async def plain_completion(run: Run, job: Job, receive: Receive) -> Completion:
    """The whole answer. Raises: what `Run.drive` raises."""
    texts = [[_echo(job, index)] for index in range(job.num_outputs)]
    tokens: list[list[TextToken]] = [[] for _ in range(job.num_outputs)]
    reasons = [FinishReason.LENGTH] * job.num_outputs  # what stays so where nothing is generated

    async def collect(output: Output, piece: Piece) -> None:
        texts[output.index].append(piece.text)
        tokens[output.index].extend(piece.tokens)
        if piece.finish is not None:
            reasons[output.index] = piece.finish

    await run.drive(collect, receive)
    spell = TokenSpeller(job.model.card, as_ids=job.tokens_as_ids)
    choices = [
        CompletionChoice(
            index=place,
            text="".join(texts[index]),
            finish_reason=reasons[index].value,
            logprobs=_logprobs(run, job, index, tokens[index], spell) if job.with_logprobs else None,
            token_ids=[token.token_id for token in tokens[index]] if job.return_token_ids else UNSET,
            prompt_token_ids=job.prompts[index // job.num_samples] if job.return_token_ids else UNSET,
            prompt_logprobs=prompt_logprobs(
                job.prompts[index // job.num_samples],
                _scorer(run, job, index).prompt_logprobs,
                spell,
                num_top=job.num_prompt_logprobs,
            )
            if job.num_prompt_logprobs is not None
            else UNSET,
        )
        for place, index in enumerate(_chosen(run, job))
    ]
    return Completion(
        id=job.completion_id,
        created=job.created,
        model=job.model_name,
        choices=choices,
        usage=run.usage(),
        system_fingerprint=job.fingerprint,
        service_tier=job.service_tier or UNSET,
    )


def _chosen(run: Run, job: Job) -> list[int]:
    """Outputs that become choices, in order: of each prompt's samples those with the highest logprob per token."""
    if not job.picks_best:
        return list(range(job.num_outputs))
    chosen: list[int] = []
    for first in range(0, job.num_outputs, job.num_samples):
        samples = run.outputs[first : first + job.num_samples]
        ranked = sorted(samples, key=lambda output: output.mean_logprob, reverse=True)
        chosen += [output.index for output in ranked[: job.num_choices]]
    return chosen


def _logprobs(run: Run, job: Job, index: int, tokens: Sequence[TextToken], spell: TokenSpeller) -> CompletionLogprobs:
    lists = completion_logprobs(tokens, spell, num_top=job.num_top_logprobs, base_offset=len(_echo(job, index)))
    if not job.scores_prompts:
        return lists
    whole = _echoed(job, _scorer(run, job, index), spell)
    whole.extend(lists)
    return whole


def _scorer(run: Run, job: Job, index: int) -> Output:
    """Where nothing is streamed, the first sample of a prompt scores it for all."""
    return run.outputs[index - index % job.num_samples]


def _echoed(job: Job, output: Output, spell: TokenSpeller) -> CompletionLogprobs:
    prompt = output.prompt_index
    return echoed_logprobs(
        job.prompts[prompt],
        job.echo_offsets[prompt],
        output.prompt_logprobs,
        spell,
        num_top=job.num_top_logprobs,
    )


async def streamed_completion(run: Run, job: Job, stream: EventStream, receive: Receive) -> None:
    """Write the answer as chunks. Raises: what `Run.drive` raises."""
    writer = CompletionChunks(run, job)
    opened: set[int] = set()

    async def write(output: Output, piece: Piece) -> None:
        events = writer.piece(output.index, piece)
        if job.scores_prompts:
            if output.index not in opened:
                opened.add(output.index)
                events = writer.scored_opening(output) + events
        elif not stream.started:
            events = writer.openings() + events
        if events:
            await stream.send(events)

    await run.drive(write, receive)
    ending = b""
    if not job.computes:
        done = Piece("", (), FinishReason.LENGTH)
        ending = writer.openings() + b"".join(writer.piece(index, done) for index in range(job.num_outputs))
    if job.include_usage:
        ending += writer.usage()
    await stream.end(ending + DONE)


class CompletionChunks:
    """Writes chunks of one answer."""

    def __init__(self, run: Run, job: Job) -> None:
        self._job = job
        self._frame = ChunkFrame(run, job, b"text_completion")
        self._spell = TokenSpeller(job.model.card, as_ids=job.tokens_as_ids)

    def openings(self) -> bytes:
        """First chunks of the choices where there is something to say before output: echo and prompt ids."""
        job = self._job
        if not job.echo_texts and not job.return_token_ids:
            return b""
        return b"".join(self._opening(index, b"null") for index in range(job.num_outputs))

    def scored_opening(self, output: Output) -> bytes:
        """The first chunk of a choice whose prompt is scored. Requires: the output's first piece is here."""
        return self._opening(output.index, json_value(_echoed(self._job, output, self._spell)))

    def _opening(self, index: int, logprobs: bytes) -> bytes:
        job = self._job
        ids = b""
        if job.return_token_ids:
            ids = b',"prompt_token_ids":' + json_value(job.prompts[index // job.num_samples])
        return self._event(index, _echo(job, index), b'"logprobs":%b,"finish_reason":null%b}' % (logprobs, ids))

    def piece(self, index: int, piece: Piece) -> bytes:
        """Chunks for a piece of a choice."""
        events = b""
        if piece.tokens or piece.text:
            events = self._event(index, piece.text, self._token_end(index, piece) if piece.tokens else PLAIN_END)
        if piece.finish is not None:
            events += self._event(index, "", b'"logprobs":null,"finish_reason":"%b"}' % piece.finish.value.encode())
        return events

    def usage(self) -> bytes:
        """The chunk after all others that `include_usage` asks for."""
        return self._frame.usage()

    def _event(self, index: int, text: str, end: bytes) -> bytes:
        return self._frame.event(b'{"index":%d,"text":%b,%b' % (index, json_text(text), end))

    def _token_end(self, index: int, piece: Piece) -> bytes:
        job = self._job
        logprobs = b"null"
        if job.with_logprobs:
            lists = completion_logprobs(
                piece.tokens, self._spell, num_top=job.num_top_logprobs, base_offset=len(_echo(job, index))
            )
            logprobs = json_value(lists)
        ids = b""
        if job.return_token_ids:
            ids = b',"token_ids":%b' % json_value([token.token_id for token in piece.tokens])
        return b'"logprobs":%b,"finish_reason":null%b}' % (logprobs, ids)


def _echo(job: Job, index: int) -> str:
    return job.echo_texts[index // job.num_samples] if job.echo_texts else ""
