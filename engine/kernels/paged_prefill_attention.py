"""Causal attention of chunks of prompts over their pages, many rows in one launch. Letters in `engine.kernels`.

A tile of queries holds consecutive tokens of one row with their G heads side by side, so keys and values are read once
per key head (FlashAttention-2, arXiv 2307.08691, with grouped heads packed). Key tiles that every query of a tile sees
whole are attended to without masks.
"""
# ruff: noqa: N803

from __future__ import annotations

import math
from collections.abc import Sequence as Many
from dataclasses import dataclass

import numpy as np
import torch
import triton.language as tl
from torch.nn import functional

from engine.fp8 import E4M3
from engine.kernels.jit import kernel, layer_strides, power_of_two

_SMALLEST_DOT = 16


@dataclass(frozen=True, slots=True)
class PrefillPlan:
    """The query tiles of one step for one window. Letters in `engine.kernels`.

    Attributes:
        items: [C, 4] int32: row, index among T of the tile's first token, how many tokens, position of the first.
            Those with most keys come first: the device takes programs in order, and short ones fill the end.
        group: G.
        query_rows: rows of a tile; it holds `query_rows // G` tokens.
        key_tokens: keys that a kernel reads at once.
        window: how many latest tokens a query sees, None for all.
    """

    items: torch.Tensor
    group: int
    query_rows: int
    key_tokens: int
    window: int | None


def plan_prefill(
    counts: Many[int],
    starts: Many[int],
    *,
    group: int,
    window: int | None,
    device: torch.device,
    query_rows: int = 128,
    key_tokens: int = 64,
) -> PrefillPlan:
    """Cut chunks into query tiles.

    Args:
        counts: B numbers of new tokens; the rows' tokens follow each other among T. 0 is an empty row.
        starts: B positions of the first new token.
        group: G, at most `query_rows`.
        window: None for all.
        device: for the tensors; copied there at once.
        query_rows: a power of two, at least 16.
        key_tokens: likewise.
    """
    if group > query_rows:
        raise ValueError(f"{group} heads do not fit a tile of {query_rows} rows")
    tokens = query_rows // group
    sizes, offsets = np.asarray(counts, dtype=np.int64), np.asarray(starts, dtype=np.int64)
    num_tiles = -(-sizes // tokens)
    rows = np.repeat(np.arange(len(sizes)), num_tiles)
    skipped = (np.arange(len(rows)) - np.repeat(np.cumsum(num_tiles) - num_tiles, num_tiles)) * tokens
    held = np.minimum(tokens, sizes[rows] - skipped)
    positions = offsets[rows] + skipped
    begins = (np.cumsum(sizes) - sizes)[rows] + skipped
    seen = positions + held if window is None else np.minimum(positions + held, held + window)
    order = np.argsort(-seen, kind="stable")
    items = np.stack((rows, begins, held, positions), axis=1)[order].astype(np.int32)
    return PrefillPlan(torch.from_numpy(items).to(device), group, query_rows, key_tokens, window)


def paged_prefill_attention(
    queries: torch.Tensor, layer: torch.Tensor, page_tables: torch.Tensor, plan: PrefillPlan
) -> torch.Tensor:
    """Attend. The grid follows the plan, so this is not for CUDA graphs.

    Args:
        queries: [T, Hq, D], rotated, heads contiguous; tokens may be strided.
        layer: [N, 2, Hkv, P, D], same dtype or e4m3, this step's keys and values included. Slots that no query sees
            may hold anything, NaN included.
        page_tables: [B, n] int32, columns contiguous; read only where the row has tokens.
        plan: of the B rows; covers the T tokens.

    Returns:
        [T, Hq, D], new memory. Tokens that the plan does not cover stay uninitialised.
    """
    page_stride, half_stride, head_stride = layer_strides(layer)
    num_tokens, num_heads, head_dim = queries.shape
    num_kv_heads, page_size = layer.shape[2], layer.shape[3]
    if num_heads != num_kv_heads * plan.group or layer.shape[4] != head_dim or layer.dtype not in (queries.dtype, E4M3):
        raise ValueError(
            f"queries {list(queries.shape)} {queries.dtype}, layer {list(layer.shape)} {layer.dtype}, "
            f"group {plan.group}"
        )
    if queries.stride(2) != 1 or queries.stride(1) != head_dim or page_tables.stride(-1) != 1:
        raise ValueError(f"strides {list(queries.stride())} of queries, {list(page_tables.stride())} of page tables")
    output = torch.empty((num_tokens, num_heads, head_dim), dtype=queries.dtype, device=queries.device)
    if plan.items.shape[0] == 0:
        return output
    _attend[(num_kv_heads, plan.items.shape[0])](
        queries,
        layer,
        page_tables,
        plan.items,
        output,
        queries.stride(0),
        page_tables.stride(0),
        page_stride,
        half_stride,
        head_stride,
        math.log2(math.e) / math.sqrt(head_dim),
        NUM_HEADS=num_heads,
        GROUP=plan.group,
        HEAD_DIM=head_dim,
        DIM_TILE=max(_SMALLEST_DOT, power_of_two(head_dim)),
        PAGE_SIZE=page_size,
        WINDOW=plan.window or 0,
        QUERY_ROWS=plan.query_rows,
        KEY_TOKENS=plan.key_tokens,
        num_warps=8 if plan.query_rows >= 128 else 4,
        num_stages=3,
    )
    return output


def paged_prefill_attention_twin(
    queries: torch.Tensor,
    layer: torch.Tensor,
    page_tables: torch.Tensor,
    counts: list[int],
    starts: list[int],
    window: int | None,
) -> torch.Tensor:
    """Specification of `paged_prefill_attention`: row by row, with what a plan is made of."""
    output = torch.empty_like(queries, memory_format=torch.contiguous_format)
    page_size, begin = layer.shape[3], 0
    for row, (count, start) in enumerate(zip(counts, starts, strict=True)):
        positions = torch.arange(start + count, device=layer.device)
        pages = page_tables[row].to(torch.int64)[positions // page_size]
        keys_values = layer[pages, :, :, positions % page_size].to(queries.dtype)
        keys, values = keys_values.permute(1, 2, 0, 3)  # [Hkv, S, D] each
        at = torch.arange(start, start + count, device=layer.device).unsqueeze(1)
        visible = positions <= at
        if window is not None:
            visible &= positions > at - window
            hidden = ~visible.any(dim=0)
            keys, values = keys.clone(), values.clone()
            keys[:, hidden], values[:, hidden] = 0, 0  # what nobody sees may be anything
        chunk = queries[begin : begin + count].transpose(0, 1)
        result = functional.scaled_dot_product_attention(chunk, keys, values, attn_mask=visible, enable_gqa=True)
        output[begin : begin + count] = result.transpose(0, 1)
        begin += count
    return output


@kernel
def _attend(
    queries: tl.tensor,
    layer: tl.tensor,
    page_tables: tl.tensor,
    items: tl.tensor,
    output: tl.tensor,
    query_stride: tl.tensor,
    table_stride: tl.tensor,
    page_stride: tl.tensor,
    half_stride: tl.tensor,
    head_stride: tl.tensor,
    scale: tl.tensor,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_TILE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    QUERY_ROWS: tl.constexpr,
    KEY_TOKENS: tl.constexpr,
) -> None:
    """One program: one tile of queries, for one key head. WINDOW 0 is none."""
    kv_head = tl.program_id(0)
    item = items + tl.program_id(1) * 4
    row = tl.load(item).to(tl.int64)
    first_token = tl.load(item + 1).to(tl.int64)
    count = tl.load(item + 2)
    first_position = tl.load(item + 3)
    dims = tl.arange(0, DIM_TILE)
    packed = tl.arange(0, QUERY_ROWS)
    tokens = packed // GROUP
    heads = kv_head * GROUP + packed % GROUP
    is_row = tokens < count
    is_query = is_row[:, None] & (dims < HEAD_DIM)[None, :]
    in_head = heads[:, None] * HEAD_DIM + dims[None, :]
    query = tl.load(queries + (first_token + tokens)[:, None] * query_stride + in_head, mask=is_query, other=0.0)
    # Rows past the last token attend as it does, which keeps them finite, and are not stored.
    at = first_position + tl.minimum(tokens, count - 1)
    end = first_position + count
    keys = layer + kv_head.to(tl.int64) * head_stride
    table = page_tables + row * table_stride

    best = tl.full((QUERY_ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((QUERY_ROWS,), tl.float32)
    result = tl.zeros((QUERY_ROWS, DIM_TILE), tl.float32)
    # Keys that all queries see are [open_begin, open_end), whole tiles of them; before lies the window's edge, after
    # them the causal one.
    if WINDOW > 0:
        low = tl.maximum(first_position + 1 - WINDOW, 0)
        open_begin = (tl.maximum(end - WINDOW, 0) + KEY_TOKENS - 1) // KEY_TOKENS * KEY_TOKENS
    else:
        low = 0
        open_begin = 0
    open_end = tl.maximum(open_begin, (first_position + 1) // KEY_TOKENS * KEY_TOKENS)
    if WINDOW > 0:
        for key_begin in tl.range(low // KEY_TOKENS * KEY_TOKENS, tl.minimum(open_begin, end), KEY_TOKENS):
            best, total, result = _attend_tile(
                query, at, keys, table, key_begin, low, end, best, total, result, page_stride, half_stride, scale,
                HEAD_DIM, DIM_TILE, PAGE_SIZE, WINDOW, KEY_TOKENS, True,
            )  # fmt: skip
    for key_begin in tl.range(open_begin, open_end, KEY_TOKENS):
        best, total, result = _attend_tile(
            query, at, keys, table, key_begin, low, end, best, total, result, page_stride, half_stride, scale,
            HEAD_DIM, DIM_TILE, PAGE_SIZE, WINDOW, KEY_TOKENS, False,
        )  # fmt: skip
    for key_begin in tl.range(open_end, end, KEY_TOKENS):
        best, total, result = _attend_tile(
            query, at, keys, table, key_begin, low, end, best, total, result, page_stride, half_stride, scale,
            HEAD_DIM, DIM_TILE, PAGE_SIZE, WINDOW, KEY_TOKENS, True,
        )  # fmt: skip
    result = result / total[:, None]
    target = output + (first_token + tokens)[:, None] * (NUM_HEADS * HEAD_DIM) + in_head
    tl.store(target, result.to(output.dtype.element_ty), mask=is_query)


@kernel
def _attend_tile(
    query: tl.tensor,
    at: tl.tensor,
    keys: tl.tensor,
    table: tl.tensor,
    key_begin: tl.tensor,
    low: tl.tensor,
    end: tl.tensor,
    best: tl.tensor,
    total: tl.tensor,
    result: tl.tensor,
    page_stride: tl.tensor,
    half_stride: tl.tensor,
    scale: tl.tensor,
    HEAD_DIM: tl.constexpr,
    DIM_TILE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    KEY_TOKENS: tl.constexpr,
    MASKED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """One step of the online softmax: running maximum, sum and weighted values, updated by KEY_TOKENS keys."""
    dims = tl.arange(0, DIM_TILE)
    positions = key_begin + tl.arange(0, KEY_TOKENS)
    if MASKED:
        exists = (positions >= low) & (positions < end)
        pages = tl.load(table + positions // PAGE_SIZE, mask=exists, other=0)
        seen = exists[:, None] & (dims < HEAD_DIM)[None, :]
    else:
        pages = tl.load(table + positions // PAGE_SIZE)
        seen = (positions >= 0)[:, None] & (dims < HEAD_DIM)[None, :]
    slots = pages.to(tl.int64) * page_stride + (positions % PAGE_SIZE) * HEAD_DIM
    source = keys + slots[:, None] + dims[None, :]
    key = tl.load(source, mask=seen, other=0.0).to(query.dtype)
    value = tl.load(source + half_stride, mask=seen, other=0.0).to(query.dtype)
    scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
    if MASKED:
        visible = positions[None, :] <= at[:, None]
        if WINDOW > 0:
            visible &= positions[None, :] > at[:, None] - WINDOW
        scores = tl.where(visible, scores, float("-inf"))
    higher = tl.maximum(best, tl.max(scores, axis=1))
    # A query that has seen no key yet has no maximum to subtract.
    level = tl.where(higher == float("-inf"), 0.0, higher)
    shares = tl.exp2(scores - level[:, None])
    shrink = tl.exp2(best - level)
    total = total * shrink + tl.sum(shares, axis=1)
    result = tl.dot(shares.to(value.dtype), value, result * shrink[:, None], input_precision="ieee")
    return higher, total, result
