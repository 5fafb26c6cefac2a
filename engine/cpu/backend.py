"""The CPU backend: products of packed matrices, compiled norms and rotation, attention straight from pages of pairs.

For bfloat16, the dtype in which CPUs with instructions for it compute fast; float32 stays with `TorchBackend`, whose
results are exact to the last bit that its tests compare.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Many
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import torch

from engine.attention import attend
from engine.attention_inputs import InputShape, TableRow
from engine.backend import HeadNorms, Linear
from engine.cpu.attention_runs import PagedRows
from engine.cpu.shared_cores import SharedCores
from engine.cpu.weight_cache import PackedWeights, WeightCache
from engine.errors import NoKernels
from engine.inputs import StepInputs
from engine.model_config import ModelConfig
from engine.packed_backend import PackedBackend
from fleet.logs import get_logger
from fleet.types import PAGE_MAJOR, PAGE_MAJOR_PAIRS

if TYPE_CHECKING:
    from engine.cpu.products import Products

_log = get_logger("cpu_backend")

_LANES = 16  # of slots and of dimensions in one vector of the kernels


class CpuBackend(PackedBackend):
    """`PackedBackend` with kernels of its own. Not for two steps at once: it keeps buffers."""

    def __init__(self, cores: SharedCores | None = None, cache: WeightCache | None = None) -> None:
        """`cores`: shared with other workers, as matrices packed by our own kernel are in `cache`."""
        self._cores = cores
        self._cache = cache
        self._weights = PackedWeights()
        self._rows = _row_kernels()
        self._products = _products() if self._rows is not None and suits_own_products() else None

    def linear(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
        """By our own kernel where it is the fastest, else packed for oneDNN."""
        if self._products is None or weight.dtype is not torch.bfloat16:
            return super().linear(weight, bias)
        return self._products.linear(weight, bias)

    @contextmanager
    def loading(self, model: str, num_bytes: int, meanwhile: Callable[[], None]) -> Iterator[None]:
        """Matrices that our own kernel multiplies lie in a file that all workers of the machine map."""
        if self._products is None or self._cache is None:
            yield
            return
        named = f"{self._products.layout} {model}"
        with self._cache.opened(named, num_bytes, meanwhile=meanwhile) as self._weights:
            yield
        self._weights = PackedWeights()

    @property
    def rounds(self) -> bool:
        """Where our own kernel computes."""
        return self._products is not None

    def named_linear(
        self, name: str, read: Callable[[], torch.Tensor], bias: torch.Tensor | None, *, rounded: bool = False
    ) -> tuple[Linear, int]:
        """From the file if it is there."""
        products = self._products
        if products is None:
            return super().named_linear(name, read, bias, rounded=rounded)
        packed = self._weights.matrix(name, lambda: products.pack(read(), rounded=rounded))
        return products.product(packed, bias), packed.num_bytes

    def warm(self, config: ModelConfig, page_size: int) -> None:
        """Compile, or load from the cache, all kernels of the model, so that no request waits for one."""
        if self._rows is not None:
            self._rows.compile(config)
            if self._pairs(torch.bfloat16, page_size, config.head_dim):
                self._rows.compile_pairs(config, page_size)

    def page_order(self, config: ModelConfig, page_size: int, dtype: torch.dtype) -> str:
        """Pairs side by side, where attention is compiled for such pages; else torch attends, and writes them."""
        return PAGE_MAJOR_PAIRS if self._pairs(dtype, page_size, config.head_dim) else PAGE_MAJOR

    def _pairs(self, dtype: torch.dtype, page_size: int, head_dim: int) -> bool:
        return self._rows is not None and dtype is torch.bfloat16 and not (page_size % _LANES or head_dim % _LANES)

    def begin_layer(self) -> None:
        """Take our present share of cores that are shared."""
        if self._cores is not None:
            self._cores.refresh()

    def rms_norm(self, hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """In one pass."""
        if self._rows is None or hidden.dtype is not torch.bfloat16 or hidden.dim() != 2 or hidden.stride(1) != 1:
            return super().rms_norm(hidden, weight, eps)
        return self._rows.rms_norm(hidden, weight, eps)

    def add_rms_norm(
        self, hidden: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """In one pass; the sum takes the place of `residual`."""
        contiguous = hidden.is_contiguous() and residual.is_contiguous()
        if self._rows is None or hidden.dtype is not torch.bfloat16 or not contiguous:
            return super().add_rms_norm(hidden, residual, weight, eps)
        return self._rows.rms_norm(hidden, weight, eps, residual), residual

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
        num_kv_heads, page_size, head_dim = layer.shape[2:]
        if self._rows is None or not self._pairs(layer.dtype, page_size, head_dim):
            return super().rotate_and_write(qkv, norms, angles, layer, inputs)
        self._rows.rotate_and_write(qkv, norms, wide, layer, inputs)
        return qkv[:, : -2 * num_kv_heads * head_dim].view(qkv.shape[0], -1, head_dim), None

    def plan_attention(self, rows: Many[TableRow], window: int | None, shape: InputShape) -> object:
        """Runs for the kernel."""
        return PagedRows(rows, window, shape)

    def attention(
        self, queries: torch.Tensor, keys_values: torch.Tensor | None, layer: torch.Tensor, inputs: object
    ) -> torch.Tensor:
        """From pages of pairs by the compiled kernel, this step's tokens included."""
        assert isinstance(inputs, PagedRows)  # noqa: S101 - made by `plan_attention` of this very backend
        if keys_values is None:
            assert self._rows is not None  # noqa: S101 - it has written the pages
            return self._rows.attention.attend(queries, layer, inputs)
        return attend(queries, keys_values, layer, inputs.gathered)


class RowKernels:
    """Launches the compiled kernels on torch's own threads. Raises NoKernels where they cannot be had.

    Attributes:
        attention: over pages of pairs.
    """

    def __init__(self) -> None:
        from engine.cpu.jit import Team
        from engine.cpu.paged_attention import PagedAttention
        from engine.cpu.row_kernels import gated_silu_rows, rms_norm_rows, rotate_rows

        self._rms_norm, self._rotate, self._gated_silu = rms_norm_rows, rotate_rows, gated_silu_rows
        self._team = Team()
        self.attention = PagedAttention(self._team)

    def compile(self, config: ModelConfig) -> None:
        """Have the kernels ready that this model needs with any pages."""
        for adds in (False, True):
            self._rms_norm(config.hidden_size, config.rms_norm_eps, adds=adds)
        self._gated_silu(config.intermediate_size)

    def compile_pairs(self, config: ModelConfig, page_size: int) -> None:
        """Those that write and read pages of pairs."""
        self.attention.compile(config.num_heads // config.num_kv_heads, config.head_dim, page_size)
        self._rotate(config.head_dim, page_size, config.rms_norm_eps if config.qk_norm else None)

    def rms_norm(
        self, hidden: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The norm of `[T, S]` bf16 with adjacent numbers, new memory; of the sum with a residual, which becomes it."""
        num_rows, size = hidden.shape
        output = torch.empty(num_rows, size, dtype=hidden.dtype)
        others = 0 if residual is None else residual.data_ptr()
        words = (hidden.data_ptr(), weight.data_ptr(), output.data_ptr(), num_rows, hidden.stride(0), others)
        self._team.run(self._rms_norm(size, eps, adds=residual is not None), words, hidden.numel())
        return output

    def gated_silu(self, gate_up: torch.Tensor) -> torch.Tensor:
        """`silu(gate) * up` of `[T, 2 * S]` bf16, contiguous; new memory."""
        num_rows, width = gate_up.shape
        output = torch.empty(num_rows, width // 2, dtype=gate_up.dtype)
        words = (gate_up.data_ptr(), output.data_ptr(), num_rows)
        self._team.run(self._gated_silu(width // 2), words, gate_up.numel())
        return output

    def rotate_and_write(
        self,
        qkv: torch.Tensor,
        norms: HeadNorms | None,
        rotation: tuple[torch.Tensor, torch.Tensor],
        layer: torch.Tensor,
        inputs: StepInputs,
    ) -> None:
        """See `Backend.rotate_and_write`, into pages of pairs. Mutates: `qkv`, its tokens contiguous, and `layer`."""
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
        self._team.run(self._rotate(head_dim, page_size, None if norms is None else norms.eps), words, qkv.numel())


def _row_kernels() -> RowKernels | None:
    try:
        return RowKernels()
    except (ImportError, OSError, NoKernels) as error:
        _log.warning("no compiled kernels on this machine, decoding is slower", reason=str(error))
        return None


def suits_own_products() -> bool:
    """Whether our own products are this processor's fastest: with AVX512-BF16, but not AMX, whose tiles oneDNN uses."""
    able = torch.cpu.get_capabilities()
    return bool(able.get("avx512_bf16") and not able.get("amx_bf16"))


def _products() -> Products:
    from engine.cpu.products import Products

    return Products()
