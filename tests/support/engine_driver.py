"""Drives a `ModelRunner` without schedulers: hand-made sequences, scattered pages, plans of any shape."""

from __future__ import annotations

import random
from collections.abc import Sequence as Many
from pathlib import Path
from typing import Any

import torch

from engine.grammar.desk import GrammarDesk
from engine.kv_pool import allocate_pool
from engine.load import LoadedModel, load_model
from engine.plan import Complete, Failed, Row, Sampled, StepPlan
from engine.runner import ModelRunner
from engine.sequence import Sequence
from fleet import model_files
from fleet.types import Passport, PeerRef, SamplingParams

GATEWAY = PeerRef(name="gateway", incarnation=1, address="tcp://127.0.0.1:1")
GREEDY = SamplingParams(temperature=0.0, max_tokens=1024)


def make_sequence(
    token_ids: Many[int], params: SamplingParams = GREEDY, *, prompt_len: int | None = None, arrival: int = 0
) -> Sequence:
    """A sequence without pages."""
    passport = Passport(
        request_id=f"r{arrival}",
        epoch=0,
        model="m",
        token_ids=list(token_ids),
        prompt_len=prompt_len or len(token_ids),
        params=params,
        gateway=GATEWAY,
    )
    return Sequence.from_passport(passport, arrival=arrival)


class Driver:
    """A model, a pool full of NaN, and page tables dealt from a shuffled deck.

    The NaN prove that nothing is read that no row has written: attention over a stray slot would spread them.
    """

    def __init__(
        self, directory: Path, *, dtype: str = "float32", page_size: int = 4, num_pages: int = 256, **how: Any
    ) -> None:
        self.model: LoadedModel = load_model(directory, dtype, **how)
        self.pool = allocate_pool(
            config=self.model.config,
            num_pages=num_pages,
            page_size=page_size,
            dtype=self.model.kv_dtype,
            device=torch.device("cpu"),
        ).fill_(torch.nan)
        self.page_size = page_size
        self.grammars = GrammarDesk(model_files.read(directory), self.model.config.vocab_size)
        self.runner = ModelRunner(self.model, self.pool, page_size, self.grammars)
        self.deck = random.Random(7).sample(range(num_pages), num_pages)

    def admit(self, token_ids: Many[int], params: SamplingParams = GREEDY, *, room: int = 0) -> Sequence:
        """A sequence with pages for its ids and `room` more tokens."""
        sequence = make_sequence(token_ids, params, arrival=len(self.deck))
        needed = -(-(len(token_ids) + room) // self.page_size)
        sequence.page_table = [self.deck.pop() for _ in range(needed)]
        return sequence

    def logits(self, rows: Many[Row]) -> torch.Tensor:
        """Logits of every token of the step, `[T, V]`; the rows count as computed afterwards."""
        hidden = self.runner.hidden_states(StepPlan(tuple(rows)))
        with torch.inference_mode():
            logits = self.model.transformer.logits(hidden)
        for row in rows:
            row.sequence.num_computed_tokens = row.start + row.count
        return logits

    def step(self, sequences: Many[Sequence], *, max_chunk: int = 1024) -> list[Sampled | Complete | Failed | None]:
        """One step of chunked prefill or decode for each sequence; appends what was sampled."""
        rows = []
        for sequence in sequences:
            count = min(sequence.num_uncomputed_tokens, max_chunk)
            start = sequence.num_computed_tokens
            rows.append(Row(sequence, start, count, sample=start + count == len(sequence.token_ids)))
        output = self.runner.run(StepPlan(tuple(rows)))
        for row, result in zip(rows, output.sampled, strict=True):
            row.sequence.num_computed_tokens += row.count
            if isinstance(result, Sampled):
                row.sequence.token_ids.append(result.token_id)
        return list(output.sampled)

    def generate(self, sequences: Many[Sequence], num_tokens: int, *, max_chunk: int = 1024) -> list[list[int]]:
        """Prefill in chunks and decode until each has `num_tokens` output tokens; the outputs."""
        while running := [one for one in sequences if one.num_output_tokens < num_tokens]:
            for result in self.step(running, max_chunk=max_chunk):
                assert not isinstance(result, Failed), result
        return [one.token_ids[one.prompt_len :] for one in sequences]
