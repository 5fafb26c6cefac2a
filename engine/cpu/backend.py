"""The CPU backend: packed products, compiled norms and rotation, attention over pages without copies.

For bfloat16, the dtype in which CPUs with instructions for it compute fast; float32 stays with `TorchBackend`, whose
results are exact to the last bit that its tests compare.
"""

from __future__ import annotations

from typing import cast

import numpy as np
import torch

from engine.attention import attend
from engine.attention_inputs import AttentionInputs, DecodeRows
from engine.backend import HeadNorms
from engine.cpu.prefill_attention import ChunkAttention
from engine.cpu.shared_cores import SharedCores
from engine.errors import NoKernels
from engine.inputs import StepInputs
from engine.model_config import ModelConfig
from engine.packed_backend import PackedBackend
from fleet.logs import get_logger

_log = get_logger("cpu_backend")


class CpuBackend(PackedBackend):
    """`PackedBackend` with kernels of its own. Not for two steps at once: it keeps buffers."""

    def __init__(self, cores: SharedCores | None = None) -> None:
        self._cores = cores
        self._rows = _row_kernels()
        self._chunks = ChunkAttention(None if self._rows is None else self._rows.softmax)

    def warm(self, config: ModelConfig, page_size: int) -> None:
        """Compile, or load from the cache, all kernels of the model, so that no request waits for one."""
        if self._rows is not None:
            self._rows.compile(config, page_size)

    def begin_layer(self) -> None:
        """Take our present share of cores that are shared."""
        if self._cores is not None:
            self._cores.refresh()

    def rms_norm(self, hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """In one pass."""
        if self._rows is None or hidden.dtype is not torch.bfloat16 or hidden.dim() != 2 or hidden.stride(1) != 1:
            return super().rms_norm(hidden, weight, eps)
        return self._rows.rms_norm(hidden, weight, eps)

    def gated_silu(self, gate_up: torch.Tensor) -> torch.Tensor:
        """In one pass."""
        if self._rows is None or gate_up.dtype is not torch.bfloat16 or not gate_up.is_contiguous():
            return super().gated_silu(gate_up)
        return self._rows.gated_silu(gate_up)

    def plan_rotation(self, angles: tuple[torch.Tensor, torch.Tensor], inputs: StepInputs) -> object:
        """For the kernel in float32, `[T, R]`; and as they are, for pages that it does not write."""
        del inputs
        cos, sin = angles
        return (cos.squeeze(1).float().contiguous(), sin.squeeze(1).float().contiguous()), angles

    def rotate_and_write(
        self, qkv: torch.Tensor, norms: HeadNorms | None, rotation: object, layer: torch.Tensor, inputs: StepInputs
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """In one pass, in place."""
        wide, angles = cast("tuple[tuple[torch.Tensor, torch.Tensor], ...]", rotation)
        if self._rows is None or layer.dtype is not torch.bfloat16:
            return super().rotate_and_write(qkv, norms, angles, layer, inputs)
        num_tokens, num_kv_heads, head_dim = qkv.shape[0], layer.shape[2], layer.shape[4]
        self._rows.rotate_and_write(qkv, norms, wide, layer, inputs)
        kv_size = 2 * num_kv_heads * head_dim
        queries = qkv[:, :-kv_size].view(num_tokens, -1, head_dim)
        return queries, qkv[:, -kv_size:].view(num_tokens, 2, num_kv_heads, head_dim)

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


class RowKernels:
    """Launches the compiled kernels on torch's own threads. Raises NoKernels where they cannot be had."""

    def __init__(self) -> None:
        from engine.cpu.decode_attention import decode_attention
        from engine.cpu.jit import Team
        from engine.cpu.row_kernels import gated_silu_rows, rms_norm_rows, rotate_rows, softmax_rows

        self._attention, self._rms_norm, self._rotate = decode_attention, rms_norm_rows, rotate_rows
        self._gated_silu, self._softmax = gated_silu_rows, softmax_rows
        self._team = Team()

    def compile(self, config: ModelConfig, page_size: int) -> None:
        """Have the kernels for this model ready."""
        self._attention(config.num_heads // config.num_kv_heads, config.head_dim, page_size)
        self._rms_norm(config.hidden_size, config.rms_norm_eps)
        self._rotate(config.head_dim, page_size, config.rms_norm_eps if config.qk_norm else None)
        self._gated_silu(config.intermediate_size)
        self._softmax()

    def rms_norm(self, hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """The norm of `[T, S]` bf16 with adjacent numbers, new memory."""
        num_rows, size = hidden.shape
        output = torch.empty(num_rows, size, dtype=hidden.dtype)
        words = (hidden.data_ptr(), weight.data_ptr(), output.data_ptr(), num_rows, hidden.stride(0))
        self._team.run(self._rms_norm(size, eps).address, np.array(words, dtype=np.int64), hidden.numel())
        return output

    def gated_silu(self, gate_up: torch.Tensor) -> torch.Tensor:
        """`silu(gate) * up` of `[T, 2 * S]` bf16, contiguous; new memory."""
        num_rows, width = gate_up.shape
        output = torch.empty(num_rows, width // 2, dtype=gate_up.dtype)
        words = (gate_up.data_ptr(), output.data_ptr(), num_rows)
        self._team.run(self._gated_silu(width // 2).address, np.array(words, dtype=np.int64), gate_up.numel())
        return output

    def rotate_and_write(
        self,
        qkv: torch.Tensor,
        norms: HeadNorms | None,
        rotation: tuple[torch.Tensor, torch.Tensor],
        layer: torch.Tensor,
        inputs: StepInputs,
    ) -> None:
        """See `Backend.rotate_and_write`. Mutates: `qkv`, whose numbers of a token are adjacent, and `layer`."""
        num_tokens, width = qkv.shape
        num_kv_heads, page_size, head_dim = layer.shape[2:]
        norm_addresses = (0, 0) if norms is None else (norms.queries.data_ptr(), norms.keys.data_ptr())
        words = (
            qkv.data_ptr(),
            rotation[0].data_ptr(),
            rotation[1].data_ptr(),
            *norm_addresses,
            inputs.page_ids.data_ptr(),
            inputs.offsets.data_ptr(),
            layer.data_ptr(),
            num_tokens,
            width // head_dim - 2 * num_kv_heads,
            num_kv_heads,
            qkv.stride(0),
            layer.stride(0),
        )
        kernel = self._rotate(head_dim, page_size, None if norms is None else norms.eps)
        self._team.run(kernel.address, np.array(words, dtype=np.int64), qkv.numel())

    def softmax(self, scores: torch.Tensor, factors: torch.Tensor, first_slot: int, window: int) -> None:
        """See `engine.cpu.prefill_attention.Softmax`; contiguous tensors."""
        num_queries, num_slots = scores.shape[1:]
        words = (scores.data_ptr(), factors.data_ptr(), factors.numel(), num_slots, num_queries, first_slot, window)
        self._team.run(self._softmax().address, np.array(words, dtype=np.int64))

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
        kernel = self._attention(queries.shape[1] // num_kv_heads, head_dim, page_size)
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


def _row_kernels() -> RowKernels | None:
    try:
        return RowKernels()
    except (ImportError, OSError, NoKernels) as error:
        _log.warning("no compiled kernels on this machine, decoding is slower", reason=str(error))
        return None
