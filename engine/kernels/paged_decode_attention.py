"""Attention of one new token per row over its pages: split over the context, then merged. Letters in `engine.kernels`.

The G query heads that share a key head ride in one tile, so keys and values are read once for all of them. Work is
shared out by `engine.kernels.decode_plan`. Softmax is online (arXiv 1805.02867) in base 2 and float32.
"""
# ruff: noqa: N803

from __future__ import annotations

import math

import torch
import triton.language as tl
from torch.nn import functional

from engine.fp8 import E4M3
from engine.kernels.decode_plan import DecodePlan
from engine.kernels.jit import kernel, layer_strides, power_of_two

_SMALLEST_DOT = 16  # rows that a matrix instruction takes at least


def paged_decode_attention(
    queries: torch.Tensor, layer: torch.Tensor, page_tables: torch.Tensor, plan: DecodePlan
) -> torch.Tensor:
    """Attend. Graph-safe where the plan was made with a `capacity`.

    Args:
        queries: [B, Hq, D], rotated, heads contiguous; rows may be strided.
        layer: [N, 2, Hkv, P, D], same dtype or e4m3, this step's keys and values included. Slots that no row sees may
            hold anything, NaN included.
        page_tables: [B, n] int32, columns contiguous; read only where the row has tokens.
        plan: of the B rows.

    Returns:
        [B, Hq, D], new memory; zeros for an empty row.
    """
    page_stride, half_stride, head_stride = layer_strides(layer)
    num_rows, num_heads, head_dim = queries.shape
    num_kv_heads, page_size = layer.shape[2], layer.shape[3]
    if num_heads % num_kv_heads or layer.shape[4] != head_dim or layer.dtype not in (queries.dtype, E4M3):
        raise ValueError(f"queries {list(queries.shape)} {queries.dtype}, layer {list(layer.shape)} {layer.dtype}")
    if queries.stride(2) != 1 or queries.stride(1) != head_dim or page_tables.stride(-1) != 1:
        raise ValueError(f"strides {list(queries.stride())} of queries, {list(page_tables.stride())} of page tables")
    if page_tables.shape[0] != num_rows or plan.row_parts.shape[0] != num_rows:
        raise ValueError(f"{num_rows} rows, {page_tables.shape[0]} tables, a plan for {plan.row_parts.shape[0]}")
    output = torch.empty((num_rows, num_heads, head_dim), dtype=queries.dtype, device=queries.device)
    if num_rows == 0:
        return output
    num_partials = max(1, plan.num_partials)
    partials = torch.empty((num_partials, num_heads, head_dim), dtype=torch.float32, device=queries.device)
    weights = torch.empty((num_partials, num_heads), dtype=torch.float32, device=queries.device)
    group = num_heads // num_kv_heads
    _attend[(plan.program_items.shape[0] - 1, num_kv_heads)](
        queries,
        layer,
        page_tables,
        plan.items,
        plan.program_items,
        output,
        partials,
        weights,
        queries.stride(0),
        page_tables.stride(0),
        page_stride,
        half_stride,
        head_stride,
        math.log2(math.e) / math.sqrt(head_dim),
        NUM_HEADS=num_heads,
        GROUP=group,
        GROUP_TILE=max(_SMALLEST_DOT, power_of_two(group)),
        HEAD_DIM=head_dim,
        DIM_TILE=max(_SMALLEST_DOT, power_of_two(head_dim)),
        PAGE_SIZE=page_size,
        TILE=plan.tile_tokens,
        num_warps=4,
        num_stages=3,
    )
    _merge[(num_rows, num_heads)](
        output,
        partials,
        weights,
        plan.row_parts,
        NUM_HEADS=num_heads,
        HEAD_DIM=head_dim,
        DIM_TILE=power_of_two(head_dim),
    )
    return output


def paged_decode_attention_twin(
    queries: torch.Tensor, layer: torch.Tensor, page_tables: torch.Tensor, lengths: list[int], window: int | None
) -> torch.Tensor:
    """Specification of `paged_decode_attention`: row by row, with the lengths and window that a plan is made of."""
    output = torch.zeros_like(queries)
    page_size = layer.shape[3]
    for row, length in enumerate(lengths):
        if not length:
            continue
        first = 0 if window is None else max(0, length - window)
        positions = torch.arange(first, length, device=layer.device)
        pages = page_tables[row].to(torch.int64)[positions // page_size]
        keys_values = layer[pages, :, :, positions % page_size].to(queries.dtype)  # [S, 2, Hkv, D]
        keys, values = keys_values.permute(1, 2, 0, 3)
        output[row] = functional.scaled_dot_product_attention(
            queries[row].unsqueeze(1), keys, values, enable_gqa=True
        ).squeeze(1)
    return output


@kernel
def _attend(
    queries: tl.tensor,
    layer: tl.tensor,
    page_tables: tl.tensor,
    items: tl.tensor,
    program_items: tl.tensor,
    output: tl.tensor,
    partials: tl.tensor,
    weights: tl.tensor,
    query_stride: tl.tensor,
    table_stride: tl.tensor,
    page_stride: tl.tensor,
    half_stride: tl.tensor,
    head_stride: tl.tensor,
    scale: tl.tensor,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_TILE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_TILE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """One program: its share of the plan's items, for one key head."""
    kv_head = tl.program_id(1)
    groups = tl.arange(0, GROUP_TILE)
    dims = tl.arange(0, DIM_TILE)
    heads = kv_head * GROUP + groups
    is_dim = dims < HEAD_DIM
    is_query = (groups < GROUP)[:, None] & is_dim[None, :]
    in_head = heads[:, None] * HEAD_DIM + dims[None, :]
    keys = layer + kv_head.to(tl.int64) * head_stride + dims[None, :]
    program = program_items + tl.program_id(0)
    for item in tl.range(tl.load(program), tl.load(program + 1)):
        row = tl.load(items + item * 4).to(tl.int64)
        first = tl.load(items + item * 4 + 1)
        end = tl.load(items + item * 4 + 2)
        place = tl.load(items + item * 4 + 3).to(tl.int64)
        query = tl.load(queries + row * query_stride + in_head, mask=is_query, other=0.0)
        best = tl.full((GROUP_TILE,), float("-inf"), tl.float32)
        total = tl.zeros((GROUP_TILE,), tl.float32)
        result = tl.zeros((GROUP_TILE, DIM_TILE), tl.float32)
        # Tiles begin at multiples of TILE; each holds a visible position, so `best` is finite from the first one on.
        for begin in tl.range(first // TILE * TILE, end, TILE):
            positions = begin + tl.arange(0, TILE)
            visible = (positions >= first) & (positions < end)
            pages = tl.load(page_tables + row * table_stride + positions // PAGE_SIZE, mask=visible, other=0)
            slots = pages.to(tl.int64) * page_stride + (positions % PAGE_SIZE) * HEAD_DIM
            seen = visible[:, None] & is_dim[None, :]
            key = tl.load(keys + slots[:, None], mask=seen, other=0.0).to(query.dtype)
            value = tl.load(keys + half_stride + slots[:, None], mask=seen, other=0.0).to(query.dtype)
            scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
            scores = tl.where(visible[None, :], scores, float("-inf"))
            higher = tl.maximum(best, tl.max(scores, axis=1))
            shares = tl.exp2(scores - higher[:, None])
            shrink = tl.exp2(best - higher)
            total = total * shrink + tl.sum(shares, axis=1)
            result = result * shrink[:, None]
            result = tl.dot(shares.to(value.dtype), value, result, input_precision="ieee")
            best = higher
        result = result / total[:, None]
        if place < 0:
            target = output + row * NUM_HEADS * HEAD_DIM + in_head
            tl.store(target, result.to(output.dtype.element_ty), mask=is_query)
        else:
            tl.store(partials + place * NUM_HEADS * HEAD_DIM + in_head, result, mask=is_query)
            tl.store(weights + place * NUM_HEADS + heads, best + tl.log2(total), mask=groups < GROUP)


@kernel
def _merge(
    output: tl.tensor,
    partials: tl.tensor,
    weights: tl.tensor,
    row_parts: tl.tensor,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_TILE: tl.constexpr,
) -> None:
    """One program: one head of one row, its parts in order. Leaves rows of one part alone, zeroes empty ones."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    dims = tl.arange(0, DIM_TILE)
    place = tl.load(row_parts + row * 2).to(tl.int64)
    count = tl.load(row_parts + row * 2 + 1)
    if count != 1:
        best = tl.full((1,), float("-inf"), tl.float32)
        total = tl.zeros((1,), tl.float32)
        result = tl.zeros((DIM_TILE,), tl.float32)
        for part in tl.range(0, count):
            at = (place + part) * NUM_HEADS + head
            weight = tl.load(weights + at + tl.arange(0, 1))
            value = tl.load(partials + at * HEAD_DIM + dims, mask=dims < HEAD_DIM, other=0.0)
            higher = tl.maximum(best, weight)
            shrink, share = tl.exp2(best - higher), tl.exp2(weight - higher)
            total = total * shrink + share
            result = result * shrink + value * share
            best = higher
        result = tl.where(count == 0, 0.0, result / tl.where(total == 0.0, 1.0, total))
        target = output + (row * NUM_HEADS + head) * HEAD_DIM + dims
        tl.store(target, result.to(output.dtype.element_ty), mask=dims < HEAD_DIM)
