"""The JSON report. Its schema is described in ``docs/loadtest.md``."""

import os
import platform
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from loadtest import __version__
from loadtest.record import Record
from loadtest.run import Result

SCHEMA_VERSION = 1
_DECIMALS = 6  # microseconds


def make_document(result: Result) -> dict[str, Any]:
    """Return the report as plain JSON values. Holds no API key and no header values."""
    return {
        "schema": "baton.loadtest",
        "schema_version": SCHEMA_VERSION,
        "started_at": result.started_at.isoformat(),
        "interrupted": result.interrupted,
        "config": result.settings.public(),
        "environment": _environment(),
        "target": {
            "model": result.target.model,
            "dialect": msgspec.to_builtins(result.target.dialect),
            "prompt_sizing": result.target.sizes.method.value,
            "prompt_overhead_tokens": result.target.sizes.overhead,
        },
        "summary": msgspec.to_builtins(result.summary) | {"peak_running": result.peak_running},
        "client": msgspec.to_builtins(result.health),
        "notes": result.notes,
        "requests": [_request(record, result.settings.chunk_times) for record in result.records],
    }


def write_document(result: Result, path: Path) -> None:
    """Write the report to ``path``, whole or not at all. Raises: OSError."""
    text = msgspec.json.format(msgspec.json.encode(make_document(result)), indent=1)
    unfinished = path.with_name(f".{path.name}.part")
    unfinished.write_bytes(text + b"\n")
    unfinished.replace(path)


def _environment() -> dict[str, Any]:
    return {
        "loadtest": __version__,
        "python": platform.python_version(),
        "implementation": platform.python_implementation(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpu_count": os.cpu_count(),
        "numpy": np.__version__,
    }


def _request(record: Record, chunk_times: bool) -> dict[str, Any]:
    # array.array is no JSON type, so the times are taken out first.
    fields: dict[str, Any] = {
        name: getattr(record, name) for name in record.__struct_fields__ if name != "content_times_s"
    }
    fields |= {"ttft_s": record.ttft_s, "tpot_s": record.tpot_s, "e2e_s": record.e2e_s}
    for name, value in fields.items():
        if isinstance(value, float):
            fields[name] = round(value, _DECIMALS)
    fields["num_chunks"] = len(record.content_times_s)
    if chunk_times:
        fields["content_times_s"] = [round(at_s, _DECIMALS) for at_s in record.content_times_s]
    return fields
