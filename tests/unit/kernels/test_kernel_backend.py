"""Whole models on the kernel backend beside plain torch: chunked prefill, decode and both in one step."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from kernel_kit import eagerly, with_kernels
from support.checkpoints import VOCAB_SIZE, make_checkpoint
from support.engine_driver import Driver

from engine.decode_graphs import DecodeGraphs, buckets_up_to
from engine.inputs import build_inputs
from engine.kernel_backend import KernelBackend, PagedAttention
from engine.kernels.decode_plan import DecodePlan
from engine.kernels.paged_prefill_attention import PrefillPlan
from engine.plan import Row

TOLERANCE = 1e-4  # as against transformers


@pytest.mark.parametrize("variant", ["qwen3", "mistral-window", "llama3"])
def test_a_model_computes_the_same_by_kernels(variant: str, tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / variant, variant)
    draw = random.Random(11)
    prompts = [[draw.randrange(VOCAB_SIZE) for _ in range(length)] for length in (11, 1, 18)]
    drivers = (Driver(directory), with_kernels(directory))
    outputs = []
    for driver in drivers:
        sequences = [driver.admit(prompt, room=6) for prompt in prompts]
        outputs.append(driver.generate(sequences, 3, max_chunk=8))
    assert outputs[0] == outputs[1]
    plain, by_kernels = (driver.logits([Row(driver.admit(prompts[2]), 0, 18, sample=False)]) for driver in drivers)
    difference = float((plain - by_kernels).abs().max())
    print(f"{variant}: largest logit difference {difference:.3g}")
    assert difference < TOLERANCE


def test_a_step_of_single_tokens_takes_the_decode_kernel(tmp_path: Path) -> None:
    driver = with_kernels(make_checkpoint(tmp_path / "qwen3", "qwen3"))
    backend, shape = driver.model.transformer.backend, driver.runner._input_shape
    one, two = driver.admit([1, 2, 3]), driver.admit([4, 5])
    single = build_inputs([Row(one, 2, 1, sample=True), Row(two, 1, 1, sample=True)], shape, backend.plan_attention)
    mixed = build_inputs([Row(one, 0, 3, sample=True), Row(two, 1, 1, sample=True)], shape, backend.plan_attention)
    plans = [inputs.attention[None] for inputs in (single, mixed)]
    assert all(isinstance(plan, PagedAttention) for plan in plans)
    decode, prefill = (plan.plan for plan in plans if isinstance(plan, PagedAttention))
    assert isinstance(decode, DecodePlan)
    assert isinstance(prefill, PrefillPlan)
    assert torch.equal(plans[0].tables[:, :1], torch.tensor([one.page_table[:1], two.page_table[:1]]).int())  # type: ignore[attr-defined]


@pytest.mark.parametrize("variant", ["qwen3", "mistral-window"])
def test_graphs_of_padded_batches_decode_the_same(variant: str, tmp_path: Path) -> None:
    driver = with_kernels(make_checkpoint(tmp_path / variant, variant))
    transformer, backend = driver.model.transformer, driver.model.transformer.backend
    assert isinstance(backend, KernelBackend)
    graphs = DecodeGraphs(
        transformer,
        backend,
        driver.pool,
        driver.runner._input_shape,
        max_rows=4,
        max_model_len=64,
        capture=eagerly,
    )
    draw = random.Random(5)
    sequences = [driver.admit([draw.randrange(VOCAB_SIZE) for _ in range(length)], room=4) for length in (7, 18, 3)]
    driver.step(sequences)
    for _ in range(2):
        rows = [Row(one, one.num_computed_tokens, 1, sample=True) for one in sequences]
        before = driver.pool.clone()
        by_graph = graphs.forward(rows)
        assert by_graph is not None
        by_graph, after = by_graph.clone(), driver.pool.clone()
        driver.pool.copy_(before)
        plain = driver.logits(rows)
        assert float((by_graph - plain).abs().max()) < TOLERANCE
        assert torch.equal(after.isnan(), driver.pool.isnan())  # padding was written nowhere
        assert float((after - driver.pool).nan_to_num(0.0).abs().max()) < TOLERANCE
        for one, logits in zip(sequences, plain, strict=True):
            one.token_ids.append(int(logits.argmax()))
    assert graphs.forward([Row(sequences[0], 0, 3, sample=True)]) is None
    assert graphs.forward([Row(sequences[0], 7, 1, sample=True)] * 5) is None


def test_buckets_end_with_the_largest_batch() -> None:
    assert buckets_up_to(1) == (1,)
    assert buckets_up_to(20) == (1, 2, 4, 8, 12, 16, 20)
    assert buckets_up_to(64)[-2:] == (48, 64)
    assert buckets_up_to(5000)[-1] == 512
