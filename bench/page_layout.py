"""Page-major against layer-major pools: what attention pays for the layout, and what a hand-off saves by it.

    python bench/page_layout.py [--threads 1]

Page-major is `[num_pages, layers, 2, kv_heads, page_size, head_dim]`: a page is one run of bytes. Layer-major is
`[layers, 2, num_pages, kv_heads, page_size, head_dim]`: what most engines use; a page is `2 * layers` runs. Attention
gathers a sequence's pages of one layer and attends, as the CPU path does. The bandwidth of a plain copy, measured in
the same run, is the limit of both.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch.nn.functional import scaled_dot_product_attention

SHAPES = {"demo (5 x 2 x 64)": (5, 2, 4, 64), "Qwen3-0.6B (28 x 8 x 128)": (28, 8, 16, 128)}
PAGE_SIZE = 16
CONTEXTS = (256, 2048, 8192)


def median_s(work: Callable[[], object], *, rounds: int = 15) -> float:
    """Median time of one call, after a warm-up."""
    work()
    times = []
    for _ in range(rounds):
        began_s = time.perf_counter()
        work()
        times.append(time.perf_counter() - began_s)
    return sorted(times)[rounds // 2]


def measure(layers: int, kv_heads: int, heads: int, head_dim: int, context: int) -> str:
    """One row: attention over all layers on both layouts, and moving one sequence's pages."""
    num_pages = max(2 * context // PAGE_SIZE, 64)
    page_major = torch.randn(num_pages, layers, 2, kv_heads, PAGE_SIZE, head_dim, dtype=torch.bfloat16)
    layer_major = page_major.permute(1, 2, 0, 3, 4, 5).contiguous()
    table = torch.randperm(num_pages)[: context // PAGE_SIZE]
    query = torch.randn(1, heads, 1, head_dim, dtype=torch.bfloat16)

    def attend(pages: torch.Tensor) -> torch.Tensor:
        # pages: [n, 2, Hkv, P, D] -> keys, values [1, Hkv, n * P, D]
        keys, values = pages.permute(1, 2, 0, 3, 4).reshape(2, 1, kv_heads, -1, head_dim)
        return scaled_dot_product_attention(query, keys, values, enable_gqa=True)

    def on_page_major() -> None:
        for layer in range(layers):
            attend(page_major[:, layer].index_select(0, table))

    def on_layer_major() -> None:
        for layer in range(layers):
            attend(layer_major[layer].index_select(1, table).transpose(0, 1))

    staging = torch.empty(len(table), *page_major.shape[1:], dtype=torch.bfloat16)
    flat = page_major[: len(table)].contiguous()
    copy_s = median_s(lambda: staging.copy_(flat))

    def move_page_major() -> None:
        for at, page in enumerate(table.tolist()):
            staging[at].copy_(page_major[page])

    target = torch.empty_like(layer_major[:, :, : len(table)])

    def move_layer_major() -> None:
        for at, page in enumerate(table.tolist()):
            for layer in range(layers):
                for half in range(2):
                    target[layer, half, at].copy_(layer_major[layer, half, page])

    a, b = median_s(on_page_major), median_s(on_layer_major)
    c, d = median_s(move_page_major, rounds=7), median_s(move_layer_major, rounds=3)
    size_mib = staging.nbytes / 2**20
    attention = f"{a * 1e3:7.2f} ms page-major, {b * 1e3:7.2f} ms layer-major ({a / b:4.2f})"
    moving = f"{c * 1e3:6.2f} ms against {d * 1e3:6.2f} ms ({d / c:4.1f} times; one plain copy {copy_s * 1e3:6.2f} ms)"
    return f"{context:>6} tokens, {size_mib:6.1f} MiB: attention {attention}; moving {moving}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    torch.set_num_threads(parser.parse_args().threads)
    with torch.inference_mode():
        for name, shape in SHAPES.items():
            layers, kv_heads, heads, head_dim = shape
            print(name)
            for context in CONTEXTS:
                print("  " + measure(layers, kv_heads, heads, head_dim, context))


if __name__ == "__main__":
    main()
