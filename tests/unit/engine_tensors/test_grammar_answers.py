"""Constrained answers of the demo model under random sampling: whatever finishes satisfies its grammar."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from support.constrained import Answer, ConstrainedModel
from support.engine_driver import make_sequence
from support.json_schemas import BY_HAND, check, generated, objects

from engine.errors import GrammarRejected
from engine.grammar.desk import MAX_COMPILED, GrammarDesk
from engine.grammar.matcher import Matcher
from engine.grammar.vocabulary import Vocabulary
from engine.plan import Complete, Failed, Sampled
from fleet.grammar import WHITESPACE, inline_schema, schema_source
from fleet.types import FinishReason, Grammar, GrammarKind, SamplingParams

PERSON = objects(name={"type": "string", "maxLength": 12}, age={"type": "integer", "minimum": 0, "maximum": 130})


@pytest.fixture(scope="module")
def model() -> Iterator[ConstrainedModel]:
    made = ConstrainedModel()
    yield made
    made.driver.grammars.close()


def of_schema(schema: Any) -> Grammar:
    return Grammar(GrammarKind.JSON_SCHEMA, schema_source(schema))


def hot(grammar: Grammar | None, *, stops: tuple[int, ...] = (0,), **more: Any) -> SamplingParams:
    given = {"temperature": 1.5, "seed": 5, "max_tokens": 200, **more}
    return SamplingParams(grammar=grammar, stop_token_ids=stops, **given)


def one(model: ConstrainedModel, grammar: Grammar, **more: Any) -> Answer:
    (answer,) = model.answers([hot(grammar, **more)])
    return answer


@pytest.mark.timeout(1200)
def test_every_finished_answer_satisfies_its_schema(model: ConstrainedModel, request: pytest.FixtureRequest) -> None:
    schemas = [*BY_HAND, *generated(request.config.getoption("--schemas"))]
    answers = model.answers([hot(of_schema(schema), seed=place) for place, schema in enumerate(schemas)])
    for schema, answer in zip(schemas, answers, strict=True):
        assert answer.finish is not FinishReason.ERROR, (schema, answer)
        if answer.finish is FinishReason.STOP:
            check(schema, answer.text)
    ends = Counter(answer.finish for answer in answers)
    print(f"{len(schemas)} schemas: {dict(ends)}")
    assert ends[FinishReason.STOP] > 0.85 * len(schemas)


@pytest.mark.parametrize(
    "pattern", [r"\d{3}-\d{4}", "(red|green)+!", "[A-Z][a-z]{0,5}( [a-z]{1,4}){2}", "é{2,3}|日本", "^ab$"]
)
def test_regular_expressions_match_the_whole_answer(model: ConstrainedModel, pattern: str) -> None:
    for seed in range(4):
        answer = one(model, Grammar(GrammarKind.REGEX, pattern), seed=seed)
        assert answer.finish is FinishReason.STOP
        assert re.fullmatch(pattern, answer.text), answer


def test_two_thousand_optional_properties_are_followed(model: ConstrainedModel) -> None:
    many = {**objects(**{f"p{i}": {"type": "integer", "maximum": 9} for i in range(2000)}), "required": []}
    answer = one(model, of_schema({"type": "array", "items": many, "minItems": 1}), max_tokens=20)
    assert answer.finish is not FinishReason.ERROR, answer
    assert re.match(r"\[\s*\{", answer.text)


def test_choices_and_grammars(model: ConstrainedModel) -> None:
    choice = Grammar(GrammarKind.LARK, 'start: "yes" | "no" | "per \\"haps\\""')
    texts = {one(model, choice, seed=seed).text for seed in range(12)}
    assert texts <= {"yes", "no", 'per "haps"'}
    assert len(texts) > 1
    call = Grammar(GrammarKind.LARK, f'start: "<call>" {inline_schema(PERSON)} "</call>"')
    answer = one(model, call)
    assert answer.text.startswith("<call>{")
    check(PERSON, answer.text.removeprefix("<call>").removesuffix("</call>"))
    assert not re.search(r"\s{3}", answer.text), "white space is bounded inside a grammar too"
    palindrome = Grammar(GrammarKind.LARK, 'start: "a" start "a" | "b"')
    answer = one(model, palindrome)
    assert answer.finish is FinishReason.LENGTH or re.fullmatch(r"(a*)b\1", answer.text)


def test_company_changes_nothing_and_a_bad_grammar_fails_alone(model: ConstrainedModel) -> None:
    """Free rows, other grammars and one that does not compile share the batch; each answer is as if alone."""
    good = [hot(of_schema(PERSON), seed=seed) for seed in range(6)] + [hot(None, seed=1, max_tokens=20)]
    alone = [model.answers([each])[0] for each in good]
    bad = [
        hot(Grammar(GrammarKind.REGEX, "(")),
        hot(Grammar(GrammarKind.JSON_SCHEMA, "no json")),
        hot(Grammar(GrammarKind.JSON_SCHEMA, '{"not": {}}')),
        hot(Grammar(GrammarKind.LARK, 'start: "a" start')),
    ]
    together = model.answers([*bad[:2], *good, *bad[2:]])
    assert together[2:9] == alone
    for answer in (*together[:2], together[9]):
        assert answer.finish is FinishReason.ERROR
        assert "grammar" in answer.error
    assert together[10].finish in (FinishReason.LENGTH, FinishReason.ERROR)


@pytest.mark.parametrize("cut", [1, 4, 9])
def test_a_sequence_goes_on_from_its_ids_alone(model: ConstrainedModel, cut: int) -> None:
    """As after a hand-off, a migration, a preemption or a death: the rest of the answer is the same."""
    params = hot(of_schema(PERSON), seed=3)
    whole = model.driver.admit([5, 6, 7], params, room=200)
    while not (result := model.driver.step([whole])[0]).ends:  # type: ignore[union-attr]
        assert isinstance(result, Sampled)
    resumed = model.driver.admit(whole.token_ids[: 3 + cut], params, room=200)
    resumed.passport = msgspec.structs.replace(resumed.passport, prompt_len=3)
    while not (result := model.driver.step([resumed])[0]).ends:  # type: ignore[union-attr]
        assert isinstance(result, Sampled)
    assert resumed.token_ids == whole.token_ids
    arrived = model.driver.admit(whole.token_ids, params)
    arrived.passport = msgspec.structs.replace(arrived.passport, prompt_len=3)
    assert model.driver.step([arrived]) == [Complete()], "it ended before, and its last message was lost"


def test_stop_ids_bans_bias_and_penalties_live_with_the_mask(model: ConstrainedModel) -> None:
    open_end = Grammar(GrammarKind.REGEX, "(ab)*")
    eos = model.eos_id
    forced = one(model, open_end, logit_bias={eos: 100.0})
    assert forced == Answer("", FinishReason.STOP), "an empty match may end at once"
    later = one(model, open_end, logit_bias={eos: 100.0}, min_tokens=5)
    assert later.finish is FinishReason.STOP
    assert re.fullmatch("(ab)+", later.text), "the stop id waits for min_tokens, and then for a whole match"
    ignored = one(model, open_end, stops=(), logit_bias={eos: 100.0}, max_tokens=30)
    assert ignored.finish is FinishReason.LENGTH
    assert re.fullmatch("(ab)+a?", ignored.text)
    closed = Grammar(GrammarKind.REGEX, "ab")
    ids = model.tokenizer.encode("ab").ids
    fought = one(model, closed, stops=(), min_tokens=50, logit_bias=dict.fromkeys(ids, -100.0), presence_penalty=2.0)
    assert fought == Answer("ab", FinishReason.STOP), "mask wins, and what is complete ends without a stop id"
    greedy = one(model, closed, temperature=0.0, max_tokens=len(ids))
    assert greedy.finish is FinishReason.STOP, "complete beats length"
    text_stop = model.tokenizer.encode("a").ids[0]
    stopped = one(model, Grammar(GrammarKind.REGEX, "[a]{50}b"), stops=(text_stop,))
    assert stopped.finish is FinishReason.STOP, "a stop id that is text follows the grammar and stops the client's way"


def test_log_probabilities_are_of_the_raw_distribution(model: ConstrainedModel) -> None:
    free = model.driver.admit([5, 6, 7], SamplingParams(temperature=0.0, max_tokens=4, logprobs=3))
    bound = model.driver.admit([5, 6, 7], hot(Grammar(GrammarKind.REGEX, "zq"), temperature=0.0, logprobs=3), room=4)
    first, second = model.driver.step([free, bound])
    assert isinstance(first, Sampled)
    assert isinstance(second, Sampled)
    assert first.logprob is not None
    assert second.logprob is not None
    assert first.logprob.top == second.logprob.top
    assert second.logprob.logprob < first.logprob.logprob


def test_white_space_cannot_go_on_for_ever(model: ConstrainedModel) -> None:
    blank = {each: 100.0 for text in (" ", "\n", "\t") for each in model.tokenizer.encode(text).ids}
    answer = one(model, of_schema(PERSON | {"maxProperties": 2}), logit_bias=blank)
    assert answer.finish is FinishReason.STOP
    check(PERSON, answer.text)
    assert re.search(r"\s", answer.text)
    assert all(re.fullmatch(WHITESPACE, run) for run in re.findall(r"\s+", re.sub(r'"[^"]*"', "", answer.text)))


def test_compiled_grammars_are_kept_and_bounded(model: ConstrainedModel) -> None:
    desk = model.driver.grammars
    for number in range(MAX_COMPILED + 10):
        desk.prepare(Grammar(GrammarKind.REGEX, f"a{number}"))
    desk.prepare(None)
    assert len(desk._compiled) == MAX_COMPILED
    assert Grammar(GrammarKind.REGEX, "a0") not in desk._compiled
    large = [Grammar(GrammarKind.REGEX, f"a{number}|" + "b" * 400_000) for number in range(4)]
    for grammar in large:
        desk.prepare(grammar)
    assert [*desk._compiled] == large[2:], "memory is bounded too"
    model.answers([hot(of_schema(PERSON))])
    assert len(desk._matchers) == 0, "a matcher goes with its sequence"


def test_a_model_without_usable_vocabulary_fails_constrained_rows_only() -> None:
    for files in ({}, {"tokenizer.json": b"{}"}, {"tokenizer.json": b"{}", "tokenizer_config.json": b"["}):
        desk = GrammarDesk(files, 100)
        sequence = make_sequence([1, 2], hot(of_schema(PERSON)))
        masks = desk.begin([make_sequence([1], arrival=1), sequence])
        assert masks is not None
        rows, words = masks.wait()
        assert (rows, words.tolist()) == ([1], [[-1] * 4])
        free, failed = masks.settle([Sampled(3), Sampled(4)])
        assert free == Sampled(3)
        assert isinstance(failed, Failed)
        assert "tokenizer" in failed.message
        desk.close()


def test_leap_seconds_are_left_out(model: ConstrainedModel) -> None:
    """RFC 3339 knows second 60 only where a leap second fell; validators refuse it elsewhere."""
    files = model.driver.grammars._files
    vocabulary = Vocabulary.from_files(files, 3072)
    for more in ({}, {"pattern": "Z$"}, {"pattern": "Z$", "allOf": [{"minLength": 1}]}):
        for kind, day in (("time", ""), ("date-time", "2024-05-06T")):
            schema = {
                "properties": {"format": {"anyOf": [{"format": kind, "type": "string", **more}]}},
                "type": "object",
            }
            for second, allowed in (("59", True), ("60", False)):
                matcher = Matcher.compile(vocabulary, of_schema(schema))
                ids = model.tokenizer.encode(f'{{"format": "{day}10:20:{second}Z"}}').ids
                if allowed:
                    matcher.follow(ids)
                else:
                    with pytest.raises(GrammarRejected):
                        matcher.follow(ids)
    names = Matcher.compile(vocabulary, of_schema({"type": "string", "format": "hostname"}))
    with pytest.raises(GrammarRejected):
        names.follow(model.tokenizer.encode('"' + "a." * 130 + 'b"').ids)
    assert schema_source({"const": {"format": "time"}}) == '{"const":{"format":"time"}}'


def test_an_unbooked_token_is_taken_back(model: ConstrainedModel) -> None:
    files = model.driver.grammars._files
    vocabulary = Vocabulary.from_files(files, 3072)
    matcher = Matcher.compile(vocabulary, Grammar(GrammarKind.REGEX, "abc"))
    a, b, c = (model.tokenizer.encode(letter).ids[0] for letter in "abc")
    matcher.follow([a])
    assert not matcher.accept(b, ())
    matcher.follow([a])
    matcher.follow([a, b])
    assert matcher.accept(c, ())
    with pytest.raises(GrammarRejected):
        matcher.follow([a, b, c, a])
