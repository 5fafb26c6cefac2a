"""Names of the parts of `bench/kernels.py`, for those who start it and need no torch."""

from __future__ import annotations

PARTS = ("rows", "decode", "prefill", "sampling", "copies", "fp8")
BEGIN = "== "
"""Before a part's name, on a line of its own, when it begins."""
