"""The Lua files beside this module: each one atomic step in Redis."""

from __future__ import annotations

from functools import cache
from importlib.resources import files


@cache
def lua(name: str) -> str:
    """Text of `lua/{name}.lua`."""
    return files("fleet").joinpath("lua", f"{name}.lua").read_text(encoding="utf-8")
