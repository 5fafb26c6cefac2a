"""Compiled kernels are kept on disk until any of the sources that they are made of changes."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time
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


def started(folder: Path, digest: str) -> subprocess.Popen[str]:
    """A fresh process that wants one kernel and keeps its code in `folder`; it says how often it was found there."""
    environ = {**os.environ, "NUMBA_CACHE_DIR": str(folder), "PYTHONPATH": str(Path(__file__).parents[3])}
    script = SCRIPT.format(digest=digest)
    return subprocess.Popen([sys.executable, "-c", script], env=environ, stdout=subprocess.PIPE, text=True)


def cache_hits(process: subprocess.Popen[str]) -> int:
    said, _ = process.communicate()
    assert process.returncode == 0
    return int(said)


def num_waiting(lock: Path) -> int:
    """Processes that wait for a lock on a file, proc_locks(5)."""
    entries = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
    return sum(words[1] == "->" and words[6].endswith(f":{lock.stat().st_ino}") for words in entries)


def test_a_kernel_is_kept_until_a_source_changes(tmp_path: Path) -> None:
    assert [cache_hits(started(tmp_path, digest)) for digest in ("old", "old", "new", "new")] == [0, 1, 0, 1]


def test_of_processes_that_want_a_kernel_at_once_one_compiles_it(tmp_path: Path) -> None:
    cache_hits(started(tmp_path, "old"))
    (lock,) = tmp_path.rglob("*.lock")
    with lock.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        several = [started(tmp_path, "new") for _ in range(3)]
        while num_waiting(lock) < len(several):
            assert all(process.poll() is None for process in several)
            time.sleep(0.05)
        with several.pop() as unlucky:
            unlucky.kill()  # its place in the queue goes with it
    assert sorted(map(cache_hits, several)) == [0, 1]


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
