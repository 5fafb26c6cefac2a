"""From a request's fields to what a worker samples with."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping

import msgspec

from fleet.types import Grammar, SamplingParams
from gateway.api.requests import ChatCompletionRequest, CompletionRequest
from gateway.errors import ContextTooLong, InvalidRequest
from gateway.pipeline import ServedModel
from gateway.text.assembler import TextOptions

COMPLETION_MAX_TOKENS = 16  # OpenAI's default of /v1/completions

AnyCompletion = ChatCompletionRequest | CompletionRequest


def output_limit(model: ServedModel, *, num_prompt_tokens: int, max_tokens: int | None, param: str) -> int:
    """How many tokens an answer may have: what was asked for, else what fits (and `max_new_tokens` of the model).

    Raises: ContextTooLong if prompt and requested output do not fit together.
    """
    room = model.max_model_len - num_prompt_tokens
    if room < 1 or (max_tokens is not None and max_tokens > room):
        raise ContextTooLong(
            limit=model.max_model_len,
            num_prompt_tokens=num_prompt_tokens,
            num_output_tokens=max_tokens,
            param=param,
        )
    if max_tokens is not None:
        return max_tokens
    cap = model.card.defaults.max_new_tokens
    return room if cap is None else max(1, min(room, cap))


def sampling_params(
    request: AnyCompletion,
    model: ServedModel,
    *,
    max_tokens: int,
    num_logprobs: int | None,
    grammar: Grammar | None = None,
    num_prompt_logprobs: int | None = None,
) -> SamplingParams:
    """Parameters of the first sample; `for_sample` derives the others. Raises: InvalidRequest."""
    defaults = model.card.defaults
    min_tokens = request.min_tokens or 0
    if min_tokens > max_tokens:
        raise InvalidRequest(
            f"'min_tokens' is {min_tokens}, more than the {max_tokens} tokens the answer may have.",
            param="min_tokens",
            code="invalid_value",
        )
    temperature = _first(request.temperature, defaults.temperature)
    top_p = _first(request.top_p, defaults.top_p)
    top_k = max(0, defaults.top_k if request.top_k is None else request.top_k)
    min_p = _first(request.min_p, defaults.min_p)
    if temperature == 0:
        top_p, top_k, min_p = 1.0, 0, 0.0  # greedy: nothing left to narrow
    elif top_p == 0:
        top_p, top_k = 1.0, 1  # an empty nucleus still holds its likeliest token
    return SamplingParams(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=_first(request.repetition_penalty, defaults.repetition_penalty),
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        logit_bias=_logit_bias(request.logit_bias or {}, model.card.vocab_size),
        seed=_seed(request.seed),
        stop_token_ids=_stop_token_ids(request, model),
        min_tokens=min_tokens,
        max_tokens=max_tokens,
        logprobs=num_logprobs,
        grammar=grammar,
        prompt_logprobs=num_prompt_logprobs,
    )


def for_sample(params: SamplingParams, index: int, *, seeded: bool, scores: bool) -> SamplingParams:
    """Parameters of sample `index` of a request: the first as they are, the others with seeds of their own.

    Unless every sample `scores` the prompt for itself, the first does for all, and the others may reuse its pages.
    """
    if index == 0:
        return params
    seed = _mix(params.seed, index) if seeded else _seed(None)
    prompt_logprobs = params.prompt_logprobs if scores else None
    return msgspec.structs.replace(params, seed=seed, prompt_logprobs=prompt_logprobs)


def text_options(request: AnyCompletion, params: SamplingParams, *, with_tokens: bool) -> TextOptions:
    """How the output becomes text."""
    stop = request.stop
    return TextOptions(
        stops=tuple([stop] if isinstance(stop, str) else stop or ()),
        include_stop=bool(request.include_stop_str_in_output),
        skip_special_tokens=request.skip_special_tokens is not False,
        stop_token_ids=frozenset(params.stop_token_ids),
        min_tokens=params.min_tokens,
        with_tokens=with_tokens,
    )


def _first(asked: float | None, default: float) -> float:
    return default if asked is None else asked


def _stop_token_ids(request: AnyCompletion, model: ServedModel) -> tuple[int, ...]:
    asked = request.stop_token_ids or []
    for token_id in asked:
        if token_id >= model.card.vocab_size:
            raise InvalidRequest(
                f"'stop_token_ids' has {token_id}, but the vocabulary ends at {model.card.vocab_size - 1}.",
                param="stop_token_ids",
                code="invalid_value",
            )
    own = () if request.ignore_eos else model.card.eos_ids
    return tuple(sorted({*asked, *own}))


def _logit_bias(asked: Mapping[str, float], vocab_size: int) -> dict[int, float]:
    biases: dict[int, float] = {}
    for key, bias in asked.items():
        # isdecimal alone lets other scripts' digits through, and ids are short
        if not (key.isascii() and key.isdecimal() and len(key) < 12) or int(key) >= vocab_size:
            raise InvalidRequest(
                f"'logit_bias' has the key {key[:40]!r}; keys are token ids from 0 to {vocab_size - 1}.",
                param="logit_bias",
                code="invalid_value",
            )
        biases[int(key)] = bias
    return biases


def _seed(asked: int | None) -> int:
    """A seed of 63 bits: the client's own where it is not negative, so that it can be recognised in logs."""
    if asked is None:
        return secrets.randbits(63)
    return asked if asked >= 0 else _mix(asked, 0)


def _mix(seed: int, index: int) -> int:
    digest = hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
