"""The demo model: its generated text, its tokenizer, and what the checkpoint answers."""

import json
import re
import sys
from pathlib import Path
from typing import Any, Final

import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

MODELS: Final = Path(__file__).resolve().parents[2] / "models"
DEMO: Final = MODELS / "demo"
sys.path.insert(0, str(MODELS))  # models/ holds scripts, not an installed package

import demo_text  # noqa: E402 - found through the line above
from demo_text import dialogue, glossary, small_talk, tool_use, wordings  # noqa: E402

TOKENIZER: Final = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
MAX_CHECKPOINT_BYTES: Final = 12_000_000


def plain(text: str) -> str:
    """Return ``text`` without case and marks, as two wordings are compared."""
    return re.sub(r"[^a-z0-9{} ]", "", text.casefold()).strip()


@pytest.mark.parametrize("stage", ["learn", "drill", "polish"])
def test_text_depends_on_the_seed_alone(stage: dialogue.Stage) -> None:
    first = list(demo_text.samples(7, 300, stage))
    assert first == list(demo_text.samples(7, 300, stage))
    assert first != list(demo_text.samples(8, 300, stage))


def test_text_is_varied() -> None:
    many = set(map(repr, demo_text.samples(0, 3_000)))
    assert len(many) > 2_500


def test_held_out_templates_are_not_in_training() -> None:
    training = {plain(one) for group in wordings.TRAINING.values() for one in group}
    held_out = {plain(one) for group in wordings.HELD_OUT.values() for one in group}
    assert len(held_out) >= 30
    assert not training & held_out


def test_held_out_small_talk_is_not_in_training() -> None:
    training = {plain(ask) for intent in small_talk.intents() for ask in intent.asks}
    held_out = {plain(ask) for intent in small_talk.intents() for ask in intent.held}
    assert not training & held_out


@pytest.mark.parametrize("stage", ["learn", "drill", "polish"])
def test_no_evaluated_question_is_asked_in_training(stage: dialogue.Stage) -> None:
    asked = {
        plain(message.content)
        for one in demo_text.samples(0, 10_000, stage)
        if isinstance(one, demo_text.Chat)
        for message in one.messages
        if message.role == "user"
    }
    evaluated = {plain(question.ask) for question in dialogue.evaluation(1)}
    assert not asked & evaluated


@pytest.mark.parametrize("term", glossary.terms(), ids=lambda term: term.names[0])
def test_every_term_holds_its_own_phrases(term: glossary.Term) -> None:
    assert all(key.casefold() in term.what.casefold() for key in term.keys)
    assert all(key.casefold() in term.why.casefold() for key in term.why_keys)
    assert term.what[0].isupper() or term.names[0] in {"vLLM", "llm-d"}


def test_every_expected_answer_is_accepted() -> None:
    assert all(question.accepts(question.answer) for question in dialogue.evaluation(3) if question.answer)


def test_no_term_has_a_rival_of_the_same_name() -> None:
    names = [name.casefold() for term in glossary.terms() for name in term.names]
    assert len(names) == len(set(names))


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_tokenizer_round_trips_any_unicode(text: str) -> None:
    ids = TOKENIZER.encode(text, add_special_tokens=False).ids
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == text


@given(st.integers(min_value=0))
def test_each_digit_is_one_token(number: int) -> None:
    assert len(TOKENIZER.encode(str(number)).ids) == len(str(number))


def test_special_tokens_and_stops_agree() -> None:
    generation = json.loads((DEMO / "generation_config.json").read_text(encoding="utf-8"))
    config = json.loads((DEMO / "config.json").read_text(encoding="utf-8"))
    assert [TOKENIZER.token_to_id(t) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")] == [0, 1, 2]
    assert generation["eos_token_id"] == [2, 0]
    assert config["eos_token_id"] == 2
    assert config["vocab_size"] == TOKENIZER.get_vocab_size()


def test_every_file_is_small() -> None:
    sizes = {path.name: path.stat().st_size for path in DEMO.iterdir()}
    print(sizes)
    assert max(sizes.values()) < MAX_CHECKPOINT_BYTES


@pytest.mark.parametrize("trim", [False, True])
def test_chat_template_renders_every_role(trim: bool) -> None:
    source = json.loads((DEMO / "tokenizer_config.json").read_text(encoding="utf-8"))["chat_template"]
    template = jinja2.Environment(
        trim_blocks=trim, lstrip_blocks=trim, undefined=jinja2.Undefined, autoescape=False  # noqa: S701 - no HTML
    ).from_string(source)  # fmt: skip
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    text = template.render(
        messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "2", "tool_call_id": "x"},
            {"role": "tool", "content": "3", "tool_call_id": "y"},
        ],
        add_generation_prompt=True,
    )
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nab<|im_end|>\n"
        '<|im_start|>assistant\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\n2\n</tool_response>\n<tool_response>\n3\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    """Return the checkpoint and its tokenizer as transformers loads them."""
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO)
    model = transformers.AutoModelForCausalLM.from_pretrained(DEMO, dtype="auto").eval()
    return model, tokenizer


def test_checkpoint_loads_as_qwen3(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    assert type(model).__name__ == "Qwen3ForCausalLM"
    assert str(model.dtype) == "torch.bfloat16"
    assert model.config.rope_parameters["rope_theta"] == 10_000.0
    assert tokenizer.eos_token == "<|im_end|>"


def test_held_out_questions_are_answered(loaded: tuple[Any, Any]) -> None:
    import eval_demo

    questions = list(glossary.evaluation(1))[::60]
    answers = eval_demo.replies(*loaded, eval_demo.prompts(questions))
    wrong = [
        (question.ask, answer)
        for question, answer in zip(questions, answers, strict=True)
        if answer is None or not question.accepts(answer)
    ]
    print(f"{len(wrong)} of {len(questions)} wrong: {wrong}")
    assert len(wrong) <= len(questions) // 10


def test_functions_are_called_and_their_results_told(loaded: tuple[Any, Any]) -> None:
    import eval_demo

    questions = [one for one in tool_use.evaluation(2) if one.category != "calls, unseen tools"][::4]
    answers = eval_demo.replies(*loaded, eval_demo.prompts(questions), [one.tools for one in questions])
    wrong = [
        (question.category, question.ask, answer)
        for question, answer in zip(questions, answers, strict=True)
        if answer is None or not question.accepts(answer)
    ]
    print(f"{len(wrong)} of {len(questions)} wrong: {wrong}")
    assert len(wrong) <= len(questions) // 8


def test_a_sentence_start_is_continued(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    inputs = tokenizer("PagedAttention stores", return_tensors="pt")
    inputs.pop("token_type_ids", None)
    output = model.generate(**inputs, do_sample=False, max_new_tokens=60)
    assert "fixed-size pages" in tokenizer.decode(output[0], skip_special_tokens=True)
