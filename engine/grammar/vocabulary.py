"""The model's vocabulary as the grammar library needs it. The one place where a worker looks at text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from llguidance import LLTokenizer

from engine.errors import VocabularyUnusable
from fleet.tokenizer_files import eos_ids, load_tokenizer, named_special_tokens


class Vocabulary:
    """Immutable and shared by all matchers of a worker.

    Attributes:
        tokenizer: the library's view: a trie of all tokens' bytes.
        eos_ids: ids that the model ends answers with; never part of a text.
        vocab_size: V, of the model; ids beyond the tokenizer's own are never allowed.
        num_words: 32-bit words of a mask.
    """

    def __init__(self, tokenizer: LLTokenizer, eos: tuple[int, ...], vocab_size: int) -> None:
        self.tokenizer = tokenizer
        self.eos_ids = eos
        self.vocab_size = vocab_size
        self.num_words = -(-tokenizer.vocab_size // 32)

    @classmethod
    def from_files(cls, files: Mapping[str, bytes], vocab_size: int) -> Vocabulary:
        """Read from the files that `fleet.model_files` names. Takes about a second for 150,000 tokens.

        Raises: VocabularyUnusable.
        """
        if "tokenizer.json" not in files:
            raise VocabularyUnusable("the model has no tokenizer.json")
        try:
            special_tokens = named_special_tokens(_json(files, "tokenizer_config.json"))
            tokenizer = load_tokenizer(files["tokenizer.json"], special_tokens)
            configs = (_json(files, "config.json"), _json(files, "generation_config.json"))
            eos = eos_ids(tokenizer, special_tokens, *configs)
            size = max(vocab_size, tokenizer.get_vocab_size(with_added_tokens=True))
            return cls(LLTokenizer(tokenizer.to_str(), n_vocab=size, eos_token=list(eos) or None), eos, vocab_size)
        except Exception as error:  # both libraries raise bare exceptions for files that they cannot use
            raise VocabularyUnusable(f"its tokenizer cannot be used for grammars: {error}") from error

    def is_text(self, token_id: int) -> bool:
        """Whether the token can be part of a text, rather than a control token."""
        return token_id not in self.eos_ids and not self.tokenizer.is_special_token(token_id)


def _json(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    return msgspec.json.decode(files.get(name, b"{}"), type=dict[str, Any])
