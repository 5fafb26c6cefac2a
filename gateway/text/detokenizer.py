"""Token ids to text while they arrive.

Two ways, both with the property that the pieces, joined, are the tokenizer's own decoding of all ids:

- byte-level vocabularies (GPT-2's scheme): every token is a string of bytes, so an incremental UTF-8 decoder does it,
  in time linear in the output. https://github.com/openai/gpt-2/blob/master/src/encoder.py
- all others (SentencePiece styles, WordPiece, …): the decoder is asked again for a short window that starts at the
  last place where text was complete, and what it says beyond the known part is new.

A character spread over several tokens is held back until it is whole. Byte-fallback decoders judge a run of byte
tokens as a whole (one bad byte spoils the run), so such a run is held back until it ends.
"""

from __future__ import annotations

import codecs
import functools
import re
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from gateway.text.tokenizer import TextTokenizer

REPLACEMENT = "\ufffd"
BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>\Z")


class TokenEnd(NamedTuple):
    """Where the text of one output token ends, in characters of the whole output.

    Attributes:
        end: characters that are complete with this token.
        need: characters that hold bytes of this token: one more than `end` if its last character goes on.
    """

    end: int
    need: int


class Detokenizer(Protocol):
    """State of one output. `feed` and `finish` return new text; nothing is ever taken back."""

    def feed(self, token_ids: Sequence[int]) -> str:
        """Text that became complete with these tokens."""
        ...

    def finish(self) -> str:
        """What was held back; now with U+FFFD where bytes are really missing."""
        ...

    def drain_ends(self) -> list[TokenEnd]:
        """Where tokens end whose text has become complete since the last call, in order; if it keeps track."""
        ...


class TokenTable:
    """Bytes of every token of a byte-level vocabulary, worked out as needed. Shared by all requests of a model."""

    def __init__(self, tokenizer: TextTokenizer, *, skip_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_ids
        self._bytes: dict[int, bytes] = {}

    def __getitem__(self, token_id: int) -> bytes:
        known = self._bytes.get(token_id)
        if known is None:
            known = b"" if token_id in self._skip else byte_level_bytes(self._tokenizer.token(token_id) or "")
            self._bytes[token_id] = known
        return known


class ByteLevelDetokenizer:
    """For tokenizers whose whole decoder is `ByteLevel`."""

    def __init__(self, table: TokenTable, *, tracks: bool) -> None:
        self._table = table
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._tracks = tracks
        self._num_chars = 0
        self._ends: list[TokenEnd] = []

    def feed(self, token_ids: Sequence[int]) -> str:
        """Text that became complete with these tokens."""
        table, decode = self._table, self._utf8.decode
        if not self._tracks:
            return decode(b"".join([table[token_id] for token_id in token_ids]))
        pieces = []
        for token_id in token_ids:
            piece = decode(table[token_id])
            pieces.append(piece)
            self._num_chars += len(piece)
            goes_on = bool(self._utf8.getstate()[0])
            self._ends.append(TokenEnd(self._num_chars, self._num_chars + goes_on))
        return "".join(pieces)

    def finish(self) -> str:
        """What was held back; it belongs to the last token."""
        return self._utf8.decode(b"", final=True)

    def drain_ends(self) -> list[TokenEnd]:
        """See `Detokenizer`."""
        ends, self._ends = self._ends, []
        return ends


class WindowDetokenizer:
    """For every other decoder. Requires: joining tokens to a decoded text never changes text that is complete.

    Args:
        tokenizer: of the model.
        skip_ids: tokens to leave out of the text.
        context: ids of text that the output goes on from (a prompt's last ordinary token), which decides whether a
            leading space belongs to the output; empty where the output is a text of its own.
    """

    def __init__(self, tokenizer: TextTokenizer, *, skip_ids: frozenset[int], context: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_ids
        self._window = list(context)
        self._window_text = self._decode(self._window) if context else ""
        self._held: list[int] = []
        self._held_all: list[int] = []  # `_held` and the skipped ids between, for `drain_ends`
        self._num_chars = 0
        self._ends: list[TokenEnd] = []

    def feed(self, token_ids: Sequence[int]) -> str:
        """Text that became complete with these tokens."""
        pieces = []
        for token_id in token_ids:
            self._held_all.append(token_id)
            token = self._tokenizer.token(token_id)
            if token is not None and token_id not in self._skip:
                self._held.append(token_id)
                if _byte_of(token) is None:
                    pieces.append(self._release(token))
            elif not self._held:
                self._settle("")
        return "".join(pieces)

    def finish(self) -> str:
        """What was held back."""
        return self._release(None) if self._held else ""

    def drain_ends(self) -> list[TokenEnd]:
        """See `Detokenizer`."""
        ends, self._ends = self._ends, []
        return ends

    def _release(self, last_token: str | None) -> str:
        """Text of the held tokens, or nothing yet if it ends amid a character; at the end (None) it counts as is."""
        decoded = self._decode(self._window + self._held)
        text = decoded[len(self._window_text) :]
        if last_token is not None and text.endswith(REPLACEMENT) and REPLACEMENT not in last_token:
            return ""
        self._settle(text)
        self._window = self._held
        self._window_text = self._decode(self._window)
        self._held = []
        return text

    def _settle(self, text: str) -> None:
        """Count `text` as the text of the held tokens, each byte token ending where its character ends."""
        utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        done = 0
        for token_id in self._held_all[:-1]:
            byte = None if token_id in self._skip else _byte_of(self._tokenizer.token(token_id))
            done = min(len(text), done + (len(utf8.decode(byte)) if byte is not None else 0))
            goes_on = bool(utf8.getstate()[0])
            self._ends.append(TokenEnd(self._num_chars + done, self._num_chars + done + goes_on))
        self._num_chars += len(text)
        self._ends.append(TokenEnd(self._num_chars, self._num_chars))
        self._held_all = []

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=False)


class DetokenizerFactory:
    """Makes detokenizers for one model."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self.is_byte_level = tokenizer.decoder_config.get("type") == "ByteLevel"
        self._tables: dict[frozenset[int], TokenTable] = {}

    def _skipped(self, *, skip_special_tokens: bool, kept_ids: frozenset[int]) -> frozenset[int]:
        return self._tokenizer.special_ids - kept_ids if skip_special_tokens else frozenset()

    def _table(self, skip_ids: frozenset[int]) -> TokenTable:
        if skip_ids not in self._tables:
            self._tables[skip_ids] = TokenTable(self._tokenizer, skip_ids=skip_ids)
        return self._tables[skip_ids]

    def new(
        self,
        *,
        skip_special_tokens: bool,
        kept_ids: frozenset[int] = frozenset(),
        prompt_ids: Sequence[int] = (),
        tracks: bool = False,
    ) -> Detokenizer:
        """A detokenizer for one output, keeping track of where tokens end if asked to.

        `kept_ids` are special tokens that show in the text in any case: markers of calls, for the reader after it.

        With `prompt_ids` the output reads on from that prompt's text (a leading space is kept); without, it is a
        text of its own, as `tokenizer.decode(output_ids)` has it.
        """
        skip_ids = self._skipped(skip_special_tokens=skip_special_tokens, kept_ids=kept_ids)
        if self.is_byte_level:
            return ByteLevelDetokenizer(self._table(skip_ids), tracks=tracks)
        return WindowDetokenizer(self._tokenizer, skip_ids=skip_ids, context=self._context(prompt_ids))

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes that an id stands for, special tokens and leading spaces included; empty for an unknown id."""
        if self.is_byte_level:
            return self._table(frozenset())[token_id]
        token = self._tokenizer.token(token_id)
        if token is None:
            return b""
        byte = _byte_of(token)
        return byte if byte is not None else token.replace("▁", " ").encode()

    def contribution(
        self, token_id: int, text: str, *, skip_special_tokens: bool, kept_ids: frozenset[int] = frozenset()
    ) -> bytes:
        """Bytes that a token gave to an output in which `text` became complete with it.

        Over an output they join to its UTF-8, unless that had to be mended with U+FFFD.
        """
        if self.is_byte_level:
            skip_ids = self._skipped(skip_special_tokens=skip_special_tokens, kept_ids=kept_ids)
            return self._table(skip_ids)[token_id]
        byte = _byte_of(self._tokenizer.token(token_id))
        return text.encode() if byte is None else byte

    def _context(self, prompt_ids: Sequence[int]) -> list[int]:
        for token_id in reversed(prompt_ids):
            token = self._tokenizer.token(token_id)
            if token is not None and token_id not in self._tokenizer.special_ids and _byte_of(token) is None:
                return [token_id]
        return []


@functools.cache
def _alphabet() -> dict[str, int]:
    """GPT-2's table from printable characters to bytes."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + position): byte for position, byte in enumerate(others)}


def byte_level_bytes(token: str) -> bytes:
    """Bytes of a byte-level token; one with a character outside the alphabet (an added token) is taken as it is."""
    byte_of = _alphabet()
    try:
        return bytes([byte_of[character] for character in token])
    except KeyError:
        return token.encode()


def _byte_of(token: str | None) -> bytes | None:
    """The byte that a byte-fallback token such as `<0x0A>` stands for, None for any other token."""
    match = BYTE_TOKEN.match(token) if token is not None and len(token) == len("<0x0A>") else None
    return bytes.fromhex(match[1]) if match is not None else None
