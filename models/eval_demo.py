"""Measure the demo model on question wordings that training never used: ``python models/eval_demo.py``.

Every other question comes behind a system prompt that training never used either. Decoding is greedy. An answer
is correct if it holds every required phrase and ends by itself; "verbatim" counts answers equal to the expected
text. Nothing is tuned on these questions.
"""

import argparse
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from demo_text import Message, Question, evaluation
from demo_text.shapes import TURN_END
from transformers import AutoModelForCausalLM, AutoTokenizer

MAX_NEW_TOKENS: Final = 260
SYSTEM_PROMPTS: Final = (
    "You are a careful guide to inference systems.",
    "Imagine that you work for a hosting company. Reply to its customers.",
    "Speak plainly, avoid jargon, and never invent facts.",
)
GLOSSARY: Final = frozenset({
    "latency", "memory", "scheduling", "parallelism", "systems", "model", "text", "sampling", "formats", "hardware",
    "fleet", "baton",
})  # fmt: skip


def prompts(questions: Sequence[Question]) -> list[list[dict[str, Any]]]:
    """Return the messages of each question, every second one behind an unseen system prompt."""
    found = []
    for number, question in enumerate(questions):
        messages = list(question.messages())
        if number % 2:
            messages.insert(0, Message("system", SYSTEM_PROMPTS[number // 2 % len(SYSTEM_PROMPTS)]))
        found.append([message.as_dict() for message in messages])
    return found


def replies(
    model: Any,
    tokenizer: Any,
    chats: Sequence[list[dict[str, Any]]],
    tools: Sequence[Sequence[dict[str, Any]]] | None = None,
    batch_size: int = 64,
) -> list[str | None]:
    """Return the greedy reply to each chat, or None where it does not end within ``MAX_NEW_TOKENS``.

    ``tools`` are the functions offered in each chat, none by default.
    """
    texts = [
        tokenizer.apply_chat_template(chat, tools=list(offered) or None, tokenize=False, add_generation_prompt=True)
        for chat, offered in zip(chats, tools or [()] * len(chats), strict=True)
    ]
    tokenizer.padding_side = "left"
    stop = tokenizer.convert_tokens_to_ids(TURN_END)
    found: list[str | None] = [None] * len(texts)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    for low in range(0, len(order), batch_size):
        chosen = order[low : low + batch_size]
        inputs = tokenizer([texts[i] for i in chosen], return_tensors="pt", padding=True)
        inputs.pop("token_type_ids", None)
        with torch.inference_mode():
            output = model.generate(**inputs, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
        for i, row in zip(chosen, output[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
            if stop in row:
                found[i] = tokenizer.decode(row[: row.index(stop)])
    return found


def main() -> None:
    """Parse the options, ask everything and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path(__file__).parent / "demo", help="folder of the checkpoint")
    parser.add_argument("--seed", type=int, default=1, help="seed of the choice of questions")
    parser.add_argument("--every", type=int, default=1, help="ask only each n-th question")
    parser.add_argument("--show-wrong", type=int, default=0, help="print this many wrong answers")
    options = parser.parse_args()

    began = time.monotonic()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto").eval()
    questions = list(evaluation(options.seed))[:: options.every]
    answers = replies(model, tokenizer, prompts(questions), [question.tools for question in questions])

    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])  # asked, correct, verbatim
    wrong = 0
    for question, answer in zip(questions, answers, strict=True):
        correct = answer is not None and question.accepts(answer)
        names = [question.category] + (["ALL DEFINITIONS"] if question.category in GLOSSARY else [])
        for name in names:
            tally = counts[name]
            tally[0] += 1
            tally[1] += correct
            tally[2] += answer == question.answer
        if not correct and wrong < options.show_wrong:
            wrong += 1
            print(f"[{question.category}] {question.ask!r} -> {answer!r}")
    print(f"{'category':20s} {'asked':>6s} {'correct':>8s} {'verbatim':>9s}")
    for name, (asked, right, verbatim) in counts.items():
        print(f"{name:20s} {asked:6d} {right / asked:8.1%} {verbatim / asked:9.1%}")
    print(f"{len(questions)} questions, {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
