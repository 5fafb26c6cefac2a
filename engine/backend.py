"""The operations of a forward pass that a device may do in its own way, and how plain torch does them.

This is the seam for Triton kernels (`engine.kernels`) and for packed CPU weights: another `Backend` replaces any of the
methods below and nothing else changes. `TorchBackend` runs on every device and is the specification of the others.

Letters: T tokens of the step, Hq query heads, Hkv key/value heads, D head_dim, P page_size, N pages, I intermediate.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Many
from contextlib import AbstractContextManager, nullcontext
from typing import ClassVar, NamedTuple, Protocol, cast

import torch
from torch.nn import functional

from engine.attention import attend
from engine.attention_inputs import AttentionInputs, InputShape, TableRow, gather_plan
from engine.exactness import is_exact, padded
from engine.fp8 import E4M3, Fp8Matrix, to_e4m3
from engine.inputs import StepInputs
from engine.model_config import ModelConfig
from engine.rope import rotate
from fleet.types import PAGE_MAJOR

Linear = Callable[[torch.Tensor], torch.Tensor]  # [T, in] -> [T, out]


class HeadNorms(NamedTuple):
    """Norms of single heads before they are rotated: their weights, `[D]` each."""

    queries: torch.Tensor
    keys: torch.Tensor
    eps: float


class Backend(Protocol):
    """What `engine.transformer` asks for, layer by layer. All tensors are of the model's dtype unless said.

    Attributes:
        packs: `linear` keeps a copy in a layout of its own and not the matrix that it is given.
        rounds: `named_linear` can round to 8 bits.
    """

    packs: ClassVar[bool]

    @property
    def rounds(self) -> bool:
        """See above."""

    def warm(self, config: ModelConfig, page_size: int) -> None:
        """Compile what steps of this model will need. Called once, before the worker is ready."""

    def page_order(self, config: ModelConfig, page_size: int, dtype: torch.dtype) -> str:
        """Order of axes in pages of this model, as `fleet.types.PAGE_MAJOR`; every `layer` below is part of those."""

    def begin_layer(self) -> None:
        """A layer is about to be computed; the place to look whether there are more or fewer cores than before."""

    def linear(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
        """Take over a matrix `[out, in]` at load time and return its product; the place to pack weights.

        The caller drops its own reference, so a packed copy need not double the memory.
        """

    def loading(self, model: str, num_bytes: int, meanwhile: Callable[[], None]) -> AbstractContextManager[None]:
        """Around the handing over of all matrices of one model, in which `named_linear` may be called.

        Args:
            model: names the values of the matrices; another model, or one changed, has another name.
            num_bytes: that the matrices take in the model's dtype.
            meanwhile: called before another worker is waited for that hands over the same matrices.
        """

    def named_linear(
        self, name: str, read: Callable[[], torch.Tensor], bias: torch.Tensor | None, *, rounded: bool = False
    ) -> tuple[Linear, int]:
        """Like `linear`, of a matrix that is read only if the backend does not hold it already under this name.

        Args:
            name: of the matrix, in its model.
            read: makes the matrix, `[out, in]`.
            bias: [out], or None.
            rounded: weights become whole numbers of 8 bits, with a scale per output. Requires: `rounds`.

        Returns:
            The product, and the bytes that the matrix takes.
        """

    def fp8_linear(self, matrix: Fp8Matrix, bias: torch.Tensor | None, dtype: torch.dtype) -> Linear | None:
        """Take over an FP8 matrix and return its product of inputs of `dtype`; None if it cannot be made here.

        The loader then dequantises the matrix and calls `linear`.
        """

    def rms_norm(self, hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Root-mean-square norm over the last axis (arXiv 1910.07467), new memory."""

    def add_rms_norm(
        self, hidden: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add what a sublayer returned to what it was given, `[T, E]` each, and norm the sum.

        Returns:
            The norm of the sum, and the sum, rounded to the model's dtype before it is normed; both arguments may be
            overwritten.
        """

    def gated_silu(self, gate_up: torch.Tensor) -> torch.Tensor:
        """`silu(gate) * up` of `[T, 2 * I]`, `[T, I]`. May overwrite its argument."""

    def plan_rotation(self, angles: tuple[torch.Tensor, torch.Tensor], inputs: StepInputs) -> object:
        """Turn a step's cosines and sines, each `[T, 1, D / 2]`, into what `rotate_and_write` reads, once per step."""

    def rotate_and_write(
        self, qkv: torch.Tensor, norms: HeadNorms | None, rotation: object, layer: torch.Tensor, inputs: StepInputs
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Norm (where weights are given) and rotate queries and keys; store keys and values in their slots.

        Args:
            qkv: [T, (Hq + 2 * Hkv) * D], queries first, then keys, then values; may be overwritten.
            norms: of queries and keys.
            rotation: what `plan_rotation` made.
            layer: [N, 2, Hkv, P, D], one layer's share of the pool, pages strided; mutated. Of the model's dtype, or
                e4m3: then keys and values saturate and are rounded to it.
            inputs: names the slots.

        Returns:
            Rotated queries [T, Hq, D], and the keys and values [T, 2, Hkv, D] for a backend whose attention reads them:
            what a reader of the pages would find, so that it makes no difference how a prompt is cut into chunks.
        """

    def plan_attention(self, rows: Many[TableRow], window: int | None, shape: InputShape) -> object:
        """Turn a step's rows into what `attention` reads, once per step and window; what that is, only it knows."""

    def attention(
        self, queries: torch.Tensor, keys_values: torch.Tensor | None, layer: torch.Tensor, inputs: object
    ) -> torch.Tensor:
        """Causal attention of each token over its own sequence, this step's tokens included.

        Args:
            queries: [T, Hq, D], rotated.
            keys_values: what `rotate_and_write` returned; it lies in pages already.
            layer: [N, 2, Hkv, P, D].
            inputs: what `plan_attention` made of the step's rows for this layer's window.

        Returns:
            [T, Hq * D].
        """


class TorchBackend:
    """Every operation in plain torch."""

    packs: ClassVar[bool] = False

    @property
    def rounds(self) -> bool:
        """Nothing is rounded."""
        return False

    def warm(self, config: ModelConfig, page_size: int) -> None:
        """Nothing is compiled."""

    def page_order(self, config: ModelConfig, page_size: int, dtype: torch.dtype) -> str:
        """As their shape says."""
        del config, page_size, dtype
        return PAGE_MAJOR

    def begin_layer(self) -> None:
        """Cores stay as they are."""

    def linear(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
        """The product by `torch.nn.functional.linear`; weights stay as they are.

        In float32 on a CPU a token's result is the same to the last bit in any batch (see `engine.exactness`).
        """
        if is_exact(weight):

            def exact(hidden: torch.Tensor) -> torch.Tensor:
                return functional.linear(padded(hidden), weight, bias)[: hidden.shape[0]]

            return exact

        def product(hidden: torch.Tensor) -> torch.Tensor:
            return functional.linear(hidden, weight, bias)

        return product

    def loading(self, model: str, num_bytes: int, meanwhile: Callable[[], None]) -> AbstractContextManager[None]:
        """Nothing is held beyond the process."""
        del model, num_bytes, meanwhile
        return nullcontext()

    def named_linear(
        self, name: str, read: Callable[[], torch.Tensor], bias: torch.Tensor | None, *, rounded: bool = False
    ) -> tuple[Linear, int]:
        """By `linear`."""
        del name
        assert not rounded  # noqa: S101 - as `rounds` says
        matrix = read()
        return self.linear(matrix, bias), matrix.nbytes

    def fp8_linear(self, matrix: Fp8Matrix, bias: torch.Tensor | None, dtype: torch.dtype) -> Linear | None:
        """None: no FP8 products."""
        del matrix, bias, dtype
        return None

    def rms_norm(self, hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """In float32 throughout. For half precision by fewer passes than torch's own operator takes on a CPU."""
        if hidden.dtype is torch.float32:
            return functional.rms_norm(hidden, (hidden.shape[-1],), weight, eps)
        norm = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True, dtype=torch.float32)
        scale = torch.rsqrt(norm.square_().div_(hidden.shape[-1]).add_(eps))
        return (hidden * scale).mul_(weight).to(hidden.dtype)

    def add_rms_norm(
        self, hidden: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One after the other."""
        summed = residual + hidden
        return self.rms_norm(summed, weight, eps), summed

    def gated_silu(self, gate_up: torch.Tensor) -> torch.Tensor:
        """In two elementwise passes."""
        num_tokens = gate_up.shape[0]
        if is_exact(gate_up):
            gate_up = padded(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return functional.silu(gate).mul_(up)[:num_tokens]

    def plan_rotation(self, angles: tuple[torch.Tensor, torch.Tensor], inputs: StepInputs) -> object:
        """As they are."""
        del inputs
        return angles

    def rotate_and_write(
        self, qkv: torch.Tensor, norms: HeadNorms | None, rotation: object, layer: torch.Tensor, inputs: StepInputs
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Operation by operation, then one scatter of keys and values together."""
        num_kv_heads, head_dim = layer.shape[2], layer.shape[4]
        num_tokens, kv_size = qkv.shape[0], 2 * num_kv_heads * head_dim
        queries = qkv[:, :-kv_size].view(num_tokens, -1, head_dim)
        keys_values = qkv[:, -kv_size:].view(num_tokens, 2, num_kv_heads, head_dim)
        keys = keys_values[:, 0]
        if norms is not None:
            queries, keys = self.rms_norm(queries, norms.queries, norms.eps), self.rms_norm(keys, norms.keys, norms.eps)
        cos, sin = cast("tuple[torch.Tensor, torch.Tensor]", rotation)
        keys_values[:, 0] = rotate(keys, cos, sin)
        if layer.dtype is E4M3:
            stored = to_e4m3(keys_values)
            layer[inputs.page_ids, :, :, inputs.offsets] = stored
            keys_values = stored.to(qkv.dtype)
        else:
            layer[inputs.page_ids, :, :, inputs.offsets] = keys_values
        return rotate(queries, cos, sin), keys_values

    def plan_attention(self, rows: Many[TableRow], window: int | None, shape: InputShape) -> object:
        """Groups and chunks, see `engine.attention_inputs`."""
        return gather_plan(rows, window, shape)

    def attention(
        self, queries: torch.Tensor, keys_values: torch.Tensor | None, layer: torch.Tensor, inputs: object
    ) -> torch.Tensor:
        """See `engine.attention`."""
        assert isinstance(inputs, AttentionInputs)  # noqa: S101 - made by `plan_attention` of this very backend
        assert keys_values is not None  # noqa: S101 - likewise by `rotate_and_write`
        return attend(queries, keys_values, layer, inputs)
