"""Attention of chunks by oneDNN's bfloat16 products, a run of queries at a time.

torch's own flash attention for CPUs is fast with AMX; without, it reaches a fifth of the rate of the products that the
linear layers use (`python bench/cpu_engine.py --split`). So scores are made by those products in a buffer that is kept:
turned into weights where they lie, and never given back to the system, which would cost a page fault per 4 KiB. Scores
are rounded to bfloat16 before the softmax, which computes in float32; `transformers` in its eager mode rounds alike.

Letters: C tokens of the chunk, Hq query heads, Hkv key/value heads, G = Hq / Hkv, D head_dim, S visible slots,
R queries of a run, N pages, P page_size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from engine.attention_inputs import Chunk

_SCORES = 2**23
"""Numbers that a run's scores may have: 16 MiB of bfloat16."""
_LEAST_RUN, _MOST_RUN = 32, 256
"""Fewer queries than this make the products slow; more would compute too much of what lies ahead of the first ones."""

Softmax = Callable[[torch.Tensor, torch.Tensor, int, int], None]
"""Turns scores `[H, R, S]` into weights, to be multiplied by the `[H, R]` float32 that it fills in.

Then come the slot of the first query and the window, 0 for none.
"""


class ChunkAttention:
    """Attention of one chunk after another. Owns its buffers; one step at a time."""

    def __init__(self, softmax: Softmax | None) -> None:
        """`softmax` of a compiled kernel, None for torch's."""
        self._softmax = softmax or _softmax
        self._scores = torch.empty(0, dtype=torch.bfloat16)
        self._gathered = torch.empty(0, dtype=torch.bfloat16)

    def attend(
        self,
        queries: torch.Tensor,
        keys_values: torch.Tensor,
        layer: torch.Tensor,
        chunk: Chunk,
        output: torch.Tensor,
    ) -> None:
        """Causal attention of a chunk over its past and itself.

        Args:
            queries: [C, Hq, D] bf16, rotated.
            keys_values: [C, 2, Hkv, D] of the chunk itself.
            layer: [N, 2, Hkv, P, D], one layer of the pool.
            chunk: whose it is.
            output: [C, Hq * D], written.
        """
        length, num_heads, head_dim = queries.shape
        keys, values = self._keys_values(keys_values, layer, chunk)
        num_kv_heads = keys.shape[0]
        group = num_heads // num_kv_heads
        grouped = queries.view(length, num_kv_heads, group, head_dim).permute(1, 2, 0, 3)  # [Hkv, G, C, D]
        base = chunk.start - chunk.first_position  # slot of the first query
        begin = 0
        while begin < length:
            run = min(_MOST_RUN, _SCORES // (num_heads * (base + begin + _MOST_RUN)))
            end = min(begin + max(_LEAST_RUN, run), length)
            low = 0 if chunk.window is None else max(0, base + begin + 1 - chunk.window)
            high = base + end
            shape = (num_kv_heads, group * (end - begin), high - low)
            scores = self._buffer("_scores", shape)
            torch.baddbmm(
                scores,
                grouped[:, :, begin:end].reshape(num_kv_heads, -1, head_dim),
                keys[:, low:high].transpose(1, 2),
                beta=0,
                alpha=head_dim**-0.5,
                out=scores,
            )
            factors = torch.empty(num_kv_heads * group, end - begin)
            self._softmax(scores.view(*factors.shape, -1), factors, base + begin - low, chunk.window or 0)
            result = torch.bmm(scores, values[:, low:high]).view(num_kv_heads, group, end - begin, head_dim)
            result *= factors.view(num_kv_heads, group, -1, 1)
            output[begin:end].view(end - begin, num_kv_heads, group, head_dim).copy_(result.permute(2, 0, 1, 3))
            begin = end

    def _keys_values(
        self, keys_values: torch.Tensor, layer: torch.Tensor, chunk: Chunk
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`[Hkv, slots, D]` each: the chunk's own, or its pages end to end in the kept buffer."""
        if chunk.page_ids is None:
            keys, values = keys_values.permute(1, 2, 0, 3)
            return keys, values
        by_head = layer.permute(1, 2, 0, 3, 4)  # [2, Hkv, N, P, D]
        _, num_kv_heads, _, page_size, head_dim = by_head.shape
        gathered = self._buffer("_gathered", (2, num_kv_heads, chunk.page_ids.shape[0], page_size, head_dim))
        torch.index_select(by_head, 2, chunk.page_ids, out=gathered)
        keys, values = gathered.flatten(2, 3)
        return keys, values

    def _buffer(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """A kept buffer in this shape, made larger if need be."""
        size = 1
        for extent in shape:
            size *= extent
        kept: torch.Tensor = getattr(self, name)
        if kept.numel() < size:
            kept = torch.empty(size, dtype=torch.bfloat16)
            setattr(self, name, kept)
        return kept[:size].view(shape)


def _softmax(scores: torch.Tensor, factors: torch.Tensor, first_slot: int, window: int) -> None:
    """The twin of `engine.cpu.row_kernels.softmax_rows`. Mutates both tensors."""
    num_queries, num_slots = scores.shape[-2:]
    slots = torch.arange(num_slots).unsqueeze(0)
    places = torch.arange(first_slot, first_slot + num_queries).unsqueeze(1)
    hidden = slots > places
    if window:
        hidden |= slots <= places - window
    scores.masked_fill_(hidden, -torch.inf)
    torch.softmax(scores, -1, out=scores)
    factors.fill_(1)
