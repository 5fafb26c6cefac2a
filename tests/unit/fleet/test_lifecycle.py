"""How a service process settles once its start is done."""

import platform

import numpy as np
import psutil
import pytest

from fleet.lifecycle import give_back_freed_memory

PIECE_BYTES = 64 * 1024
NUM_PIECES = 1024


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps freed memory and can be asked for it")
def test_what_the_start_freed_goes_back_to_the_system() -> None:
    pieces = [np.ones(PIECE_BYTES, dtype=np.uint8) for _ in range(NUM_PIECES)]
    last = pieces.pop()  # above the others: glibc by itself gives back only what lies above all that is in use
    full_bytes = psutil.Process().memory_info().rss
    pieces.clear()
    give_back_freed_memory()
    given_bytes = full_bytes - psutil.Process().memory_info().rss
    assert given_bytes > NUM_PIECES * PIECE_BYTES // 2
    assert last.all()
