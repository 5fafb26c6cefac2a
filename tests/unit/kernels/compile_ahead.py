"""Compile every kernel for a GPU that need not be there, as its launcher would ask for it.

    python tests/unit/kernels/compile_ahead.py CAPABILITY...

The launchers run on CPU tensors of real models' shapes; in place of a launch, Triton compiles to the end (`ptxas` ships
with it). Prints one line of JSON per kernel and capability: its name, shared memory, registers, and bytes spilled.
Run by `test_kernels_compile.py` in a process of its own: Triton decides at import whether to compile or interpret.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from engine.candidates import Cuts
from engine.kernels import fp8_product
from engine.kernels.decode_plan import plan_decode
from engine.kernels.fp8 import quantise_rows, quantise_tensor, quantise_tiles
from engine.kernels.fp8_product import fp8_row_product, fp8_tile_product
from engine.kernels.fp8_tiles import ALL_TILES
from engine.kernels.paged_decode_attention import paged_decode_attention
from engine.kernels.paged_prefill_attention import paged_prefill_attention, plan_prefill
from engine.kernels.pages import gather_pages
from engine.kernels.penalties import Bias, Penalties, edit_logits, note_chosen
from engine.kernels.rms_norm import add_rms_norm, rms_norm
from engine.kernels.rotary_page_write import rotary_page_write
from engine.kernels.row_logits import RowLogits
from engine.kernels.sampling import choose_tokens
from engine.kernels.silu_mul import silu_mul

_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class _AbsentGpu:
    """As much of a driver as compiling takes."""

    capability = 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # Triton keeps what it compiled by device

    def get_current_stream(self, _device: int) -> int:
        return 0


def compile_only(gpu: _AbsentGpu) -> None:
    """From here on, launches compile and report."""
    driver.set_active(gpu)
    run = JITFunction.run

    def report(self: Any, *args: Any, **kwargs: Any) -> None:
        compiled = run(self, *args, **{**kwargs, "warmup": True})
        found = {"kernel": self._fn_name, "capability": gpu.capability, **_resources(compiled)}
        print(json.dumps(found), flush=True)

    JITFunction.run = report


def _resources(compiled: Any) -> dict[str, int]:
    """What the assembler allotted."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([_CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))  # type: ignore[index]
    text = compiled.asm["ptx"]
    return {
        "shared_bytes": compiled.metadata.shared,
        "registers": registers,
        "threads": 32 * compiled.metadata.num_warps,
        "stack_bytes": stack,
        "inexact": len(re.findall(r"\bfma\.|\.ftz\b|\.approx\b", text)),
    }


def compile_over_pages(layer: torch.Tensor, head_norm: torch.Tensor) -> None:
    """What writes and reads pages."""
    cpu = torch.device("cpu")
    qkv, places = torch.empty(4, 48 * 128, dtype=torch.bfloat16), torch.zeros(4, dtype=torch.int64)
    angles = torch.empty(64, 128)
    queries = rotary_page_write(
        qkv, angles, places, places, layer, num_heads=32, query_norm=head_norm, key_norm=head_norm
    )
    tables = torch.zeros(4, 8, dtype=torch.int32)
    paged_decode_attention(queries, layer, tables, plan_decode([100, 0, 7, 1], window=None, num_programs=4, device=cpu))
    for window in (None, 32):
        plan = plan_prefill([3, 0, 1, 0], [9, 0, 0, 0], group=4, window=window, device=cpu)
        paged_prefill_attention(queries, layer, tables, plan)


def compile_all(capability: int) -> None:
    """One launch of each kernel, shapes of Qwen3-8B (32 query heads, 8 key heads of 128) unless it says otherwise."""
    hidden, weight = torch.empty(4, 4096, dtype=torch.bfloat16), torch.empty(4096, dtype=torch.bfloat16)
    rms_norm(hidden, weight, 1e-6)
    add_rms_norm(hidden, hidden, weight, 1e-6)
    silu_mul(torch.empty(4, 2 * 12288, dtype=torch.bfloat16))

    pool = torch.empty(8, 2, 2, 8, 16, 128, dtype=torch.bfloat16)
    head_norm = torch.empty(128, dtype=torch.bfloat16)
    compile_over_pages(pool[:, 1], head_norm)
    places = torch.zeros(4, dtype=torch.int64)
    gather_pages(pool, places[:2], torch.empty_like(pool[:2]))
    logits, ints = torch.empty(4, 151936), torch.zeros(4, dtype=torch.int32)
    numbers = torch.ones(4)
    penalties = Penalties(ints, logits.view(torch.int32), numbers, numbers.double(), numbers.double())
    rows = RowLogits.plain(logits.bfloat16())
    edit_logits(rows, Bias(torch.zeros(5, dtype=torch.int32), ints, numbers), penalties)
    note_chosen(penalties, places)
    choose_tokens(rows, numbers, Cuts(places, numbers, numbers), places, places)
    if capability >= 89:  # the first with FP8
        quantise_tensor(hidden)
        quantise_rows(hidden)
        quantise_tiles(hidden)
        quantise_rows(hidden, 0.1)
        scales, of_channels = torch.empty(32, 32), torch.empty(4096)
        weight = torch.empty(4096, 4096, dtype=torch.float8_e4m3fn)
        for chosen in ALL_TILES:
            fp8_product.tiles_for = lambda *_, chosen=chosen: chosen
            values, of_rows = quantise_tiles(torch.empty(256, 4096, dtype=torch.bfloat16), tile_rows=1)
            fp8_tile_product(values, of_rows, weight, scales)
            fp8_row_product(values, of_rows[:, 0].contiguous(), weight, of_channels)
        compile_over_pages(pool.to(torch.float8_e4m3fn)[:, 1], head_norm)


if __name__ == "__main__":
    absent = _AbsentGpu()
    compile_only(absent)
    for capability in map(int, sys.argv[1:]):
        absent.capability = capability
        compile_all(capability)
