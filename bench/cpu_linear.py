"""Products of a decoder's matrices on the CPU: plain, packed for oneDNN, and our own, beside what memory can deliver.

    python bench/cpu_linear.py [--threads 2]

All 28 layers of Qwen3-0.6B's shape in bfloat16, so that weights come from memory and not from a cache. The limit is
reading the weights once, two bytes each, at the bandwidth of a plain sum over as many bytes, measured in the same run;
our own products read a quarter less (`engine/cpu/panels.py`), and can be below it.
"""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from machine_limits import best_s

from engine.backend import Linear, TorchBackend
from engine.cpu.products import Products
from engine.packed_backend import PackedBackend, can_pack

LAYERS = 28
SHAPES = ((4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072))  # [out, in] of qkv, o, gate_up, down
TOKENS = (1, 4, 8, 16, 32, 64, 128, 256, 512)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    torch.set_num_threads(parser.parse_args().threads)
    if not can_pack(torch.device("cpu")):
        raise SystemExit("this build of torch, or this CPU, does not pack bfloat16 matrices")
    matrices = [torch.randn(shape, dtype=torch.bfloat16) * 0.02 for _ in range(LAYERS) for shape in SHAPES]
    num_bytes = sum(matrix.nbytes for matrix in matrices)
    plain: list[Linear] = [TorchBackend().linear(matrix, None) for matrix in matrices]
    packed: list[Linear] = [PackedBackend().linear(matrix, None) for matrix in matrices]
    products = Products()
    ours: list[Linear] = [products.linear(matrix, None) for matrix in matrices]
    flat = torch.cat([matrix.view(torch.int64).flatten() for matrix in matrices])
    read_s = best_s(flat.sum, 5)
    print(f"{num_bytes / 1e9:.2f} GB of weights; reading them once takes {read_s * 1e3:.1f} ms")
    for count in TOKENS:
        inputs = [torch.randn(count, matrix.shape[1], dtype=torch.bfloat16) for matrix in matrices[: len(SHAPES)]]

        def run(products: list[Linear], inputs: list[torch.Tensor] = inputs) -> None:
            for at, product in enumerate(products):
                product(inputs[at % len(SHAPES)])

        rounds = 6 if count <= 64 else 3
        plain_s, packed_s, ours_s = (best_s(functools.partial(run, kind), rounds) for kind in (plain, packed, ours))
        times = f"plain {plain_s * 1e3:7.1f} ms, oneDNN packed {packed_s * 1e3:7.1f} ms, ours {ours_s * 1e3:7.1f} ms"
        rates = f"{num_bytes / ours_s / 1e9:5.1f} GB/s, {count * num_bytes / ours_s / 1e9:6.0f} GFLOP/s"
        print(f"{count:4d} tokens: {times}: {rates}, {ours_s / read_s:5.2f} times the reading")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
