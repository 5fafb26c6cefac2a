"""A model's tokenizer, from the files that `transformers` saves.

Encoding comes in two kinds. `encode` is what `transformers` does: special tokens written in the text become control
tokens. `encode_seamed` is for rendered chats: its text is cut at seams, and nothing that spans a seam is ever read as
one token, which is how look-alikes of control tokens in message content stay text (`gateway.text.control_marks`).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Mapping
from typing import Any

from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from fleet.tokenizer_files import load_tokenizer, named_special_tokens
from gateway.errors import CardError

INLINE_ENCODE_CHARS = 8192  # longer texts are encoded on a thread (about 2 ms of the event loop's time)


class TextTokenizer:
    """Wraps `tokenizers.Tokenizer`; safe to share between requests and threads, never mutated after construction.

    Args:
        tokenizer_json: contents of `tokenizer.json`.
        tokenizer_config: decoded `tokenizer_config.json`.

    Raises:
        CardError: the tokenizer does not load.
    """

    def __init__(self, tokenizer_json: bytes, tokenizer_config: Mapping[str, Any]) -> None:
        try:
            self.special_tokens = named_special_tokens(tokenizer_config)
            self._tokenizer = load_tokenizer(tokenizer_json, self.special_tokens)
            self.decoder_config: dict[str, Any] = json.loads(tokenizer_json).get("decoder") or {}
        except Exception as error:  # `tokenizers` raises bare Exception for a file it cannot read
            raise CardError(f"tokenizer.json does not load: {error}") from error
        self._apply_bos_eos(tokenizer_config)
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.special_texts = tuple(token.content for token in added.values() if token.special and token.content)
        self.num_tokens = self._tokenizer.get_vocab_size(with_added_tokens=True)
        self._newline_ids = self._encode("\n", add_special_tokens=False)
        self._prefixes_space = self._detect_prefix_space()

    @property
    def backend(self) -> Tokenizer:
        """The `tokenizers.Tokenizer` underneath. Callers do not mutate it."""
        return self._tokenizer

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Encode as `transformers` does. `add_special_tokens` adds what the tokenizer puts around a text (BOS)."""
        return self._encode(text, add_special_tokens=add_special_tokens)

    async def encode_async(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Like `encode`; long texts go to a thread and leave the event loop free."""
        if len(text) <= INLINE_ENCODE_CHARS:
            return self._encode(text, add_special_tokens=add_special_tokens)
        return await asyncio.to_thread(self._encode, text, add_special_tokens=add_special_tokens)

    async def spans_async(self, text: str, *, add_special_tokens: bool) -> list[tuple[int, int]]:
        """Characters `[start, end)` of the text that each token of `encode_async` stands for; empty for added ones."""
        if len(text) <= INLINE_ENCODE_CHARS:
            return self._spans(text, add_special_tokens)
        return await asyncio.to_thread(self._spans, text, add_special_tokens)

    async def encode_seamed_async(self, pieces: list[str], *, add_special_tokens: bool = False) -> list[int]:
        """Encode pieces of one text so that no token spans two pieces. One piece is encoded as by `encode`."""
        if sum(map(len, pieces)) <= INLINE_ENCODE_CHARS:
            return self.encode_seamed(pieces, add_special_tokens=add_special_tokens)
        return await asyncio.to_thread(self.encode_seamed, pieces, add_special_tokens=add_special_tokens)

    def encode_seamed(self, pieces: list[str], *, add_special_tokens: bool = False) -> list[int]:
        """Encode pieces of one text so that no token spans two pieces. One piece is encoded as by `encode`."""
        ids = self._encode(pieces[0], add_special_tokens=add_special_tokens) if pieces else []
        for piece in pieces[1:]:
            if piece:
                ids += self._encode_continuation(piece)
        return ids

    def decode(self, token_ids: Iterable[int], *, skip_special_tokens: bool) -> str:
        """Text of a whole sequence; ids that the tokenizer does not know are dropped."""
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def token(self, token_id: int) -> str | None:
        """The vocabulary's own spelling of an id, or None if it has none."""
        token: str | None = self._tokenizer.id_to_token(token_id)
        return token

    def id_of(self, token: str) -> int | None:
        """The id of a vocabulary entry, or None."""
        token_id: int | None = self._tokenizer.token_to_id(token)
        return token_id

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        # the batch call releases the interpreter lock, the single one does not
        ids: list[int] = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        return ids

    def _spans(self, text: str, add_special_tokens: bool) -> list[tuple[int, int]]:
        spans: list[tuple[int, int]] = self._tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)[
            0
        ].offsets
        return spans

    def _encode_continuation(self, piece: str) -> list[int]:
        """Encode text that does not begin the sequence, without the space that SentencePiece styles put in front."""
        if self._prefixes_space:
            ids = self._encode("\n" + piece, add_special_tokens=False)
            if ids[: len(self._newline_ids)] == self._newline_ids:
                return ids[len(self._newline_ids) :]
        return self._encode(piece, add_special_tokens=False)

    def _detect_prefix_space(self) -> bool:
        ids = self._encode("x", add_special_tokens=False)
        return bool(ids) and (self.token(ids[0]) or "").startswith(("▁", "Ġ"))

    def _apply_bos_eos(self, config: Mapping[str, Any]) -> None:
        """An explicit `add_bos_token` or `add_eos_token` replaces the post-processor, as in `transformers` 5."""
        if "add_bos_token" not in config and "add_eos_token" not in config:
            return
        pairs: list[tuple[str, int]] = []
        template = "$A:0"
        for key, name in (("add_bos_token", "bos_token"), ("add_eos_token", "eos_token")):
            text = self.special_tokens.get(name)
            token_id = self.id_of(text) if text is not None else None
            if config.get(key) and text is not None and token_id is not None:
                pairs.append((text, token_id))
                template = f"{text}:0 {template}" if name == "bos_token" else f"{template} {text}:0"
        self._tokenizer.post_processor = TemplateProcessing(
            single=template, pair=f"{template} $B:1", special_tokens=pairs
        )
