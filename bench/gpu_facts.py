"""What a result file says of a machine with a GPU: card, driver, libraries, sharing of the card by others.

    python bench/gpu_facts.py        # one line of JSON

A process of its own, since asking torch makes a context on the card. Nothing here fails for a tool that is missing.
"""

from __future__ import annotations

import contextlib
import csv
import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from machine import describe

ROOT = Path(__file__).resolve().parents[1]
_TOOL_S = 20.0
_ASKED = (
    "name", "driver_version", "vbios_version", "memory.total", "memory.used", "power.limit", "clocks.max.sm",
    "clocks.max.memory", "clocks.sm", "temperature.gpu", "persistence_mode", "compute_mode", "mig.mode.current",
    "ecc.mode.current",
)  # fmt: skip
_MODULES = ("torch", "triton", "cupy", "numba", "transformers")


def facts() -> dict[str, Any]:
    """All of it; `gpu` is missing where torch sees none, and then `no_gpu` says why."""
    import torch

    found = describe()
    found["versions"] |= _distributions()
    found["versions"]["cuda"] = torch.version.cuda
    if commit := _said("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"):
        found["commit"] = commit
    found["nvidia_smi"] = nvidia_smi()
    try:
        properties = torch.cuda.get_device_properties(0)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        found["no_gpu"] = str(error).splitlines()[0]
        return found
    major, minor = torch.cuda.get_device_capability(0)
    found["gpu"] = {
        "name": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "capability": f"{major}.{minor}",
        "fp8": (major, minor) >= (8, 9),
    }
    return found


def nvidia_smi() -> list[dict[str, str]]:
    """One entry per card; a field that this driver does not know leaves the others to be asked without it."""
    asked = list(_ASKED)
    while asked:
        said = _said("nvidia-smi", f"--query-gpu={','.join(asked)}", "--format=csv,noheader", keep_failure=True)
        unknown = [name for name in asked if f'"{name}"' in said]
        if not unknown:
            rows = csv.reader(said.splitlines(), skipinitialspace=True)
            return [dict(zip(asked, row, strict=True)) for row in rows if len(row) == len(asked)]
        asked = [name for name in asked if name not in unknown]
    return []


def _distributions() -> dict[str, str]:
    """Version by the name of whatever distribution brings a module: cupy has one per CUDA version."""
    found = {}
    brought_by = metadata.packages_distributions()
    for module in _MODULES:
        for name in dict.fromkeys(brought_by.get(module, [])):
            found[name] = metadata.version(name)
    return found


def _said(*words: str, keep_failure: bool = False) -> str:
    """What a tool printed; empty if it is not there, hangs or fails."""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(words, capture_output=True, text=True, timeout=_TOOL_S, check=False)
        if done.returncode == 0 or keep_failure:
            return done.stdout.strip()
    return ""


if __name__ == "__main__":
    json.dump(facts(), sys.stdout)
    print()
