"""The handlers of OpenAI's and vLLM's endpoints."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from urllib.parse import unquote

import msgspec
from litestar import Response, post
from litestar.params import FromPath
from litestar.types import Receive

from gateway.api.answer_headers import name_request, note_headers
from gateway.api.chat_answer import plain_chat, streamed_chat
from gateway.api.chat_prompt import chat_prompt
from gateway.api.client_watch import ClientGone
from gateway.api.completion_answer import plain_completion, streamed_completion
from gateway.api.context import Api, ApiContext, caller_key, may_use, model_or_only
from gateway.api.decoding import read_body
from gateway.api.documentation import answers, body_of
from gateway.api.jobs import Job, Run
from gateway.api.prepare import chat_job, completion_job
from gateway.api.refusals import check_final_message
from gateway.api.replies import AnyRequest, json_reply
from gateway.api.requests import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from gateway.api.responses import (
    ChatCompletion,
    Completion,
    Detokenized,
    ModelEntry,
    ModelList,
    Tokenized,
)
from gateway.api.routes import readable
from gateway.api.sse import EventStream, StreamedAnswer
from gateway.api.text_prompt import text_prompt_ids
from gateway.api.tools import check_served, tool_use
from gateway.errors import ClientLeft, InvalidRequest
from gateway.pipeline import ServedModel

_CHAT = msgspec.json.Decoder(ChatCompletionRequest)
_COMPLETION = msgspec.json.Decoder(CompletionRequest)
_TOKENIZE = msgspec.json.Decoder(TokenizeRequest)
_DETOKENIZE = msgspec.json.Decoder(DetokenizeRequest)


@post(
    "/v1/chat/completions",
    status_code=200,
    summary="Answer a conversation",
    tags=["OpenAI"],
    operation_class=body_of(ChatCompletionRequest),
    responses=answers(ChatCompletion, 409, 413, 415),
)
async def chat_completions(request: AnyRequest, api: Api) -> Response[bytes]:
    """Apply the model's chat template and generate; with `stream`, as server-sent events."""
    body = await read_body(request, _CHAT)
    name_request(request.scope, body.request_id)
    return await _answer(api, await chat_job(api, body, caller_key(request)), request, plain_chat, streamed_chat)


@post(
    "/v1/completions",
    status_code=200,
    summary="Continue a text",
    tags=["OpenAI"],
    operation_class=body_of(CompletionRequest),
    responses=answers(Completion, 409, 413, 415),
)
async def completions(request: AnyRequest, api: Api) -> Response[bytes]:
    """Generate from text or token ids; with `stream`, as server-sent events."""
    body = await read_body(request, _COMPLETION)
    name_request(request.scope, body.request_id)
    job = await completion_job(api, body, caller_key(request))
    return await _answer(api, job, request, plain_completion, streamed_completion)


@readable("/v1/models", summary="List models", tags=["OpenAI"], responses=answers(ModelList))
async def list_models(request: AnyRequest, api: Api) -> Response[bytes]:
    """Every name that can be put in `model`."""
    key = caller_key(request)
    return json_reply(
        ModelList(
            [
                _entry(name, model)
                for model in api.pipeline.models()
                if may_use(key, model)
                for name in (model.name, *model.aliases)
            ]
        )
    )


@readable("/v1/models/{model_id:path}", summary="Describe a model", tags=["OpenAI"], responses=answers(ModelEntry))
async def get_model(request: AnyRequest, api: Api, model_id: FromPath[str]) -> Response[bytes]:
    """One entry of the list. The id may be percent-encoded or not."""
    del model_id  # normalised as a path by the router; the raw path says what was meant
    raw: bytes = request.scope["raw_path"]
    name = unquote(raw.decode("latin-1").partition("?")[0]).partition("/v1/models/")[2].rstrip("/")
    return json_reply(_entry(name, api.find_model(name, caller_key(request))))


@post(
    "/tokenize",
    status_code=200,
    summary="Text or messages to token ids",
    tags=["vLLM"],
    operation_class=body_of(TokenizeRequest),
    responses=answers(Tokenized, 413, 415),
)
async def tokenize(request: AnyRequest, api: Api) -> Response[bytes]:
    """The ids that a completion of the same `prompt` or `messages` would be computed from."""
    body = await read_body(request, _TOKENIZE)
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequest("Give either 'prompt' or 'messages'.", param="prompt", code="invalid_value")
    model = model_or_only(api, body.model, request)
    check_final_message(body)
    if body.messages is not None:
        use = tool_use(body.tools, None, parallel=None)
        check_served(use, model)
        prompt = await chat_prompt(
            model,
            body.messages,
            add_generation_prompt=body.add_generation_prompt is not False,
            continue_final_message=bool(body.continue_final_message),
            add_special_tokens=bool(body.add_special_tokens),
            variables=body.chat_template_kwargs or {},
            tools=use.declared,
        )
        ids = prompt.ids
    else:
        (ids,) = await text_prompt_ids(
            model, [body.prompt or ""], add_special_tokens=body.add_special_tokens is not False
        )
    strings = None
    if body.return_token_strs:
        strings = [model.card.tokenizer.token(token_id) or "" for token_id in ids]
    return json_reply(Tokenized(len(ids), model.max_model_len, ids, strings))


@post(
    "/detokenize",
    status_code=200,
    summary="Token ids to text",
    tags=["vLLM"],
    operation_class=body_of(DetokenizeRequest),
    responses=answers(Detokenized, 413, 415),
)
async def detokenize(request: AnyRequest, api: Api) -> Response[bytes]:
    """The text of the ids, special tokens included."""
    body = await read_body(request, _DETOKENIZE)
    model = model_or_only(api, body.model, request)
    if body.tokens and max(body.tokens) >= model.card.vocab_size:
        raise InvalidRequest(
            f"'tokens' has an id outside the vocabulary (0 to {model.card.vocab_size - 1}).",
            param="tokens",
            code="invalid_value",
        )
    return json_reply(Detokenized(model.card.tokenizer.decode(body.tokens, skip_special_tokens=False)))


PlainAnswer = Callable[[Run, Job, Receive], Awaitable[ChatCompletion | Completion]]
StreamWriter = Callable[[Run, Job, EventStream, Receive], Awaitable[None]]


async def _answer(
    api: ApiContext, job: Job, request: AnyRequest, plain: PlainAnswer, streamed: StreamWriter
) -> Response[bytes]:
    """Run a job and answer as its request wants it."""
    note_headers(request.scope, job.headers)
    if job.stream:

        async def produce(stream: EventStream, receive: Receive) -> None:
            async with Run(api, job) as run:
                await streamed(run, job, stream, receive)

        return StreamedAnswer(produce, {})
    try:
        async with Run(api, job) as run:
            body = await plain(run, job, request.receive)
    except ClientGone as error:
        raise ClientLeft from error
    return json_reply(body)


def _entry(name: str, model: ServedModel) -> ModelEntry:
    return ModelEntry(id=name, created=model.created, max_model_len=model.max_model_len, root=model.name)
