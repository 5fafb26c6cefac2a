"""Every kernel compiles for the GPUs that are served, without one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
KERNELS = HERE.parents[2] / "engine" / "kernels"


CAPABILITIES = (80, 90)
EXACT = {f"engine.kernels.{name}" for name in ("sampling", "draw_limits", "penalties", "fp8")}
"""Modules whose results are specified to the bit: no fused product, no flush to zero, no approximation."""
LAUNCHED = re.compile(r"@(?:kernel|varying\(.*\))\ndef \w+\([^)]*\) -> None:")
"""A kernel that a launcher launches, rather than one that other kernels call."""


def test_kernels_compile_and_stay_in_registers(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, str(HERE / "compile_ahead.py"), *map(str, CAPABILITIES)],
        capture_output=True, text=True, check=False, env=environment, timeout=110,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    compiled = [json.loads(line) for line in done.stdout.splitlines()]
    for one in compiled:
        print(one)
    texts = {f"engine.kernels.{path.stem}": path.read_text() for path in KERNELS.glob("*.py")}
    every = {name for name, text in texts.items() if LAUNCHED.search(text)}
    for capability in CAPABILITIES:
        modules = {one["kernel"].rpartition(".")[0] for one in compiled if one["capability"] == capability}
        assert modules == (every if capability >= 89 else every - {"engine.kernels.fp8", "engine.kernels.fp8_product"})
    assert all(one["stack_bytes"] <= 128 for one in compiled), "a kernel keeps its state in memory"
    assert all(one["registers"] * one["threads"] <= 65_536 for one in compiled), "a program does not fit a processor"
    exact = [one for one in compiled if one["kernel"].rpartition(".")[0] in EXACT]
    assert {one["kernel"].rpartition(".")[0] for one in exact} == EXACT
    assert all(one["inexact"] == 0 for one in exact), "a rounding that the specification makes is left out"
    # What a program may have on the smallest card of the generation: 99 KiB on compute capability 8.6 and 8.9.
    assert all(one["shared_bytes"] <= 101_376 for one in compiled)
