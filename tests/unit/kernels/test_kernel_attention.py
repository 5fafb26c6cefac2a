"""Paged attention against row-by-row attention, on pools in which every slot that no row may see is NaN."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_kit import assert_close, poisoned_pool
from support.engine_driver import make_sequence

from engine.attention import attend
from engine.attention_inputs import InputShape, gather_plan
from engine.inputs import build_inputs
from engine.kernels.decode_plan import DecodePlan, plan_decode
from engine.kernels.paged_decode_attention import paged_decode_attention, paged_decode_attention_twin
from engine.kernels.paged_prefill_attention import (
    paged_prefill_attention,
    paged_prefill_attention_twin,
    plan_prefill,
)
from engine.plan import Row

CPU = torch.device("cpu")
HEADS = [(4, 2, 16), (7, 1, 24), (3, 3, 80), (16, 2, 32)]


def small_plan(lengths: list[int], window: int | None, device: torch.device, capacity: int | None = None) -> DecodePlan:
    """Parts of 32 tokens, so that short contexts are split and merged."""
    return plan_decode(
        lengths, window=window, num_programs=3, device=device, tile_tokens=16, min_part_tokens=32, max_parts=4,
        capacity=capacity,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), HEADS)
@pytest.mark.parametrize("window", [None, 20])
def test_decode_equals_its_twin(
    num_heads: int, num_kv_heads: int, head_dim: int, window: int | None, dtype: torch.dtype, device: torch.device
) -> None:
    torch.manual_seed(0)
    lengths = [33, 0, 1, 150, 32]
    first_seen = [max(0, length - window) if window else 0 for length in lengths]
    layer, tables = poisoned_pool(
        lengths,
        num_kv_heads=num_kv_heads,
        page_size=4,
        head_dim=head_dim,
        dtype=dtype,
        device=device,
        first_seen=first_seen,
    )
    queries = torch.randn(5, (num_heads + 2) * head_dim, device=device).to(dtype)
    queries = queries[:, : num_heads * head_dim].view(5, num_heads, head_dim)  # as they lie in a fused projection
    attended = paged_decode_attention(queries, layer, tables, small_plan(lengths, window, device))
    expected = paged_decode_attention_twin(queries, layer, tables, lengths, window)
    assert_close("decode", attended, expected, roundings=32 if dtype is torch.float32 else 3)
    assert not attended[1].any(), "an empty row is zero"


@pytest.mark.parametrize("page_size", [1, 3, 16, 64])
def test_decode_takes_any_page_size(page_size: int, device: torch.device) -> None:
    torch.manual_seed(1)
    lengths = [70, 5]
    layer, tables = poisoned_pool(
        lengths, num_kv_heads=2, page_size=page_size, head_dim=16, dtype=torch.float32, device=device
    )
    queries = torch.randn(2, 4, 16, device=device)
    attended = paged_decode_attention(queries, layer, tables, small_plan(lengths, None, device))
    expected = paged_decode_attention_twin(queries, layer, tables, lengths, None)
    assert_close("decode", attended, expected, roundings=32)


def test_company_and_padding_do_not_change_a_bit(device: torch.device) -> None:
    torch.manual_seed(2)
    lengths = [150, 40, 0, 90]
    layer, tables = poisoned_pool(lengths, num_kv_heads=1, page_size=4, head_dim=16, dtype=torch.float32, device=device)
    queries = torch.randn(4, 2, 16, device=device)
    together = paged_decode_attention(queries, layer, tables, small_plan(lengths, None, device, capacity=64))
    for row, length in enumerate(lengths):
        one = slice(row, row + 1)
        alone = paged_decode_attention(queries[one], layer, tables[one], small_plan([length], None, device))
        assert torch.equal(alone[0], together[row])


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 700), min_size=1, max_size=9),
    window=st.none() | st.integers(1, 300),
    num_programs=st.integers(1, 12),
    max_parts=st.integers(1, 6),
)
def test_a_plan_covers_each_visible_token_once(
    lengths: list[int], window: int | None, num_programs: int, max_parts: int
) -> None:
    plan = plan_decode(
        lengths, window=window, num_programs=num_programs, device=CPU, tile_tokens=16, min_part_tokens=32,
        max_parts=max_parts, capacity=64,
    )  # fmt: skip
    bounds = plan.program_items.tolist()
    assert bounds[0] == 0
    assert bounds == sorted(bounds)
    items = plan.items[: bounds[-1]].tolist()
    seen: dict[int, list[int]] = {row: [] for row in range(len(lengths))}
    for row, first, end, _ in items:
        assert first < end
        seen[row] += range(first, end)
    for row, length in enumerate(lengths):
        assert seen[row] == list(range(max(0, length - window) if window else 0, length))
        mine = [place for owner, _, _, place in items if owner == row]
        first_place, count = plan.row_parts[row].tolist()
        assert count == len(mine) <= max_parts
        assert mine == ([-1] if count == 1 else list(range(first_place, first_place + count)))
    # No program has more than its share and one part.
    costs = [-(-end // 16) - first // 16 for _, first, end, _ in items]
    loads = [sum(costs[begin:stop]) for begin, stop in pairwise(bounds)]
    assert max(loads) <= -(-sum(costs) // num_programs) + max(costs, default=0)


def test_a_plan_that_outgrows_its_graph_is_refused() -> None:
    with pytest.raises(ValueError, match="2 parts do not fit a plan of 1"):
        small_plan([60], None, CPU, capacity=1)
    with pytest.raises(ValueError, match="whole tiles"):
        plan_decode([1], window=None, num_programs=1, device=CPU, tile_tokens=64, min_part_tokens=96)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), HEADS)
@pytest.mark.parametrize("window", [None, 1, 21])
def test_prefill_equals_its_twin(
    num_heads: int, num_kv_heads: int, head_dim: int, window: int | None, dtype: torch.dtype, device: torch.device
) -> None:
    torch.manual_seed(3)
    counts, starts = [19, 0, 1, 40], [0, 0, 37, 50]
    lengths = [count + start for count, start in zip(counts, starts, strict=True)]
    first_seen = [max(0, start + 1 - window) if window else 0 for start in starts]
    layer, tables = poisoned_pool(
        lengths,
        num_kv_heads=num_kv_heads,
        page_size=4,
        head_dim=head_dim,
        dtype=dtype,
        device=device,
        first_seen=first_seen,
    )
    queries = torch.randn(60, num_heads, head_dim, device=device).to(dtype)
    plan = plan_prefill(
        counts, starts, group=num_heads // num_kv_heads, window=window, device=device, query_rows=32, key_tokens=16
    )
    attended = paged_prefill_attention(queries, layer, tables, plan)
    expected = paged_prefill_attention_twin(queries, layer, tables, counts, starts, window)
    assert_close("prefill", attended, expected, roundings=32 if dtype is torch.float32 else 3)


@pytest.mark.parametrize("window", [None, 9])
def test_both_equal_the_attention_of_the_cpu(window: int | None, device: torch.device) -> None:
    torch.manual_seed(4)
    lengths, counts = [30, 17, 45], [12, 1, 1]
    layer, tables = poisoned_pool(lengths, num_kv_heads=2, page_size=4, head_dim=16, dtype=torch.float32, device=device)
    rows = []
    for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        sequence = make_sequence([1] * length)
        sequence.page_table.extend(tables[row, : -(-length // 4)].tolist())
        rows.append(Row(sequence, length - count, count, sample=False))
    shape = InputShape(page_size=4, windows=(window,), last_window=window, layer_token_bytes=256, device=device)
    inputs = build_inputs(rows, shape, gather_plan)
    keys_values = layer[inputs.page_ids, :, :, inputs.offsets]
    queries = torch.randn(14, 4, 16, device=device)
    expected = attend(queries, keys_values, layer, inputs.attention[window]).view(14, 4, 16)

    starts = [length - count for length, count in zip(lengths, counts, strict=True)]
    plan = plan_prefill(counts, starts, group=2, window=window, device=device, query_rows=16, key_tokens=16)
    assert_close("prefill", paged_prefill_attention(queries, layer, tables, plan), expected, roundings=32)
    decoded = paged_decode_attention(queries[12:], layer, tables[1:], small_plan(lengths[1:], window, device))
    assert_close("decode", decoded, expected[12:], roundings=32)


def test_empty_launches_and_refusals(device: torch.device) -> None:
    layer, tables = poisoned_pool([4], num_kv_heads=2, page_size=4, head_dim=16, dtype=torch.float32, device=device)
    nothing = torch.zeros(0, 4, 16, device=device)
    assert paged_decode_attention(nothing, layer, tables[:0], small_plan([], None, device)).shape == (0, 4, 16)
    no_tiles = plan_prefill([0], [3], group=2, window=None, device=device)
    assert paged_prefill_attention(nothing, layer, tables, no_tiles).shape == (0, 4, 16)
    queries = torch.zeros(1, 4, 16, device=device)
    with pytest.raises(ValueError, match="a plan for 2"):
        paged_decode_attention(queries, layer, tables, small_plan([4, 4], None, device))
    with pytest.raises(ValueError, match="bfloat16"):
        paged_decode_attention(queries.bfloat16(), layer, tables, small_plan([4], None, device))
    with pytest.raises(ValueError, match="group 4"):
        paged_prefill_attention(queries, layer, tables, plan_prefill([1], [3], group=4, window=None, device=device))
    with pytest.raises(ValueError, match="do not fit"):
        plan_prefill([1], [3], group=17, window=None, device=device, query_rows=16)
