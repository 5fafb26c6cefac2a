"""Two machines in one: a network namespace of its own, joined to the tests' by a pair of virtual interfaces."""

from __future__ import annotations

import os
import secrets
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field


@dataclass(frozen=True)
class OtherMachine:
    """Processes start there behind `prefix`; `near` is this machine's address on the wire, `far` the other's."""

    near: str
    far: str
    prefix: list[str] = field(default_factory=list)


class NotPermitted(Exception):
    """No namespace can be made here; the message says why."""


def _ip(*arguments: str) -> None:
    try:
        done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise NotPermitted("there is no `ip` command") from error
    if done.returncode != 0:
        raise NotPermitted(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


@contextmanager
def other_machine() -> Iterator[OtherMachine]:
    """A machine that reaches this one by its wire alone. Raises NotPermitted, mostly for want of root's rights."""
    mark = secrets.token_hex(3)
    name, here, there = f"baton-{mark}", f"bt{mark}a", f"bt{mark}b"
    net = f"10.{83 + os.getpid() % 100}.{os.getpid() // 100 % 250}"
    machine = OtherMachine(f"{net}.1", f"{net}.2", ["ip", "netns", "exec", name])
    with ExitStack() as undo:
        _ip("netns", "add", name)
        undo.callback(_ip, "netns", "delete", name)  # the pair of interfaces goes with it
        _ip("link", "add", here, "type", "veth", "peer", "name", there, "netns", name)
        _ip("address", "add", f"{machine.near}/30", "dev", here)
        _ip("link", "set", here, "up")
        _ip("-n", name, "address", "add", f"{machine.far}/30", "dev", there)
        _ip("-n", name, "link", "set", there, "up")
        _ip("-n", name, "link", "set", "lo", "up")
        yield machine
