"""Stop strings: cut exactly, the earliest match wins, nothing is lost, tokens are counted up to the match."""

from __future__ import annotations

from gateway_kit import encode, tiny_card, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from fleet.types import FinishReason
from gateway.pipeline import Tokens
from gateway.text.assembler import Piece, TextAssembler, TextOptions
from gateway.text.stop_strings import StopScanner

letters = st.text(alphabet="ab", max_size=30)
stops = st.lists(st.text(alphabet="ab", min_size=1, max_size=5), min_size=1, max_size=4)


def expected_cut(text: str, wanted: list[str]) -> tuple[int, int] | None:
    """Start and end of the earliest match, the shorter of two that begin together."""
    found = [(text.find(stop), len(stop)) for stop in wanted if stop in text]
    if not found:
        return None
    start, length = min(found)
    return start, start + length


@settings(max_examples=400, deadline=None)
@given(text=letters, wanted=stops, cuts=st.lists(st.integers(1, 4), max_size=30))
def test_any_cut_into_chunks_gives_the_text_before_the_earliest_match(
    text: str, wanted: list[str], cuts: list[int]
) -> None:
    scanner = StopScanner(wanted)
    released, place = "", 0
    for size in [*cuts, len(text)]:
        released += scanner.feed(text[place : place + size])
        place += size
    released += scanner.finish()
    cut = expected_cut(text, wanted)
    if cut is None:
        assert scanner.match is None
        assert released == text
    else:
        assert scanner.match is not None
        assert (scanner.match.start, scanner.match.end) == cut
        assert released == text[: cut[0]]


@settings(max_examples=300, deadline=None)
@given(text=letters, wanted=stops)
def test_no_released_text_could_have_been_part_of_a_match(text: str, wanted: list[str]) -> None:
    scanner = StopScanner(wanted)
    cut = expected_cut(text, wanted)
    limit = len(text) if cut is None else cut[0]
    released = 0
    for character in text:
        released += len(scanner.feed(character))
        assert released <= limit


def test_a_half_match_is_released_as_soon_as_it_fails() -> None:
    scanner = StopScanner(["END"])
    assert scanner.feed("xE") == "x"
    assert scanner.feed("N") == ""
    assert scanner.feed("x") == "ENx"


def run(text: str, options: TextOptions, *, per_push: int = 1) -> tuple[TextAssembler, list[Piece]]:
    assembler = TextAssembler(tiny_card(), options)
    ids = encode(tiny_model(), text)
    pieces = []
    for start in range(0, len(ids), per_push):
        pieces.append(assembler.push(Tokens(token_ids=ids[start : start + per_push])))
        if pieces[-1].finish is not None:
            return assembler, pieces
    pieces.append(assembler.push(Tokens(token_ids=[], finish=FinishReason.LENGTH)))
    return assembler, pieces


@settings(max_examples=150, deadline=None)
@given(
    text=st.text(alphabet="helo wrd🙂", min_size=1, max_size=20),
    stop=st.text(alphabet="helo wrd🙂", min_size=1, max_size=4),
    per_push=st.integers(1, 5),
)
def test_tokens_count_up_to_the_one_that_completed_the_match(text: str, stop: str, per_push: int) -> None:
    options = TextOptions(stops=(stop,), with_tokens=True)
    assembler, pieces = run(text, options, per_push=per_push)
    told = "".join(piece.text for piece in pieces)
    tokens = [token for piece in pieces for token in piece.tokens]
    ids = encode(tiny_model(), text)
    assert [piece.finish for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    if stop in text:
        assert told == text[: text.find(stop)]
        assert pieces[-1].finish is FinishReason.STOP
        needed = next(
            n for n in range(len(ids) + 1) if stop in tiny_card().tokenizer.decode(ids[:n], skip_special_tokens=True)
        )
        assert assembler.num_tokens == needed
    else:
        assert told == text
        assert assembler.num_tokens == len(ids)
    assert [token.token_id for token in tokens] == ids[: assembler.num_tokens]
    assert b"".join(token.data for token in tokens) == told.encode()


def test_the_stop_string_can_be_kept() -> None:
    _, pieces = run("hello world", TextOptions(stops=("o w",), include_stop=True))
    assert "".join(piece.text for piece in pieces) == "hello w"


def test_stop_strings_wait_for_min_tokens() -> None:
    ids = encode(tiny_model(), "hello hello hello")
    first = len(encode(tiny_model(), "hello"))
    _, pieces = run("hello hello hello", TextOptions(stops=("hello",), min_tokens=first))
    assert "".join(piece.text for piece in pieces) == "hello "
    _, pieces = run("hello hello hello", TextOptions(stops=("hello",), min_tokens=len(ids)))
    assert "".join(piece.text for piece in pieces) == "hello hello hello"


def test_a_stop_token_counts_but_has_no_text() -> None:
    card = tiny_card()
    comma = encode(tiny_model(), ",")
    options = TextOptions(stop_token_ids=frozenset(comma), with_tokens=True)
    assembler = TextAssembler(card, options)
    ids = [*encode(tiny_model(), "hello"), *comma]
    piece = assembler.push(Tokens(token_ids=ids, finish=FinishReason.STOP))
    assert piece.text == "hello"
    assert assembler.num_tokens == len(ids)
    assert [token.data for token in piece.tokens][-1] == b""
