"""Run as a file: ask the kernel for a signal when the parent dies, then become the given command.

    python -I -S leash.py PARENT_PID SIGNAL COMMAND [ARGUMENT ...]

A wrapper rather than a function between fork and exec, where Python code is not safe. Standard library only.
"""

from __future__ import annotations

import ctypes
import os
import sys

PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> None:
    """Set the parent-death signal (prctl(2); it survives exec) and exec. Does not return."""
    parent, signum, command = int(arguments[0]), int(arguments[1]), arguments[2:]
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signum, 0, 0, 0) != 0:
        sys.exit(f"prctl: {os.strerror(ctypes.get_errno())}")
    # The parent may have died between fork and prctl; then no signal will ever come.
    if os.getppid() != parent:
        sys.exit("the parent is gone")
    os.execvp(command[0], command)  # noqa: S606 - becoming the command is the point


if __name__ == "__main__":
    main(sys.argv[1:])
