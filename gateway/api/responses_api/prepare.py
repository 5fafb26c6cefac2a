"""From a decoded request to a plan: the conversation so far, the chat it becomes, and the response as created."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

import msgspec

from fleet.keys import ApiKey
from gateway.api.context import ApiContext
from gateway.api.jobs import Job
from gateway.api.prepare import chat_job, render_chat
from gateway.api.requests import ChatCompletionRequest, SamplingFields
from gateway.api.responses_api import refusals
from gateway.api.responses_api.conversation import droppable, messages_of
from gateway.api.responses_api.items import Item, MessageItem, as_stored, read_items
from gateway.api.responses_api.objects import LIVE, ResponseObject
from gateway.api.responses_api.requests import LOGPROBS, CreateResponseRequest, InputTokensRequest
from gateway.api.responses_api.store import ResponseStore, StoredResponse
from gateway.api.responses_api.tools import chat_format, chat_tool_choice, chat_tools, shown_format, shown_tools
from gateway.errors import InvalidRequest
from gateway.pipeline import ServedModel

AnyRequest = CreateResponseRequest | InputTokensRequest

_FIELDS = {
    "messages": "input",
    "response_format": "text.format",
    "max_completion_tokens": "max_output_tokens",
    "reasoning_effort": "reasoning.effort",
}
"""What a field of the chat that we make is called here."""


class Plan(msgspec.Struct, kw_only=True):
    """A response about to be computed.

    Attributes:
        response: as created.
        chat: the chat request that computes it; with the seed that was drawn, it alone makes the job again.
        job: what to run.
        items: this turn's input, with ids.
        ancestors: ids of the responses before it, oldest first.
    """

    response: ResponseObject
    chat: ChatCompletionRequest
    job: Job
    items: list[Item]
    ancestors: list[str]


async def response_plan(
    api: ApiContext, store: ResponseStore | None, request: CreateResponseRequest, key: ApiKey | None
) -> Plan:
    """Raises: ApiError."""
    refusals.check_response(request)
    model = api.find_model(request.model, key)
    items = _input_of(request)
    ancestors, context = await _context(store, request.previous_response_id, key)
    chat = _chat(request, [*context, *items])
    if request.truncation == "auto":
        await _truncate(model, request, chat, [*context, *items])
    response_id = f"resp_{uuid.uuid4().hex}"
    job = await job_of(api, chat, key)
    chat.seed = job.params[0].seed
    job = msgspec.structs.replace(job, completion_id=response_id)
    return Plan(
        response=_created(request, response_id, job),
        chat=chat,
        job=job,
        items=[as_stored(item) for item in items],
        ancestors=ancestors,
    )


async def job_of(api: ApiContext, chat: ChatCompletionRequest, key: ApiKey | None) -> Job:
    """The job of a chat that was made of a response. Raises: ApiError in the names of the Responses API."""
    try:
        return await chat_job(api, chat, key)
    except InvalidRequest as error:
        raise _renamed(error) from error


async def count_input(
    store: ResponseStore | None, model: ServedModel, request: InputTokensRequest, key: ApiKey | None
) -> int:
    """Prompt tokens that a response to the same request would have. Raises: ApiError."""
    refusals.check_count(request)
    items = _input_of(request)
    _, context = await _context(store, request.previous_response_id, key)
    chat = _chat(request, [*context, *items], model=model.name)
    if request.truncation == "auto":
        await _truncate(model, request, chat, [*context, *items])
    try:
        return len(await _prompt_ids(model, chat))
    except InvalidRequest as error:
        raise _renamed(error) from error


def _input_of(request: AnyRequest) -> list[Item]:
    if request.input is None:
        raise InvalidRequest("Missing required parameter: input", param="input", code="missing_required_parameter")
    items = read_items(request.input)
    if not items:
        raise InvalidRequest("'input' is an empty list.", param="input", code="invalid_value")
    return items


async def _context(
    store: ResponseStore | None, previous_id: str | None, key: ApiKey | None
) -> tuple[list[str], list[Item]]:
    """Ids and items of the whole chain before this response, oldest first."""
    if previous_id is None:
        return [], []
    if store is None:
        raise _unknown_previous(previous_id)
    last = await store.get(previous_id, key)
    if last is None:
        raise _unknown_previous(previous_id)
    if last.response.status in LIVE:
        raise InvalidRequest(
            f"Previous response {previous_id!r} is not finished: its status is {last.response.status!r}.",
            param="previous_response_id",
            code="previous_response_not_finished",
        )
    items: list[Item] = []
    chain = await store.chain(last)
    for ancestor_id, ancestor in zip([*last.ancestors, previous_id], chain, strict=True):
        if ancestor is None:
            raise _unknown_previous(ancestor_id)
        items += _turn(ancestor)
    return [*last.ancestors, previous_id], items


def _turn(stored: StoredResponse) -> list[Item]:
    output: list[Any] = msgspec.to_builtins(stored.response.output)
    return [*stored.items, *read_items(output, at="output")]


def _chat(request: AnyRequest, items: Sequence[Item], *, model: str = "") -> ChatCompletionRequest:
    """The chat request that a response comes down to."""
    fields: dict[str, Any] = {"model": model}
    if isinstance(request, CreateResponseRequest):
        fields = {name: getattr(request, name) for name in SamplingFields.__struct_fields__}
        wants_logprobs = LOGPROBS in (request.include or ()) or bool(request.top_logprobs)
        fields |= {
            "max_completion_tokens": request.max_output_tokens,
            "logprobs": wants_logprobs,
            "top_logprobs": request.top_logprobs if wants_logprobs else None,
        }
    return ChatCompletionRequest(
        **fields,
        messages=messages_of(request.instructions, items),
        response_format=chat_format(request.text),
        tools=chat_tools(request.tools, request.tool_choice),
        tool_choice=chat_tool_choice(request.tool_choice),
        parallel_tool_calls=request.parallel_tool_calls,
        chat_template_kwargs=request.chat_template_kwargs,
        reasoning_effort=request.reasoning.effort if request.reasoning is not None else None,
    )


async def _truncate(
    model: ServedModel, request: AnyRequest, chat: ChatCompletionRequest, items: Sequence[Item]
) -> None:
    """Let the conversation begin later, as little as is needed for it to fit. Mutates: the chat's messages."""
    room = model.max_model_len - (chat.max_completion_tokens or 1)

    async def fits(start: int) -> bool:
        dropped = (item for item in items[:start] if isinstance(item, MessageItem))
        kept = [item for item in dropped if item.role in ("system", "developer")]
        chat.messages = messages_of(request.instructions, [*kept, *items[start:]])
        return len(await _prompt_ids(model, chat)) <= room

    starts = [0, *droppable(items)]
    low, high = 0, len(starts) - 1
    while low < high:  # the first start that fits, or the last one
        middle = (low + high) // 2
        if await fits(starts[middle]):
            high = middle
        else:
            low = middle + 1
    await fits(starts[low])


async def _prompt_ids(model: ServedModel, chat: ChatCompletionRequest) -> list[int]:
    return (await render_chat(model, chat))[1].ids


def _created(request: CreateResponseRequest, response_id: str, job: Job) -> ResponseObject:
    params = job.params[0]
    background = bool(request.background)
    return ResponseObject(
        id=response_id,
        created_at=job.created,
        model=request.model,
        status="queued" if background else "in_progress",
        background=background,
        instructions=request.instructions,
        max_output_tokens=request.max_output_tokens,
        parallel_tool_calls=request.parallel_tool_calls is not False,
        previous_response_id=request.previous_response_id,
        reasoning={"effort": request.reasoning.effort if request.reasoning else None, "summary": None},
        store=request.stores,
        temperature=params.temperature,
        top_p=params.top_p,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        text={"format": shown_format(request.text)},
        tool_choice="auto" if request.tool_choice is None else request.tool_choice,
        tools=shown_tools(request.tools),
        top_logprobs=request.top_logprobs or 0,
        truncation=request.truncation or "disabled",
        metadata=request.metadata or {},
        service_tier=job.service_tier or "default",
        prompt_cache_key=request.prompt_cache_key,
        safety_identifier=request.safety_identifier,
        user=msgspec.UNSET if request.user is None else request.user,
    )


def _renamed(error: InvalidRequest) -> InvalidRequest:
    """The error with our field's name for the chat's."""
    for theirs, ours in _FIELDS.items():
        if error.param is not None and error.param.partition("[")[0].partition(".")[0] == theirs:
            error.param = ours
            error.message = error.message.replace(f"{theirs!r}", f"{ours!r}")
            break
    return error


def _unknown_previous(previous_id: str) -> InvalidRequest:
    return InvalidRequest(
        f"Previous response with id {previous_id[:100]!r} not found.",
        param="previous_response_id",
        code="previous_response_not_found",
    )
