"""Paged attention in plain torch: the twin of every attention kernel.

Letters: T tokens of the step, Hq query heads, Hkv key/value heads, G = Hq / Hkv, D head_dim, P page_size, N pages,
B rows of a decode group, S gathered slots, C tokens of a chunk.

Gathering is one copy: `layer` is viewed with the page axis third, so that `index_select` lays the pages of one head end
to end, which is what attention reads. Query heads that share a key head ride as extra queries (decode) or over an
expanded view (chunks), so grouped-query attention never repeats keys in memory.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from engine.attention_inputs import AttentionInputs, Chunk, DecodeGroup
from engine.exactness import attend_exactly, is_exact

# Queries of a chunk that has a past attend in runs of this many: the mask stays `run x keys`, and keys after the
# run's last query or before its first window are not read.
QUERY_RUN = 256


def attend(
    queries: torch.Tensor, keys_values: torch.Tensor, layer: torch.Tensor, inputs: AttentionInputs
) -> torch.Tensor:
    """Causal attention for every token of the step.

    Args:
        queries: [T, Hq, D], rotated.
        keys_values: [T, 2, Hkv, D] of this step, already in `layer` too.
        layer: [N, 2, Hkv, P, D], one layer of the pool, of the queries' dtype or e4m3. Slots that no row names may hold
            anything, NaN included.
        inputs: groups and chunks that cover the T tokens.

    Returns:
        [T, Hq * D], new memory. A row's result depends on its own sequence only.
    """
    num_tokens, num_heads, head_dim = queries.shape
    output = torch.empty(num_tokens, num_heads * head_dim, dtype=queries.dtype, device=queries.device)
    for group in inputs.groups:
        output[group.tokens] = _attend_group(queries.index_select(0, group.tokens), layer, group)
    for chunk in inputs.chunks:
        span = slice(chunk.begin, chunk.end)
        output[span] = _attend_chunk(queries[span], keys_values[span], layer, chunk)
    return output


def _attend_group(queries: torch.Tensor, layer: torch.Tensor, group: DecodeGroup) -> torch.Tensor:
    """`[B, Hq, D]` over the group's pages, `[B, Hq * D]`."""
    size, num_heads, head_dim = queries.shape
    gathered = gather_pages(layer, group.page_ids, queries.dtype)  # [2, Hkv, B * S, D]
    num_kv_heads = gathered.shape[1]
    gathered = gathered.view(2, num_kv_heads, size, -1, head_dim)
    if group.hidden_rows is not None:
        gathered[:, :, group.hidden_rows, group.hidden_slots] = 0
    else:
        gathered = gathered[:, :, :, group.first : group.end]
    keys, values = gathered.transpose(1, 2)  # [B, Hkv, S, D] each
    grouped = queries.view(size, num_kv_heads, num_heads // num_kv_heads, head_dim)
    if is_exact(queries):
        visible = None if group.visible is None else group.visible.squeeze(1).repeat_interleave(num_kv_heads, dim=0)
        num = size * num_kv_heads
        return attend_exactly(
            grouped.reshape(num, -1, head_dim),
            keys.reshape(num, -1, head_dim),
            values.reshape(num, -1, head_dim),
            visible,
        ).reshape(size, num_heads * head_dim)
    result = functional.scaled_dot_product_attention(grouped, keys, values, attn_mask=group.visible)
    return result.reshape(size, num_heads * head_dim)


def _attend_chunk(queries: torch.Tensor, keys_values: torch.Tensor, layer: torch.Tensor, chunk: Chunk) -> torch.Tensor:
    """`[C, Hq, D]` over past and present, `[C, Hq * D]`."""
    length, num_heads, head_dim = queries.shape
    if chunk.page_ids is None:
        keys, values = keys_values.permute(1, 2, 0, 3)  # [Hkv, C, D] each
    else:
        keys, values = gather_pages(layer, chunk.page_ids, queries.dtype)
    num_kv_heads = keys.shape[0]
    group = num_heads // num_kv_heads
    grouped = queries.view(length, num_kv_heads, group, head_dim).permute(1, 2, 0, 3)  # [Hkv, G, C, D]
    exact = is_exact(queries)
    shared = keys, values
    keys = keys.unsqueeze(1).expand(-1, group, -1, -1)  # [Hkv, G, slots, D], one copy for G heads
    values = values.unsqueeze(1).expand(-1, group, -1, -1)
    if chunk.page_ids is None and chunk.window is None and not exact:
        result = functional.scaled_dot_product_attention(grouped, keys, values, is_causal=True)
        return result.permute(2, 0, 1, 3).reshape(length, num_heads * head_dim)
    output = torch.empty(length, num_kv_heads, group, head_dim, dtype=queries.dtype, device=queries.device)
    base = chunk.start - chunk.first_position  # slot of the first query
    for begin in range(0, length, QUERY_RUN):
        end = min(begin + QUERY_RUN, length)
        low = 0 if chunk.window is None else max(0, base + begin + 1 - chunk.window)
        high = base + end
        query_slots = torch.arange(base + begin, high, device=queries.device).unsqueeze(1)
        key_slots = torch.arange(low, high, device=queries.device)
        visible = key_slots <= query_slots
        if chunk.window is not None:
            visible &= key_slots > query_slots - chunk.window
        if exact:
            result = attend_exactly(
                grouped[:, :, begin:end].reshape(num_kv_heads, -1, head_dim),
                shared[0][:, low:high],
                shared[1][:, low:high],
                visible.repeat(group, 1),
            ).view(num_kv_heads, group, end - begin, head_dim)
        else:
            result = functional.scaled_dot_product_attention(
                grouped[:, :, begin:end], keys[:, :, low:high], values[:, :, low:high], attn_mask=visible
            )
        output[begin:end] = result.permute(2, 0, 1, 3)
    return output.view(length, num_heads * head_dim)


def gather_pages(layer: torch.Tensor, page_ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Keys and values of pages end to end, `[2, Hkv, len(page_ids) * P, D]`, copied once.

    Args:
        layer: [N, 2, Hkv, P, D].
        page_ids: [n] int64.
        dtype: of the result; FP8 pages are widened to it.
    """
    by_head = layer.permute(1, 2, 0, 3, 4)  # [2, Hkv, N, P, D]
    return by_head.index_select(2, page_ids).flatten(2, 3).to(dtype)
