"""Tokenizer files as `transformers` saves them, read alike by gateways (text) and workers (grammar masks)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Tokenizer

SPECIAL_TOKEN_NAMES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


def load_tokenizer(tokenizer_json: bytes, special_tokens: Mapping[str, str]) -> Tokenizer:
    """The tokenizer without truncation and padding, the named special tokens marked as such.

    Raises: whatever `tokenizers` raises for a file that it cannot read, bare Exception among it.
    """
    tokenizer: Tokenizer = Tokenizer.from_str(tokenizer_json.decode())
    tokenizer.no_truncation()
    tokenizer.no_padding()
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    missing = [AddedToken(text, special=True) for text in special_tokens.values() if text not in known]
    # Only tokens the vocabulary has already: a new id would lie outside the model's embedding
    tokenizer.add_special_tokens([token for token in missing if tokenizer.token_to_id(token.content) is not None])
    return tokenizer


def named_special_tokens(tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token` and so on; written as a string, or in older files as an object with `content`."""
    named: dict[str, str] = {}
    for name in SPECIAL_TOKEN_NAMES:
        value = tokenizer_config.get(name)
        text = value.get("content") if isinstance(value, Mapping) else value
        if isinstance(text, str) and text:
            named[name] = text
    return named


def eos_ids(tokenizer: Tokenizer, special_tokens: Mapping[str, str], *configs: Mapping[str, Any]) -> tuple[int, ...]:
    """Ids that end an answer, from `config.json` or `generation_config.json` and the tokenizer."""
    found: set[int] = set()
    for config in configs:
        value = config.get("eos_token_id", text_config(config).get("eos_token_id"))
        found.update([value] if isinstance(value, int) else value or [])
    eos = special_tokens.get("eos_token")
    eos_id = tokenizer.token_to_id(eos) if eos is not None else None
    if eos_id is not None:
        found.add(eos_id)
    return tuple(sorted(found))


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Models that also see or hear keep the language model's part below `text_config`."""
    nested = config.get("text_config")
    return nested if isinstance(nested, Mapping) else {}
