"""The CPU backend's attention against its torch twin, in float32, over pages whose strange slots hold NaN."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from support.checkpoints import make_checkpoint
from support.engine_driver import GREEDY, Driver, make_sequence

from engine.attention import attend
from engine.attention_inputs import AttentionInputs, InputShape, gather_plan
from engine.backend import HeadNorms, TorchBackend
from engine.cpu.backend import CpuBackend
from engine.inputs import StepInputs, build_inputs
from engine.plan import Row

HKV, PAGE_SIZE = 4, 8
ROUNDING = 2.0**-8  # of bfloat16, relative

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(),  # type: ignore[no-untyped-call]
    reason="this build of torch has no oneDNN",
)


def step(
    rows: list[tuple[int, int]], *, group: int, head_dim: int, window: int | None, seed: int = 0
) -> tuple[StepInputs, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs of rows `(past, count)`, queries, keys and values, and a layer of a pool of NaN that holds the pasts."""
    torch.manual_seed(seed)
    total = sum(past + count for past, count in rows)
    deck = random.Random(seed).sample(range(total), total)
    plan = []
    for past, count in rows:
        sequence = make_sequence(range(past + count), GREEDY)
        sequence.page_table = [deck.pop() for _ in range(-(-(past + count) // PAGE_SIZE))]
        plan.append(Row(sequence, past, count, sample=True))
    cpu = torch.device("cpu")
    inputs = build_inputs(plan, InputShape(PAGE_SIZE, (window,), layer_token_bytes=64, device=cpu), gather_plan)
    num_tokens = sum(count for _, count in rows)
    queries = torch.randn(num_tokens, HKV * group, head_dim)
    keys_values = torch.randn(num_tokens, 2, HKV, head_dim)
    layer = torch.full((total, 2, HKV, PAGE_SIZE, head_dim), torch.nan)
    for row in plan:
        for position in range(row.start):
            page = row.sequence.page_table[position // PAGE_SIZE]
            layer[page, :, :, position % PAGE_SIZE] = torch.randn(2, HKV, head_dim)
    layer[inputs.page_ids, :, :, inputs.offsets] = keys_values
    return inputs, queries.bfloat16(), keys_values.bfloat16(), layer.bfloat16()


def plan_of(inputs: StepInputs, window: int | None) -> AttentionInputs:
    plan = inputs.attention[window]
    assert isinstance(plan, AttentionInputs)
    return plan


@pytest.mark.parametrize("window", [None, 5, 40])
@pytest.mark.parametrize(("group", "head_dim"), [(1, 64), (2, 128), (5, 80)])
def test_attention_matches_its_twin(group: int, head_dim: int, window: int | None) -> None:
    rows = [(0, 1), (37, 1), (0, 70), (7, 1), (50, 33), (120, 1), (3, 2)]
    inputs, queries, keys_values, layer = step(rows, group=group, head_dim=head_dim, window=window)
    attention = plan_of(inputs, window)
    expected = attend(queries.float(), keys_values.float(), layer.float(), attention)
    result = CpuBackend().attention(queries, keys_values, layer, attention).float()
    difference = (result - expected).abs().max().item()
    print(f"largest difference {difference:.5f}")
    assert difference <= 4 * ROUNDING * expected.abs().max().item()


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize(("group", "head_dim"), [(2, 128), (3, 80)])
def test_norm_rotation_and_page_write_match_their_twins(group: int, head_dim: int, normed: bool) -> None:
    inputs, _, _, layer = step([(37, 1), (0, 21), (9, 4)], group=group, head_dim=head_dim, window=None)
    num_tokens, num_heads = inputs.token_ids.shape[0], (group + 2) * HKV
    qkv = torch.randn(num_tokens, num_heads * head_dim).bfloat16()
    norms = HeadNorms(torch.rand(head_dim).bfloat16(), torch.rand(head_dim).bfloat16(), 1e-6) if normed else None
    angles = torch.rand(num_tokens, 1, head_dim // 2) * 6
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
    fast, twin = CpuBackend(), TorchBackend()
    wide = HeadNorms(norms.queries.float(), norms.keys.float(), norms.eps) if norms is not None else None
    exact_layer, exact_qkv = layer.float(), qkv.float()
    expected, kept = twin.rotate_and_write(
        exact_qkv, wide, (cos.float(), sin.float()), exact_layer, inputs
    )  # fmt: skip
    rotation = fast.plan_rotation((cos, sin), inputs)
    queries, keys_values = fast.rotate_and_write(qkv, norms, rotation, layer, inputs)
    assert kept is not None
    assert keys_values is not None
    for result, wanted in ((queries, expected), (keys_values, kept), (layer, exact_layer)):
        known = wanted.isfinite()
        assert torch.equal(result.isfinite(), known)
        assert ((result.float() - wanted).abs() <= ROUNDING * (1 + wanted.abs()))[known].all()


def test_the_norm_of_rows_matches_its_twin() -> None:
    hidden, weight = torch.randn(37, 96 * 2).bfloat16()[:, :96], torch.rand(96).bfloat16()
    for rows in (hidden, hidden[:1], hidden[:0]):
        expected = TorchBackend().rms_norm(rows.float(), weight.float(), 1e-6)
        result = CpuBackend().rms_norm(rows, weight, 1e-6)
        assert ((result.float() - expected).abs() <= ROUNDING * expected.abs()).all()


@pytest.mark.parametrize("size", [3072, 80])
def test_the_gated_activation_matches_its_twin(size: int) -> None:
    gate_up = torch.cat((torch.linspace(-120, 120, 7 * size), torch.randn(7 * size) * 4)).view(-1, 2 * size).bfloat16()
    expected = TorchBackend().gated_silu(gate_up.float())
    result = CpuBackend().gated_silu(gate_up).float()
    assert ((result - expected).abs() <= ROUNDING * expected.abs() + 1e-30).all()


def test_a_long_prompt_takes_several_runs_and_its_last_chunk_agrees() -> None:
    inputs, queries, keys_values, layer = step([(4090, 300)], group=4, head_dim=16, window=None)
    attention = plan_of(inputs, None)
    expected = attend(queries.float(), keys_values.float(), layer.float(), attention)
    result = CpuBackend().attention(queries, keys_values, layer, attention).float()
    assert (result - expected).abs().max().item() <= 4 * ROUNDING * expected.abs().max().item()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_rows_bits_depend_on_neither_its_company_nor_the_threads(threads: int) -> None:
    rows = [(37, 1), (120, 1), (8, 1), (0, 1)]
    inputs, queries, keys_values, layer = step(rows, group=2, head_dim=64, window=None)
    backend = CpuBackend()
    alone = [
        backend.attention(queries[at : at + 1], keys_values[at : at + 1], layer, one.attention[None])
        for at, one in enumerate(step_alone(inputs, len(rows)))
    ]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together = backend.attention(queries, keys_values, layer, inputs.attention[None])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(together, torch.cat(alone))


def step_alone(inputs: StepInputs, num_rows: int) -> list[StepInputs]:
    """Each row of a decode step as a step of its own."""
    from dataclasses import replace

    plan = plan_of(inputs, None)
    rows = plan.decode
    assert rows is not None
    steps = []
    for at in range(num_rows):
        end = rows.starts[at + 1] if at + 1 < num_rows else None
        one = replace(
            rows,
            tokens=rows.tokens[:1],
            pages=rows.pages[rows.starts[at] : end],
            starts=rows.starts[:1],
            firsts=rows.firsts[at : at + 1],
            ends=rows.ends[at : at + 1],
        )
        steps.append(replace(inputs, attention={None: replace(plan, decode=one)}))
    return steps


def test_a_bfloat16_model_says_what_its_float32_twin_says(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / "m", "qwen3", dtype=torch.bfloat16)
    exact, fast = Driver(directory, dtype="float32"), Driver(directory, dtype="bfloat16")
    prompt = [random.Random(1).randrange(3, 300) for _ in range(90)]
    results = []
    for driver in (exact, fast):
        sequence = driver.admit(prompt)
        parts = [driver.logits([Row(sequence, at, count, sample=False)]) for at, count in ((0, 50), (50, 1), (51, 39))]
        results.append(torch.cat(parts))
    difference = (results[0] - results[1]).abs()
    scale = results[0].std().item()
    print(f"logits differ by {difference.mean().item():.4f} in the mean, standard deviation {scale:.3f}")
    assert difference.mean().item() < 0.03 * scale


def test_without_the_compiler_the_twin_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.cpu.backend.RowKernels", missing)
    inputs, queries, keys_values, layer = step([(37, 1), (9, 1)], group=2, head_dim=64, window=None)
    attention = plan_of(inputs, None)
    result = CpuBackend().attention(queries, keys_values, layer, attention)
    assert torch.equal(result, attend(queries, keys_values, layer, attention))


def missing() -> None:
    raise ImportError("No module named 'numba'")
