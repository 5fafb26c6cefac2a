"""Compiled kernels are kept on disk until any of the sources that they are made of changes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("numba")

from engine.cpu.jit import source_digest

SCRIPT = """
import engine.cpu.jit as jit
jit.source_digest = lambda: {digest!r}
from engine.cpu.row_kernels import gated_silu_rows
print(gated_silu_rows(64).cache_hits)
"""


def cache_hits(folder: Path, digest: str) -> int:
    """Of one kernel in a fresh process that keeps its code in `folder`."""
    environ = {**os.environ, "NUMBA_CACHE_DIR": str(folder), "PYTHONPATH": str(Path(__file__).parents[3])}
    script = SCRIPT.format(digest=digest)
    done = subprocess.run([sys.executable, "-c", script], env=environ, capture_output=True, check=True, text=True)
    return int(done.stdout)


def test_a_kernel_is_kept_until_a_source_changes(tmp_path: Path) -> None:
    assert [cache_hits(tmp_path, digest) for digest in ("old", "old", "new", "new")] == [0, 1, 0, 1]


def test_every_source_counts(tmp_path: Path) -> None:
    package = tmp_path / "cpu"
    package.mkdir()
    (tmp_path / "candidates.py").write_text("LOWEST = 1")
    (tmp_path / "choice.py").write_text("")
    (package / "tiles.py").write_text("LANES = 16")
    digests = {source_digest(package)}
    for path, text in ((package / "tiles.py", "LANES = 8"), (tmp_path / "candidates.py", "LOWEST = 2")):
        path.write_text(text)
        source_digest.cache_clear()
        digests.add(source_digest(package))
    source_digest.cache_clear()
    assert len(digests) == 3
