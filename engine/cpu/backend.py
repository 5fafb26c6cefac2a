"""The CPU backend: packed products, attention over pages without copies, the products' own rate for prompts.

For bfloat16, the dtype in which CPUs with instructions for it compute fast; float32 stays with `TorchBackend`, whose
results are exact to the last bit that its tests compare.
"""

from __future__ import annotations

import numpy as np
import torch

from engine.attention import attend
from engine.attention_inputs import AttentionInputs, DecodeRows
from engine.cpu.prefill_attention import ChunkAttention
from engine.cpu.shared_cores import SharedCores
from engine.errors import NoKernels
from engine.packed_backend import PackedBackend
from fleet.logs import get_logger

_log = get_logger("cpu_backend")


class CpuBackend(PackedBackend):
    """`PackedBackend` with attention of its own. Not for two steps at once: it keeps buffers."""

    def __init__(self, cores: SharedCores | None = None) -> None:
        self._cores = cores
        self._chunks = ChunkAttention()
        self._rows = _row_attention()

    def warm(self, *, group: int, head_dim: int, page_size: int) -> None:
        """Compile, or load from the cache, what decoding needs, so that no request waits for it."""
        if self._rows is not None:
            self._rows.compile(group, head_dim, page_size)

    def begin_layer(self) -> None:
        """Take our present share of cores that are shared."""
        if self._cores is not None:
            self._cores.refresh()

    def attention(
        self, queries: torch.Tensor, keys_values: torch.Tensor | None, layer: torch.Tensor, inputs: object
    ) -> torch.Tensor:
        """Single tokens by the compiled kernel, chunks by products."""
        assert isinstance(inputs, AttentionInputs)  # noqa: S101 - made by `plan_attention` of this very backend
        assert keys_values is not None  # noqa: S101 - likewise by `rotate_and_write`
        if (
            queries.dtype is not torch.bfloat16
            or layer.dtype is not torch.bfloat16
            or (inputs.decode is not None and self._rows is None)
        ):
            return attend(queries, keys_values, layer, inputs)
        num_tokens, num_heads, head_dim = queries.shape
        output = torch.empty(num_tokens, num_heads * head_dim, dtype=queries.dtype)
        if inputs.decode is not None and self._rows is not None:
            self._rows.attend(queries, layer, inputs.decode, output)
        for chunk in inputs.chunks:
            span = slice(chunk.begin, chunk.end)
            self._chunks.attend(queries[span], keys_values[span], layer, chunk, output[span])
        return output


class RowAttention:
    """Launches `engine.cpu.decode_attention` on torch's own threads. Raises NoKernels where it cannot be had."""

    def __init__(self) -> None:
        from engine.cpu.decode_attention import decode_attention
        from engine.cpu.jit import Team

        self._compile = decode_attention
        self._team = Team()

    def compile(self, group: int, head_dim: int, page_size: int) -> None:
        """Have the kernel for this shape ready."""
        self._compile(group, head_dim, page_size)

    def attend(self, queries: torch.Tensor, layer: torch.Tensor, rows: DecodeRows, output: torch.Tensor) -> None:
        """Attention of single tokens.

        Args:
            queries: [T, Hq, D] bf16, each token's heads end to end.
            layer: [N, 2, Hkv, P, D] bf16, one layer of the pool; a page's share of a layer is one run.
            rows: B of the T tokens.
            output: [T, Hq * D] bf16, contiguous; written for those tokens.
        """
        num_kv_heads, page_size, head_dim = layer.shape[2:]
        if queries.stride(1) != head_dim or queries.stride(2) != 1:
            queries = queries.contiguous()
        kernel = self._compile(queries.shape[1] // num_kv_heads, head_dim, page_size)
        self._team.run(
            kernel.address,
            np.array(
                (
                    queries.data_ptr(),
                    rows.pages.ctypes.data,
                    rows.starts.ctypes.data,
                    rows.firsts.ctypes.data,
                    rows.ends.ctypes.data,
                    rows.tokens.ctypes.data,
                    output.data_ptr(),
                    layer.data_ptr(),
                    len(rows.tokens),
                    num_kv_heads,
                    layer.stride(0),
                    queries.stride(0),
                ),
                dtype=np.int64,
            ),
        )


def _row_attention() -> RowAttention | None:
    try:
        return RowAttention()
    except (ImportError, OSError, NoKernels) as error:
        _log.warning("no compiled attention on this machine, decoding is slower", reason=str(error))
        return None
