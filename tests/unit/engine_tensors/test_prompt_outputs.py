"""Scores and vectors of prompts against `transformers`, chunk by chunk; each test prints the largest difference."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from support.checkpoints import VOCAB_SIZE
from support.engine_driver import Driver
from transformers import AutoModelForCausalLM

from engine import prompt_outputs
from engine.plan import Pooled, Row, Sampled, ScoredPrompt, StepPlan
from engine.sequence import Sequence
from fleet.types import Pooling, SamplingParams, TokenLogprob
from prefill_svc.vectors import Vectors

CheckpointOf = Callable[[str], Path]
TOLERANCE = 1e-4
PROMPT = [random.Random(2).randrange(VOCAB_SIZE) for _ in range(37)]


def reference(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def run_chunks(driver: Driver, sequence: Sequence, beside: Sequence, *, chunk: int) -> list[tuple[Any, Any]]:
    """Results and scores of each chunk of a prompt; another sequence takes part in every step."""
    found = []
    while count := min(chunk, sequence.num_uncomputed_tokens):
        start = sequence.num_computed_tokens
        whole = start + count == len(sequence.token_ids)
        rows = (
            Row(beside, beside.num_computed_tokens, 1, sample=False),
            Row(sequence, start, count, sample=whole and not sequence.is_prompt_only),
        )
        out = driver.runner.run(StepPlan(rows))
        for row in rows:
            row.sequence.num_computed_tokens += row.count
        assert out.sampled[0] is None
        found.append((out.sampled[1], out.scored.get(1)))
    return found


@pytest.mark.parametrize("variant", ["llama3", "qwen3"])
@pytest.mark.parametrize("chunk", [1, 8, 64])
def test_scores_of_a_prompt_match(
    variant: str, chunk: int, checkpoint: CheckpointOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompt_outputs, "SLICE_BYTES", 3 * 4 * VOCAB_SIZE)  # three tokens' logits at once
    driver = Driver(checkpoint(variant))
    beside = driver.admit(range(60))
    params = SamplingParams(temperature=0, max_tokens=4, prompt_logprobs=3)
    found = run_chunks(driver, driver.admit(PROMPT, params, room=1), beside, chunk=chunk)
    assert isinstance(found[-1][0], Sampled)
    scores: list[TokenLogprob] = []
    for _, scored in found:
        if scored is not None:
            assert isinstance(scored, ScoredPrompt)
            assert scored.position == len(scores) + 1
            scores += scored.logprobs
    with torch.inference_mode():
        expected = reference(checkpoint(variant))(torch.tensor([PROMPT])).logits[0].log_softmax(-1)
    assert len(scores) == len(PROMPT) - 1
    difference = 0.0
    for place, score in enumerate(scores):
        row = expected[place]
        chosen = float(row[PROMPT[place + 1]])
        difference = max(difference, abs(score.logprob - chosen))
        tops = row.topk(3)
        difference = max(
            difference, *(abs(a.logprob - b) for a, b in zip(score.top, tops.values.tolist(), strict=True))
        )
        assert [one.token_id for one in score.top] == tops.indices.tolist()
        assert score.rank == 1 + int((row > chosen).sum())
    print(f"{variant}: largest difference {difference:.2e}")
    assert difference < TOLERANCE


@pytest.mark.parametrize("pooling", [Pooling.MEAN, Pooling.LAST])
@pytest.mark.parametrize("variant", ["llama3", "qwen3"])
def test_vectors_match_the_final_hidden_states(variant: str, pooling: Pooling, checkpoint: CheckpointOf) -> None:
    driver = Driver(checkpoint(variant))
    with torch.inference_mode():
        states = reference(checkpoint(variant)).model(torch.tensor([PROMPT])).last_hidden_state[0]
    expected = states.mean(dim=0) if pooling is Pooling.MEAN else states[-1]
    expected = expected / expected.norm()
    for chunk in (1, 8, 64):
        sequence = driver.admit(PROMPT, SamplingParams(max_tokens=0))
        sequence.passport = msgspec.structs.replace(sequence.passport, pooling=pooling)
        vectors = Vectors()
        for result, scored in run_chunks(driver, sequence, driver.admit(range(40)), chunk=chunk):
            assert scored is None
            if result is not None:
                assert isinstance(result, Pooled)
                vectors.add(sequence, result)
        vector = vectors.take(sequence)
        assert vector is not None
        assert vectors.take(sequence) is None
        ours = torch.from_numpy(np.frombuffer(vector, dtype="<f4").copy())
        difference = float((ours - expected).abs().max())
        print(f"{variant} {pooling} in chunks of {chunk}: largest difference {difference:.2e}")
        assert difference < TOLERANCE
        assert float(ours.norm()) == pytest.approx(1, abs=1e-6)


def test_a_vector_that_is_not_finite_is_none(checkpoint: CheckpointOf) -> None:
    sequence = Driver(checkpoint("llama")).admit([1])
    for bad in (np.nan, np.inf, 0.0):
        vectors = Vectors()
        vectors.add(sequence, Pooled(np.full(4, bad, dtype=np.float32).tobytes()))
        assert vectors.take(sequence) is None
