"""Operations by Triton kernels: what a CUDA device computes with."""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass

import numpy as np
import torch

from engine.attention_inputs import InputShape, TableRow
from engine.backend import HeadNorms, Linear, TorchBackend
from engine.fp8 import Fp8Matrix
from engine.inputs import StepInputs
from engine.kernels.decode_plan import DecodePlan, plan_decode
from engine.kernels.fp8 import quantise_rows, quantise_tiles
from engine.kernels.fp8_product import FEW_ROWS, fp8_row_product, fp8_tile_product
from engine.kernels.fp8_tiles import SCALED
from engine.kernels.paged_decode_attention import paged_decode_attention
from engine.kernels.paged_prefill_attention import PrefillPlan, paged_prefill_attention, plan_prefill
from engine.kernels.rms_norm import add_rms_norm, rms_norm
from engine.kernels.rotary_page_write import rotary_page_write
from engine.kernels.silu_mul import silu_mul

_PROGRAMS_PER_PROCESSOR = 2
_INTERPRETED_PROGRAMS = 4
_FP8_MULTIPLE = 16  # of both sides of a matrix that cuBLAS multiplies in FP8
_GRAPH_PARTS = 16  # of one row at most: what a graph keeps room for, in every row


@dataclass(frozen=True, slots=True)
class PagedAttention:
    """A step's attention for one window, as the kernels want it. Letters as in `engine.kernels`.

    Attributes:
        tables: [B, n] int32, pages of each row from its first one on.
        plan: of the decode kernel where every row has one new token, else of the prefill kernel.
    """

    tables: torch.Tensor
    plan: DecodePlan | PrefillPlan


@dataclass(frozen=True, slots=True)
class Rotation:
    """A step's rotary angles and slots, as `rotary_page_write` takes them: [T, D], [T], [T]."""

    angles: torch.Tensor
    rows: torch.Tensor
    slots: torch.Tensor


class KernelBackend(TorchBackend):
    """`TorchBackend` with norms, activation, rotation, page writes and attention in Triton; matrices stay cuBLAS's.

    Args:
        group: query heads that share a key head.
        device: where it runs; a CPU under Triton's interpreter.
        fp8: whether it multiplies FP8 numbers.
    """

    def __init__(self, *, group: int, device: torch.device, fp8: bool = False) -> None:
        self._group = group
        self._fp8 = fp8
        self._num_programs = _INTERPRETED_PROGRAMS
        if device.type == "cuda":
            properties = torch.cuda.get_device_properties(device)
            self._num_programs = _PROGRAMS_PER_PROCESSOR * properties.multi_processor_count

    def fp8_linear(self, matrix: Fp8Matrix, bias: torch.Tensor | None, dtype: torch.dtype) -> Linear | None:
        """Inputs are quantised per row, so that a token's result depends on no other.

        The product is Triton's, but for many rows with scales per row and channel: that one is cuBLAS's.
        """
        sizes_fit = not any(size % _FP8_MULTIPLE for size in matrix.values.shape)
        if not self._fp8 or dtype is not torch.bfloat16 or not sizes_fit or matrix.tile not in (None, (SCALED, SCALED)):
            return None
        values, scales = matrix.values, matrix.scales

        def by_tile(hidden: torch.Tensor) -> torch.Tensor:
            quantised, of_rows = quantise_tiles(hidden, tile_rows=1, tile_columns=SCALED)
            out = fp8_tile_product(quantised, of_rows, values, scales)
            return out if bias is None else out.add_(bias)

        def by_row(hidden: torch.Tensor) -> torch.Tensor:
            quantised, of_rows = quantise_rows(hidden, matrix.input_scale)
            if hidden.shape[0] <= FEW_ROWS:
                out = fp8_row_product(quantised, of_rows, values, scales)
            else:
                out = torch._scaled_mm(  # noqa: SLF001 - no public name
                    quantised,
                    values.t(),
                    scale_a=of_rows.unsqueeze(1),
                    scale_b=scales.unsqueeze(0),
                    out_dtype=torch.bfloat16,
                )
            return out if bias is None else out.add_(bias)

        return by_row if matrix.tile is None else by_tile

    def rms_norm(self, hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """One pass over memory."""
        return rms_norm(hidden, weight, eps)

    def add_rms_norm(
        self, hidden: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One pass over memory."""
        return add_rms_norm(hidden, residual, weight, eps)

    def gated_silu(self, gate_up: torch.Tensor) -> torch.Tensor:
        """One pass over memory; leaves its argument alone."""
        return silu_mul(gate_up)

    def plan_attention(self, rows: Many[TableRow], window: int | None, shape: InputShape) -> PagedAttention:
        """Whole page tables as one tensor, and the work shared out among programs."""
        tables = np.zeros((len(rows), max(len(row.table) for row in rows)), dtype=np.int32)
        for at, row in enumerate(rows):
            tables[at, : len(row.table)] = row.table
        plan: DecodePlan | PrefillPlan
        if all(row.count == 1 for row in rows):
            lengths = [row.start + 1 for row in rows]
            plan = plan_decode(lengths, window=window, num_programs=self._num_programs, device=shape.device)
        else:
            counts, starts = [row.count for row in rows], [row.start for row in rows]
            plan = plan_prefill(counts, starts, group=self._group, window=window, device=shape.device)
        return PagedAttention(torch.from_numpy(tables).to(shape.device), plan)

    def plan_padded(self, lengths: Many[int], window: int | None, device: torch.device) -> DecodePlan:
        """A decode plan whose tensors have the same shapes for any lengths of as many rows, as a graph needs them."""
        return plan_decode(
            lengths,
            window=window,
            num_programs=self._num_programs,
            device=device,
            max_parts=_GRAPH_PARTS,
            capacity=_GRAPH_PARTS * len(lengths),
        )

    def plan_rotation(self, angles: tuple[torch.Tensor, torch.Tensor], inputs: StepInputs) -> Rotation:
        """One table of the step's own angles, and slots."""
        table = torch.cat(angles, dim=-1).squeeze(1)  # [T, D]
        rows = torch.arange(table.shape[0], device=table.device)
        return Rotation(table, rows, inputs.slots)

    def rotate_and_write(
        self, qkv: torch.Tensor, norms: HeadNorms | None, rotation: object, layer: torch.Tensor, inputs: StepInputs
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """In one launch; attention reads pages alone."""
        del inputs
        assert isinstance(rotation, Rotation)  # noqa: S101 - made by `plan_rotation` of this very backend
        num_kv_heads, head_dim = layer.shape[2], layer.shape[4]
        queries = rotary_page_write(
            qkv,
            rotation.angles,
            rotation.rows,
            rotation.slots,
            layer,
            num_heads=qkv.shape[1] // head_dim - 2 * num_kv_heads,
            query_norm=None if norms is None else norms.queries,
            key_norm=None if norms is None else norms.keys,
            eps=0.0 if norms is None else norms.eps,
        )
        return queries, None

    def attention(
        self, queries: torch.Tensor, keys_values: torch.Tensor | None, layer: torch.Tensor, inputs: object
    ) -> torch.Tensor:
        """From the pages alone, this step's tokens included."""
        del keys_values
        assert isinstance(inputs, PagedAttention)  # noqa: S101 - made by `plan_attention` of this very backend
        if isinstance(inputs.plan, DecodePlan):
            attended = paged_decode_attention(queries, layer, inputs.tables, inputs.plan)
        else:
            attended = paged_prefill_attention(queries, layer, inputs.tables, inputs.plan)
        return attended.flatten(1)
