"""How far one sequence's output has come in its grammar."""

from __future__ import annotations

from collections.abc import Sequence as Many
from enum import StrEnum

import numpy as np
import numpy.typing as npt
from llguidance import LLExecutor, LLMatcher

from engine.errors import GrammarRejected
from engine.grammar.vocabulary import Vocabulary
from fleet.grammar import library_source, limits, short
from fleet.types import Grammar

MaskWords = npt.NDArray[np.int32]


class Standing(StrEnum):
    """What a matcher says before a token is chosen."""

    OPEN = "open"  # some tokens are allowed: see the mask
    COMPLETE = "complete"  # the output matches, and nothing longer does


class Matcher:
    """One sequence's match. Not thread-safe: used by one thread at a time.

    Args:
        vocabulary: of the model.
        library: freshly made or copied; consumed nothing yet.
    """

    def __init__(self, vocabulary: Vocabulary, library: LLMatcher) -> None:
        self._vocabulary = vocabulary
        self._library = library
        self._num_consumed = 0

    @classmethod
    def compile(cls, vocabulary: Vocabulary, grammar: Grammar) -> Matcher:
        """A matcher at the start. Releases the interpreter lock. Raises: GrammarRejected."""
        try:
            source = library_source(grammar)
        except ValueError as error:
            raise GrammarRejected(short(str(error))) from error
        matcher = cls(vocabulary, LLMatcher(vocabulary.tokenizer, source, log_level=0, limits=limits()))
        matcher.check()
        return matcher

    def copy(self) -> Matcher:
        """Another one that goes its own way from here."""
        twin = Matcher(self._vocabulary, self._library.deep_copy())
        twin._num_consumed = self._num_consumed
        return twin

    def follow(self, output_ids: Many[int]) -> None:
        """Stand where these output ids lead: the same as before plus what was sampled, or all of a replayed output.

        Raises: GrammarRejected if they do not match.
        """
        num_new = len(output_ids) - self._num_consumed
        if num_new < 0:  # a token was sampled and never booked
            self._library.rollback(-num_new)
        elif num_new:
            self._library.consume_tokens(list(output_ids[-num_new:]))
        self._num_consumed = len(output_ids)
        self.check()

    def stand(self, words: MaskWords, stop_token_ids: Many[int]) -> Standing:
        """Finish a mask of `fill`, and say whether there is a token left to choose.

        Stop ids that are control tokens are allowed exactly where the output so far is a match; those that are text
        (a client may name any) follow the grammar like other text. The model's end-of-sequence ids are not allowed
        where they are not stop ids.

        Args:
            words: [num_words] int32, as filled for this matcher; mutated.
            stop_token_ids: of the sequence.

        Raises: GrammarRejected if the grammar proves too large to follow, or leads nowhere.
        """
        self.check()
        for token_id in self._vocabulary.eos_ids:
            _set(words, token_id, allowed=False)
        accepting = self._library.is_accepting()
        if not words.any():
            if accepting:
                return Standing.COMPLETE
            raise GrammarRejected("no token continues the output")
        for token_id in stop_token_ids if accepting else ():
            if token_id < self._vocabulary.vocab_size and not self._vocabulary.is_text(token_id):
                _set(words, token_id, allowed=True)
        return Standing.OPEN

    def accept(self, token_id: int, stop_token_ids: Many[int]) -> bool:
        """Go on by a token that the mask allowed; true if the output now matches and nothing longer does."""
        if token_id in stop_token_ids and not self._vocabulary.is_text(token_id):
            return False  # it ends the sequence by itself
        self._num_consumed += 1
        return self._library.consume_token(token_id) and self._library.is_accepting() and self._library.is_stopped()

    def check(self) -> None:
        """Raises: GrammarRejected if the library has given up on this matcher."""
        if self._library.is_error():
            raise GrammarRejected(short(self._library.get_error().partition("<state>")[0]))


def fill(executor: LLExecutor, matchers: Many[tuple[Matcher, int]], masks: MaskWords) -> None:
    """Write the masks of several matchers, bit `i % 32` of word `i // 32` for id `i`; see `Matcher.stand`.

    One call without the interpreter lock, since taking it back once per row would cost more than the masks.

    Args:
        executor: its threads share the work.
        matchers: each with its row in `masks`.
        masks: [C, num_words] int32, contiguous; the rows named are overwritten.
    """
    if matchers:
        libraries = [(matcher._library, row) for matcher, row in matchers]  # noqa: SLF001 - of this module
        executor.unsafe_compute_mask_ptr(libraries, masks.ctypes.data, masks.shape[1] * masks.itemsize, len(masks))


def _set(words: MaskWords, token_id: int, *, allowed: bool) -> None:
    bit = np.array(1 << token_id % 32, dtype=np.uint32).view(np.int32)
    if allowed:
        words[token_id // 32] |= bit
    else:
        words[token_id // 32] &= ~bit
