"""The benches are scripts beside each other; their modules import each other by name."""

from __future__ import annotations

import sys
from pathlib import Path

BENCH = Path(__file__).parents[3] / "bench"
sys.path.append(str(BENCH))
