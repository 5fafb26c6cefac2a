"""The four forms of `prompt` in `/v1/completions` to token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gateway.errors import InvalidRequest
from gateway.pipeline import ServedModel


async def text_prompt_ids(
    model: ServedModel, prompts: Sequence[str | list[int]], *, add_special_tokens: bool
) -> list[list[int]]:
    """Token ids of each prompt of `split_prompts`.

    Ids are taken literally; texts get what the tokenizer puts around a text. Raises: InvalidRequest naming `prompt`.
    """
    return [
        await _ids(model, one, add_special_tokens=add_special_tokens) if isinstance(one, str) else _checked(model, one)
        for one in prompts
    ]


def split_prompts(prompt: str | list[Any]) -> list[str | list[int]]:
    """A list of prompts, each a text or a list of ids. Raises: InvalidRequest."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise _bad("'prompt' is an empty list.")
    if all(isinstance(item, str) for item in prompt):
        return list(prompt)
    if _is_ids(prompt):
        return [prompt]
    if all(isinstance(item, list) and _is_ids(item) for item in prompt):
        return list(prompt)
    raise _bad("'prompt' must be a string, a list of strings, a list of token ids or a list of lists of token ids.")


def prompt_text(model: ServedModel, prompt: str | list[int], *, skip_special_tokens: bool) -> str:
    """What `echo` repeats: a text as it was sent, ids decoded."""
    if isinstance(prompt, str):
        return prompt
    return model.card.tokenizer.decode(prompt, skip_special_tokens=skip_special_tokens)


def _is_ids(items: list[Any]) -> bool:
    return all(type(item) is int for item in items)


async def _ids(model: ServedModel, text: str, *, add_special_tokens: bool) -> list[int]:
    if not text:
        raise _bad("'prompt' is empty.")
    ids = await model.card.tokenizer.encode_async(text, add_special_tokens=add_special_tokens)
    if not ids:
        raise _bad("'prompt' has no tokens.")
    return ids


def _checked(model: ServedModel, ids: list[int]) -> list[int]:
    if not ids:
        raise _bad("'prompt' is empty.")
    size = model.card.vocab_size
    if min(ids) < 0 or max(ids) >= size:
        raise _bad(f"'prompt' has a token id outside the vocabulary (0 to {size - 1}).")
    return ids


def _bad(message: str) -> InvalidRequest:
    return InvalidRequest(message, param="prompt", code="invalid_value")
