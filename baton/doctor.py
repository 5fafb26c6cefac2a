"""`baton doctor`: can this machine serve, by which device and which hand-off transports, and if not, why not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from enum import StrEnum

import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from baton.facts import Facts

GIB = 2**30
MIN_MEMORY_BYTES = GIB
MIN_SHM_BYTES = 256 * 2**20
MIN_OPEN_FILES = 256
GOOD_OPEN_FILES = 4096


class Grade(StrEnum):
    """How a finding weighs: `no` stops Baton, `poor` costs speed or capacity, `info` is only told."""

    OK = "ok"
    POOR = "poor"
    NO = "no"
    INFO = "info"


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One row: what was looked at, what was found, and what follows from it."""

    topic: str
    grade: Grade
    found: str
    advice: str = ""


class Diagnosis(msgspec.Struct, frozen=True, kw_only=True):
    """All findings, the verdict in sentences, and whether this machine can serve at all."""

    can_serve: bool
    verdict: list[str]
    findings: list[Finding]
    facts: Facts


def diagnose(facts: Facts) -> Diagnosis:
    """Judge the facts; pure."""
    findings = [
        *_hardware(facts),
        *_software(facts),
        *_limits(facts),
        *_transports(facts),
    ]
    blocking = [finding for finding in findings if finding.grade is Grade.NO]
    verdict = [f"{finding.topic}: {finding.advice or finding.found}" for finding in blocking]
    if not blocking:
        device = f"{len(facts.gpus)} GPU" if _has_cuda(facts) else f"CPU, {facts.usable_cores} cores"
        usable = [
            finding.topic.removeprefix("transport ") for finding in _transports(facts) if finding.grade is Grade.OK
        ]
        verdict = [f"this machine can serve on {device}; hand-offs go by {', '.join(usable)}"]
        verdict += [f"{finding.topic}: {finding.advice}" for finding in findings if finding.grade is Grade.POOR]
    return Diagnosis(can_serve=not blocking, verdict=verdict, findings=findings, facts=facts)


def show(diagnosis: Diagnosis, console: Console) -> None:
    """Print the table and the verdict."""
    styles = {Grade.OK: "green", Grade.POOR: "yellow", Grade.NO: "red", Grade.INFO: "dim"}
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("what", "", "found", "what follows"):
        table.add_column(title, overflow="fold")
    for finding in diagnosis.findings:
        grade = Text(finding.grade, style=styles[finding.grade])
        table.add_row(Text(finding.topic), grade, Text(finding.found), Text(finding.advice))
    console.print(table)
    console.print()
    mark = "[green]✓[/green]" if diagnosis.can_serve else "[red]✗[/red]"
    for line in diagnosis.verdict:
        console.print(mark, Text(line), highlight=False, soft_wrap=True)
        mark = "[yellow]·[/yellow]" if diagnosis.can_serve else mark


def _has_cuda(facts: Facts) -> bool:
    return facts.torch is not None and facts.torch.cuda and bool(facts.gpus)


def _hardware(facts: Facts) -> Iterator[Finding]:
    yield Finding(topic="system", grade=Grade.INFO, found=f"{facts.system}, Python {facts.python}")
    flags = ", ".join(facts.cpu_flags) or "none of interest"
    yield _cpu(facts, flags)
    quota = "" if facts.cpu_quota is None else f", control group grants {facts.cpu_quota:g}"
    few = facts.usable_cores < 2
    yield Finding(
        topic="cores",
        grade=Grade.POOR if few else Grade.OK,
        found=f"{facts.usable_cores} usable of {facts.cores}{quota}",
        advice="prefill and decode will take turns on one core" if few else "",
    )
    total = min(facts.memory_bytes, facts.memory_limit_bytes or facts.memory_bytes)
    limit = "" if facts.memory_limit_bytes is None else f", control group grants {_gib(facts.memory_limit_bytes)}"
    small = total < MIN_MEMORY_BYTES
    yield Finding(
        topic="memory",
        grade=Grade.NO if small else Grade.OK,
        found=f"{_gib(facts.memory_available_bytes)} free of {_gib(facts.memory_bytes)}{limit}",
        advice=f"less than {_gib(MIN_MEMORY_BYTES)} does not hold a fleet" if small else "",
    )
    for index, gpu in enumerate(facts.gpus):
        found = f"{gpu.name}, {gpu.memory_mib / 1024:.0f} GiB, sm {gpu.compute_capability}, driver {gpu.driver}"
        yield Finding(topic=f"GPU {index}", grade=Grade.OK, found=found)
    if not facts.gpus:
        yield Finding(topic="GPU", grade=Grade.INFO, found=facts.gpu_error or "none")


def _cpu(facts: Facts, flags: str) -> Finding:
    has = set(facts.cpu_flags)
    if _has_cuda(facts):
        grade, advice = Grade.OK, ""
    elif "amx_bf16" in has:
        grade, advice = Grade.OK, "bfloat16 runs on matrix units"
    elif has & {"avx512_bf16", "bf16"}:
        grade, advice = Grade.OK, "bfloat16 runs on vector units"
    elif has & {"avx2", "avx512f", "asimd"}:
        grade, advice = Grade.POOR, "no bfloat16 arithmetic: --dtype float32 is likely faster, at twice the memory"
    else:
        grade, advice = Grade.POOR, "no AVX2: matrix products will be slow"
    return Finding(topic="CPU", grade=grade, found=f"{facts.cpu} ({flags})", advice=advice)


def _software(facts: Facts) -> Iterator[Finding]:
    if facts.torch is None:
        yield Finding(
            topic="torch", grade=Grade.NO, found=facts.torch_error, advice="PyTorch does not load: make install"
        )
    else:
        mismatch = bool(facts.gpus) and not facts.torch.cuda
        cuda = f"CUDA {facts.torch.cuda_version}" if facts.torch.cuda_version else "CPU build"
        yield Finding(
            topic="torch",
            grade=Grade.POOR if mismatch else Grade.OK,
            found=f"{facts.torch.version}, {cuda}",
            advice="there is a GPU that this PyTorch cannot use: check driver and build" if mismatch else "",
        )
    for module in ("triton", "cupy"):
        version = facts.packages.get(module)
        needed = _has_cuda(facts)
        yield Finding(
            topic=module,
            grade=Grade.INFO if version is None and not needed else Grade.POOR if version is None else Grade.OK,
            found=version or "not installed",
            advice="install the gpu extra" if version is None and needed else "",
        )
    where = f"at {facts.redis_url}" if facts.redis_url else "embedded"
    yield Finding(
        topic="Redis",
        grade=Grade.NO if facts.redis_version is None else Grade.OK,
        found=facts.redis_error if facts.redis_version is None else f"{facts.redis_version}, {where}",
        advice=f"Redis {where} cannot be used ({facts.redis_error})" if facts.redis_version is None else "",
    )


def _limits(facts: Facts) -> Iterator[Finding]:
    soft, hard = facts.open_files
    # A negative limit is "unlimited".
    low, fatal = 0 <= soft < GOOD_OPEN_FILES, 0 <= soft < MIN_OPEN_FILES
    yield Finding(
        topic="open files",
        grade=Grade.NO if fatal else Grade.POOR if low else Grade.OK,
        found=f"{soft} (up to {hard})",
        advice=f"each stream needs one: ulimit -n {min(hard, 65536) if hard > 0 else 65536}" if low else "",
    )
    yield Finding(
        topic="encryption",
        grade=Grade.OK if facts.curve else Grade.POOR,
        found="ZeroMQ has CURVE" if facts.curve else "ZeroMQ was built without CURVE",
        advice="" if facts.curve else "a fleet can run on this machine alone: install pyzmq's own wheel",
    )
    if facts.shm_bytes is None or facts.shm_free_bytes is None:
        yield Finding(topic="shared memory", grade=Grade.INFO, found="missing or not writable")
        return
    tight = facts.shm_free_bytes < MIN_SHM_BYTES
    yield Finding(
        topic="shared memory",
        grade=Grade.POOR if tight else Grade.OK,
        found=f"{_gib(facts.shm_free_bytes)} free of {_gib(facts.shm_bytes)} in /dev/shm",
        advice="page pools lie here: give it more (docker: --shm-size), or --transports tcp" if tight else "",
    )


def _transports(facts: Facts) -> Iterator[Finding]:
    checks: tuple[tuple[str, Callable[[Facts], str | None], str], ...] = (
        ("shm", _why_no_shm, "workers of this machine write into each other's pages"),
        ("tcp", _why_no_tcp, "works everywhere"),
        ("cuda_ipc", _why_no_cuda_ipc, "GPUs of this machine write into each other's pages"),
        ("nixl", _why_no_nixl, "RDMA between machines"),
    )
    for name, why_not, use in checks:
        reason = why_not(facts) if name in facts.transports_built else "not part of this version of Baton"
        grade = Grade.OK if reason is None else Grade.NO if name == "tcp" else Grade.INFO
        yield Finding(
            topic=f"transport {name}", grade=grade, found="would work" if reason is None else reason, advice=use
        )


def _why_no_shm(facts: Facts) -> str | None:
    return "no writable /dev/shm" if facts.shm_bytes is None else None


def _why_no_tcp(facts: Facts) -> str | None:
    return None if facts.loopback else "sockets on loopback do not work"


def _why_no_cuda_ipc(facts: Facts) -> str | None:
    if not facts.gpus:
        return "no GPU"
    if not _has_cuda(facts):
        return "PyTorch sees no GPU"
    return None if "cupy" in facts.packages else "cupy is not installed (gpu extra)"


def _why_no_nixl(facts: Facts) -> str | None:
    return None if "nixl" in facts.packages else "the nixl package is not installed"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.1f} GiB"
