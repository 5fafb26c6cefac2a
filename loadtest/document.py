"""The JSON report. Its schema is described in ``docs/loadtest.md``."""

import csv
import io
import os
import platform
from collections.abc import Iterable
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
        "environment": environment(),
        "target": {
            "model": result.target.model,
            "dialect": msgspec.to_builtins(result.target.dialect),
            "prompt_sizing": result.target.sizes.method.value,
            "prompt_overhead_tokens": result.target.sizes.overhead,
        },
        "summary": msgspec.to_builtins(result.summary) | {"peak_running": result.peak_running},
        "client": msgspec.to_builtins(result.health),
        "notes": result.notes,
        "server": msgspec.to_builtins(result.samples),
        "requests": [_request(record, chunk_times=result.settings.chunk_times) for record in result.records],
    }


def write_document(document: dict[str, Any], path: Path) -> None:
    """Write a report as JSON to ``path``, whole or not at all. Raises: OSError."""
    write_whole(path, msgspec.json.format(msgspec.json.encode(document), indent=1) + b"\n")


def write_table(records: Iterable[Record], path: Path) -> None:
    """Write a line per request as CSV to ``path``, whole or not at all. Raises: OSError."""
    rows = [_request(record, chunk_times=False) for record in records]
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    write_whole(path, text.getvalue().encode())


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that nobody ever sees half done. Raises: OSError."""
    unfinished = path.with_name(f".{path.name}.part")
    unfinished.write_bytes(data)
    unfinished.replace(path)


def environment() -> dict[str, Any]:
    """Return what the figures of this machine depend on."""
    return {
        "loadtest": __version__,
        "python": platform.python_version(),
        "implementation": platform.python_implementation(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpu_count": os.cpu_count(),
        "numpy": np.__version__,
    }


def _request(record: Record, *, chunk_times: bool) -> dict[str, Any]:
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
