"""The four forms of `prompt` in `/v1/completions` to token ids."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from gateway.errors import InvalidRequest
from gateway.pipeline import ServedModel


async def text_prompt_ids(
    model: ServedModel, prompts: Sequence[str | list[int]], *, add_special_tokens: bool, param: str = "prompt"
) -> list[list[int]]:
    """Token ids of each prompt of `split_prompts`.

    Ids are taken literally; texts get what the tokenizer puts around a text. Raises: InvalidRequest naming `param`.
    """
    return [
        await _ids(model, one, add_special_tokens=add_special_tokens, param=param)
        if isinstance(one, str)
        else _checked(model, one, param)
        for one in prompts
    ]


def split_prompts(prompt: str | list[Any], *, param: str = "prompt") -> list[str | list[int]]:
    """A list of prompts, each a text or a list of ids. Raises: InvalidRequest naming `param`."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise _bad(param, "is an empty list")
    if all(isinstance(item, str) for item in prompt):
        return list(prompt)
    if _is_ids(prompt):
        return [prompt]
    if all(isinstance(item, list) and _is_ids(item) for item in prompt):
        return list(prompt)
    raise _bad(param, "must be a string, a list of strings, a list of token ids or a list of lists of token ids")


def prompt_text(model: ServedModel, prompt: str | list[int], *, skip_special_tokens: bool) -> str:
    """What `echo` repeats: a text as it was sent, ids decoded."""
    if isinstance(prompt, str):
        return prompt
    return model.card.tokenizer.decode(prompt, skip_special_tokens=skip_special_tokens)


async def token_offsets(
    model: ServedModel, prompt: str | list[int], *, add_special_tokens: bool, skip_special_tokens: bool
) -> list[int]:
    """Where in what `prompt_text` says, in characters, the text of each token of `text_prompt_ids` begins."""
    if isinstance(prompt, str):
        spans = await model.card.tokenizer.spans_async(prompt, add_special_tokens=add_special_tokens)
    else:
        detokenizer = model.card.detokenizers.new(skip_special_tokens=skip_special_tokens, tracks=True)
        detokenizer.feed(prompt)
        detokenizer.finish()
        ends = [end.end for end in detokenizer.drain_ends()]
        spans = list(pairwise([0, *ends]))
    offsets: list[int] = []
    end_before = 0
    for start, end in spans:
        # Tokenizers leave a leading space out of a token's span; a token within a character shares that one's span
        begin = end_before if start == end else min(start, end_before)
        offsets.append(max(begin, offsets[-1] if offsets else 0))
        end_before = max(end_before, end)
    return offsets


def _is_ids(items: list[Any]) -> bool:
    return all(type(item) is int for item in items)


async def _ids(model: ServedModel, text: str, *, add_special_tokens: bool, param: str) -> list[int]:
    if not text:
        raise _bad(param, "is empty")
    ids = await model.card.tokenizer.encode_async(text, add_special_tokens=add_special_tokens)
    if not ids:
        raise _bad(param, "has no tokens")
    return ids


def _checked(model: ServedModel, ids: list[int], param: str) -> list[int]:
    if not ids:
        raise _bad(param, "is empty")
    size = model.card.vocab_size
    if min(ids) < 0 or max(ids) >= size:
        raise _bad(param, f"has a token id outside the vocabulary (0 to {size - 1})")
    return ids


def _bad(param: str, problem: str) -> InvalidRequest:
    return InvalidRequest(f"{param!r} {problem}.", param=param, code="invalid_value")
