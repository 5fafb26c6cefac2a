"""What grammars cost: compiling, one mask, putting masks on logits, and whole steps with and without them.

    python bench/grammar_masks.py [--model models/demo] [--threads 1]

Masks are measured on the model's own vocabulary and on a made one of 150,000 tokens, along random walks through each
grammar. Steps are the model's own at batch 1 and 32, free and constrained steps taking turns, so that a noisy machine
hits both alike; `waited` is what a constrained step spent waiting for masks after its logits were there.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llguidance import LLExecutor
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from engine.grammar.desk import GrammarDesk
from engine.grammar.masks import forbid
from engine.grammar.matcher import Matcher, Standing, fill
from engine.grammar.vocabulary import Vocabulary
from engine.kv_pool import allocate_pool
from engine.load import load_model
from engine.plan import Row, Sampled, StepPlan
from engine.runner import ModelRunner
from engine.sequence import Sequence
from fleet import model_files
from fleet.grammar import schema_source
from fleet.types import Grammar, GrammarKind, Passport, PeerRef, SamplingParams

PAGE_SIZE = 16
BIG = 150_000
WALKS = 8
LONGEST = 80


def of(**properties: Any) -> dict[str, Any]:
    """An object with exactly these properties."""
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


TEXT = {"type": "string", "maxLength": 40}
PERSON = of(
    name=TEXT, age={"type": "integer", "minimum": 0, "maximum": 130}, mail={"type": "string", "format": "email"}
)
TREE = {
    "$defs": {"t": of(v=TEXT, kids={"type": "array", "items": {"$ref": "#/$defs/t"}, "maxItems": 3})},
    "$ref": "#/$defs/t",
}
WIDE = {"type": "object", "properties": {f"p{i}": TEXT for i in range(200)}, "additionalProperties": False}
GRAMMARS: Mapping[str, Grammar] = {
    "json_object": Grammar(GrammarKind.JSON_SCHEMA, '{"type":"object"}'),
    "person, 3 properties": Grammar(GrammarKind.JSON_SCHEMA, schema_source(PERSON)),
    "recursive tree": Grammar(GrammarKind.JSON_SCHEMA, schema_source(TREE)),
    "200 optional properties": Grammar(GrammarKind.JSON_SCHEMA, schema_source(WIDE)),
    "enum of 2,000": Grammar(GrammarKind.JSON_SCHEMA, json.dumps({"enum": [f"value {i * 7}" for i in range(2000)]})),
    "regex": Grammar(GrammarKind.REGEX, r"[A-Z][a-z]{2,20}( [A-Z][a-z]{2,20}){1,4}, \d{4}-\d{2}-\d{2}"),
}


def big_vocabulary() -> Vocabulary:
    """150,000 tokens of one to four syllables, with JSON's usual runs of punctuation."""
    rng = random.Random(1)
    tokens = dict.fromkeys(["<|end|>", *pre_tokenizers.ByteLevel.alphabet()])
    tokens |= dict.fromkeys(['{"', '":', '",', '"}', '"}}', '":"', '","', '["', '"]', "},", '},{"', "]}"])
    syllables = [a + b + c for a in "bcdfghklmnprstvw" for b in "aeiou" for c in ("", "n", "r", "s", "t")]
    while len(tokens) < BIG:
        word = "".join(rng.choices(syllables, k=rng.randint(1, 4)))
        tokens[rng.choice(("", "Ġ", '"')) + (word.capitalize() if rng.random() < 0.2 else word)] = None
    tokenizer = Tokenizer(models.BPE(vocab={token: place for place, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    files = {"tokenizer.json": tokenizer.to_str().encode(), "tokenizer_config.json": b'{"eos_token": "<|end|>"}'}
    return Vocabulary.from_files(files, BIG)


def milliseconds(work: Callable[[], object]) -> float:
    """Of one call."""
    began_s = time.perf_counter()
    work()
    return (time.perf_counter() - began_s) * 1e3


def walk(vocabulary: Vocabulary, start: Matcher, times: list[float], rng: np.random.Generator) -> None:
    """Follow a grammar along allowed tokens drawn at random; the time of each mask is added to `times`."""
    matcher = start.copy()
    output: list[int] = []
    words = np.zeros((1, vocabulary.num_words), dtype=np.int32)
    executor = LLExecutor(num_threads=1)
    for _ in range(LONGEST):
        began_s = time.perf_counter()
        matcher.follow(output)
        fill(executor, [(matcher, 0)], words)
        standing = matcher.stand(words[0], vocabulary.eos_ids)
        times.append((time.perf_counter() - began_s) * 1e3)
        allowed = np.nonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))[0]
        token_id = int(rng.choice(allowed)) if standing is Standing.OPEN else vocabulary.eos_ids[0]
        if token_id in vocabulary.eos_ids:
            return
        output.append(token_id)


def masks(name: str, vocabulary: Vocabulary) -> None:
    """One table: compiling and masks."""
    print(f"\n| {name} | compile, ms | mask median | p99 | largest, ms |\n| --- | ---: | ---: | ---: | ---: |")
    for title, grammar in GRAMMARS.items():
        times: list[float] = []
        compiles = [milliseconds(lambda: Matcher.compile(vocabulary, grammar)) for _ in range(5)]  # noqa: B023
        rng = np.random.default_rng(3)
        start = Matcher.compile(vocabulary, grammar)
        for _ in range(WALKS):
            walk(vocabulary, start, times, rng)
        quantiles = np.percentile(times, [50, 99])
        figures = " | ".join(f"{value:.2f}" for value in (quantiles[1], max(times)))
        print(f"| {title} | {statistics.median(compiles):.2f} | {quantiles[0]:.3f} | {figures} |")


def application(vocab_size: int) -> None:
    """Putting masks on logits."""
    for rows in (1, 32):
        logits = torch.randn(rows, vocab_size)
        words = np.full((rows, -(-vocab_size // 32)), 0x55555555, dtype=np.int32)
        spent = statistics.median(milliseconds(lambda: forbid(logits, range(rows), words)) for _ in range(15))  # noqa: B023
        print(f"masks onto logits [{rows}, {vocab_size}]: {spent:.2f} ms")


class Steps:
    """Decode steps of one model."""

    def __init__(self, directory: Path) -> None:
        self.model = load_model(directory)
        config = self.model.config
        pool = allocate_pool(
            config=config, num_pages=2048, page_size=PAGE_SIZE, dtype=self.model.dtype, device=self.model.device
        ).zero_()
        self.desk = GrammarDesk(model_files.read(directory), config.vocab_size)
        self.runner = ModelRunner(self.model, pool, PAGE_SIZE, self.desk)

    def sequences(self, count: int, grammar: Grammar | None, first_page: int) -> list[Sequence]:
        """With 64 prompt tokens each and room for more."""
        made = []
        for number in range(count):
            params = SamplingParams(temperature=1.0, seed=number, max_tokens=500, grammar=grammar)
            passport = Passport(
                request_id=f"r{number}", epoch=0, model="m", token_ids=list(range(64)), prompt_len=64, params=params,
                gateway=PeerRef(name="g", incarnation=1, address="tcp://127.0.0.1:1"),
            )  # fmt: skip
            sequence = Sequence.from_passport(passport, arrival=number)
            sequence.page_table = list(range(first_page + number * 16, first_page + number * 16 + 16))
            made.append(sequence)
        return made

    def step(self, sequences: list[Sequence]) -> tuple[float, float]:
        """Milliseconds of a step, and of its sampling."""
        rows = tuple(Row(one, one.num_computed_tokens, one.num_uncomputed_tokens, sample=True) for one in sequences)
        began_s = time.perf_counter()
        output = self.runner.run(StepPlan(rows))
        spent_ms = (time.perf_counter() - began_s) * 1e3
        for row, result in zip(rows, output.sampled, strict=True):
            row.sequence.num_computed_tokens += row.count
            assert isinstance(result, Sampled), result  # noqa: S101 (a bench of a failing model measures nothing)
            row.sequence.token_ids.append(result.token_id)
        assert self.runner.last_timing is not None  # noqa: S101 (there was a step)
        return spent_ms, self.runner.last_timing.sample_s * 1e3

    def compare(self, batch: int, grammar: Grammar) -> None:
        """One row of the table."""
        free, bound = self.sequences(batch, None, 0), self.sequences(batch, grammar, 1024)
        for each in (free, bound, free, bound):
            self.step(each)
        pairs = [(self.step(free), self.step(bound)) for _ in range(60)]
        figures = [statistics.median(pair[side][part] for pair in pairs) for part in (0, 1) for side in (0, 1)]
        print(f"| {batch} | {figures[0]:.2f} | {figures[1]:.2f} | {figures[2]:.2f} | {figures[3]:.2f} |")


def main() -> None:
    """Print all tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("models/demo"))
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    steps = Steps(arguments.model)
    files = model_files.read(arguments.model)
    began_s = time.perf_counter()
    own = Vocabulary.from_files(files, steps.model.config.vocab_size)
    own_s = time.perf_counter() - began_s
    big = big_vocabulary()
    print(f"vocabulary of {own.vocab_size} read in {own_s * 1e3:.0f} ms")
    masks(f"{own.vocab_size} tokens", own)
    masks(f"{BIG} tokens", big)
    print()
    application(own.vocab_size)
    application(BIG)
    print("\n| batch | free step, ms | constrained step | free sampling | constrained sampling, ms |")
    print("| ---: | ---: | ---: | ---: | ---: |")
    never_ends = Grammar(GrammarKind.REGEX, '("[a-z ]{1,20}": (true|[0-9]+), )*')
    for batch in (1, 32):
        steps.compare(batch, never_ends)
    steps.desk.close()


if __name__ == "__main__":
    main()
