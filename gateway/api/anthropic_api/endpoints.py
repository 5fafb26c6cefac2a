"""The handlers of `/v1/messages`."""

from __future__ import annotations

import msgspec
from litestar import Response, Router, post
from litestar.types import Receive

from fleet.types import FinishReason
from gateway.api.answer_headers import note_headers
from gateway.api.anthropic_api.conversion import count_tokens, message_job
from gateway.api.anthropic_api.errors import exception_handlers, message_error, name_answer
from gateway.api.anthropic_api.objects import Message, MessageErrorBody, MessageTokensCount, MessageUsage
from gateway.api.anthropic_api.requests import CountMessageTokensRequest, CreateMessageRequest
from gateway.api.anthropic_api.writer import MessageWriter
from gateway.api.client_watch import ClientGone
from gateway.api.context import Api, ApiContext, caller_key
from gateway.api.decoding import read_body
from gateway.api.documentation import answers, body_of
from gateway.api.jobs import Job, Output, Run
from gateway.api.replies import AnyRequest, json_reply
from gateway.api.sse import EventStream, StreamedAnswer, typed_event
from gateway.errors import ApiError, ClientLeft
from gateway.text.assembler import Piece

_CREATE = msgspec.json.Decoder(CreateMessageRequest)
_COUNT = msgspec.json.Decoder(CountMessageTokensRequest)


@post(
    "/",
    status_code=200,
    summary="Answer turns",
    operation_class=body_of(CreateMessageRequest),
    responses=answers(Message, 413, 415, failure=MessageErrorBody),
)
async def create_message(request: AnyRequest, api: Api) -> Response[bytes]:
    """Generate; with `stream`, as typed events."""
    request_id = name_answer(request)
    body = await read_body(request, _CREATE)
    job = await message_job(api, body, caller_key(request))
    note_headers(request.scope, job.headers)
    writing = _Writing(job, asked=body.max_tokens)
    if job.stream:
        return _streamed(api, job, writing, request_id)
    try:
        async with Run(api, job) as run:
            await writing.drive(run, request.receive)
    except ClientGone as error:
        raise ClientLeft from error
    return json_reply(writing.message)


@post(
    "/count_tokens",
    status_code=200,
    summary="Count tokens of turns",
    operation_class=body_of(CountMessageTokensRequest),
    responses=answers(MessageTokensCount, 413, 415, failure=MessageErrorBody),
)
async def count_message_tokens(request: AnyRequest, api: Api) -> Response[bytes]:
    """The input tokens that `POST /v1/messages` would count for the same fields, cached ones included."""
    name_answer(request)
    body = await read_body(request, _COUNT)
    model = api.find_model(body.model, caller_key(request))
    return json_reply(MessageTokensCount(await count_tokens(model, body)))


def messages_router() -> Router:
    """Both endpoints, with errors in Anthropic's shape."""
    return Router(
        "/v1/messages",
        route_handlers=[create_message, count_message_tokens],
        exception_handlers=exception_handlers(),
        tags=["Anthropic"],
    )


class _Writing:
    """One answer being written.

    Args:
        asked: `max_tokens` of the request.
    """

    def __init__(self, job: Job, *, asked: int) -> None:
        self.message = Message(job.completion_id, job.model_name, [], MessageUsage(len(job.prompts[0]), 0))
        self._writer = MessageWriter(self.message)
        self._out_of_room = job.params[0].max_tokens < asked

    async def drive(self, run: Run, receive: Receive, stream: EventStream | None = None) -> bytes:
        """Run to the end; returns the last events, those before go to the stream. Raises: what `Run.drive` raises."""
        finish = FinishReason.STOP
        stop_sequence: str | None = None

        async def write(output: Output, piece: Piece) -> None:
            nonlocal finish, stop_sequence
            opening = b""
            if stream is not None and not stream.started:
                opening = self._writer.started(MessageUsage.of(run.usage()))
            events = opening + self._writer.told(output.read(piece))
            finish = piece.finish or finish
            if output.assembler.match is not None:
                stop_sequence = output.assembler.match.text
            if stream is not None and events:
                await stream.send(events)

        await run.drive(write, receive)
        return self._writer.finished(
            finish, MessageUsage.of(run.usage()), stop_sequence=stop_sequence, out_of_room=self._out_of_room
        )


def _streamed(api: ApiContext, job: Job, writing: _Writing, request_id: str) -> Response[bytes]:
    async def produce(stream: EventStream, receive: Receive) -> None:
        async with Run(api, job) as run:
            ending = await writing.drive(run, receive, stream)
        await stream.end(ending)

    def failed(error: ApiError) -> bytes:
        return typed_event("error", message_error(error, request_id))

    return StreamedAnswer(produce, job.headers, error_event=failed)
