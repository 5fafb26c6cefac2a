"""The two forms of a chat answer: one JSON object, or chunks."""

from __future__ import annotations

from litestar.types import Receive
from msgspec import UNSET

from gateway.api.jobs import Job, Output, Run
from gateway.api.logprobs import TokenSpeller, chat_logprobs
from gateway.api.responses import AnswerMessage, ChatChoice, ChatCompletion, ChatLogprobs
from gateway.api.sse import DONE, EventStream, json_text, json_value
from gateway.text.assembler import Piece, TextToken


async def plain_chat(run: Run, job: Job, receive: Receive) -> ChatCompletion:
    """The whole answer. Raises: what `Run.drive` raises."""
    texts: list[list[str]] = [[] for _ in range(job.num_outputs)]
    tokens: list[list[TextToken]] = [[] for _ in range(job.num_outputs)]
    reasons = [""] * job.num_outputs

    async def collect(output: Output, piece: Piece) -> None:
        texts[output.index].append(piece.text)
        tokens[output.index].extend(piece.tokens)
        if piece.finish is not None:
            reasons[output.index] = piece.finish.value

    await run.drive(collect, receive)
    spell = TokenSpeller(job.model.card)
    choices = [
        ChatChoice(
            index=index,
            message=AnswerMessage("".join(texts[index])),
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
        prompt_token_ids=job.prompts[0] if job.return_token_ids else UNSET,
    )


async def streamed_chat(run: Run, job: Job, stream: EventStream, receive: Receive) -> None:
    """Write the answer as chunks. Raises: what `Run.drive` raises."""
    writer = ChatChunks(job)

    async def write(output: Output, piece: Piece) -> None:
        events = writer.piece(output.index, piece)
        if not stream.started:
            events = writer.openings() + events
        if events:
            await stream.send(events)

    await run.drive(write, receive)
    ending = writer.usage(run) if job.include_usage else b""
    await stream.end(ending + DONE)


class ChatChunks:
    """Writes chunks of one answer; what never changes in them is encoded once.

    The first chunk of each choice carries the role, the last one an empty delta and the finish reason.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._spell = TokenSpeller(job.model.card)
        self._head = (
            b'data: {"id":%b,"object":"chat.completion.chunk","created":%d,"model":%b,"system_fingerprint":%b,'
            % (json_text(job.completion_id), job.created, json_text(job.model_name), json_text(job.fingerprint))
        )
        self._tail = b'],"usage":null}\n\n' if job.include_usage else b"]}\n\n"
        self._content = [
            self._head + b'"choices":[{"index":%d,"delta":{"content":' % index for index in range(job.num_outputs)
        ]
        self._plain_end = b'},"logprobs":null,"finish_reason":null}' + self._tail

    def openings(self) -> bytes:
        """The first chunks of all choices, in order: clients count on it."""
        prompt = b""
        if self._job.return_token_ids:
            prompt = b'"prompt_token_ids":%b,' % json_value(self._job.prompts[0])
        return b"".join(
            self._head
            + (b"" if index else prompt)
            + b'"choices":[{"index":%d,"delta":{"role":"assistant","content":"","refusal":null},' % index
            + b'"logprobs":null,"finish_reason":null}'
            + self._tail
            for index in range(self._job.num_outputs)
        )

    def piece(self, index: int, piece: Piece) -> bytes:
        """Chunks for a piece of a choice."""
        events = b""
        if piece.tokens:
            events = self._content[index] + json_text(piece.text) + self._token_end(piece)
        elif piece.text:
            events = self._content[index] + json_text(piece.text) + self._plain_end
        if piece.finish is not None:
            events += b'%b"choices":[{"index":%d,"delta":{},"logprobs":null,"finish_reason":"%b"}%b' % (
                self._head,
                index,
                piece.finish.value.encode(),
                self._tail,
            )
        return events

    def usage(self, run: Run) -> bytes:
        """The chunk after all others that `include_usage` asks for."""
        return b'%b"choices":[],"usage":%b}\n\n' % (self._head, json_value(run.usage()))

    def _token_end(self, piece: Piece) -> bytes:
        job = self._job
        logprobs = b"null"
        if job.with_logprobs:
            entries = chat_logprobs(piece.tokens, self._spell, num_top=job.num_top_logprobs)
            logprobs = json_value(ChatLogprobs(entries))
        ids = b""
        if job.return_token_ids:
            ids = b',"token_ids":%b' % json_value([token.token_id for token in piece.tokens])
        return b'},"logprobs":%b,"finish_reason":null%b}%b' % (logprobs, ids, self._tail)
