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
from engine.plan import Row
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


OURS = pytest.mark.skipif(not suits_own_products(), reason="oneDNN's products")


@pytest.mark.parametrize(
    "how",
    [
        pytest.param({"dtype": "float32"}, id="float32"),
        pytest.param({"dtype": "bfloat16"}, marks=OURS, id="bfloat16"),
        pytest.param({"dtype": "bfloat16", "quantization": "int8"}, marks=OURS, id="int8"),
    ],
)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("variant", ["qwen3", "llama3"])
def test_chunks_and_company_change_no_bit(
    checkpoint: CheckpointOf, variant: str, threads: int, how: dict[str, str]
) -> None:
    torch.set_num_threads(threads)
    try:
        draw = random.Random(variant)
        lengths = (1, 5, 130, 301)
        page_size = 4 if how["dtype"] == "float32" else 16  # pages of pairs are multiples of 16
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
