"""From a fused projection to rotated queries and written pages, in one launch. Letters in `engine.kernels`."""
# ruff: noqa: N803

from __future__ import annotations

import torch
import triton.language as tl

from engine.fp8 import E4M3, to_e4m3
from engine.kernels.fp8 import saturate
from engine.kernels.jit import kernel, layer_strides, power_of_two, tiles
from engine.kernels.rms_norm import rms_norm_twin
from engine.rope import rotate

_MOST_ELEMENTS = 2048  # of one program's tile of heads


def rotary_page_write(
    qkv: torch.Tensor,
    angles: torch.Tensor,
    angle_rows: torch.Tensor,
    slots: torch.Tensor,
    layer: torch.Tensor,
    *,
    num_heads: int,
    query_norm: torch.Tensor | None = None,
    key_norm: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> torch.Tensor:
    """Norm heads (where weights are given), rotate queries and keys, store keys and values in their slots. Graph-safe.

    Args:
        qkv: [T, (Hq + 2 * Hkv) * D], columns contiguous; not mutated.
        angles: [A, D] contiguous, any float dtype: D / 2 cosines, then D / 2 sines of the pairs `(i, i + D / 2)`.
        angle_rows: [T] int32 or int64, each token's row of `angles`: its position where the table covers positions.
        slots: [T] int64, where each token's keys and values go; a negative one stores nothing (a graph's padding).
        layer: [N, 2, Hkv, P, D] of the dtype of `qkv`, or saturating e4m3; mutated. Two tokens never share a slot.
        num_heads: Hq.
        query_norm: [D], with `key_norm` or not at all (Qwen3).
        key_norm: [D].
        eps: of the norms.

    Returns:
        [T, Hq, D], rotated queries, new memory. Products are in float32 and rounded once, normed heads once before.
    """
    stride_page, stride_half, stride_head = layer_strides(layer)
    num_kv_heads, page_size, head_dim = layer.shape[2:]
    num_tokens, total_heads = qkv.shape[0], num_heads + 2 * num_kv_heads
    if qkv.shape[1] != total_heads * head_dim or qkv.stride(1) != 1 or layer.dtype not in (qkv.dtype, E4M3):
        raise ValueError(f"{list(qkv.shape)} {qkv.dtype} is not {total_heads} heads of {head_dim} for {layer.dtype}")
    if head_dim % 2 or angles.shape[1] != head_dim or not angles.is_contiguous():
        raise ValueError(f"angles {list(angles.shape)} do not turn heads of {head_dim}")
    if angle_rows.shape != (num_tokens,) or slots.shape != (num_tokens,):
        raise ValueError(f"{num_tokens} tokens, angle rows {list(angle_rows.shape)}, slots {list(slots.shape)}")
    if (query_norm is None) != (key_norm is None):
        raise ValueError("norms of queries and keys come together")
    queries = torch.empty((num_tokens, num_heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    if num_tokens == 0:
        return queries
    half_tile = power_of_two(head_dim // 2)
    head_tile = max(1, min(power_of_two(total_heads), _MOST_ELEMENTS // half_tile))
    _rotary_page_write[(num_tokens, tiles(total_heads, head_tile))](
        qkv,
        angles,
        angle_rows,
        slots,
        query_norm,
        key_norm,
        queries,
        layer,
        qkv.stride(0),
        stride_page,
        stride_half,
        stride_head,
        eps,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        PAGE_SIZE=page_size,
        HEAD_DIM=head_dim,
        HEAD_TILE=head_tile,
        HALF_TILE=half_tile,
        NORMS=query_norm is not None,
        FP8=layer.dtype is E4M3,
    )
    return queries


def rotary_page_write_twin(
    qkv: torch.Tensor,
    angles: torch.Tensor,
    angle_rows: torch.Tensor,
    slots: torch.Tensor,
    layer: torch.Tensor,
    *,
    num_heads: int,
    query_norm: torch.Tensor | None = None,
    key_norm: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> torch.Tensor:
    """Specification of `rotary_page_write`, by the operations of `engine.transformer`."""
    num_kv_heads, page_size, head_dim = layer.shape[2:]
    heads = qkv.reshape(qkv.shape[0], -1, head_dim)
    queries, keys, values = heads.tensor_split([num_heads, num_heads + num_kv_heads], dim=1)
    if query_norm is not None and key_norm is not None:
        queries = rms_norm_twin(queries, query_norm, eps)
        keys = rms_norm_twin(keys, key_norm, eps)
    cos, sin = angles[angle_rows].to(torch.float32).unsqueeze(1).chunk(2, dim=-1)
    queries = rotate(queries.to(torch.float32), cos, sin).to(qkv.dtype)
    keys = rotate(keys.to(torch.float32), cos, sin).to(qkv.dtype)
    kept = slots >= 0
    pages, offsets = slots[kept] // page_size, slots[kept] % page_size
    stored = torch.stack((keys, values), dim=1)[kept]
    layer[pages, :, :, offsets] = to_e4m3(stored) if layer.dtype is E4M3 else stored
    return queries


@kernel
def _rotary_page_write(
    qkv: tl.tensor,
    angles: tl.tensor,
    angle_rows: tl.tensor,
    slots: tl.tensor,
    query_norm: tl.tensor,
    key_norm: tl.tensor,
    queries: tl.tensor,
    layer: tl.tensor,
    row_stride: tl.tensor,
    page_stride: tl.tensor,
    half_stride: tl.tensor,
    head_stride: tl.tensor,
    eps: tl.tensor,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    HALF_TILE: tl.constexpr,
    NORMS: tl.constexpr,
    FP8: tl.constexpr,
) -> None:
    """One program: HEAD_TILE heads of one token, whichever of queries, keys and values they are."""
    num_pairs: tl.constexpr = HEAD_DIM // 2
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEAD_TILE + tl.arange(0, HEAD_TILE)[:, None]
    pairs = tl.arange(0, HALF_TILE)[None, :]
    is_query = heads < NUM_HEADS
    is_value = heads >= NUM_HEADS + NUM_KV_HEADS
    is_pair = pairs < num_pairs
    inside = (heads < NUM_HEADS + 2 * NUM_KV_HEADS) & is_pair

    source = qkv + token * row_stride + heads * HEAD_DIM + pairs
    first = tl.load(source, mask=inside, other=0.0)
    second = tl.load(source + num_pairs, mask=inside, other=0.0)
    left, right = first.to(tl.float32), second.to(tl.float32)
    if NORMS:
        squares = tl.sum(left * left, axis=1) + tl.sum(right * right, axis=1)
        scale = tl.rsqrt(squares / HEAD_DIM + eps)[:, None]
        of_query = tl.load(query_norm + pairs, mask=is_pair, other=0.0).to(tl.float32)
        of_key = tl.load(key_norm + pairs, mask=is_pair, other=0.0).to(tl.float32)
        left = left * scale * tl.where(is_query, of_query, of_key)
        of_query = tl.load(query_norm + num_pairs + pairs, mask=is_pair, other=0.0).to(tl.float32)
        of_key = tl.load(key_norm + num_pairs + pairs, mask=is_pair, other=0.0).to(tl.float32)
        right = right * scale * tl.where(is_query, of_query, of_key)
        left, right = left.to(first.dtype).to(tl.float32), right.to(first.dtype).to(tl.float32)
    angle = angles + tl.load(angle_rows + token).to(tl.int64) * HEAD_DIM + pairs
    cos = tl.load(angle, mask=is_pair, other=0.0).to(tl.float32)
    sin = tl.load(angle + num_pairs, mask=is_pair, other=0.0).to(tl.float32)
    # Values pass by untouched: even an infinity among them must not meet a product.
    turned_first = tl.where(is_value, first, (left * cos - right * sin).to(first.dtype))
    turned_second = tl.where(is_value, second, (right * cos + left * sin).to(first.dtype))

    target = queries + (token * NUM_HEADS + heads) * HEAD_DIM + pairs
    tl.store(target, turned_first, mask=inside & is_query)
    tl.store(target + num_pairs, turned_second, mask=inside & is_query)
    slot = tl.load(slots + token).to(tl.int64)
    if slot >= 0:
        kv_head = heads - NUM_HEADS  # values follow keys
        half = (kv_head >= NUM_KV_HEADS).to(tl.int64)
        head = (kv_head - half * NUM_KV_HEADS).to(tl.int64)
        page = layer + (slot // PAGE_SIZE) * page_stride + (slot % PAGE_SIZE) * HEAD_DIM
        in_page = page + half * half_stride + head * head_stride + pairs
        if FP8:
            stored_first, stored_second = saturate(turned_first.to(tl.float32)), saturate(turned_second.to(tl.float32))
        else:
            stored_first, stored_second = turned_first, turned_second
        tl.store(in_page, stored_first, mask=inside & (heads >= NUM_HEADS))
        tl.store(in_page + num_pairs, stored_second, mask=inside & (heads >= NUM_HEADS))
