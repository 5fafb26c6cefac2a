"""Log-probabilities in the two shapes of OpenAI's API."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import zip_longest

from fleet.types import TokenLogprob
from gateway.api.responses import ChatTokenLogprob, CompletionLogprobs, PromptLogprob, PromptLogprobs, TopTokenLogprob
from gateway.text.assembler import TextToken
from gateway.text.card import ModelCard

FLOOR = -9999.0  # JSON has no infinity


class TokenSpeller:
    r"""Writes single tokens as text. A token that is only part of a character is written `bytes:\xe2\x82`.

    Args:
        card: of the model.
        as_ids: write `token_id:5` instead, which unlike text is never ambiguous (vLLM).
    """

    def __init__(self, card: ModelCard, *, as_ids: bool = False) -> None:
        self._detokenizers = card.detokenizers
        self._as_ids = as_ids
        self._spelled: dict[int, tuple[str, list[int]]] = {}

    def __call__(self, token_id: int) -> tuple[str, list[int]]:
        """Text and bytes of an id."""
        known = self._spelled.get(token_id)
        if known is None:
            data = self._detokenizers.token_bytes(token_id)
            text = f"token_id:{token_id}" if self._as_ids else _spelled(data)
            known = self._spelled[token_id] = text, list(data)
        return known


def _spelled(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def chat_logprobs(tokens: Iterable[TextToken], spell: TokenSpeller, *, num_top: int) -> list[ChatTokenLogprob]:
    """Entries for `logprobs.content`."""
    return [_chat_entry(token, spell, num_top) for token in tokens]


def completion_logprobs(
    tokens: Iterable[TextToken], spell: TokenSpeller, *, num_top: int, base_offset: int
) -> CompletionLogprobs:
    """The parallel lists. `text_offset` counts characters from the start of the choice's text, echo included.

    `top_logprobs` names the `num_top` likeliest tokens and the chosen one.
    """
    result = CompletionLogprobs([], [], [], [])
    for token in tokens:
        logprob = token.logprob or TokenLogprob(FLOOR)
        text = spell(token.token_id)[0]
        result.tokens.append(text)
        result.token_logprobs.append(finite(logprob.logprob))
        result.top_logprobs.append(_likeliest(text, logprob, spell, num_top))
        result.text_offset.append(base_offset + token.offset)
    return result


def echoed_logprobs(
    ids: Sequence[int],
    offsets: Sequence[int],
    logprobs: Sequence[TokenLogprob],
    spell: TokenSpeller,
    *,
    num_top: int,
) -> CompletionLogprobs:
    """The parallel lists of an echoed prompt: `logprobs` are of all ids but the first, which nothing predicts."""
    result = CompletionLogprobs([], [], [], list(offsets))
    for token_id, logprob in zip_longest(ids, (None, *logprobs)):
        text = spell(token_id)[0]
        result.tokens.append(text)
        result.token_logprobs.append(None if logprob is None else finite(logprob.logprob))
        result.top_logprobs.append(None if logprob is None else _likeliest(text, logprob, spell, num_top))
    return result


def prompt_logprobs(
    ids: Sequence[int], logprobs: Sequence[TokenLogprob], spell: TokenSpeller, *, num_top: int
) -> PromptLogprobs:
    """VLLM's `prompt_logprobs`: at each place the `num_top` likeliest tokens and the prompt's own."""
    result: PromptLogprobs = [None]
    for token_id, logprob in zip(ids[1:], logprobs, strict=False):
        ranked = [(one.token_id, one.logprob, rank) for rank, one in enumerate(logprob.top[:num_top], start=1)]
        candidates = {token_id: (logprob.logprob, logprob.rank)} | {one: (value, rank) for one, value, rank in ranked}
        result.append(
            {one: PromptLogprob(finite(value), rank, spell(one)[0]) for one, (value, rank) in candidates.items()}
        )
    return result


def _likeliest(text: str, logprob: TokenLogprob, spell: TokenSpeller, num_top: int) -> dict[str, float]:
    """The likeliest tokens by their text, and the token itself."""
    found: dict[str, float] = {}
    for other in logprob.top[:num_top]:
        found.setdefault(spell(other.token_id)[0], finite(other.logprob))
    found.setdefault(text, finite(logprob.logprob))
    return found


def finite(logprob: float) -> float:
    """Clamp to what JSON and clients can take: [-9999, 0]."""
    return FLOOR if math.isnan(logprob) else min(0.0, max(FLOOR, logprob))


def _chat_entry(token: TextToken, spell: TokenSpeller, num_top: int) -> ChatTokenLogprob:
    logprob = token.logprob
    top = logprob.top[:num_top] if logprob is not None else []
    return ChatTokenLogprob(
        token=spell(token.token_id)[0],
        logprob=finite(logprob.logprob if logprob is not None else FLOOR),
        bytes=list(token.data),
        top_logprobs=[TopTokenLogprob(spell(t.token_id)[0], finite(t.logprob), spell(t.token_id)[1]) for t in top],
    )
