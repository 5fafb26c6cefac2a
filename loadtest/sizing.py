"""How many tokens the words of a prompt are, by the server's own count.

A prompt's token count is taken as ``overhead`` (chat template, special tokens) plus the cost of each word
with the space before it. Tokenizers that split at spaces first, which is nearly all of them, make that sum
exact.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from enum import StrEnum

import msgspec
import numpy as np

from loadtest.errors import ExchangeError, ServerUnreachable
from loadtest.server import Server
from loadtest.words import WORDS

_GROUP = 16
_PARALLEL = 8
_ANCHOR = "the"
_GUESSED_TOKENS_PER_WORD = 1.3

CountTokens = Callable[[str], Awaitable[list[int] | int]]


class Method(StrEnum):
    """Where the costs come from, from exact to rough."""

    TOKENIZE = "tokenize"  # every word measured with the server's /tokenize
    PROBE = "probe"  # mean tokens per word, from the usage of two probe requests
    GUESS = "guess"  # the server tells nothing


class Sizes(msgspec.Struct, frozen=True):
    """Token costs of words.

    ``costs[i]`` is the tokens of a space and ``words[i]`` (whole numbers if ``method`` is TOKENIZE, else one
    mean for all); ``overhead`` is what a prompt has besides; ``token_ids`` are ids to make token-array
    prompts of, empty if the server does not tell any.
    """

    method: Method
    words: tuple[str, ...]
    costs: tuple[float, ...]
    overhead: float
    token_ids: tuple[int, ...] = ()

    @property
    def exact(self) -> bool:
        """Whether prompts come out at the length asked for, rather than near it."""
        return self.method is Method.TOKENIZE

    def describe(self) -> str:
        """Say in one line how prompts are sized."""
        mean = f"{np.mean(self.costs):.2f} tokens per word, {self.overhead:.0f} of overhead"
        return {
            Method.TOKENIZE: f"exact, by the server's /tokenize ({mean})",
            Method.PROBE: f"approximate, from the usage of probe requests ({mean})",
            Method.GUESS: f"guessed: the server has no /tokenize and reports no usage ({mean})",
        }[self.method]


async def find_tokenizer(server: Server, model: str) -> CountTokens | None:
    """Return a function from text to its token ids (or only their number), None without /tokenize.

    Knows the forms ``{"model", "prompt"}`` beside or under ``/v1`` and ``{"content"}``.
    Raises: ServerUnreachable.
    """
    forms = [
        (f"{server.root}/tokenize", "prompt"),
        (f"{server.base}/tokenize", "prompt"),
        (f"{server.root}/tokenize", "content"),
    ]
    for path, field in forms:

        async def count(text: str, path: str = path, field: str = field) -> list[int] | int:
            answer = await server.post_json(path, {"model": model, field: text})
            body = answer.body if answer.status == 200 and isinstance(answer.body, dict) else {}
            tokens = body.get("tokens")
            if isinstance(tokens, list) and all(isinstance(token, int) for token in tokens):
                return tokens
            if isinstance(body.get("count"), int):
                return int(body["count"])
            raise ExchangeError(f"{path} answered {answer.status}: {answer.message}")

        try:
            # Two lengths: a page that answers 200 to anything does not count tokens.
            few, many = _number(await count(_ANCHOR)), _number(await count(f"{_ANCHOR} {WORDS[0]}"))
        except ServerUnreachable:
            raise
        except ExchangeError:
            continue
        if many > few:
            return count
    return None


async def measure_words(count: CountTokens) -> Sizes:
    """Find the cost of every word, asking for groups first and splitting those that need it.

    The overhead is left 0. Raises: ExchangeError if the tokenizer stops answering.
    """
    anchor = await count(_ANCHOR)
    costs = dict.fromkeys(WORDS, 1.0)
    ids: set[int] = set()
    gate = asyncio.Semaphore(_PARALLEL)

    async def measure(group: Sequence[str]) -> None:
        async with gate:
            answer = await count(" ".join((_ANCHOR, *group)))
        if isinstance(answer, list) and isinstance(anchor, list):
            ids.update(set(answer) - set(anchor))
        cost = _number(answer) - _number(anchor)
        if len(group) == 1:
            costs[group[0]] = float(max(cost, 1))
        elif cost != len(group):
            middle = len(group) // 2
            await measure(group[:middle])
            await measure(group[middle:])

    async with asyncio.TaskGroup() as tasks:
        for start in range(0, len(WORDS), _GROUP):
            tasks.create_task(measure(WORDS[start : start + _GROUP]))
    return Sizes(Method.TOKENIZE, WORDS, tuple(costs[word] for word in WORDS), 0.0, tuple(sorted(ids)))


def with_overhead(sizes: Sizes, num_words: int, prompt_tokens: int | None) -> Sizes:
    """Return ``sizes`` with the overhead that a probe of :func:`probe_text` words reveals."""
    if prompt_tokens is None:
        return sizes
    words = sum(sizes.costs[:num_words])
    return msgspec.structs.replace(sizes, overhead=max(0.0, prompt_tokens - words))


def from_probes(small: tuple[int, int | None], large: tuple[int, int | None]) -> Sizes:
    """Fit ``tokens = overhead + cost * words`` through two probes, each (words, prompt tokens or None)."""
    cost, overhead, method = _GUESSED_TOKENS_PER_WORD, 0.0, Method.GUESS
    (few, few_tokens), (many, many_tokens) = small, large
    if few_tokens is not None and many_tokens is not None and many_tokens > few_tokens and many > few:
        cost = (many_tokens - few_tokens) / (many - few)
        overhead, method = max(0.0, few_tokens - cost * few), Method.PROBE
    return Sizes(method, WORDS, (cost,) * len(WORDS), overhead)


def probe_text(num_words: int, *, spread: bool = False) -> str:
    """Return ``num_words`` words: the first ones, or with ``spread`` ones from all over the list."""
    step = max(1, len(WORDS) // num_words) if spread else 1
    return " ".join(WORDS[(place * step) % len(WORDS)] for place in range(num_words))


def _number(answer: list[int] | int) -> int:
    return len(answer) if isinstance(answer, list) else answer
