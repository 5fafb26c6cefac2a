"""The doctor's judgement on made-up machines, and one look at the real one."""

from __future__ import annotations

import io
import resource
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from baton.cli import main
from baton.doctor import GIB, Diagnosis, Finding, Grade, diagnose, show
from baton.facts import Facts, Gpu, TorchFacts, memory_limit, parse_gpus, read_cpu
from baton.settings import without_password

PLAIN = Facts(
    python="3.11",
    system="Linux",
    cpu="Some CPU",
    cpu_flags=["amx_bf16", "avx2"],
    cores=8,
    usable_cores=8,
    cpu_quota=None,
    memory_bytes=32 * GIB,
    memory_available_bytes=30 * GIB,
    memory_limit_bytes=None,
    shm_bytes=16 * GIB,
    shm_free_bytes=16 * GIB,
    open_files=(65536, 65536),
    locked_bytes=None,
    gpus=[],
    gpu_error="nvidia-smi is not installed",
    torch=TorchFacts(version="2.13.0+cpu", cuda=False),
    packages={},
    curve=True,
    loopback=True,
    redis_url="",
    redis_version="6.2.14",
)
GPU = Gpu(name="H200", memory_mib=143771, driver="580.1", compute_capability="9.0")


def _finding(facts: Facts, topic: str) -> Finding:
    return next(finding for finding in diagnose(facts).findings if finding.topic == topic)


def test_a_plain_machine_can_serve_on_its_cpu() -> None:
    diagnosis = diagnose(PLAIN)
    assert diagnosis.can_serve
    assert diagnosis.verdict == ["this machine can serve on CPU, 8 cores; hand-offs go by shm, tcp"]


@pytest.mark.parametrize(
    ("change", "topic", "grade", "words"),
    [
        ({"cpu_flags": ["avx2"]}, "CPU", Grade.POOR, "--dtype float32"),
        ({"cpu_flags": []}, "CPU", Grade.POOR, "no AVX2"),
        ({"usable_cores": 1}, "cores", Grade.POOR, "one core"),
        ({"memory_limit_bytes": GIB // 2}, "memory", Grade.NO, "does not hold a fleet"),
        ({"torch": None, "torch_error": "no module"}, "torch", Grade.NO, "make install"),
        ({"gpus": [GPU]}, "torch", Grade.POOR, "a GPU that this PyTorch cannot use"),
        ({"redis_version": None, "redis_error": "refused"}, "Redis", Grade.NO, "refused"),
        ({"open_files": (1024, 4096)}, "open files", Grade.POOR, "ulimit -n 4096"),
        ({"open_files": (64, 64)}, "open files", Grade.NO, "ulimit"),
        ({"shm_free_bytes": 2**20}, "shared memory", Grade.POOR, "--shm-size"),
        ({"loopback": False}, "transport tcp", Grade.NO, "works everywhere"),
        ({"curve": False}, "encryption", Grade.POOR, "this machine alone"),
    ],
)
def test_what_is_wrong_is_said(change: dict[str, object], topic: str, grade: Grade, words: str) -> None:
    facts = msgspec.structs.replace(PLAIN, **change)
    finding = _finding(facts, topic)
    assert finding.grade is grade
    assert words in finding.advice
    diagnosis = diagnose(facts)
    assert diagnosis.can_serve is (grade is not Grade.NO)
    assert any(topic in line for line in diagnosis.verdict)


def test_without_shared_memory_tcp_is_left() -> None:
    diagnosis = diagnose(msgspec.structs.replace(PLAIN, shm_bytes=None, shm_free_bytes=None))
    assert diagnosis.can_serve
    assert diagnosis.verdict[0].endswith("hand-offs go by tcp")


def test_transports_that_this_version_does_not_have_are_not_promised() -> None:
    torch = TorchFacts(version="2.13.0", cuda=True, cuda_version="13.0")
    machine = msgspec.structs.replace(
        PLAIN, gpus=[GPU], torch=torch, packages={"cupy": "14", "triton": "3", "nixl": "1"}, transports_built=("tcp",)
    )
    assert diagnose(machine).verdict[0] == "this machine can serve on 1 GPU; hand-offs go by tcp"
    assert "not part of this version" in _finding(machine, "transport cuda_ipc").found
    able = msgspec.structs.replace(machine, transports_built=("tcp", "cuda_ipc", "nixl"))
    assert _finding(able, "transport cuda_ipc").grade is Grade.OK
    without = msgspec.structs.replace(able, packages={})
    assert "cupy is not installed" in _finding(without, "transport cuda_ipc").found
    assert _finding(without, "cupy").grade is Grade.POOR


def test_the_table_shows_text_as_it_is() -> None:
    out = io.StringIO()
    facts = msgspec.structs.replace(PLAIN, cpu="CPU [bold]x[/bold]")
    show(diagnose(facts), Console(file=out, width=200))
    assert "CPU [bold]x[/bold]" in out.getvalue()


def test_facts_are_read_from_files_and_tools(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("model name\t: A CPU\nflags\t\t: fpu avx2 amx_bf16 sse\n")
    assert read_cpu(cpuinfo) == ("A CPU", ["amx_bf16", "avx2"])
    assert parse_gpus("NVIDIA H200, 143771, 580.1, 9.0\nOdd, [N/A], 1, 2.0\nnonsense\n") == [
        Gpu(name="NVIDIA H200", memory_mib=143771, driver="580.1", compute_capability="9.0"),
        Gpu(name="Odd", memory_mib=0, driver="1", compute_capability="2.0"),
    ]
    assert memory_limit(tmp_path) is None
    (tmp_path / "memory.max").write_text("1073741824\n")
    assert memory_limit(tmp_path) == GIB
    (tmp_path / "memory.max").write_text("max\n")
    assert memory_limit(tmp_path) is None
    assert without_password("redis://user:secret@host:1/0") == "redis://***@host:1/0"
    assert without_password("redis://host:1/0") == "redis://host:1/0"


def test_this_machine(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BATON_REDIS_URL", raising=False)
    code = main(["doctor", "--json"])
    diagnosis = msgspec.json.decode(capsys.readouterr().out, type=Diagnosis)
    assert code == (0 if diagnosis.can_serve else 1)
    assert diagnosis.facts.open_files == resource.getrlimit(resource.RLIMIT_NOFILE)
    assert diagnosis.facts.torch is not None
    assert diagnosis.facts.redis_version is not None
    assert "shm" in diagnosis.facts.transports_built
