"""Every kernel compiles for the GPUs that are served, without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
KERNELS = HERE.parents[2] / "engine" / "kernels"


CAPABILITIES = (80, 90)


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
    every = {f"engine.kernels.{path.stem}" for path in KERNELS.glob("*.py") if "@kernel\n" in path.read_text()}
    for capability in CAPABILITIES:
        modules = {one["kernel"].rpartition(".")[0] for one in compiled if one["capability"] == capability}
        assert modules == (every if capability >= 89 else every - {"engine.kernels.fp8", "engine.kernels.fp8_product"})
    assert all(one["stack_bytes"] <= 128 for one in compiled), "a kernel keeps its state in memory"
    # What a program may have on the smallest card of the generation: 99 KiB on compute capability 8.6 and 8.9.
    assert all(one["shared_bytes"] <= 101_376 for one in compiled)
