"""The paged forward pass against `transformers`, family by family; each test prints the largest difference."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import VARIANTS, VOCAB_SIZE, make_checkpoint, spell_as_transformers_4
from support.engine_driver import Driver
from transformers import AutoModelForCausalLM, GenerationConfig

from engine.plan import Row

CheckpointOf = Callable[[str], Path]
TOLERANCE = 1e-4


def reference(directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()


def random_prompts(*lengths: int, seed: int = 3) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(VOCAB_SIZE) for _ in range(length)] for length in lengths]


def paged_logits(driver: Driver, prompts: list[list[int]], *, seed: int = 5) -> list[torch.Tensor]:
    """All logits of all prompts, in steps that mix chunks of 1 to 13 tokens of some of the sequences."""
    draw = random.Random(seed)
    sequences = [driver.admit(prompt) for prompt in prompts]
    parts: dict[int, list[torch.Tensor]] = {at: [] for at in range(len(prompts))}
    while unfinished := [at for at, one in enumerate(sequences) if one.num_uncomputed_tokens]:
        chosen = draw.sample(unfinished, draw.randint(1, len(unfinished)))
        rows = []
        for at in chosen:
            one = sequences[at]
            count = min(one.num_uncomputed_tokens, draw.choice((1, 1, 2, 5, 13)))
            rows.append(Row(one, one.num_computed_tokens, count, sample=False))
        logits = driver.logits(rows)
        for at, row in zip(chosen, rows, strict=True):
            parts[at].append(logits[: row.count])
            logits = logits[row.count :]
    return [torch.cat(parts[at]) for at in range(len(prompts))]


def reference_logits(model: Any, prompts: list[list[int]]) -> list[torch.Tensor]:
    with torch.inference_mode():
        return [model(torch.tensor([prompt])).logits[0].float() for prompt in prompts]


def reference_greedy(model: Any, prompt: list[int], num_tokens: int) -> list[int]:
    config = GenerationConfig(max_new_tokens=num_tokens, do_sample=False, pad_token_id=0)
    ids = torch.tensor([prompt])
    model.generation_config.eos_token_id = None
    with torch.inference_mode():
        output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    return list(output[0, len(prompt) :].tolist())


def largest_difference(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_of_chunks_and_single_tokens_match(variant: str, checkpoint: CheckpointOf) -> None:
    prompts = random_prompts(45, 1, 30, 17)
    ours = paged_logits(Driver(checkpoint(variant)), prompts)
    theirs = reference_logits(reference(checkpoint(variant)), prompts)
    difference = largest_difference(ours, theirs)
    print(f"{variant}: largest difference {difference:.2e}, largest logit {max(t.abs().max() for t in theirs):.1f}")
    assert difference < TOLERANCE


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_batches_generate_what_transformers_generates(variant: str, checkpoint: CheckpointOf) -> None:
    prompts = random_prompts(9, 14, 3, seed=11)
    model = reference(checkpoint(variant))
    expected = [reference_greedy(model, prompt, 33) for prompt in prompts]
    driver = Driver(checkpoint(variant))
    sequences = [driver.admit(prompt, room=33) for prompt in prompts]
    assert driver.generate(sequences, 33, max_chunk=6) == expected
    assert all(len(set(one)) > 8 for one in expected), "decoding has degenerated and proves little"


@pytest.mark.parametrize("prompt_len", [40, 60])
def test_dynamic_rope_grows_beyond_the_original_maximum_as_generate_does(
    prompt_len: int, checkpoint: CheckpointOf
) -> None:
    (prompt,) = random_prompts(prompt_len)
    directory = checkpoint("llama-dynamic")  # trained for 48 positions
    expected = reference_greedy(reference(directory), prompt, 36)
    driver = Driver(directory)
    assert driver.generate([driver.admit(prompt, room=36)], 36, max_chunk=16) == [expected]


def test_long_prompts_in_large_chunks_match_past_the_query_run(checkpoint: CheckpointOf) -> None:
    for variant in ("llama3", "mistral-window", "qwen2-window"):
        (prompt,) = random_prompts(500)
        driver = Driver(checkpoint(variant), page_size=16)
        sequence = driver.admit(prompt)
        spans = ((0, 90), (90, 390), (390, 499), (499, 500))
        ours = torch.cat([driver.logits([Row(sequence, a, b - a, sample=False)]) for a, b in spans])
        difference = largest_difference([ours], reference_logits(reference(checkpoint(variant)), [prompt]))
        print(f"{variant}: largest difference over 500 tokens {difference:.2e}")
        assert difference < TOLERANCE


def test_a_short_row_beside_long_ones_is_padded_without_harm(checkpoint: CheckpointOf) -> None:
    prompts = random_prompts(70, 66, 61, 58, 5)
    directory = checkpoint("qwen3-window")
    driver = Driver(directory)
    sequences = [driver.admit(prompt) for prompt in prompts]
    driver.logits([Row(one, 0, len(one.token_ids) - 1, sample=False) for one in sequences])
    last = driver.logits([Row(one, one.num_computed_tokens, 1, sample=False) for one in sequences])
    theirs = torch.stack([logits[-1] for logits in reference_logits(reference(directory), prompts)])
    assert float((last - theirs).abs().max()) < TOLERANCE


def test_shards_hold_the_same_model_as_one_file(checkpoint: CheckpointOf, tmp_path: Path) -> None:
    sharded = make_checkpoint(tmp_path / "sharded", "qwen3", max_shard_size="200KB")
    assert (sharded / "model.safetensors.index.json").exists()
    prompts = random_prompts(20)
    whole, parts = Driver(checkpoint("qwen3")), Driver(sharded)
    assert torch.equal(paged_logits(whole, prompts)[0], paged_logits(parts, prompts)[0])
    assert whole.model.fingerprint == parts.model.fingerprint


@pytest.mark.parametrize("variant", ["llama", "llama3", "llama-linear", "llama-dynamic", "llama-yarn-mscale", "qwen3"])
def test_both_spellings_of_the_configuration_mean_the_same(variant: str, tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / variant, variant, dtype=torch.bfloat16)
    modern = Driver(directory, dtype="bfloat16").model.config
    spell_as_transformers_4(directory)
    assert Driver(directory, dtype="bfloat16").model.config == modern
    assert modern.checkpoint_dtype == "bfloat16"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", ["llama3", "qwen2", "qwen3", "mistral-window"])
def test_half_precision_is_as_near_as_transformers_is(
    variant: str, dtype: torch.dtype, checkpoint: CheckpointOf
) -> None:
    prompts = random_prompts(40, 23)
    exact = reference_logits(reference(checkpoint(variant)), prompts)
    theirs = reference_logits(reference(checkpoint(variant), dtype), prompts)
    ours = paged_logits(Driver(checkpoint(variant), dtype=str(dtype).removeprefix("torch.")), prompts)

    def mean_error(logits: list[torch.Tensor]) -> float:
        return float(torch.cat([(a - b).abs().flatten() for a, b in zip(logits, exact, strict=True)]).mean())

    print(f"{variant} {dtype}: mean error ours {mean_error(ours):.4f}, transformers {mean_error(theirs):.4f}")
    assert mean_error(ours) < 1.25 * mean_error(theirs)
