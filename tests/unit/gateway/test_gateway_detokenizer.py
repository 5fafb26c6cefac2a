"""Incremental detokenizing: pieces join to the tokenizer's own decoding, and no half character gets out."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
from gateway_kit import byte_level_tokenizer, sentencepiece_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders

from gateway.text.detokenizer import DetokenizerFactory
from gateway.text.tokenizer import TextTokenizer


def metaspace_tokenizer() -> Tokenizer:
    tokenizer = sentencepiece_tokenizer(legacy=False)
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def wordpiece_tokenizer() -> Tokenizer:
    tokenizer = sentencepiece_tokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return tokenizer


MAKERS: dict[str, Callable[[], Tokenizer]] = {
    "byte-level": byte_level_tokenizer,
    "llama-2": sentencepiece_tokenizer,
    "metaspace": metaspace_tokenizer,
    "wordpiece": wordpiece_tokenizer,
}
SIZES = 340  # a few ids beyond every vocabulary: models have padding rows


@functools.cache
def tokenizer_of(kind: str) -> TextTokenizer:
    return TextTokenizer(MAKERS[kind]().to_str().encode(), {})


# bytes of 你 and 🙂 in the byte-fallback vocabulary turn up often, so that whole characters occur as well
ids = st.lists(st.one_of(st.integers(0, SIZES), st.sampled_from([3 + b for b in "你🙂\n".encode()])), max_size=24)


@pytest.mark.parametrize("kind", MAKERS)
@settings(max_examples=150, deadline=None)
@given(token_ids=ids, cuts=st.lists(st.integers(1, 4), max_size=24), skip=st.booleans(), tracks=st.booleans())
def test_pieces_join_to_the_full_decoding(
    kind: str, token_ids: list[int], cuts: list[int], skip: bool, tracks: bool
) -> None:
    tokenizer = tokenizer_of(kind)
    detokenizer = DetokenizerFactory(tokenizer).new(skip_special_tokens=skip, tracks=tracks)
    text, place = "", 0
    for size in [*cuts, len(token_ids)]:
        text += detokenizer.feed(token_ids[place : place + size])
        place += size
    text += detokenizer.finish()
    assert text == tokenizer.decode(token_ids, skip_special_tokens=skip)
    if tracks:
        ends = [end for end, _ in detokenizer.drain_ends()]
        assert len(ends) == len(token_ids)
        assert ends == sorted(ends)


@pytest.mark.parametrize("kind", ["byte-level", "llama-2", "metaspace"])
@settings(max_examples=100, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_valid_text_never_shows_a_replacement_character_on_the_way(kind: str, text: str) -> None:
    tokenizer = tokenizer_of(kind)
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    detokenizer = DetokenizerFactory(tokenizer).new(skip_special_tokens=False)
    pieces = [detokenizer.feed([token_id]) for token_id in token_ids]
    pieces.append(detokenizer.finish())
    assert "".join(pieces) == tokenizer.decode(token_ids, skip_special_tokens=False)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_an_emoji_waits_for_its_last_byte() -> None:
    tokenizer = tokenizer_of("byte-level")
    token_ids = tokenizer.encode("🙂", add_special_tokens=False)
    assert len(token_ids) > 1
    detokenizer = DetokenizerFactory(tokenizer).new(skip_special_tokens=True)
    pieces = [detokenizer.feed([token_id]) for token_id in token_ids]
    assert pieces[-1] == "🙂"
    assert not any(pieces[:-1])


def test_truly_missing_bytes_show_once_the_output_ends() -> None:
    tokenizer = tokenizer_of("llama-2")
    detokenizer = DetokenizerFactory(tokenizer).new(skip_special_tokens=True)
    assert detokenizer.feed([3 + 0xE4, 3 + 0xBD]) == ""
    assert detokenizer.finish() == "\ufffd\ufffd"


def test_byte_tokens_end_where_their_character_ends() -> None:
    tokenizer = tokenizer_of("llama-2")
    detokenizer = DetokenizerFactory(tokenizer).new(skip_special_tokens=True, tracks=True)
    letter = tokenizer.id_of("a")
    assert letter is not None
    assert detokenizer.feed([3 + 0x0A, *(3 + byte for byte in "你".encode()), letter]) == "\n你a"
    assert detokenizer.drain_ends() == [(1, 1), (1, 2), (1, 2), (2, 2), (3, 3)]


def test_a_continuation_keeps_its_leading_space_and_a_message_has_none() -> None:
    tokenizer = tokenizer_of("llama-2")
    factory = DetokenizerFactory(tokenizer)
    prompt = tokenizer.encode("the", add_special_tokens=True)
    output = tokenizer.encode("world", add_special_tokens=False)
    assert factory.new(skip_special_tokens=True, prompt_ids=prompt).feed(output) == " world"
    assert factory.new(skip_special_tokens=True).feed(output) == "world"
    assert factory.new(skip_special_tokens=True, prompt_ids=[1, 3 + 10]).feed(output) == "world"


def test_contributions_of_tokens_join_to_the_text() -> None:
    for kind in ("byte-level", "llama-2"):
        tokenizer = tokenizer_of(kind)
        factory = DetokenizerFactory(tokenizer)
        token_ids = tokenizer.encode("hello 你好 🙂\n\nthe", add_special_tokens=False)
        detokenizer = factory.new(skip_special_tokens=True, tracks=True)
        text = detokenizer.feed(token_ids) + detokenizer.finish()
        starts = [0, *(end for end, _ in detokenizer.drain_ends())]
        joined = b"".join(
            factory.contribution(token_id, text[start:end], skip_special_tokens=True)
            for token_id, start, end in zip(token_ids, starts, starts[1:], strict=False)
        )
        assert joined == text.encode()
