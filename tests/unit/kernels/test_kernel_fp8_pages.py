"""FP8 pages: written saturated and rounded, read as the numbers that they hold, by every kernel and by plain torch."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from kernel_kit import assert_close, poisoned_pool
from support.checkpoints import VOCAB_SIZE, make_checkpoint
from support.engine_driver import Driver

from engine.fp8 import E4M3
from engine.kernel_backend import KernelBackend
from engine.kernels.decode_plan import plan_decode
from engine.kernels.paged_decode_attention import paged_decode_attention, paged_decode_attention_twin
from engine.kernels.paged_prefill_attention import paged_prefill_attention, paged_prefill_attention_twin, plan_prefill
from engine.kernels.rotary_page_write import rotary_page_write, rotary_page_write_twin
from engine.plan import Row

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="this GPU has no FP8"
)
DTYPES = [torch.float32, torch.bfloat16]


def steps_apart(one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
    """How many e4m3 numbers lie between; NaN is one number, whatever its sign."""
    bits = [tensor.view(torch.uint8).masked_fill(tensor.float().isnan(), 0x7F).to(torch.int32) for tensor in (one, two)]
    ordered = [torch.where(each < 128, each, 128 - each) for each in bits]
    return (ordered[0] - ordered[1]).abs()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norms", [False, True])
def test_writing_equals_its_twin(norms: bool, dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(0)
    num_tokens, num_heads, num_kv_heads, head_dim = 6, 4, 2, 16
    qkv = torch.randn(num_tokens, (num_heads + 2 * num_kv_heads) * head_dim, device=device).to(dtype)
    qkv[0, -1], qkv[0, -2], qkv[1, -3], qkv[1, -4] = 1e6, -torch.inf, 2.0**-9, torch.nan
    pool = torch.randn(9, 3, 2, num_kv_heads, 4, head_dim, device=device).to(E4M3)
    expected_pool = pool.clone()
    weights = torch.rand(2, head_dim, device=device).to(dtype) if norms else [None, None]
    angles = torch.randn(num_tokens, head_dim, device=device)
    rows, slots = torch.arange(num_tokens, device=device), torch.randperm(36, device=device)[:num_tokens]
    slots[3] = -1
    queries = [
        call(
            qkv, angles, rows, slots, over[:, 1], num_heads=num_heads, query_norm=weights[0], key_norm=weights[1],
            eps=1e-6,
        )
        for call, over in ((rotary_page_write, pool), (rotary_page_write_twin, expected_pool))
    ]  # fmt: skip
    assert queries[0].dtype == dtype
    assert_close("queries", queries[0], queries[1], roundings=4)
    apart = steps_apart(pool, expected_pool)
    assert not apart[:, :, 1].any(), "values are rounded alone"
    assert not apart[:, [0, 2]].any()
    print(f"keys: {int(apart.count_nonzero())} of {apart.numel()} are not the same e4m3 number")
    assert int(apart.max()) <= 1  # a sum rounded otherwise may fall on the other side of a middle
    assert int(apart.count_nonzero()) <= 3
    place = expected_pool[slots[0] // 4, 1, 1, -1, slots[0] % 4].float()
    assert place[-2:].tolist() == [-448.0, 448.0]
    assert expected_pool[slots[1] // 4, 1, 1, -1, slots[1] % 4].float().isnan().sum() == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 20])
def test_attention_equals_its_twins(window: int | None, dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(1)
    num_heads, num_kv_heads, head_dim = 6, 2, 24
    counts, starts = [1, 0, 19, 40], [32, 0, 0, 50]
    lengths = [count + start for count, start in zip(counts, starts, strict=True)]
    first_seen = [max(0, start + 1 - window) if window else 0 for start in starts]
    layer, tables = poisoned_pool(
        lengths, num_kv_heads=num_kv_heads, page_size=4, head_dim=head_dim, dtype=dtype, device=device,
        first_seen=first_seen, page_dtype=E4M3,
    )  # fmt: skip
    roundings = 32 if dtype is torch.float32 else 4
    queries = torch.randn(sum(counts), num_heads, head_dim, device=device).to(dtype)
    plan = plan_prefill(counts, starts, group=3, window=window, device=device, query_rows=16, key_tokens=16)
    attended = paged_prefill_attention(queries, layer, tables, plan)
    expected = paged_prefill_attention_twin(queries, layer, tables, counts, starts, window)
    assert_close("prefill", attended, expected, roundings=roundings)
    queries = torch.randn(4, num_heads, head_dim, device=device).to(dtype)
    decode = plan_decode(
        lengths, window=window, num_programs=3, device=device, tile_tokens=16, min_part_tokens=32, max_parts=4
    )
    attended = paged_decode_attention(queries, layer, tables, decode)
    expected = paged_decode_attention_twin(queries, layer, tables, lengths, window)
    assert_close("decode", attended, expected, roundings=roundings)


@pytest.mark.parametrize("variant", ["qwen3", "mistral-window"])
def test_a_model_over_fp8_pages_computes_the_same_by_kernels(variant: str, tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / variant, variant)
    draw = random.Random(11)
    prompts = [[draw.randrange(VOCAB_SIZE) for _ in range(length)] for length in (11, 1, 18)]
    drivers = [Driver(directory, kv_cache_dtype="fp8_e4m3") for _ in range(2)]
    config = drivers[1].model.config
    backend = KernelBackend(group=config.num_heads // config.num_kv_heads, device=torch.device("cpu"))
    object.__setattr__(drivers[1].model.transformer, "backend", backend)
    logits = []
    for driver in drivers:
        sequences = [driver.admit(prompt) for prompt in prompts]
        driver.logits([Row(one, 0, max(1, len(one.token_ids) - 3), sample=False) for one in sequences])
        rest = [one for one in sequences if one.num_uncomputed_tokens]
        rows = [Row(one, one.num_computed_tokens, one.num_uncomputed_tokens, sample=False) for one in rest]
        logits.append(driver.logits(rows))
    difference = float((logits[0] - logits[1]).abs().max())
    apart = steps_apart(drivers[0].pool, drivers[1].pool)
    print(f"{variant}: largest logit difference {difference:.3g}; {int(apart.count_nonzero())} page numbers differ")
    # A key on the other side of a middle is a step of e4m3 away, which weighs more than sums in another order.
    assert difference < (1e-3 if not apart.any() else 0.2)
