"""What becomes of the children when `baton up` is killed without a chance to say anything."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from child_scripts import is_running

from baton import leash
from baton.cleanup import Cleanup
from baton.janitor import read_orders

# Starts a child on the leash, tells its pid, and waits to be killed.
PARENT = """
import os, subprocess, sys, time
child = subprocess.Popen(
    [sys.executable, "-I", "-S", sys.argv[1], str(os.getpid()), "15", sys.executable, "-S", "-c",
     "import time; time.sleep(60)"], start_new_session=True)
print(child.pid, flush=True)
time.sleep(60)
"""
# Enters a Cleanup, tells it of a stubborn child and of a directory, and waits to be killed.
CARELESS = """
import pathlib, subprocess, sys, time
from baton.cleanup import Cleanup
with Cleanup(grace_s=0.5) as cleanup:
    code = "import signal, time; signal.signal(15, signal.SIG_IGN); print('on', flush=True); time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-S", "-c", code], start_new_session=True, stdout=subprocess.PIPE)
    child.stdout.readline()
    cleanup.group(child.pid, True)
    cleanup.will_remove(pathlib.Path(sys.argv[1]))
    print(child.pid, flush=True)
    time.sleep(60)
"""


def _soon(is_so: Callable[[], bool], timeout_s: float = 5.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if is_so():
            return True
        time.sleep(0.02)
    return False


def _start(*command: str) -> tuple[subprocess.Popen[str], int]:
    parent = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    return parent, int(parent.stdout.readline())


def _kill(parent: subprocess.Popen[str]) -> None:
    parent.kill()
    parent.wait()
    assert parent.stdout is not None
    parent.stdout.close()


def test_a_child_on_the_leash_dies_with_its_parent() -> None:
    parent, child = _start("-S", "-c", PARENT, leash.__file__)
    assert is_running(child)
    _kill(parent)
    assert _soon(lambda: not is_running(child))


def test_the_leash_does_not_start_anything_for_a_parent_that_is_gone() -> None:
    done = subprocess.run(
        [sys.executable, "-I", "-S", leash.__file__, str(os.getppid()), "15", "/bin/true"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "the parent is gone" in done.stderr


def test_the_janitor_ends_children_that_ignore_sigterm_and_removes_what_was_left(tmp_path: Path) -> None:
    left = tmp_path / "left"
    left.mkdir()
    (left / "redis.sock").touch()
    parent, child = _start("-c", CARELESS, str(left))
    _kill(parent)
    assert is_running(child)
    assert _soon(lambda: not is_running(child) and not left.exists(), timeout_s=15)


def test_an_orderly_end_removes_the_paths_and_leaves_no_janitor(tmp_path: Path) -> None:
    left = tmp_path / "left.json"
    left.touch()
    with Cleanup() as cleanup:
        cleanup.will_remove(left)
        janitor = cleanup._janitor
        assert janitor is not None
        assert janitor.poll() is None
    assert not left.exists()
    assert janitor.returncode == 0


def test_a_janitor_that_was_killed_does_not_disturb_the_run(tmp_path: Path) -> None:
    left = tmp_path / "left.json"
    left.touch()
    with Cleanup() as cleanup:
        assert cleanup._janitor is not None
        cleanup._janitor.send_signal(signal.SIGKILL)
        cleanup._janitor.wait()
        cleanup.will_remove(left)
    assert not left.exists()


def test_orders_are_followed_to_the_end_of_the_pipe() -> None:
    assert read_orders(["group 5\n", "group 6\n", "gone 5\n", "gone 9\n", "remove /x y\n"]) == ([6], [Path("/x y")])
    assert read_orders(["group 5\n", "done\n"]) is None
