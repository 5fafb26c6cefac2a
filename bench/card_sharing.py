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
from collections.abc import Iterator
from pathlib import Path

CONTROL = "nvidia-cuda-mps-control"
TIME_SLICES = "time slices"
_TRY = "import torch; torch.ones(8, device='cuda').sum().item()"


@contextlib.contextmanager
def shared_card() -> Iterator[tuple[dict[str, str], str]]:
    """The environment for processes that share the card, and how they do, in words.

    A service that runs already is used and left alone; one of our own listens in a directory of its own and ends with
    the context.
    """
    if "CUDA_MPS_PIPE_DIRECTORY" in os.environ:
        yield dict(os.environ), "MPS, found running"
        return
    control = shutil.which(CONTROL)
    if control is None:
        yield dict(os.environ), f"{TIME_SLICES} ({CONTROL} is not here)"
        return
    with tempfile.TemporaryDirectory(prefix="baton-mps-") as folder:
        environment = os.environ | {
            "CUDA_MPS_PIPE_DIRECTORY": str(Path(folder) / "pipe"),
            "CUDA_MPS_LOG_DIRECTORY": str(Path(folder) / "log"),
        }
        for name in ("pipe", "log"):
            (Path(folder) / name).mkdir()
        started = _run([control, "-d"], environment)
        try:
            tried = _run([sys.executable, "-c", _TRY], environment) if started == "" else started
            yield (environment, "MPS") if tried == "" else (dict(os.environ), f"{TIME_SLICES} (MPS: {tried})")
        finally:
            if started == "":
                _run([control], environment, "quit\n")


def _run(words: list[str], environment: dict[str, str], text: str | None = None) -> str:
    """Empty if it went well, else the last line of what it said."""
    try:
        done = subprocess.run(
            words, env=environment, input=text, capture_output=True, text=True, check=False, timeout=90
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{type(error).__name__}"
    said = (done.stderr or done.stdout).strip().splitlines()
    return "" if done.returncode == 0 else (said[-1] if said else f"exit {done.returncode}")
