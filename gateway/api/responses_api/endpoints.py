"""The handlers of `/v1/responses`."""

from __future__ import annotations

import asyncio
from typing import Annotated, Literal

import msgspec
from litestar import MediaType, Response, delete, get, post
from litestar.params import FromPath, FromQuery, QueryParameter
from litestar.types import Receive

from fleet.keys import ApiKey
from fleet.logs import get_logger
from fleet.redis_client import UNAVAILABLE
from fleet.types import FinishReason
from gateway.api.answer_headers import note_headers
from gateway.api.client_watch import ClientGone, while_client_stays
from gateway.api.context import Api, ApiContext, caller_key, model_or_only
from gateway.api.decoding import read_body
from gateway.api.documentation import answers, body_of
from gateway.api.jobs import Output, Run
from gateway.api.replies import AnyRequest, json_reply
from gateway.api.responses_api.background import BackgroundRuns
from gateway.api.responses_api.items import item_json
from gateway.api.responses_api.objects import (
    DeletedResponse,
    InputItemList,
    InputTokens,
    ResponseObject,
)
from gateway.api.responses_api.prepare import Plan, count_input, response_plan
from gateway.api.responses_api.requests import CreateResponseRequest, InputTokensRequest
from gateway.api.responses_api.store import StoredResponse, away
from gateway.api.responses_api.telling import narrator_of, tell
from gateway.api.sse import EventStream, StreamedAnswer, typed_event
from gateway.errors import ApiError, ClientLeft, InvalidRequest
from gateway.text.assembler import Piece

_CREATE = msgspec.json.Decoder(CreateResponseRequest)
_COUNT = msgspec.json.Decoder(InputTokensRequest)
_log = get_logger("responses")

MAX_PAGE = 100
STORE_WAIT_S = 1.0
"""A client waits so long at most for its finished response to be stored; a Redis that hangs holds up no answer."""


@post(
    "/v1/responses",
    status_code=200,
    summary="Answer input items",
    tags=["OpenAI"],
    operation_class=body_of(CreateResponseRequest),
    responses=answers(ResponseObject),
)
async def create_response(request: AnyRequest, api: Api) -> Response[bytes]:
    """Generate; with `stream`, as typed events; with `background`, on its own, to be retrieved later."""
    key = caller_key(request)
    plan = await response_plan(api, api.responses, await read_body(request, _CREATE), key)
    headers = plan.job.headers
    note_headers(request.scope, headers)
    if plan.response.background:
        runs = _background(api)
        body = await runs.start(plan, key)
        if plan.job.stream:
            return _followed(runs, plan.response.id, after=-1, headers=headers)
        return _as_json(body, headers)
    if plan.job.stream:
        return _streamed(api, plan, key)
    try:
        async with Run(api, plan.job) as run:
            body = await _whole(api, run, plan, key, request.receive)
    except ClientGone as error:
        raise ClientLeft from error
    return _as_json(body, headers)


@get(
    "/v1/responses/{response_id:str}", summary="Retrieve a response", tags=["OpenAI"], responses=answers(ResponseObject)
)
async def get_response(
    request: AnyRequest,
    api: Api,
    response_id: FromPath[str],
    stream: FromQuery[bool] = False,
    starting_after: Annotated[int | None, QueryParameter(ge=0)] = None,
) -> Response[bytes]:
    """The response as it stands; with `stream`, the events of a background response after number `starting_after`."""
    stored = await _own(api, response_id, request)
    if not stream:
        if starting_after is not None:
            raise InvalidRequest(
                "'starting_after' is only allowed when 'stream' is true.", param="starting_after", code="invalid_value"
            )
        return _as_json(stored.body)
    if not stored.streams:
        raise InvalidRequest(
            "Only a response that was created with 'background' and 'stream' can be streamed again.",
            param="stream",
            code="invalid_value",
        )
    return _followed(_background(api), response_id, after=-1 if starting_after is None else starting_after, headers={})


@delete(
    "/v1/responses/{response_id:str}",
    status_code=200,
    summary="Delete a response",
    tags=["OpenAI"],
    responses=answers(DeletedResponse),
)
async def delete_response(request: AnyRequest, api: Api, response_id: FromPath[str]) -> Response[bytes]:
    """Forget a response; one that still runs in the background stops."""
    await _own(api, response_id, request)
    assert api.responses is not None, "there was a response in it"  # noqa: S101 (our own invariant)
    await api.responses.delete(response_id)
    return json_reply(DeletedResponse(response_id))


@post(
    "/v1/responses/{response_id:str}/cancel",
    status_code=200,
    summary="Cancel a background response",
    tags=["OpenAI"],
    responses=answers(ResponseObject),
)
async def cancel_response(request: AnyRequest, api: Api, response_id: FromPath[str]) -> Response[bytes]:
    """Stop it. One that has ended stays as it is."""
    stored = await _own(api, response_id, request)
    if not stored.response.background:
        raise InvalidRequest("Only a background response can be cancelled.", param="response_id", code="invalid_value")
    await _background(api).cancel(stored)
    return _as_json((await _own(api, response_id, request)).body)


@get(
    "/v1/responses/{response_id:str}/input_items",
    summary="List the input of a response",
    tags=["OpenAI"],
    responses=answers(InputItemList),
)
async def list_input_items(
    request: AnyRequest,
    api: Api,
    response_id: FromPath[str],
    order: FromQuery[Literal["asc", "desc"]] = "desc",
    limit: Annotated[int, QueryParameter(ge=1, le=MAX_PAGE)] = 20,
    after: FromQuery[str | None] = None,
) -> Response[bytes]:
    """The items of this response's own input, without those of responses before it."""
    stored = await _own(api, response_id, request)
    items = [item_json(item) for item in stored.items]
    if order == "desc":
        items.reverse()
    if after is not None:
        places = [place for place, item in enumerate(items) if item["id"] == after]
        if not places:
            raise InvalidRequest(f"No item with id {after[:100]!r}.", param="after", code="invalid_value")
        items = items[places[0] + 1 :]
    page = items[:limit]
    return json_reply(
        InputItemList(
            data=page,
            has_more=len(items) > limit,
            first_id=page[0]["id"] if page else "",
            last_id=page[-1]["id"] if page else "",
        )
    )


@post(
    "/v1/responses/input_tokens",
    status_code=200,
    summary="Count input tokens",
    tags=["OpenAI"],
    operation_class=body_of(InputTokensRequest),
    responses=answers(InputTokens),
)
async def count_input_tokens(request: AnyRequest, api: Api) -> Response[bytes]:
    """The prompt tokens that `POST /v1/responses` would report for the same fields."""
    body = await read_body(request, _COUNT)
    model = model_or_only(api, body.model, request)
    return json_reply(InputTokens(await count_input(api.responses, model, body, caller_key(request))))


async def _whole(api: ApiContext, run: Run, plan: Plan, key: ApiKey | None, receive: Receive) -> bytes:
    """The whole answer as JSON, kept if it is to be. Raises: what `Run.drive` raises."""
    narrator = narrator_of(plan.response, plan.job)
    reason = FinishReason.STOP

    async def collect(output: Output, piece: Piece) -> None:
        nonlocal reason
        tell(narrator, output, piece)
        reason = piece.finish or reason

    await run.drive(collect, receive)
    narrator.finished(reason, run.usage())
    return await _keep(api, plan, key)


def _streamed(api: ApiContext, plan: Plan, key: ApiKey | None) -> Response[bytes]:
    narrator = narrator_of(plan.response, plan.job)

    async def produce(stream: EventStream, receive: Receive) -> None:
        reason = FinishReason.STOP

        async def write(output: Output, piece: Piece) -> None:
            nonlocal reason
            reason = piece.finish or reason
            opening = b"" if stream.started else narrator.created() + narrator.started()
            events = opening + tell(narrator, output, piece)
            if events:
                await stream.send(events)

        async with Run(api, plan.job) as run:
            await run.drive(write, receive)
            ending = narrator.finished(reason, run.usage())
        await _keep(api, plan, key)
        await stream.end(ending)

    return StreamedAnswer(produce, plan.job.headers, error_event=narrator.failed)


async def _keep(api: ApiContext, plan: Plan, key: ApiKey | None) -> bytes:
    """Store a finished foreground response before its client hears the end. Without Redis the client still does."""
    if plan.response.store and api.responses is not None:
        try:
            async with asyncio.timeout(STORE_WAIT_S):
                return await api.responses.save(plan.response, items=plan.items, ancestors=plan.ancestors, key=key)
        except UNAVAILABLE as error:
            _log.warning("response could not be stored", id=plan.response.id, error=str(error) or "Redis hangs")
    return msgspec.json.encode(plan.response)


def _followed(runs: BackgroundRuns, response_id: str, *, after: int, headers: dict[str, str]) -> Response[bytes]:
    """The events of a background response, for as long as its reader stays."""

    async def produce(stream: EventStream, receive: Receive) -> None:
        async def pass_on() -> None:
            async for events in runs.log.follow(response_id, after=after):
                await stream.send(events)

        await while_client_stays([pass_on()], receive)
        await stream.end(b"")

    return StreamedAnswer(produce, headers, error_event=_broken)


def _broken(error: ApiError) -> bytes:
    """Reading the events failed, which says nothing about the response: the client may come back."""
    return typed_event("error", {"type": "error", "code": error.code, "message": error.message, "param": None})


def _background(api: ApiContext) -> BackgroundRuns:
    if api.background is None:
        raise away()
    return api.background


async def _own(api: ApiContext, response_id: str, request: AnyRequest) -> StoredResponse:
    """A response of the caller's own. Raises: ApiError 404, also for one of another key."""
    stored = await api.responses.get(response_id, caller_key(request)) if api.responses is not None else None
    if stored is None:
        raise ApiError(
            f"Response with id {response_id[:100]!r} not found.",
            status=404,
            error_type="invalid_request_error",
            code="response_not_found",
            param="response_id",
        )
    return stored


def _as_json(body: bytes, headers: dict[str, str] | None = None) -> Response[bytes]:
    return Response(content=body, media_type=MediaType.JSON, headers=headers)
