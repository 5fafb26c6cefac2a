"""A pretended fleet for tests of the HTTP half: small tokenizers, a pipeline that says what it is told to."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import math
import socket
import struct
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

import msgspec
import uvicorn
from litestar import Litestar
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from fleet.types import FinishReason, Pooling, SamplingParams, TokenLogprob, TopLogprob
from gateway.api.config import ApiConfig
from gateway.app import create_app
from gateway.errors import Overloaded, PipelineError
from gateway.http_door import BoundedHttp
from gateway.pipeline import ModelReadiness, Readiness, ServedModel, Tokens
from gateway.text.card import ModelCard

CHATML = (
    "{%- for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ message.content }}{% if message.tool_calls %}{{ message.tool_calls | tojson }}{% endif %}<|im_end|>\n"
    "{% endfor %}{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = (
    "the quick brown fox jumps over the lazy dog while hello world how are you today",
    "naïve café 你好 世界 🙂 🎉 Привет one two three four five six seven eight nine ten",
)
MODEL = "org/tiny"
HIDDEN_SIZE = 4


def byte_level_tokenizer() -> Tokenizer:
    """A byte-level BPE tokenizer in the style of GPT-2, with ChatML's control tokens and a `<think>` that is text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=330,
            show_progress=False,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        ),
    )
    tokenizer.add_tokens([AddedToken("<think>", special=False), AddedToken("</think>", special=False)])
    return tokenizer


def sentencepiece_tokenizer(*, legacy: bool = True) -> Tokenizer:
    """A BPE tokenizer in the style of Llama 2: `▁` for spaces, byte fallback, BOS in front."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocab |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for character in "▁abcdefghijklmnopqrstuvwxyzé世<>|_/[]INSTYUHRW.,!?":
        vocab.setdefault(character, len(vocab))
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("▁", "w"), ("l", "l"), ("▁", "▁"), ("o", "r")]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    decoder: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if legacy:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence([*decoder, decoders.Strip(" ", 1, 0)])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        tokenizer.decoder = decoders.Sequence([*decoder, decoders.Strip(" ", 1, 0)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def model_files(tokenizer: Tokenizer, template: str | None = CHATML, **generation: Any) -> dict[str, bytes]:
    """Files as a worker publishes them."""
    is_sentencepiece = tokenizer.token_to_id("<s>") is not None
    bos, eos = ("<s>", "</s>") if is_sentencepiece else (None, "<|im_end|>")
    config: dict[str, Any] = {"eos_token": eos}
    if bos is not None:
        config["bos_token"] = bos
    files = {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps(config).encode(),
        "config.json": json.dumps({"vocab_size": tokenizer.get_vocab_size() + 8, "hidden_size": HIDDEN_SIZE}).encode(),
        "generation_config.json": json.dumps(generation).encode(),
    }
    if template is not None:
        files["chat_template.jinja"] = template.encode()
    return files


@functools.cache
def tiny_card() -> ModelCard:
    """The byte-level model that most tests serve."""
    return ModelCard.from_files(model_files(byte_level_tokenizer()))


def tiny_model(**changes: Any) -> ServedModel:
    """A served model around `tiny_card`."""
    fields: dict[str, Any] = {"name": MODEL, "created": 1_700_000_000, "max_model_len": 512, "card": tiny_card()}
    return ServedModel(**{**fields, **changes})


class FakeGeneration:
    """Hands out a script of `Tokens`, and notes what its owner does with it."""

    def __init__(self, request_id: str, prompt_len: int, script: Sequence[Tokens], pipeline: FakePipeline) -> None:
        self.request_id = request_id
        self.prompt_len = prompt_len
        self.stopped_at: int | None = None
        self.num_closes = 0
        self._script = script
        self._pipeline = pipeline

    async def __aiter__(self) -> AsyncIterator[Tokens]:
        for place, tokens in enumerate(self._script):
            if place >= self._pipeline.hold_after:
                await self._pipeline.go_on.wait()
            await asyncio.sleep(0)
            yield tokens

    def stop(self, num_output_tokens: int) -> None:
        self.stopped_at = num_output_tokens

    async def aclose(self) -> None:
        self.num_closes += 1


class FakePipeline:
    """Says `text` (cut by its tokenizer) to everybody, `per_item` tokens at a time.

    `hold_after` items of each generation, the rest waits for `go_on`. `refuse` is raised by `submit`.
    """

    def __init__(self, model: ServedModel | None = None) -> None:
        self.served = [model or tiny_model()]
        self.text = "hello world"
        self.texts: list[str] = []
        self.ids: list[int] | None = None
        self.per_item = 1
        self.cached_tokens = 0
        self.end: Tokens | None = None
        self.score: Callable[[int], float] = lambda _: -0.25
        self.hold_after = 10**9
        self.go_on = asyncio.Event()
        self.refuse: PipelineError | None = None
        self.refuse_after = 0
        self.counts = (1, 1)
        self.room = 10**9
        self.submitted: list[dict[str, Any]] = []
        self.generations: list[FakeGeneration] = []
        self.checked: list[int] = []
        self.full: Overloaded | None = None

    def models(self) -> list[ServedModel]:
        return self.served

    def model(self, name: str) -> ServedModel | None:
        return next((m for m in self.served if name in {m.name, *m.aliases}), None)

    def readiness(self) -> Readiness:
        prefill, decode = self.counts
        return Readiness(models=(ModelReadiness(model=MODEL, num_prefill=prefill, num_decode=decode),))

    def check_room(self, _: ServedModel, num_sequences: int, *, priority: int) -> None:
        del priority
        self.checked.append(num_sequences)
        if self.full is not None:
            raise self.full

    def require_room(self, _: ServedModel, num_sequences: int, *, priority: int) -> None:
        del priority
        if num_sequences > self.room:
            raise Overloaded("full", retry_after_s=1)

    async def submit(
        self,
        *,
        model: ServedModel,
        prompt_ids: list[int],
        params: SamplingParams,
        request_id: str,
        cache_salt: str = "",
        priority: int = 0,
        pooling: Pooling | None = None,
        output_ids: Sequence[int] = (),
        affinity: str = "",
    ) -> FakeGeneration:
        if self.refuse is not None and len(self.generations) >= self.refuse_after:
            raise self.refuse
        place = len(self.generations)
        self.submitted.append(
            {
                "model": model,
                "ids": prompt_ids,
                "params": params,
                "salt": cache_salt,
                "priority": priority,
                "pooling": pooling,
                "num_known": len(output_ids),
                "affinity": affinity,
            }
        )
        text = self.texts[place % len(self.texts)] if self.texts else self.text
        if params.max_tokens == 0:
            script = [self.end or Tokens(token_ids=[], finish=FinishReason.LENGTH, vector=vector_of(prompt_ids))]
        else:
            ids = self.ids if self.ids is not None else encode(model, text)
            script = self.script(model, params, ids, len(output_ids))
        if params.prompt_logprobs is not None:
            told = [logprob_of(token_id, params.prompt_logprobs) for token_id in prompt_ids[1:]]
            script[0] = msgspec.structs.replace(script[0], prompt_logprobs=told)
        generation = FakeGeneration(request_id, len(prompt_ids), script, self)
        self.generations.append(generation)
        return generation

    def script(self, model: ServedModel, params: SamplingParams, ids: list[int], num_known: int = 0) -> list[Tokens]:
        """What a worker would send: `ids` and an end-of-sequence id, or the first `max_tokens` of them.

        Of a sequence that goes on elsewhere, what comes after the first `num_known` of these.
        """
        eos = [token_id for token_id in model.card.eos_ids if token_id in params.stop_token_ids][:1]
        whole = [*ids, *eos]
        told = whole[num_known : params.max_tokens]
        reason = FinishReason.STOP if told and told[-1] in params.stop_token_ids else FinishReason.LENGTH
        chosen = self.score(len(self.generations))
        items = [told[i : i + self.per_item] for i in range(0, len(told), self.per_item)]
        script = [
            Tokens(
                token_ids=item,
                logprobs=[logprob_of(token_id, params.logprobs, chosen) for token_id in item]
                if params.logprobs is not None
                else None,
                finish=reason if place == len(items) - 1 else None,
                cached_tokens=self.cached_tokens,
            )
            for place, item in enumerate(items)
        ]
        if self.end is not None:
            script[-1] = self.end
        return script


def logprob_of(token_id: int, num_top: int, chosen: float = -0.25) -> TokenLogprob:
    """A made-up log-probability: the token itself is the likeliest."""
    top = [TopLogprob(token_id, -0.25), TopLogprob((token_id + 1) % 300, -1.5), TopLogprob(5, float("-inf"))]
    return TokenLogprob(chosen, top[:num_top], rank=1)


def vector_of(ids: Sequence[int]) -> bytes:
    """A made-up vector of length 1 and `HIDDEN_SIZE` numbers that depends on every id."""
    angle = sum((place + 1) * token_id for place, token_id in enumerate(ids))
    return struct.pack(f"<{HIDDEN_SIZE}f", 0.6 * math.cos(angle), 0.6 * math.sin(angle), 0.8, 0.0)


def encode(model: ServedModel, text: str) -> list[int]:
    """Ids of an output text."""
    return model.card.tokenizer.encode(text, add_special_tokens=False)


def make_app(pipeline: FakePipeline, **changes: Any) -> Litestar:
    """The application over a pretended fleet; `changes` go to `create_app`, or are fields of `ApiConfig`."""
    fields = {name: changes.pop(name) for name in list(changes) if name in ApiConfig.__struct_fields__}
    return create_app(pipeline, ApiConfig(version="test", **fields), **changes)


class _Server(uvicorn.Server):
    """Leaves signals to pytest."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextlib.asynccontextmanager
async def serving(app: Litestar) -> AsyncIterator[str]:
    """Serve on a loopback port with uvicorn, as the gateway does; yields the base address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = _Server(
            uvicorn.Config(
                app,
                log_config=None,
                lifespan="on",
                ws="none",
                http=BoundedHttp,
                loop="asyncio",
                timeout_graceful_shutdown=1,  # a failed test may leave connections behind
            )
        )
        async with asyncio.TaskGroup() as group:
            group.create_task(server.serve(sockets=[listener]))
            await eventually(lambda: server.started)
            try:
                yield f"http://127.0.0.1:{listener.getsockname()[1]}"
            finally:
                server.should_exit = True


async def eventually(condition: Callable[[], bool], *, timeout_s: float = 20.0) -> None:
    """Wait until something is true. Raises: TimeoutError."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 (what is awaited has no event of its own)
            await asyncio.sleep(0.005)
