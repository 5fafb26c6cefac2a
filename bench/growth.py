"""How cost grows, and whether in straight lines: with batch, context, decode workers and streams.

    python bench/growth.py [batch] [context] [workers] [streams] [--json bench/results/growth.json]

batch, context: one decode step in this process, small models, one thread; its parts beside the limit of reading the
keys and values once. workers, streams: a real gateway process and made-up workers (`bench/mock_workers.py`); processor
time is the gateway's own. A line is fitted to each column; `worst` is the largest distance of a point from it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from growth_gateway import with_streams, with_workers
from machine import describe
from machine_limits import read_gb_s
from model_directory import QWEN3_0_6B
from random_checkpoint import random_checkpoint
from step_overhead import PAGE_SIZE, PARTS, Worker

from engine.load import LoadedModel, load_model
from fleet import logs

ROOT = Path(__file__).resolve().parents[1]
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
CONTEXTS = (128, 512, 2048, 8192, 16384, 32768)
CONTEXT_BATCH = 4
LONG_SHAPE = QWEN3_0_6B | {
    "vocab_size": 3072,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
}
Rows = list[dict[str, float]]


def show(rows: Rows, by: str) -> dict[str, dict[str, float]]:
    """Print a table and, below it, each column's line over `by`; returns the lines."""
    names = list(rows[0])
    print("| " + " | ".join(names) + " |\n|" + " ---: |" * len(names))
    for row in rows:
        cells = (f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}" for value in row.values())
        print("| " + " | ".join(cells) + " |")
    at = np.array([row[by] for row in rows])
    lines = {}
    for name in names:
        values = np.array([row[name] for row in rows])
        if name == by or len(rows) < 3 or not values.any():
            continue
        slope, base = np.polyfit(at, values, 1)
        worst = np.abs(values - (base + slope * at)).max() / values.max()
        lines[name] = {"base": float(base), "slope": float(slope), "worst": float(worst)}
        print(f"  {name}: {base:,.4g} + {slope:,.4g} per {by}, worst {worst:.0%} of the largest")
    return lines


def step_costs(model: LoadedModel, batch: int, context: int, steps: int) -> dict[str, float]:
    """Medians of a step's parts, microseconds."""
    worker = Worker(model, batch, context, steps=steps)
    for _ in range(3):
        worker.step()
    timed = [worker.step() for _ in range(steps)]
    return {part: statistics.median(step[part] for step in timed) * 1e6 for part in PARTS}


def opened(directory: Path) -> LoadedModel:
    """A model in bfloat16 where this machine is fast in it, its kernels compiled."""
    model = load_model(directory)
    model.transformer.backend.warm(model.config, PAGE_SIZE)
    return model


def by_batch() -> dict[str, Any]:
    """The demo model at 128 tokens of context."""
    model = opened(ROOT / "models" / "demo")
    rows = [{"batch": float(batch), **step_costs(model, batch, 128, 30)} for batch in BATCHES]
    print(f"\nbatch: the demo model, {model.dtype_name}, context 128; microseconds of a step")
    return {"rows": rows, "lines": show(rows, "batch")}


def by_context() -> dict[str, Any]:
    """A model with long contexts; reading keys and values is the limit of the slope."""
    with tempfile.TemporaryDirectory() as directory:
        model = opened(random_checkpoint(Path(directory), LONG_SHAPE))
    config = model.config
    token_bytes = 2 * config.num_layers * config.num_kv_heads * config.head_dim * model.dtype.itemsize
    rate = read_gb_s()
    rows = []
    for context in CONTEXTS:
        costs = step_costs(model, CONTEXT_BATCH, context, 8 if context > 4096 else 20)
        limit_us = CONTEXT_BATCH * context * token_bytes / rate / 1e3
        rows.append({"context": float(context), **costs, "reading KV at best": limit_us})
    print(
        f"\ncontext: {CONTEXT_BATCH} streams, 4 layers of 4 key heads of 64, {model.dtype_name}; microseconds of a step"
    )
    lines = show(rows, "context")
    share = lines["reading KV at best"]["slope"] / lines["forward"]["slope"]
    print(f"  a token of context is read at {share:.0%} of the {rate:.1f} GB/s that one thread reads")
    return {"rows": rows, "lines": lines, "read_gb_s": rate, "share_of_limit": share}


def main() -> None:
    """Run what was asked for; with `--json`, replace those parts in the file."""
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "batch": by_batch,
        "context": by_context,
        "workers": lambda: asyncio.run(with_workers()),
        "streams": lambda: asyncio.run(with_streams()),
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*parts, []], default=[])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logs.configure(service="bench", level="warning", log_format="console")
    known: dict[str, Any] = {}
    if options.json and options.json.is_file():
        known = json.loads(options.json.read_text())
    for name in options.parts or parts:
        result = parts[name]()
        if name in ("workers", "streams"):
            print(f"\n{name}: one gateway process")
            result["lines"] = show(result["rows"], name)
        known[name] = {**describe(), **result}
    if options.json:
        options.json.parent.mkdir(exist_ok=True)
        options.json.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
