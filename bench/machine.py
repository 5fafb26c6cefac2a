"""What the benches share: what a result file says of machine and versions, and quantiles."""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import os
import platform
import re
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "numpy", "litestar", "pyzmq", "msgspec")


def cpu_name() -> str:
    """As the kernel names it, with family and model, which tell cores apart where the name does not."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor()
    found = dict(re.findall(r"^(model name|cpu family|model)\s*: (.*)$", text, re.MULTILINE))
    return f"{found.get('model name', 'unknown')} (family {found.get('cpu family')}, model {found.get('model')})"


def describe() -> dict[str, Any]:
    """Date, CPU, cores, memory, and versions of what computes."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "memory_gib": round(pages / 2**30, 1)},
        "versions": {"python": platform.python_version(), **versions},
    }


def quantile(values: list[float], share: float) -> float:
    """Of values that need not be sorted; NaN of none."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else float("nan")
