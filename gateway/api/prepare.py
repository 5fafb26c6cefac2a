"""From a decoded request to a job: check, tokenize, resolve every parameter, charge the caller's quota."""

from __future__ import annotations

import time
import uuid

import msgspec

from fleet.keys import ApiKey
from gateway.api import refusals
from gateway.api.call_grammar import call_grammar
from gateway.api.chat_prompt import ChatPrompt, chat_prompt
from gateway.api.constraints import constraint
from gateway.api.context import ApiContext
from gateway.api.jobs import Job
from gateway.api.reasoning import template_variables
from gateway.api.requests import ChatCompletionRequest, CompletionRequest, StreamOptions
from gateway.api.sampling import (
    COMPLETION_MAX_TOKENS,
    AnyCompletion,
    output_limit,
    sampling_params,
    text_options,
)
from gateway.api.tenancy import Place, place_of
from gateway.api.text_prompt import prompt_text, split_prompts, text_prompt_ids, token_offsets
from gateway.api.tools import ToolUse, check_served, read_options, tool_use
from gateway.errors import InvalidRequest
from gateway.pipeline import ServedModel
from gateway.text.message_reader import ReadOptions


async def render_chat(model: ServedModel, request: ChatCompletionRequest) -> tuple[ToolUse, ChatPrompt]:
    """The tools of a request resolved, and its prompt. Raises: InvalidRequest."""
    use = tool_use(request.tools, request.tool_choice, parallel=request.parallel_tool_calls)
    check_served(use, model)
    prompt = await chat_prompt(
        model,
        request.messages,
        add_generation_prompt=request.add_generation_prompt is not False,
        continue_final_message=bool(request.continue_final_message),
        add_special_tokens=bool(request.add_special_tokens),
        variables=template_variables(request.chat_template_kwargs or {}, request.reasoning_effort, model),
        tools=use.declared,
    )
    return use, prompt


async def chat_job(api: ApiContext, request: ChatCompletionRequest, key: ApiKey | None) -> Job:
    """Raises: ApiError; Overloaded."""
    refusals.check_chat(request)
    model = api.find_model(request.model, key)
    _check_decoder(request, model)
    place = _place(api, request, key, model, num_outputs=request.n or 1, param="n")
    use, prompt = await render_chat(model, request)
    ids = prompt.ids
    form = await constraint(request)
    grammar = await call_grammar(use, model.card, form, thinking=prompt.thinking)
    asked = request.max_completion_tokens if request.max_completion_tokens is not None else request.max_tokens
    ids = _truncated(ids, request.truncate_prompt_tokens, model, asked)
    max_tokens = output_limit(model, num_prompt_tokens=len(ids), max_tokens=asked, param="messages")
    num_top = request.top_logprobs or 0
    params = sampling_params(
        request,
        model,
        max_tokens=max_tokens,
        num_logprobs=num_top if request.logprobs else None,
        num_prompt_logprobs=request.prompt_logprobs,
        grammar=grammar,
    )
    with_tokens = bool(request.logprobs or request.return_token_ids)
    if form is not None and grammar is form:  # the whole output is of that form: no calls, no reasoning
        reads = ReadOptions()
    else:
        shows_special_tokens = request.skip_special_tokens is False
        reads = read_options(use, model, thinking=prompt.thinking, shows_special_tokens=shows_special_tokens)
    options = text_options(request, params, with_tokens=with_tokens)
    streaming = request.stream_options or StreamOptions()
    headers = await api.limiter.admit(key, len(ids))
    return Job(
        completion_id=f"chatcmpl-{uuid.uuid4().hex}",
        created=int(time.time()),
        model=model,
        model_name=request.model,
        fingerprint=api.fingerprint(model),
        prompts=[ids],
        params=[params],
        options=msgspec.structs.replace(options, kept_ids=model.card.marker_ids if reads.sees_markers else frozenset()),
        reads=reads,
        chose_function=use.named,
        num_samples=request.n or 1,
        num_prompt_logprobs=request.prompt_logprobs,
        seeded=request.seed is not None,
        continues_prompt=bool(request.continue_final_message),
        stream=bool(request.stream),
        include_usage=bool(streaming.include_usage),
        usage_in_chunks=bool(streaming.continuous_usage_stats),
        obfuscates=bool(streaming.include_obfuscation),
        tokens_as_ids=bool(request.return_tokens_as_token_ids),
        return_token_ids=bool(request.return_token_ids),
        with_logprobs=bool(request.logprobs),
        num_top_logprobs=num_top,
        cache_salt=place.cache_salt,
        priority=place.priority,
        affinity=place.affinity,
        service_tier=place.tier,
        metadata=request.metadata,
        client_request_id=request.request_id,
        key=key,
        headers=headers,
    )


async def completion_job(api: ApiContext, request: CompletionRequest, key: ApiKey | None) -> Job:
    """Raises: ApiError; Overloaded."""
    refusals.check_completion(request)
    model = api.find_model(request.model, key)
    _check_decoder(request, model)
    sources = split_prompts(request.prompt)
    num_choices = request.n or 1
    num_samples = max(num_choices, request.best_of or 1) if request.max_tokens != 0 else num_choices
    num_logprobs = request.logprobs
    if num_logprobs is None and num_samples > num_choices:
        num_logprobs = 0  # the best are chosen by it
    asked = [num for num in (request.logprobs if request.echo else None, request.prompt_logprobs) if num is not None]
    place = _place(api, request, key, model, num_outputs=len(sources) * num_samples, param="prompt")
    add_special_tokens = request.add_special_tokens is not False
    prompts = [
        _truncated(ids, request.truncate_prompt_tokens, model, request.max_tokens)
        for ids in await text_prompt_ids(model, sources, add_special_tokens=add_special_tokens)
    ]
    grammar = await constraint(request)
    params = [
        sampling_params(
            request,
            model,
            max_tokens=_completion_limit(model, len(ids), request.max_tokens),
            num_logprobs=num_logprobs,
            num_prompt_logprobs=max(asked, default=None),
            grammar=grammar,
        )
        for ids in prompts
    ]
    skip_special_tokens = request.skip_special_tokens is not False
    echo = [prompt_text(model, source, skip_special_tokens=skip_special_tokens) for source in sources]
    scores_prompts = bool(request.echo) and request.logprobs is not None
    offsets = [
        await token_offsets(
            model, source, add_special_tokens=add_special_tokens, skip_special_tokens=skip_special_tokens
        )
        for source in (sources if scores_prompts else ())
    ]
    with_tokens = request.logprobs is not None or bool(request.return_token_ids)
    streaming = request.stream_options or StreamOptions()
    headers = await api.limiter.admit(key, sum(map(len, prompts)))
    return Job(
        completion_id=f"cmpl-{uuid.uuid4().hex}",
        created=int(time.time()),
        model=model,
        model_name=request.model,
        fingerprint=api.fingerprint(model),
        prompts=prompts,
        params=params,
        options=text_options(request, params[0], with_tokens=with_tokens),
        num_samples=num_samples,
        num_choices=num_choices,
        seeded=request.seed is not None,
        continues_prompt=True,
        echo_texts=echo if request.echo else (),
        echo_offsets=offsets,
        scores_prompts=scores_prompts,
        num_prompt_logprobs=request.prompt_logprobs,
        generates=request.max_tokens != 0,
        stream=bool(request.stream),
        include_usage=bool(streaming.include_usage),
        usage_in_chunks=bool(streaming.continuous_usage_stats),
        obfuscates=bool(streaming.include_obfuscation),
        tokens_as_ids=bool(request.return_tokens_as_token_ids),
        return_token_ids=bool(request.return_token_ids),
        with_logprobs=request.logprobs is not None,
        num_top_logprobs=request.logprobs or 0,
        cache_salt=place.cache_salt,
        priority=place.priority,
        affinity=place.affinity,
        service_tier=place.tier,
        metadata=request.metadata,
        client_request_id=request.request_id,
        key=key,
        headers=headers,
    )


def _place(
    api: ApiContext, request: AnyCompletion, key: ApiKey | None, model: ServedModel, *, num_outputs: int, param: str
) -> Place:
    """The request's place, if there is one: full queues refuse it before its prompt is read.

    Raises: InvalidRequest; Overloaded.
    """
    if num_outputs > api.config.max_generations:
        raise InvalidRequest(
            f"At most {api.config.max_generations} outputs (prompts times 'n' or 'best_of') fit in one request.",
            param=param,
            code="invalid_value",
        )
    place = place_of(request, key, shared_prefix_cache=api.config.shared_prefix_cache)
    api.pipeline.check_room(model, num_outputs, priority=place.priority)
    return place


def _check_decoder(request: AnyCompletion, model: ServedModel) -> None:
    if request.spaces_between_special_tokens is False and not model.card.detokenizers.is_byte_level:
        raise InvalidRequest(
            "'spaces_between_special_tokens' cannot be false: this model's tokenizer decides on spaces itself.",
            param="spaces_between_special_tokens",
            code="unsupported_parameter",
        )


def _truncated(ids: list[int], num_kept: int | None, model: ServedModel, max_tokens: int | None) -> list[int]:
    """The last `num_kept` ids; for -1 as many as leave room for the output."""
    if num_kept is None:
        return ids
    if num_kept == -1:
        num_kept = max(1, model.max_model_len - max(1, max_tokens or 1))
    return ids[-num_kept:]


def _completion_limit(model: ServedModel, num_prompt_tokens: int, asked: int | None) -> int:
    """Output tokens of a prompt. The default gives way to the context; only what was asked for is an error."""
    if asked is None:
        asked = max(1, min(COMPLETION_MAX_TOKENS, model.max_model_len - num_prompt_tokens))
    if asked == 0 and num_prompt_tokens <= model.max_model_len:
        return 0
    return output_limit(model, num_prompt_tokens=num_prompt_tokens, max_tokens=asked, param="prompt")
