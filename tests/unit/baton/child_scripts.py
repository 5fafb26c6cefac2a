"""Small programs that stand in for services, and a probe and a reporter that watch them."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

from baton.child import Child, ChildSpec
from baton.report import Stage

# Writes its name to `order` when it starts and when it is asked to leave.
POLITE = """
import signal, sys, time, pathlib
name, order = sys.argv[1:3]
def note(what):
    with open(order, "a") as file:
        file.write(f"{what} {name}\\n")
def leave(*_):
    note("left")
    sys.exit(0)
signal.signal(signal.SIGTERM, leave)
note("began")
print("serving", flush=True)
pathlib.Path(order + "." + name + ".ready").touch()
while True:
    time.sleep(0.02)
"""
STUBBORN = """
import signal, sys, time, pathlib
name, order = sys.argv[1:3]
signal.signal(signal.SIGTERM, signal.SIG_IGN)
pathlib.Path(order + "." + name + ".ready").touch()
while True:
    time.sleep(0.02)
"""
STILLBORN = """
import sys
print("first line")
print("the reason why", file=sys.stderr)
sys.exit(3)
"""
# Becomes ready and crashes, every time.
SICKLY = """
import os, signal, sys, time, pathlib
name, order = sys.argv[1:3]
with open(order, "a") as file:
    file.write(f"began {name}\\n")
pathlib.Path(order + "." + name + ".ready").touch()
time.sleep(0.25)
os.kill(os.getpid(), signal.SIGKILL)
"""
# Leaves a child of its own behind, in its process group.
LITTERING = """
import pathlib, subprocess, sys, time
name, order = sys.argv[1:3]
litter = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
pathlib.Path(order + ".litter").write_text(str(litter.pid))
pathlib.Path(order + "." + name + ".ready").touch()
time.sleep(60)
"""
DRAINED = """
import pathlib, sys, time
name, order = sys.argv[1:3]
pathlib.Path(order + "." + name + ".ready").touch()
time.sleep(0.3)
"""


def spec(script: str, name: str, role: str, order: Path, *, grace_s: float = 5.0) -> ChildSpec:
    """A child that runs `script` with its name and the file for notes as arguments."""
    command = (sys.executable, "-S", "-c", script, name, str(order))
    return ChildSpec(name, role, command, dict(os.environ), grace_s)


def notes_in(order: Path) -> list[str]:
    """What the polite ones wrote, in order."""
    return order.read_text().splitlines() if order.exists() else []


@dataclass
class FileProbe:
    """Ready is whoever has touched its file; a new life has to touch it again."""

    order: Path

    async def __call__(self, child: Child) -> bool:
        """See `baton.probes.Probe`."""
        return take_ready(self.order, child.spec.name)


def take_ready(order: Path, name: str) -> bool:
    """Whether this child has said that it is ready; asks it to say so again."""
    ready = Path(f"{order}.{name}.ready")
    found = ready.exists()
    ready.unlink(missing_ok=True)
    return found


def litter_of(order: Path) -> int:
    """Process id of what the littering one left behind."""
    return int(Path(f"{order}.litter").read_text())


@dataclass
class Recorder:
    """A reporter that remembers."""

    changes: list[tuple[str, Stage, str]] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)

    def changed(self, name: str, stage: Stage, *, elapsed_s: float, note: str = "") -> None:
        """See `baton.report.Reporter`."""
        assert elapsed_s >= 0
        self.changes.append((name, stage, note))

    def say(self, line: str) -> None:
        """See `baton.report.Reporter`."""
        self.lines.append(line)

    def stages(self, name: str) -> list[Stage]:
        """Stages of one child, in order."""
        return [stage for changed, stage, _ in self.changes if changed == name]


def is_running(pid: int) -> bool:
    """Whether a process of this id exists and is no zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat[stat.rindex(")") + 2] != "Z"
