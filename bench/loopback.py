"""Servers that a bench starts on this machine: where one may listen, and whether one answers."""

from __future__ import annotations

import socket
import urllib.request


def free_port() -> int:
    """A port of loopback that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers(url: str, *, timeout_s: float) -> bool:
    """Whether a GET is answered with 200."""
    try:
        with urllib.request.urlopen(url, timeout=timeout_s) as answer:  # noqa: S310 - our own address
            return bool(answer.status == 200)
    except OSError:
        return False
