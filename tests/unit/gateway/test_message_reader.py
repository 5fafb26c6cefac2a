"""Calls and reasoning in a model's text: found in every format, whatever the cuts, and never lost."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.text.message_events import CallDelta, CallEnd, CallStart, ContentDelta, MessageEvent, ReasoningDelta
from gateway.text.message_reader import MessageReader, ReadOptions
from gateway.text.message_syntax import AUTO, CallFormat, SyntaxChoices

NAMES = ("get_weather", "add")
HERMES = ReadOptions(calls=CallFormat.HERMES, functions=NAMES)
LLAMA3 = ReadOptions(calls=CallFormat.LLAMA3, functions=NAMES, hidden_markers=("<|python_tag|>",))
MISTRAL = ReadOptions(calls=CallFormat.MISTRAL, functions=NAMES, hidden_markers=("[TOOL_CALLS]", "[ARGS]"))
OPTIONS = (HERMES, LLAMA3, MISTRAL)
THINKS = ReadOptions(calls=CallFormat.HERMES, functions=NAMES, thinks=True)

Joined = list[list[Any]]


def joined(events: list[MessageEvent]) -> Joined:
    """Events without ids, deltas of a kind in a row made one."""
    found: Joined = []
    begun = -1
    for event in events:
        match event:
            case ContentDelta(text) | ReasoningDelta(text):
                kind = "content" if isinstance(event, ContentDelta) else "reasoning"
                assert text
                if found and found[-1][0] == kind:
                    found[-1][1] += text
                else:
                    found.append([kind, text])
            case CallStart(index, call_id, name):
                assert index == begun + 1
                assert call_id.startswith("call_")
                begun = index
                found.append(["call", name, "", False])
            case CallDelta(index, arguments):
                assert arguments
                assert index == begun
                assert not found[-1][3]
                found[-1][2] += arguments
            case CallEnd(index):
                assert index == begun
                found[-1][3] = True
    return found


def read(options: ReadOptions, pieces: list[str] | str) -> Joined:
    reader = MessageReader(options)
    events = [event for piece in pieces for event in reader.feed(piece)]
    return joined(events + reader.finish())


def call(name: str, arguments: str, *, ended: bool = True) -> list[Any]:
    return ["call", name, arguments, ended]


PARIS = '{"city": "Paris"}'
ADD = '{"a": 1, "b": [2, {"c": "}"}]}'

# as the models write them: Qwen 2.5 and Qwen3, Llama 3.1 and 3.2, Mistral 7B v0.3 and Mistral Small 3
SAMPLES: list[tuple[ReadOptions, str, Joined]] = [
    (
        HERMES,
        f'<tool_call>\n{{"name": "get_weather", "arguments": {PARIS}}}\n</tool_call>',
        [call("get_weather", PARIS)],
    ),
    (
        HERMES,
        (
            f'Let me look.\n\n<tool_call>\n{{"name": "get_weather", "arguments": {PARIS}}}\n</tool_call>\n'
            f'<tool_call>\n{{"name": "add", "arguments": {ADD}}}\n</tool_call>'
        ),
        [["content", "Let me look."], call("get_weather", PARIS), call("add", ADD)],
    ),
    (HERMES, f'<tool_call>{{"arguments": {ADD}, "name": "add"}}</tool_call>', [call("add", ADD)]),
    (HERMES, '<tool_call>{"name": "add"}</tool_call> done', [call("add", "{}"), ["content", "done"]]),
    (
        HERMES,
        r'<tool_call>{"id": 3, "name": "add", "arguments": "{\"a\": 1}", "type": "function"}</tool_call>',
        [call("add", '{"a": 1}')],
    ),
    (
        HERMES,
        '<tool_call>{"name": "add", "arguments": {"a": "</tool_call> \\"}"}}</tool_call>',
        [call("add", '{"a": "</tool_call> \\"}"}')],
    ),
    (HERMES, f'<tool_call>{{"name": "add", "arguments": {ADD}</tool_call>', [call("add", ADD)]),
    (LLAMA3, f'{{"name": "get_weather", "parameters": {PARIS}}}', [call("get_weather", PARIS)]),
    (LLAMA3, f'<|python_tag|>{{"name": "get_weather", "parameters": {PARIS}}}', [call("get_weather", PARIS)]),
    (
        LLAMA3,
        f'{{"name": "get_weather", "parameters": {PARIS}}}; {{"name": "add", "parameters": {ADD}}}',
        [call("get_weather", PARIS), call("add", ADD)],
    ),
    (
        LLAMA3,
        f'I will ask.<|python_tag|>{{"type": "function", "name": "add", "parameters": {ADD}}}',
        [["content", "I will ask."], call("add", ADD)],
    ),
    (MISTRAL, f'[TOOL_CALLS] [{{"name": "get_weather", "arguments": {PARIS}}}]', [call("get_weather", PARIS)]),
    (
        MISTRAL,
        f'[TOOL_CALLS][{{"name": "get_weather", "arguments": {PARIS}}}, {{"arguments": {ADD}, "name": "add"}}]',
        [call("get_weather", PARIS), call("add", ADD)],
    ),
    (
        MISTRAL,
        f"Sure.[TOOL_CALLS]get_weather[ARGS]{PARIS}[TOOL_CALLS]add[CALL_ID]a1B2c3D4e[ARGS]{ADD}",
        [["content", "Sure."], call("get_weather", PARIS), call("add", ADD)],
    ),
    (MISTRAL, f"[TOOL_CALLS]add{ADD}", [call("add", ADD)]),
]
# no calls: broken, unknown, or something else that looks alike
CONTENT: list[tuple[ReadOptions, str, str]] = [
    (HERMES, "a <tool_cal", "a <tool_cal"),
    (HERMES, "1 < 2 and <tool", "1 < 2 and <tool"),
    (HERMES, "<tool_call>\nnot JSON\n</tool_call>", "<tool_call>\nnot JSON\n</tool_call>"),
    (HERMES, '<tool_call>{"name": "steal", "arguments": {}}</tool_call>',
     '<tool_call>{"name": "steal", "arguments": {}}</tool_call>'),
    (HERMES, '<tool_call>{"name": "add", "argum', '<tool_call>{"name": "add", "argum'),
    (HERMES, '<tool_call>{"name": 3, "arguments": {}}', '<tool_call>{"name": 3, "arguments": {}}'),
    (HERMES, "spaces stay  \n", "spaces stay  \n"),
    (LLAMA3, '{"answer": 42}', '{"answer": 42}'),
    (LLAMA3, '{"name": "add", "parameters"', '{"name": "add", "parameters"'),
    (LLAMA3, '<|python_tag|>brave_search.call(query="x")', 'brave_search.call(query="x")'),
    (LLAMA3, f'Here: {{"name": "add", "parameters": {ADD}}}', f'Here: {{"name": "add", "parameters": {ADD}}}'),
    (MISTRAL, "[TOOL_CALLS] oh no", " oh no"),
    (MISTRAL, "[TOOL_CALLS]", ""),
    (MISTRAL, "[TOOL_C", "[TOOL_C"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "text", "expected"), SAMPLES)
def test_calls_are_found_in_whole_texts_and_letter_by_letter(options: ReadOptions, text: str, expected: Joined) -> None:
    assert read(options, [text]) == expected
    assert read(options, text) == expected
    arguments = [entry[2] for entry in expected if entry[0] == "call"]
    assert all(isinstance(json.loads(one), dict) for one in arguments)


@pytest.mark.parametrize(("options", "text", "expected"), CONTENT)
def test_what_is_no_call_is_content_and_nothing_is_lost(options: ReadOptions, text: str, expected: str) -> None:
    wanted = [["content", expected]] if expected else []
    assert read(options, [text]) == wanted
    assert read(options, text) == wanted


def test_arguments_stream_while_they_are_written() -> None:
    reader = MessageReader(HERMES)
    assert reader.feed('<tool_call>{"name": "add", "argu') == []
    start, *_ = reader.feed('ments": {"te')
    assert isinstance(start, CallStart)
    assert reader.feed('xt": "abc') == [CallDelta(0, 'xt": "abc')]
    assert reader.feed("def\\") == [CallDelta(0, "def\\")]
    assert reader.feed('"x"') == [CallDelta(0, '"x"')]
    assert reader.feed("}") == [CallDelta(0, "}"), CallEnd(0)]
    assert reader.num_calls == 1


def test_a_call_that_is_cut_has_what_was_written_and_no_end() -> None:
    for value in ('{"a": "x\\', '{"a": 1'):
        text = f'<tool_call>{{"name": "add", "arguments": {value}'
        expected = [call("add", value, ended=False)]
        assert read(HERMES, [text]) == expected
        assert read(HERMES, text) == expected


def test_a_call_that_breaks_ends_where_it_broke() -> None:
    text = '<tool_call>{"name": "add", "arguments": {"a": </tool_call>ok'
    expected = [call("add", '{"a": '), ["content", "ok"]]
    assert read(HERMES, [text]) == expected
    assert read(HERMES, text) == expected


def test_calls_beyond_the_bound_are_left_out() -> None:
    text = SAMPLES[1][1]
    options = ReadOptions(calls=CallFormat.HERMES, functions=NAMES, max_calls=1)
    assert read(options, text) == SAMPLES[1][2][:2]


THOUGHTS: list[tuple[str, bool, Joined]] = [
    ("<think>\nhm, <b>\n</think>\n\nYes.", False, [["reasoning", "hm, <b>"], ["content", "Yes."]]),
    ("\n<think>hm</think>Yes.\n", False, [["reasoning", "hm"], ["content", "Yes.\n"]]),
    ("hm\n</think>\n\nYes.", True, [["reasoning", "hm"], ["content", "Yes."]]),
    ("<think>hm</think>Yes.", True, [["reasoning", "hm"], ["content", "Yes."]]),
    ("<think>\n\n</think>\n\nYes.", False, [["content", "Yes."]]),
    ("Yes <think>no</think>", False, [["content", "Yes <think>no</think>"]]),
    ("<thin ice", False, [["content", "<thin ice"]]),
    ("<think>hm </thi", False, [["reasoning", "hm </thi"]]),
    (
        '<think>\n<tool_call>? no\n</think>\n<tool_call>{"name": "add", "arguments": {}}</tool_call>',
        False,
        [["reasoning", "<tool_call>? no"], call("add", "{}")],
    ),
]


@pytest.mark.parametrize(("text", "thinking", "expected"), THOUGHTS)
def test_reasoning_is_split_off(text: str, thinking: bool, expected: Joined) -> None:
    options = ReadOptions(calls=CallFormat.HERMES, functions=NAMES, thinks=True, thinking=thinking)
    assert read(options, [text]) == expected
    assert read(options, text) == expected


def test_a_reader_without_formats_passes_everything_on() -> None:
    reader = MessageReader(ReadOptions())
    assert reader.feed("<tool_call> ") == [ContentDelta("<tool_call> ")]
    assert reader.feed("") == []
    assert reader.finish() == []


FRAGMENTS = [
    "<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<think>", "</think>",
    '{"name": "add", "arguments": ', '{"name": "add", "parameters": ', '{"arguments": {"a": 1}, "name": "add"}', ADD,
    '"x\\"y"', "\\", '"', "{", "}", "[", "]", ",", ";", ":", " ", "\n", "add", "abc", "é", "<", "12",
]  # fmt: skip


@settings(max_examples=600, deadline=None)
@given(
    st.sampled_from([*OPTIONS, THINKS]),
    st.lists(st.sampled_from(FRAGMENTS), max_size=14).map("".join),
    st.lists(st.integers(1, 12), max_size=40),
)
def test_events_do_not_depend_on_the_cuts(options: ReadOptions, text: str, widths: list[int]) -> None:
    pieces, place = [], 0
    for width in widths:
        pieces.append(text[place : place + width])
        place += width
    pieces.append(text[place:])
    whole = read(options, [text])
    assert read(options, pieces) == whole
    if not any(kind == "call" for kind, *_ in whole) and options == HERMES:
        assert whole == ([["content", text]] if text else [])


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(st.text(max_size=6), st.one_of(st.text(max_size=8), st.integers(), st.none()), max_size=3),
    st.booleans(),
)
def test_any_arguments_come_through_unchanged(arguments: dict[str, Any], ascii_only: bool) -> None:
    value = json.dumps(arguments, ensure_ascii=ascii_only)
    for options, text in (
        (HERMES, f'<tool_call>\n{{"name": "add", "arguments": {value}}}\n</tool_call>'),
        (LLAMA3, f'{{"name": "add", "parameters": {value}}}'),
        (MISTRAL, f"[TOOL_CALLS]add[ARGS]{value}"),
    ):
        assert read(options, text) == [call("add", value)]


@pytest.mark.parametrize(
    ("template", "calls", "thinks"),
    [
        ("{{ '<tool_call>' }}{{ '<think>' }}", CallFormat.HERMES, True),
        ("{{ '[TOOL_CALLS] [' }}", CallFormat.MISTRAL, False),
        ("{{ '<|python_tag|>' }}", CallFormat.LLAMA3, False),
        ("{{ 'Environment: ipython' }}", CallFormat.LLAMA3, False),
        ("{{ '<tool_call>\n<function=' }}", None, False),
        ("{{ content.split('</think>')[-1] }}", None, True),
        ("{{ message.content }}", None, False),
    ],
)
def test_the_template_tells_the_syntax(template: str, calls: CallFormat | None, thinks: bool) -> None:
    syntax = AUTO.of(template)
    assert (syntax.calls, syntax.thinks) == (calls, thinks)


def test_the_operator_may_choose_per_model_or_for_all() -> None:
    choices = SyntaxChoices(tool_formats="org/a=mistral, hermes", reasoning_formats="org/b=think")
    assert choices.of("org/a").of("").calls is CallFormat.MISTRAL
    assert choices.of("org/b").of("[TOOL_CALLS]").calls is CallFormat.HERMES
    assert choices.of("org/b").of("").thinks
    assert not choices.of("org/a").of("").thinks
    assert SyntaxChoices(tool_formats="none").of("x").of("<tool_call>").calls is None
    for field in ("tool_formats", "reasoning_formats"):
        with pytest.raises(ValueError, match="pythonic"):
            SyntaxChoices(**{field: "org/a=pythonic"})
