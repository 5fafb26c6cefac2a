"""The two forms of a chat answer: one JSON object, or chunks."""

from __future__ import annotations

from litestar.types import Receive
from msgspec import UNSET

from gateway.api.chunks import PLAIN_END, ChunkFrame
from gateway.api.jobs import Job, Output, Run
from gateway.api.logprobs import TokenSpeller, chat_logprobs, prompt_logprobs
from gateway.api.message_parts import MessageParts
from gateway.api.responses import ChatChoice, ChatCompletion, ChatLogprobs
from gateway.api.sse import DONE, EventStream, json_text, json_value
from gateway.text.assembler import Piece, TextToken
from gateway.text.message_events import CallDelta, CallStart, ContentDelta, MessageEvent, ReasoningDelta


async def plain_chat(run: Run, job: Job, receive: Receive) -> ChatCompletion:
    """The whole answer. Raises: what `Run.drive` raises."""
    messages = [MessageParts() for _ in range(job.num_outputs)]
    tokens: list[list[TextToken]] = [[] for _ in range(job.num_outputs)]
    reasons = [""] * job.num_outputs

    async def collect(output: Output, piece: Piece) -> None:
        messages[output.index].add(output.read(piece))
        tokens[output.index].extend(piece.tokens)
        if piece.finish is not None:
            reasons[output.index] = output.finish_reason(piece.finish)

    await run.drive(collect, receive)
    spell = TokenSpeller(job.model.card, as_ids=job.tokens_as_ids)
    choices = [
        ChatChoice(
            index=index,
            message=messages[index].message(),
            finish_reason=reasons[index],
            logprobs=ChatLogprobs(chat_logprobs(tokens[index], spell, num_top=job.num_top_logprobs))
            if job.with_logprobs
            else None,
            token_ids=[token.token_id for token in tokens[index]] if job.return_token_ids else UNSET,
        )
        for index in range(job.num_outputs)
    ]
    return ChatCompletion(
        id=job.completion_id,
        created=job.created,
        model=job.model_name,
        choices=choices,
        usage=run.usage(),
        system_fingerprint=job.fingerprint,
        service_tier=job.service_tier or UNSET,
        metadata=job.metadata or UNSET,
        prompt_token_ids=job.prompts[0] if job.return_token_ids else UNSET,
        prompt_logprobs=prompt_logprobs(
            job.prompts[0], run.outputs[0].prompt_logprobs, spell, num_top=job.num_prompt_logprobs
        )
        if job.num_prompt_logprobs is not None
        else UNSET,
    )


async def streamed_chat(run: Run, job: Job, stream: EventStream, receive: Receive) -> None:
    """Write the answer as chunks. Raises: what `Run.drive` raises."""
    writer = ChatChunks(run, job)

    async def write(output: Output, piece: Piece) -> None:
        events = writer.piece(output, piece)
        if not stream.started:
            events = writer.openings() + events
        if events:
            await stream.send(events)

    await run.drive(write, receive)
    ending = writer.usage() if job.include_usage else b""
    await stream.end(ending + DONE)


class ChatChunks:
    """Writes chunks of one answer.

    The first chunk of each choice carries the role, the last one an empty delta and the finish reason.
    """

    def __init__(self, run: Run, job: Job) -> None:
        self._job = job
        self._frame = ChunkFrame(run, job, b"chat.completion.chunk")
        self._spell = TokenSpeller(job.model.card, as_ids=job.tokens_as_ids)
        # A message of calls has no content; where there may be some, that is not known yet
        self._opening = b'"role":"assistant","content":%b,"refusal":null' % (b"null" if job.reads.calls else b'""')

    def openings(self) -> bytes:
        """The first chunks of all choices, in order: clients count on it."""
        prompt = b""
        if self._job.return_token_ids:
            prompt = b'"prompt_token_ids":%b,' % json_value(self._job.prompts[0])
        return b"".join(
            self._event(index, self._opening, PLAIN_END, beside=b"" if index else prompt)
            for index in range(self._job.num_outputs)
        )

    def piece(self, output: Output, piece: Piece) -> bytes:
        """Chunks for a piece of a choice: one for each delta, the first of them with the piece's tokens."""
        index = output.index
        deltas = [delta for event in output.read(piece) if (delta := _delta(event)) is not None]
        events = b""
        if piece.tokens:
            first, *deltas = deltas or [b""]
            events = self._event(index, first, self._token_end(piece))
        events += b"".join([self._event(index, delta, PLAIN_END) for delta in deltas])
        if piece.finish is not None:
            reason = output.finish_reason(piece.finish).encode()
            events += self._event(index, b"", b'"logprobs":null,"finish_reason":"%b"}' % reason)
        return events

    def usage(self) -> bytes:
        """The chunk after all others that `include_usage` asks for."""
        return self._frame.usage()

    def _event(self, index: int, delta: bytes, end: bytes, *, beside: bytes = b"") -> bytes:
        return self._frame.event(b'{"index":%d,"delta":{%b},%b' % (index, delta, end), beside=beside)

    def _token_end(self, piece: Piece) -> bytes:
        job = self._job
        logprobs = b"null"
        if job.with_logprobs:
            entries = chat_logprobs(piece.tokens, self._spell, num_top=job.num_top_logprobs)
            logprobs = json_value(ChatLogprobs(entries))
        ids = b""
        if job.return_token_ids:
            ids = b',"token_ids":%b' % json_value([token.token_id for token in piece.tokens])
        return b'"logprobs":%b,"finish_reason":null%b}' % (logprobs, ids)


def _delta(event: MessageEvent) -> bytes | None:
    """The inside of the `delta` object that tells an event; the end of a call is told by what comes after it."""
    match event:
        case ContentDelta(text):
            return b'"content":' + json_text(text)
        case ReasoningDelta(text):
            return b'"reasoning_content":%b,"reasoning":%b' % (json_text(text), json_text(text))
        case CallStart(index, call_id, name):
            return b'"tool_calls":[{"index":%d,"id":"%b","type":"function","function":{"name":%b,"arguments":""}}]' % (
                index,
                call_id.encode(),
                json_text(name),
            )
        case CallDelta(index, arguments):
            return b'"tool_calls":[{"index":%d,"function":{"arguments":%b}}]' % (index, json_text(arguments))
    return None
