"""Every kernel against its twin on a GPU, and its time beside what the same device's memory and matrix units give.

    python bench/kernels.py [--parts rows decode …] [--heads 32] [--kv-heads 8] [--head-dim 128] [--hidden 4096]
                            [--intermediate 12288]

Needs a GPU. Two limits are measured first: the rate of a device copy (bytes read and written) and of a large bfloat16
product. Each line then gives the largest difference from the twin, the median time, what was moved or multiplied per
second, and its share of the limit. Differences beyond what rounding explains are marked APART; a part that cannot go on
says FAILED and why, and the next one follows. The exit status is 1 after either.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a bare checkout

from device_limits import DeviceLimits, Timer
from fp8_kernels import fp8
from kernel_parts import BEGIN, PARTS

PAGE_SIZE = 16
DTYPE = torch.bfloat16
ROUNDING = 2.0**-8  # of bfloat16


@dataclass(frozen=True, slots=True)
class Shapes:
    """The model whose layers are imitated."""

    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    intermediate: int
    vocab: int


class Bench:
    """Prints one line per kernel; remembers whether all agreed with their twins."""

    def __init__(self) -> None:
        self.agreed = True
        self._timer = Timer()
        self._limits = DeviceLimits.measure(self._timer)
        print(
            f"device copy {self._limits.copy_bytes_per_s / 1e9:.0f} GB/s, "
            f"bfloat16 product {self._limits.flops / 1e12:.0f} TFLOP/s"
        )

    def line(
        self,
        name: str,
        pairs: list[tuple[torch.Tensor, torch.Tensor]],
        work: Callable[[], object],
        *,
        num_bytes: float = 0,
        flops: float = 0,
        roundings: float = 4,
    ) -> None:
        """Compare what kernel and twin returned, time the kernel, print.

        Args:
            name: of the case.
            pairs: results of kernel and twin.
            work: the kernel's launch.
            num_bytes: that must be read and written at least; 0 where `flops` bound it.
            flops: that must be done at least.
            roundings: of bfloat16 that a result may be away from the twin's, relative to the larger of 1 and itself.
        """
        worst, good = 0.0, True
        for actual, expected in pairs:
            apart = (actual.double() - expected.double()).abs()
            allowed = roundings * ROUNDING * expected.double().abs().clamp(min=1.0)
            worst = max(worst, float(apart.max()))
            good = good and bool((apart <= allowed).all())
        self.agreed = self.agreed and good
        time_s = self._timer.median_s(work)
        rate = (
            f"{flops / time_s / 1e12:7.0f} TFLOP/s {flops / time_s / self._limits.flops:5.0%}"
            if flops
            else f"{num_bytes / time_s / 1e9:7.0f} GB/s    {num_bytes / time_s / self._limits.copy_bytes_per_s:5.0%}"
        )
        mark = "" if good else "  APART"
        print(f"{name:44} {time_s * 1e6:9.1f} us {rate} of the limit; difference {worst:.2g}{mark}", flush=True)


def rows(bench: Bench, shapes: Shapes) -> None:
    """Norms, activation, rotation with page writes."""
    from engine.kernels.rms_norm import add_rms_norm, add_rms_norm_twin
    from engine.kernels.rotary_page_write import rotary_page_write, rotary_page_write_twin
    from engine.kernels.silu_mul import silu_mul, silu_mul_twin

    for tokens in (64, 8192):
        hidden, residual = (torch.randn(tokens, shapes.hidden, dtype=DTYPE, device="cuda") for _ in range(2))
        weight = torch.randn(shapes.hidden, dtype=DTYPE, device="cuda")
        bench.line(
            f"add and norm, {tokens} x {shapes.hidden}",
            list(
                zip(
                    add_rms_norm(hidden, residual, weight, 1e-6),
                    add_rms_norm_twin(hidden, residual, weight, 1e-6),
                    strict=True,
                )
            ),
            partial(add_rms_norm, hidden, residual, weight, 1e-6),
            num_bytes=4 * hidden.nbytes,
        )
        gate_up = torch.randn(tokens, 2 * shapes.intermediate, dtype=DTYPE, device="cuda")
        bench.line(
            f"silu times up, {tokens} x {shapes.intermediate}",
            [(silu_mul(gate_up), silu_mul_twin(gate_up))],
            partial(silu_mul, gate_up),
            num_bytes=1.5 * gate_up.nbytes,
        )
        width = (shapes.heads + 2 * shapes.kv_heads) * shapes.head_dim
        qkv = torch.randn(tokens, width, dtype=DTYPE, device="cuda")
        pool = torch.zeros(
            tokens // PAGE_SIZE, 4, 2, shapes.kv_heads, PAGE_SIZE, shapes.head_dim, dtype=DTYPE, device="cuda"
        )
        expected_pool = pool.clone()
        angles = torch.rand(tokens, shapes.head_dim, device="cuda")
        places, slots = torch.arange(tokens, device="cuda"), torch.randperm(tokens, device="cuda")
        norm = torch.randn(shapes.head_dim, dtype=DTYPE, device="cuda")
        arguments = (qkv, angles, places, slots)
        write, twin = (
            partial(call, num_heads=shapes.heads, query_norm=norm, key_norm=norm)
            for call in (rotary_page_write, rotary_page_write_twin)
        )
        bench.line(
            f"rotate and write pages, {tokens} tokens",
            [(write(*arguments, pool[:, 1]), twin(*arguments, expected_pool[:, 1])), (pool, expected_pool)],
            partial(write, *arguments, pool[:, 1]),
            num_bytes=2 * qkv.nbytes + angles.nbytes,
        )


def decode(bench: Bench, shapes: Shapes) -> None:
    """One token per row over even and uneven contexts."""
    from engine.kernels.decode_plan import plan_decode
    from engine.kernels.paged_decode_attention import paged_decode_attention, paged_decode_attention_twin

    device = torch.device("cuda")
    programs = torch.cuda.get_device_properties(device).multi_processor_count * 2 // shapes.kv_heads
    for what, lengths in (
        ("1 x 1k", [1024]),
        ("1 x 32k", [32768]),
        ("64 x 4k", [4096] * 64),
        ("1 x 64k and 63 x 1k", [65536] + [1024] * 63),
    ):
        layer, tables = scattered(lengths, shapes)
        queries = torch.randn(len(lengths), shapes.heads, shapes.head_dim, dtype=DTYPE, device=device)
        plan = plan_decode(lengths, window=None, num_programs=max(1, programs), device=device)
        bench.line(
            f"decode attention, {what}",
            [
                (
                    paged_decode_attention(queries, layer, tables, plan),
                    paged_decode_attention_twin(queries, layer, tables, lengths, None),
                )
            ],
            partial(paged_decode_attention, queries, layer, tables, plan),
            num_bytes=sum(lengths) * 2 * shapes.kv_heads * shapes.head_dim * DTYPE.itemsize,
        )


def prefill(bench: Bench, shapes: Shapes) -> None:
    """Whole prompts, a chunk with a long past, a window."""
    from engine.kernels.paged_prefill_attention import (
        paged_prefill_attention,
        paged_prefill_attention_twin,
        plan_prefill,
    )

    device = torch.device("cuda")
    for what, counts, starts, window in (
        ("4 x 2k", [2048] * 4, [0] * 4, None),
        ("2k after 14k", [2048], [14336], None),
        ("8k, window 1k", [8192], [0], 1024),
        ("uneven", [1, 3000, 17, 500, 64], [5000, 0, 90, 1000, 7], None),
    ):
        layer, tables = scattered([count + start for count, start in zip(counts, starts, strict=True)], shapes)
        queries = torch.randn(sum(counts), shapes.heads, shapes.head_dim, dtype=DTYPE, device=device)
        plan = plan_prefill(counts, starts, group=shapes.heads // shapes.kv_heads, window=window, device=device)
        seen = sum(
            min(position + 1, window or position + 1)
            for count, start in zip(counts, starts, strict=True)
            for position in range(start, start + count)
        )
        bench.line(
            f"prefill attention, {what}",
            [
                (
                    paged_prefill_attention(queries, layer, tables, plan),
                    paged_prefill_attention_twin(queries, layer, tables, counts, starts, window),
                )
            ],
            partial(paged_prefill_attention, queries, layer, tables, plan),
            flops=4 * seen * shapes.heads * shapes.head_dim,
        )


def sampling(bench: Bench, shapes: Shapes) -> None:
    """Choices of every kind, against the CPU's own sampling code run on the device."""
    from engine.candidates import Cuts
    from engine.choice import choose_tokens as choose_tokens_twin
    from engine.kernels.row_logits import RowLogits
    from engine.kernels.sampling import choose_tokens

    num_rows = 64
    logits = (torch.randn(num_rows, shapes.vocab, device="cuda") * 3).to(DTYPE)
    rows = RowLogits.plain(logits)
    ones, zeros = torch.ones(num_rows, device="cuda"), torch.zeros(num_rows, device="cuda")
    seeds = torch.arange(num_rows, device="cuda")
    for what, temperatures, top_k, top_p in (
        ("greedy", zeros, 0, 1.0),
        ("uncut", ones, 0, 1.0),
        ("top-k 50", ones, 50, 1.0),
        ("top-p 0.9", ones, 0, 0.9),
    ):
        cuts = Cuts(torch.full_like(seeds, top_k), ones * top_p, zeros)
        choose = partial(choose_tokens, rows, temperatures, cuts, seeds, seeds, searches=top_k > 0 or top_p < 1)
        chosen, expected = choose(), choose_tokens_twin(logits.float(), temperatures, cuts, seeds, seeds)
        bench.line(
            f"choose, {num_rows} x {shapes.vocab}, {what}",
            [((chosen != expected), torch.zeros_like(chosen))],
            choose,
            num_bytes=logits.nbytes,
            roundings=0,
        )


def copies(bench: Bench, shapes: Shapes) -> None:
    """Pages to a staging buffer."""
    from engine.kernels.pages import gather_pages, gather_pages_twin

    pool = torch.randn(2048, 36, 2, shapes.kv_heads, PAGE_SIZE, shapes.head_dim, device="cuda").to(DTYPE)
    ids = torch.randperm(2048, device="cuda")[:256]
    staging, expected = (torch.zeros_like(pool[:256]) for _ in range(2))
    gather_pages(pool, ids, staging)
    gather_pages_twin(pool, ids, expected)
    bench.line(
        "gather 256 pages",
        [(staging, expected)],
        partial(gather_pages, pool, ids, staging),
        num_bytes=2 * staging.nbytes,
        roundings=0,
    )


def scattered(lengths: list[int], shapes: Shapes) -> tuple[torch.Tensor, torch.Tensor]:
    """One layer out of four, and page tables `[B, n]` int32 over pages in random order."""
    per_row = [-(-length // PAGE_SIZE) for length in lengths]
    order = torch.randperm(sum(per_row), dtype=torch.int32)
    pool = torch.randn(sum(per_row), 4, 2, shapes.kv_heads, PAGE_SIZE, shapes.head_dim, dtype=DTYPE, device="cuda")
    tables = torch.zeros(len(lengths), max(per_row), dtype=torch.int32)
    for row, pages in enumerate(order.split(per_row)):  # type: ignore[no-untyped-call]
        tables[row, : len(pages)] = pages
    return pool[:, 1], tables.to("cuda")


def main() -> int:
    """Run the parts; 1 if a kernel and its twin disagree or a part failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    for name, default in (("heads", 32), ("kv-heads", 8), ("head-dim", 128), ("hidden", 4096), ("intermediate", 12288)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--vocab", type=int, default=151936)
    options = vars(parser.parse_args())
    parts = options.pop("parts")
    shapes = Shapes(**options)
    if not torch.cuda.is_available():
        print("No GPU here, so there is nothing to time. On a CPU, `pytest tests/unit/kernels` checks the kernels.")
        return 0
    torch.manual_seed(0)
    properties = torch.cuda.get_device_properties(0)
    print(f"{properties.name}, {properties.multi_processor_count} multiprocessors, torch {torch.__version__}")
    bench = Bench()
    work = dict(zip(PARTS, (rows, decode, prefill, sampling, copies, fp8), strict=True))
    for name in parts:
        print(f"{BEGIN}{name}", flush=True)
        try:
            work[name](bench, shapes)
        except Exception as error:  # noqa: BLE001 - a compiler's, a driver's or our own: the next part may do better
            bench.agreed = False
            traceback.print_exc(file=sys.stdout)
            print(f"{name} FAILED: {error!r}".splitlines()[0], flush=True)
            torch.cuda.synchronize()  # raises, and ends the process, where the device is lost to it
    return 0 if bench.agreed else 1


if __name__ == "__main__":
    sys.exit(main())
