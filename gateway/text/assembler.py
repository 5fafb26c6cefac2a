"""One output's way from token ids to text: detokenize, watch for stop strings, keep tokens beside their text."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from operator import attrgetter

import msgspec

from fleet.types import FinishReason, TokenLogprob
from gateway.pipeline import Tokens
from gateway.text.card import ModelCard
from gateway.text.detokenizer import TokenEnd
from gateway.text.stop_strings import StopMatch, StopScanner


class TextOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What a request wants of its text.

    Attributes:
        stops: stop strings, none empty.
        include_stop: keep the stop string or stop token in the text.
        skip_special_tokens: leave special tokens out of the text.
        kept_ids: special tokens that stay in it all the same.
        stop_token_ids: ids that end the sequence; such a last token has no text.
        min_tokens: stop strings are not looked for in the text of the first so many tokens.
        with_tokens: report tokens beside the text (for log-probabilities or returned ids).
    """

    stops: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True
    kept_ids: frozenset[int] = frozenset()
    stop_token_ids: frozenset[int] = frozenset()
    min_tokens: int = 0
    with_tokens: bool = False


class TextToken(msgspec.Struct, frozen=True):
    """One output token beside its text.

    Attributes:
        token_id: its id.
        offset: characters of output text before it.
        data: the bytes it contributed to the text: none for a stop token, cut where a stop string cut.
        logprob: if log-probabilities were asked for.
    """

    token_id: int
    offset: int
    data: bytes
    logprob: TokenLogprob | None


class Piece(msgspec.Struct, frozen=True):
    """What became sure at one step: text, and the tokens whose text is out with it.

    `finish` is set in the last piece.
    """

    text: str
    tokens: Sequence[TextToken] = ()
    finish: FinishReason | None = None


class _Waiting(msgspec.Struct):
    """A token that has not been reported yet."""

    token_id: int
    logprob: TokenLogprob | None


class TextAssembler:
    """State of one output.

    Args:
        card: of the model.
        options: of the request.
        prompt_ids: the prompt where the output reads on from it (completions); empty where it is a message.

    Attributes:
        num_tokens: output tokens so far; with a stop string, up to and with the token that completed it.
        match: the stop string that ended the output, if one did.
    """

    def __init__(self, card: ModelCard, options: TextOptions, prompt_ids: Sequence[int] = ()) -> None:
        self._factory = card.detokenizers
        self._options = options
        self._scanner = StopScanner(options.stops) if options.stops else None
        self._tracks = options.with_tokens or bool(options.stops)
        self._detokenizer = self._factory.new(
            skip_special_tokens=options.skip_special_tokens,
            kept_ids=options.kept_ids,
            prompt_ids=prompt_ids,
            tracks=self._tracks,
        )
        self._ends: list[TokenEnd] = []  # of token i, as far as known
        self._num_chars = 0  # of the output, held back or not
        self._num_released = 0
        self._waiting: deque[_Waiting] = deque()
        self._hidden_place = -1  # of a stop token, which has no text
        self._num_reported = 0
        self._tail = ""  # output text from the first unreported token on
        self._bytes_released = 0
        self._bytes_reported = 0
        self.num_tokens = 0
        self.match: StopMatch | None = None

    def push(self, tokens: Tokens) -> Piece:
        """Take what arrived. After a piece with `finish` nothing more may be pushed."""
        ids = tokens.token_ids
        self.num_tokens += len(ids)
        hidden = self._hides_last(tokens)
        text = self._detokenizer.feed(ids[:-1] if hidden else ids)
        if tokens.finish is not None:
            text += self._detokenizer.finish()
        if not self._tracks:
            return Piece(text, (), tokens.finish)
        self._note(tokens, text, hidden=hidden)
        released = self._scan(text, final=tokens.finish is not None)
        finish = tokens.finish if self.match is None else FinishReason.STOP
        self._num_released += len(released)
        if not self._options.with_tokens:
            return Piece(released, (), finish)
        self._bytes_released += len(released.encode())
        return Piece(released, self._report(final=finish is not None), finish)

    def _hides_last(self, tokens: Tokens) -> bool:
        """Whether the last token is a stop token, which has no part in the text."""
        return (
            tokens.finish is FinishReason.STOP
            and not self._options.include_stop
            and bool(tokens.token_ids)
            and tokens.token_ids[-1] in self._options.stop_token_ids
        )

    def _note(self, tokens: Tokens, text: str, *, hidden: bool) -> None:
        """Keep tokens and where their text ends."""
        self._num_chars += len(text)
        self._ends += self._detokenizer.drain_ends()
        if tokens.finish is not None and self._ends:
            self._ends[-1] = TokenEnd(
                self._num_chars, self._num_chars
            )  # what the detokenizer gave up last belongs to the last token
        if hidden:
            self._ends.append(TokenEnd(self._num_chars, self._num_chars))
            self._hidden_place = self.num_tokens - 1
        if self._options.with_tokens:
            self._tail += text
            logprobs: Sequence[TokenLogprob | None] = tokens.logprobs or [None] * len(tokens.token_ids)
            self._waiting.extend(map(_Waiting, tokens.token_ids, logprobs))

    def _scan(self, text: str, *, final: bool) -> str:
        """Look for stop strings; returns the text that may go out."""
        if self._scanner is None:
            return text
        num_unread = self._num_unread(text)
        released = self._scanner.skip(text[:num_unread]) if num_unread else ""
        released += self._scanner.feed(text[num_unread:])
        if final:
            released += self._scanner.finish()
        self.match = self._scanner.match
        if self.match is not None:
            self.num_tokens = bisect_left(self._ends, self.match.end, key=attrgetter("end")) + 1
            if self._options.include_stop:
                released += self.match.text
        return released

    def _num_unread(self, text: str) -> int:
        """How much of new text belongs to the first `min_tokens` tokens."""
        first = self._options.min_tokens
        if first == 0:
            return 0
        if len(self._ends) < first:
            return len(text)
        return min(len(text), max(0, self._ends[first - 1].end - (self._num_chars - len(text))))

    def _report(self, *, final: bool) -> list[TextToken]:
        """Tokens whose text is out; at the end all that count."""
        reported: list[TextToken] = []
        limit = self.num_tokens if final else len(self._ends)
        while self._num_reported < limit and self._waiting:
            place = self._num_reported
            start = self._ends[place - 1].end if place else 0
            end, need = self._ends[place]
            if need > self._num_released and not final:
                break
            waiting = self._waiting.popleft()
            text, self._tail = self._tail[: end - start], self._tail[end - start :]
            data = self._factory.contribution(
                waiting.token_id,
                text,
                skip_special_tokens=self._options.skip_special_tokens,
                kept_ids=self._options.kept_ids,
            )
            if self.match is not None:
                data = data[: max(0, self._bytes_released - self._bytes_reported)]
            elif place == self._hidden_place:
                data = b""
            self._bytes_reported += len(data)
            self._num_reported += 1
            reported.append(TextToken(waiting.token_id, start, data, waiting.logprob))
        return reported
