"""`POST /v1/embeddings`: prompts to vectors, through the prefill pool alone."""

from __future__ import annotations

import asyncio
import base64
import math
import struct
import uuid

import msgspec
from litestar import Response, post
from litestar.types import Receive

from fleet.types import FinishReason, Pooling, SamplingParams
from fleet.usage import Counts
from gateway.api.answer_headers import note_headers
from gateway.api.client_watch import ClientGone, while_client_stays
from gateway.api.context import Api, ApiContext, caller_key
from gateway.api.decoding import read_body
from gateway.api.documentation import answers, body_of
from gateway.api.jobs import failure_of
from gateway.api.replies import AnyRequest, json_reply
from gateway.api.requests import EmbeddingRequest
from gateway.api.responses import Embedding, Embeddings, EmbeddingUsage
from gateway.api.tenancy import tenant_salt
from gateway.api.text_prompt import split_prompts, text_prompt_ids
from gateway.errors import ClientLeft, ContextTooLong, GenerationFailed, InvalidRequest
from gateway.pipeline import ServedModel

MAX_INPUTS = 2048  # as OpenAI documents
MAX_IN_FLIGHT = 64
"""Inputs of one request that are with the fleet at once, so that a large batch does not fill the queue."""


_DECODER = msgspec.json.Decoder(EmbeddingRequest)


@post(
    "/v1/embeddings",
    status_code=200,
    summary="Texts to vectors",
    tags=["OpenAI"],
    operation_class=body_of(EmbeddingRequest),
    responses=answers(Embeddings, 413, 415),
)
async def embeddings(request: AnyRequest, api: Api) -> Response[bytes]:
    """Pool the model's final hidden states of each input into one vector."""
    body = await read_body(request, _DECODER)
    key = caller_key(request)
    model = api.find_model(body.model, key)
    _check_dimensions(body, model)
    sources = split_prompts(body.input, param="input")
    if len(sources) > MAX_INPUTS:
        raise InvalidRequest(f"'input' has more than {MAX_INPUTS} entries.", param="input", code="invalid_value")
    prompts = await text_prompt_ids(
        model, sources, add_special_tokens=body.add_special_tokens is not False, param="input"
    )
    longest = max(map(len, prompts))
    if longest > model.max_model_len:
        raise ContextTooLong(
            limit=model.max_model_len, num_prompt_tokens=longest, num_output_tokens=None, param="input"
        )
    num_tokens = sum(map(len, prompts))
    note_headers(request.scope, await api.limiter.admit(key, num_tokens))
    key_id = "" if key is None else key.key_id
    salt = tenant_salt(key_id, body.cache_salt or "", shared=api.config.shared_prefix_cache)
    vectors = await _compute(api, body, model, prompts, salt, request.receive)
    api.usage.add(key_id, model.name, Counts(requests=1, prompt_tokens=num_tokens))
    answer = Embeddings(
        data=[Embedding(index, _written(body, vector)) for index, vector in enumerate(vectors)],
        model=body.model,
        usage=EmbeddingUsage(prompt_tokens=num_tokens, total_tokens=num_tokens),
    )
    return json_reply(answer)


def _check_dimensions(body: EmbeddingRequest, model: ServedModel) -> None:
    size = model.card.hidden_size
    if body.dimensions is not None and size is not None and body.dimensions > size:
        raise InvalidRequest(
            f"'dimensions' is {body.dimensions}, but vectors of this model have {size}.",
            param="dimensions",
            code="invalid_value",
        )


async def _compute(
    api: ApiContext, body: EmbeddingRequest, model: ServedModel, prompts: list[list[int]], salt: str, receive: Receive
) -> list[bytes]:
    """A vector per prompt. Raises: ApiError, ClientLeft, PipelineError; whatever is under way is cancelled then."""
    request_id = f"embd-{uuid.uuid4().hex}"
    vectors = [b""] * len(prompts)
    seats = asyncio.Semaphore(MAX_IN_FLIGHT)

    async def compute(index: int) -> None:
        async with seats:
            generation = await api.pipeline.submit(
                model=model,
                prompt_ids=prompts[index],
                params=SamplingParams(max_tokens=0),
                request_id=f"{request_id}-{index}" if index else request_id,
                cache_salt=salt,
                priority=body.priority or 0,
                pooling=body.pooling or Pooling.LAST,
            )
            try:
                async for tokens in generation:
                    if tokens.finish in {FinishReason.ERROR, FinishReason.CANCELLED}:
                        raise failure_of(tokens)
                    vectors[index] = tokens.vector or b""
            finally:
                await generation.aclose()
            if not vectors[index]:
                raise GenerationFailed("The worker sent no vector.")

    try:
        await while_client_stays([compute(index) for index in range(len(prompts))], receive)
    except ClientGone as error:
        raise ClientLeft from error
    return vectors


def _written(body: EmbeddingRequest, vector: bytes) -> list[float] | str:
    """As the client asked for it; a shortened vector is made length 1 again."""
    size = len(vector) // 4
    if body.encoding_format == "base64" and body.dimensions in (None, size):
        return base64.b64encode(vector).decode()
    numbers = list(struct.unpack(f"<{size}f", vector))
    if body.dimensions is not None and body.dimensions < size:
        length = math.hypot(*numbers[: body.dimensions]) or 1.0
        numbers = [number / length for number in numbers[: body.dimensions]]
    if body.encoding_format == "base64":
        return base64.b64encode(struct.pack(f"<{len(numbers)}f", *numbers)).decode()
    return numbers
