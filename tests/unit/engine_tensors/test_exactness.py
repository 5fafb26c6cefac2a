"""A token's logits are the same to the last bit, however its sequence was chunked and batched.

In float32, and in bfloat16 and with int8 weights where products and attention are kernels of our own.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.checkpoints import VOCAB_SIZE
from support.engine_driver import Driver

from engine.cpu.backend import suits_own_products
from engine.inputs import build_inputs
from engine.plan import Row
from engine.runner import input_shape
from engine.sequence import Sequence

CheckpointOf = Callable[[str], Path]


def logits_in_chunks(driver: Driver, sequences: list[Sequence], draw: random.Random) -> list[torch.Tensor]:
    """All logits of all sequences, in steps of random chunks of random ones of them."""
    parts: list[list[torch.Tensor]] = [[] for _ in sequences]
    while waiting := [at for at, one in enumerate(sequences) if one.num_uncomputed_tokens]:
        chosen = draw.sample(waiting, draw.randint(1, len(waiting)))
        rows = []
        for at in chosen:
            one = sequences[at]
            count = min(one.num_uncomputed_tokens, draw.choice((1, 1, 1, 2, 3, 17, 60)))
            rows.append(Row(one, one.num_computed_tokens, count, sample=False))
        logits = driver.logits(rows)
        for at, row in zip(chosen, rows, strict=True):
            parts[at].append(logits[: row.count])
            logits = logits[row.count :]
    return [torch.cat(own) for own in parts]


def page_size_of(how: dict[str, str]) -> int:
    return 4 if how["dtype"] == "float32" else 16  # pages of pairs are multiples of 16


OURS = pytest.mark.skipif(not suits_own_products(), reason="oneDNN's products")
EXACT = pytest.mark.parametrize(
    "how",
    [
        pytest.param({"dtype": "float32"}, id="float32"),
        pytest.param({"dtype": "bfloat16"}, marks=OURS, id="bfloat16"),
        pytest.param({"dtype": "bfloat16", "quantization": "int8"}, marks=OURS, id="int8"),
    ],
)


@EXACT
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("variant", ["qwen3", "llama3"])
def test_chunks_and_company_change_no_bit(
    checkpoint: CheckpointOf, variant: str, threads: int, how: dict[str, str]
) -> None:
    torch.set_num_threads(threads)
    try:
        draw = random.Random(variant)
        lengths = (1, 5, 130, 301)
        page_size = page_size_of(how)
        prompts = [[draw.randrange(VOCAB_SIZE) for _ in range(length)] for length in lengths]
        driver = Driver(checkpoint(variant), page_size=page_size, num_pages=512, **how)
        whole = []
        for prompt in prompts:  # each alone and in one piece
            one = driver.admit(prompt)
            whole.append(driver.logits([Row(one, 0, len(prompt), sample=False)]))
        for _ in range(2):
            again = Driver(checkpoint(variant), page_size=page_size, num_pages=512, **how)
            mixed = logits_in_chunks(again, [again.admit(prompt) for prompt in prompts], draw)
            for length, expected, actual in zip(lengths, whole, mixed, strict=True):
                assert torch.equal(actual, expected), (length, float((actual - expected).abs().max()))
    finally:
        torch.set_num_threads(1)


@EXACT
def test_what_the_last_layer_leaves_out_changes_no_bit(checkpoint: CheckpointOf, how: dict[str, str]) -> None:
    draw = random.Random(5)
    driver = Driver(checkpoint("qwen3"), page_size=page_size_of(how), num_pages=512, **how)
    transformer, pool = driver.model.transformer, driver.pool
    sequences = [driver.admit([draw.randrange(VOCAB_SIZE) for _ in range(length)]) for length in (1, 40, 70, 33)]
    begins, ends = (0, 0, 0, 0), (1, 17, 70, 32)
    for sampling in ((True, True, False, True), (False, True, False, False), (False,) * 4):
        rows = [
            Row(one, begin, end - begin, sample=sample)
            for one, begin, end, sample in zip(sequences, begins, ends, sampling, strict=True)
        ]
        with torch.inference_mode():
            inputs = build_inputs(
                rows, input_shape(driver.model, page_size_of(how)), transformer.backend.plan_attention
            )
            everything = transformer.hidden_states(inputs, pool)
            written = pool.clone()
            pool.fill_(torch.nan)
            sampled = transformer.sampled_states(inputs, pool)
        assert torch.equal(sampled, everything[inputs.sampled_tokens])
        assert len(sampled) == sum(sampling)
        assert torch.equal(pool.nan_to_num(), written.nan_to_num())  # keys and values of the others are there
