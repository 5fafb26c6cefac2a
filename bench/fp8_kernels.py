"""The FP8 part of `bench/kernels.py`: quantisation, products, and attention over FP8 pages."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from kernels import Bench, Shapes

_DTYPE = torch.bfloat16


def fp8(bench: Bench, shapes: Shapes) -> None:
    """All of it, where the GPU has FP8."""
    if torch.cuda.get_device_capability() < (8, 9):
        print("FP8 left out: this GPU has none")
        return
    quantisation(bench, shapes)
    products(bench, shapes)
    pages(bench, shapes)


def quantisation(bench: Bench, shapes: Shapes) -> None:
    """By tensor, row and tile."""
    from engine.kernels import fp8 as by

    values = torch.randn(8192, shapes.hidden, dtype=_DTYPE, device="cuda")
    for name, work, twin in (
        ("tensor", by.quantise_tensor, by.quantise_tensor_twin),
        ("rows", by.quantise_rows, by.quantise_rows_twin),
        ("tiles", by.quantise_tiles, by.quantise_tiles_twin),
    ):
        pairs = [(one.float(), other.float()) for one, other in zip(work(values), twin(values), strict=True)]
        bench.line(
            f"quantise 8192 x {shapes.hidden} by {name}",
            pairs,
            partial(work, values),
            num_bytes=1.5 * values.nbytes,
            roundings=0,
        )


def products(bench: Bench, shapes: Shapes) -> None:
    """The gate and up matrix by rows (cuBLAS) and by tiles (Triton), quantising the inputs included."""
    from engine.fp8 import Fp8Matrix, product_twin, quantise, quantise_channels
    from engine.kernel_backend import KernelBackend

    backend = KernelBackend(group=1, device=torch.device("cuda"), fp8=True)
    weight = torch.randn(2 * shapes.intermediate, shapes.hidden, device="cuda") / shapes.hidden**0.5
    tiled = Fp8Matrix(*quantise(weight, tile_rows=128, tile_columns=128), tile=(128, 128))
    for name, matrix in (("rows", quantise_channels(weight)), ("tiles", tiled)):
        product = backend.fp8_linear(matrix, None, _DTYPE)
        if product is None:
            raise RuntimeError(f"no FP8 product by {name} on this GPU")
        for tokens in (1, 64, 8192):
            hidden = torch.randn(tokens, shapes.hidden, dtype=_DTYPE, device="cuda")
            bench.line(
                f"FP8 product by {name}, {tokens} x {shapes.hidden} x {2 * shapes.intermediate}",
                [(product(hidden[:128]), product_twin(hidden[:128], matrix, None))],  # beyond 64 rows cuBLAS multiplies
                partial(product, hidden),
                num_bytes=matrix.num_bytes,
                flops=2.0 * tokens * weight.numel() if tokens > 64 else 0,
            )


def pages(bench: Bench, shapes: Shapes) -> None:
    """Attention of single tokens and of a prompt."""
    from kernels import scattered

    from engine.fp8 import E4M3
    from engine.kernels.decode_plan import plan_decode
    from engine.kernels.paged_decode_attention import paged_decode_attention, paged_decode_attention_twin
    from engine.kernels.paged_prefill_attention import (
        paged_prefill_attention,
        paged_prefill_attention_twin,
        plan_prefill,
    )

    device = torch.device("cuda")
    programs = torch.cuda.get_device_properties(device).multi_processor_count * 2 // shapes.kv_heads
    lengths = [4096] * 64
    layer, tables = scattered(lengths, shapes)
    layer = layer.to(E4M3)
    queries = torch.randn(len(lengths), shapes.heads, shapes.head_dim, dtype=_DTYPE, device=device)
    plan = plan_decode(lengths, window=None, num_programs=max(1, programs), device=device)
    bench.line(
        "decode attention over FP8 pages, 64 x 4k",
        [
            (
                paged_decode_attention(queries, layer, tables, plan),
                paged_decode_attention_twin(queries, layer, tables, lengths, None),
            )
        ],
        partial(paged_decode_attention, queries, layer, tables, plan),
        num_bytes=sum(lengths) * 2 * shapes.kv_heads * shapes.head_dim,
    )
    counts, starts = [2048], [2048]
    prompt = plan_prefill(counts, starts, group=shapes.heads // shapes.kv_heads, window=None, device=device)
    queries = torch.randn(2048, shapes.heads, shapes.head_dim, dtype=_DTYPE, device=device)
    bench.line(
        "prefill attention over FP8 pages, 2k after 2k",
        [
            (
                paged_prefill_attention(queries, layer, tables, prompt),
                paged_prefill_attention_twin(queries, layer, tables, counts, starts, None),
            )
        ],
        partial(paged_prefill_attention, queries, layer, tables, prompt),
        flops=4 * sum(range(2049, 4097)) * shapes.heads * shapes.head_dim,
    )
