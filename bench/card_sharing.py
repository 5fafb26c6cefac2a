"""Several processes on one card: by NVIDIA's multi-process service where it may run, else by time slices.

Under the service (MPS) kernels of several processes run at the same time; without it the card changes from one process
to the next and runs one of them at a time.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

CONTROL = "nvidia-cuda-mps-control"
TIME_SLICES = "time slices"
MODES = ("auto", "mps", "time-slices")
_TRY = "import torch; torch.ones(8, device='cuda').sum().item()"
_TRY_S = 60.0  # torch is read from a cold disk
_CONTROL_S = 20.0


class SharingRefused(Exception):
    """MPS was asked for and does not run here."""


@contextlib.contextmanager
def shared_card(
    mode: str = "auto", trial: Sequence[str] = (sys.executable, "-c", _TRY)
) -> Iterator[tuple[dict[str, str], str]]:
    """The environment for processes that share the card, and how they do, in words.

    A service that runs already is used and left alone; one of our own listens in a directory of its own and ends with
    the context.

    Args:
        mode: one of `MODES`; `auto` takes MPS where it works.
        trial: a command that must succeed under MPS.

    Raises:
        SharingRefused: `mode` is mps, and it cannot be had; with what the tools said.
    """
    plain = dict(os.environ)
    if mode == "time-slices":
        yield plain, TIME_SLICES
        return
    if "CUDA_MPS_PIPE_DIRECTORY" in os.environ:
        yield plain, "MPS, found running"
        return
    control = shutil.which(CONTROL)
    with tempfile.TemporaryDirectory(prefix="baton-mps-", ignore_cleanup_errors=True) as folder:
        environment = plain | {
            f"CUDA_MPS_{kind}_DIRECTORY": str(Path(folder, kind.lower())) for kind in ("PIPE", "LOG")
        }
        for kind in ("pipe", "log"):
            Path(folder, kind).mkdir()
        refusal = f"{CONTROL} is not here"
        try:
            if control is not None:
                refusal = _run([control, "-d"], environment, limit_s=_CONTROL_S) or _run(
                    list(trial), environment, limit_s=_TRY_S
                )
            if refusal and mode == "mps":
                raise SharingRefused(f"MPS: {refusal}")
            yield (plain, f"{TIME_SLICES} (MPS: {refusal})") if refusal else (environment, "MPS")
        finally:
            if control is not None:  # also after a refusal: half of it may run
                _run([control], environment, "quit -t 5\n", limit_s=_CONTROL_S)


def _run(words: list[str], environment: dict[str, str], text: str | None = None, *, limit_s: float) -> str:
    """Empty if it went well, else the last line of what it said.

    It speaks into a file: a daemon that keeps a pipe open would keep us waiting for the pipe's end.
    """
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as told:
        told.write(text or "")
        told.seek(0)
        try:
            done = subprocess.run(
                words, env=environment, stdin=told, stdout=said, stderr=said, check=False, timeout=limit_s
            )
        except subprocess.TimeoutExpired:
            return f"TimeoutExpired after {limit_s:g} s"
        except OSError as error:
            return str(error)
        said.seek(0)
        lines = said.read().strip().splitlines()
    return "" if done.returncode == 0 else (lines[-1] if lines else f"exit status {done.returncode}")
