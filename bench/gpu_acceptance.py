"""One command on a machine with one GPU: limits, kernels beside their twins, the pipeline, a table, a result file.

    python bench/gpu_acceptance.py [--out bench/results] [--skip-kernels]
    python bench/gpu_acceptance.py --rehearse        # the same path on a CPU with the demo model; writes no file

Needs the project installed with its `gpu` extra. A random-weight checkpoint of Qwen3-8B's shape is made first (16 GB in
the temporary directory, kept). Gateway, one prefill and one decode worker then share the GPU as processes of their own;
hand-offs go over CUDA IPC, and any other transport in use fails the run. `python -m loadtest` is the client.

Processes share the card by MPS where that is allowed, else by time slices; the result says which. Before the fleet, one
decode worker's step loop is profiled alone for the gaps between kernels (`bench/idle_gaps.py`).

What each figure is held against: decoding reads all weights and the context's keys and values once per step, so its
limit is the measured copy rate over those bytes; a prompt costs two operations per weight and token plus attention,
over the measured product rate.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import json
import os
import platform
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from card_sharing import shared_card
from model_sizes import Sizes

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

READY_S = 240.0
QWEN3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_window_layers": 36,
    "tie_word_embeddings": False,
}
"""Where Qwen/Qwen3-8B differs from Qwen3-0.6B."""
FP8_FLAGS = ("--quantization", "fp8", "--kv-cache-dtype", "fp8_e4m3")
PACKAGES = ("torch", "triton", "cupy-cuda13x", "litestar", "pyzmq")


@dataclass(frozen=True)
class Scale:
    """What a run asks for; the rehearsal asks for little.

    Attributes:
        streams: for the saturated figure. outputs: tokens of each answer there and at batch 1.
        prompts: prompt lengths whose prefill is timed. long_prompt: of hand-offs and intruders.
    """

    streams: int
    saturated_requests: int
    outputs: int
    prompts: tuple[int, ...]
    long_prompt: int
    phase_s: float


FULL = Scale(256, 768, 1024, (1024, 4096, 8192), 8192, 20.0)
REHEARSAL = Scale(8, 24, 48, (128, 400), 400, 4.0)


@dataclass
class Report:
    """Rows of the table: figure, unit, limit measured in the same run (or None), target (or None)."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def add(
        self, name: str, value: float, unit: str, *, limit: float | None = None, target: float | None = None,
        at_most: bool = False,
    ) -> None:  # fmt: skip
        """Book a figure. `at_most`: the target is an upper bound."""
        met = None if target is None else (value <= target if at_most else value >= target)
        row = {"name": name, "value": value, "unit": unit, "limit": limit, "target": target, "met": met}
        self.rows.append(row)
        share = "" if limit is None else f"  {value / limit:5.0%} of {limit:.4g}"
        verdict = "" if target is None else f"  {'meets' if met else 'MISSES'} {target:.4g}"
        print(f"{name:52} {value:10.4g} {unit}{share}{verdict}", flush=True)


@contextlib.contextmanager
def fleet(model: Path, name: str, flags: list[str]) -> Iterator[str]:
    """A gateway with one worker of each kind on a free port; yields its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = Path(tempfile.gettempdir()) / "baton-gpu-acceptance.log"
    words = [sys.executable, "-m", "baton", "up", "--model", str(model), "--served-model-name", name]
    with log.open("w") as out:
        process = subprocess.Popen([*words, "--port", str(port), *flags], cwd=ROOT, stdout=out, stderr=out)
    try:
        began_s = time.monotonic()
        while not _is_ready(port):
            if process.poll() is not None or time.monotonic() - began_s > READY_S:
                raise SystemExit(f"the fleet did not come up; its log:\n{log.read_text()[-4000:]}")
            time.sleep(0.25)
        print(f"fleet ready after {time.monotonic() - began_s:.1f} s", flush=True)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def _is_ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health/ready", timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def load(url: str, *words: str) -> dict[str, Any]:
    """Run the load test and return its JSON report; it must have had no failures."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        common = ["--url", f"{url}/v1", "--no-progress", "--json", str(report), "--ignore-eos"]
        done = subprocess.run(
            [sys.executable, "-m", "loadtest", *words, *common], cwd=ROOT, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise SystemExit(f"load test failed:\n{done.stdout}\n{done.stderr}")
        read: dict[str, Any] = json.loads(report.read_text())
    return read


def transports_in_use(url: str) -> dict[str, float]:
    """Hand-offs given, by transport, as the gateway's metrics tell."""
    text = urllib.request.urlopen(f"{url}/metrics", timeout=10).read().decode()  # noqa: S310  # our own address
    used: dict[str, float] = {}
    for labels, value in re.findall(r"^baton_worker_hand_offs_total\{([^}]*)\} (\S+)", text, re.MULTILINE):
        found = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        if found.get("outcome") == "given" and float(value):
            used[found["transport"]] = used.get(found["transport"], 0.0) + float(value)
    return used


def one_stream(url: str, scale: Scale, name: str, report: Report, *, limit: float | None, target: float | None) -> None:
    """Decoding speed of a single stream, on a fleet that is warmed up here."""
    load(url, "--concurrency", "2", "--num-requests", "8", "--prompt-len", "64", "--output-len", "32")
    single = load(url, "--concurrency", "1", "--num-requests", "3", "--output-len", str(scale.outputs))["summary"]
    report.add(name, 1 / single["tpot_s"]["p50"], "tokens/s", limit=limit, target=target)


def pipeline(url: str, scale: Scale, sizes: Sizes | None, limits: dict[str, float] | None, report: Report) -> None:
    """The figures of the whole pipeline, as a client sees them."""
    copy = limits["copy_bytes_per_s"] if limits else None
    flops = limits["flops"] if limits else None
    context = 128 + scale.outputs / 2
    limit = copy / sizes.step_bytes(1, context) if copy and sizes else None
    one_stream(url, scale, "decode, 1 stream", report, limit=limit, target=0.85 * limit if limit else None)

    many = load(
        url, "--concurrency", str(scale.streams), "--num-requests", str(scale.saturated_requests), "--output-len",
        str(scale.outputs), "--timeout-s", "600",
    )["summary"]  # fmt: skip
    report.add(
        f"128 in, {scale.outputs} out, {scale.streams} streams", many["output_tokens_per_s"], "tokens/s",
        limit=scale.streams * copy / sizes.step_bytes(scale.streams, context) if copy and sizes else None,
        target=16_000.0 if sizes else None,
    )  # fmt: skip

    for length in scale.prompts:
        one = load(
            url, "--concurrency", "1", "--num-requests", "5", "--prompt-len", str(length), "--output-len", "1"
        )["summary"]  # fmt: skip
        limit = flops / (sizes.prompt_flops(length) / length) if flops and sizes else None
        report.add(
            f"prefill, {length} tokens", length / one["ttft_s"]["p50"], "tokens/s", limit=limit,
            target=0.75 * limit if limit else None,
        )  # fmt: skip

    longs = load(
        url, "--concurrency", "1", "--num-requests", "8", "--prompt-len", str(scale.long_prompt), "--output-len", "16"
    )["requests"]  # fmt: skip
    first, rest = [], []
    for one in longs:
        gaps = [b - a for a, b in zip(one["content_times_s"], one["content_times_s"][1:], strict=False)]
        first += gaps[:1]  # a slow machine's answer may come as one piece
        rest += gaps[1:]
    if not rest:
        raise SystemExit("every answer came in one or two pieces: this machine is too slow to time a hand-off")
    over_ms = (statistics.median(first) - statistics.median(rest)) * 1e3
    report.add(
        f"hand-off of {scale.long_prompt} tokens, beyond a step, p50", over_ms, "ms", target=10.0 if sizes else None,
        at_most=True,
    )  # fmt: skip

    both = load(
        url, "interference", "--concurrency", "8", "--duration-s", str(scale.phase_s), "--output-len", "256",
        "--intruder-len", str(scale.long_prompt),
    )["outcome"]  # fmt: skip
    report.add("median ITL with long prompts, to undisturbed", both["itl_p50_ratio"], "times", target=2.0, at_most=True)
    report.add(
        "ITL p99 with long prompts, to undisturbed median", both["itl_p99_to_undisturbed_median"], "times", target=2.5,
        at_most=True,
    )  # fmt: skip
    report.add("prompts' speed beside streams, to alone", both["prompt_progress"], "times")


def device_limits(report: Report) -> dict[str, float]:
    """Copy and product rate of the GPU; checks the kernels on the way out if asked."""
    import kernels  # needs a GPU

    bench = kernels.Bench()
    report.add("device copy, read and written", bench.copy_bytes_per_s / 1e9, "GB/s")
    report.add("bfloat16 product", bench.flops / 1e12, "TFLOP/s")
    return {"copy_bytes_per_s": bench.copy_bytes_per_s, "flops": bench.flops}


def idle_gaps(report: Report, *words: str, target: float | None) -> None:
    """What the device waits between the kernels of decode steps, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "bench/idle_gaps.py", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        report.faults.append(f"the profile of decode steps failed: {done.stderr[-800:]}")
        return
    found = json.loads(done.stdout.splitlines()[-1])
    report.add(f"decode step, {found['batch']} streams, profiled", found["step_ms"], "ms")
    report.add("idle between its kernels", found["idle_share"] * 100, "%", target=target, at_most=True)
    report.add("of it in gaps beyond 5 us", found["long_gap_share"] * 100, "%")


def check_kernels(report: Report) -> list[str]:
    """Every kernel against its twin; returns the lines of the bench."""
    done = subprocess.run(
        [sys.executable, "bench/kernels.py"], cwd=ROOT, capture_output=True, text=True, check=False, timeout=240
    )
    print(done.stdout, end="", flush=True)
    if done.returncode != 0:
        report.faults.append(f"kernels disagree with their twins: {done.stderr[-500:]}")
    return done.stdout.splitlines()


def has_fp8() -> bool:
    """Whether the GPU multiplies FP8 numbers."""
    import torch

    return torch.cuda.get_device_capability() >= (8, 9)


def facts() -> dict[str, Any]:
    """GPU and versions."""
    import torch  # the rehearsal needs it no earlier

    found: dict[str, Any] = {"date": dt.datetime.now(dt.UTC).date().isoformat(), "python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {"gpu": properties.name, "memory_gib": round(properties.total_memory / 2**30, 1)}
        found["cuda"] = torch.version.cuda
    return found


def main() -> int:
    """Run; 1 if a kernel disagrees with its twin or pages went another way than CUDA IPC."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="folder of the result file")
    parser.add_argument("--skip-kernels", action="store_true", help="leave the comparison with twins out")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, with the demo model; writes no file")
    options = parser.parse_args()
    report, kernel_lines = Report(), list[str]()
    described = facts()
    print(json.dumps(described))
    if options.rehearse:
        idle_gaps(report, "--context", "64", "--steps", "20", target=None)
        with fleet(ROOT / "models" / "demo", "demo", []) as url:
            pipeline(url, REHEARSAL, None, None, report)
            print(f"hand-offs by transport: {transports_in_use(url)}")
        with fleet(ROOT / "models" / "demo", "demo", [*FP8_FLAGS]) as url:
            one_stream(url, REHEARSAL, "decode, 1 stream, FP8 weights and pages", report, limit=None, target=None)
        print(*report.faults, sep="\n")
        return 1 if report.faults else 0
    if "gpu" not in described:
        print("no GPU here; --rehearse runs the same path on a CPU")
        return 2
    from random_checkpoint import QWEN3_0_6B, random_checkpoint  # needs torch

    limits = device_limits(report)
    if not options.skip_kernels:
        kernel_lines = check_kernels(report)
    shape = QWEN3_0_6B | QWEN3_8B
    directory = random_checkpoint(Path(tempfile.gettempdir()) / "baton-bench" / "qwen3-8b-random", shape)
    flags = ["--device", "cuda", "--transports", "cuda_ipc", "--max-num-seqs", "256", "--max-step-tokens", "8192",
             "--max-model-len", "16384", "--kv-cache-bytes", str(14 * 2**30)]  # fmt: skip
    with shared_card() as (environment, described["sharing"]):
        os.environ.update(environment)
        profiled = ["--model", str(directory), "--kv-cache-bytes", str(8 * 2**30)]
        idle_gaps(report, *profiled, target=3.0)
        with fleet(directory, "qwen3-8b", flags) as url:
            pipeline(url, FULL, Sizes.of(shape), limits, report)
            used = transports_in_use(url)
        if has_fp8():
            limit = limits["copy_bytes_per_s"] / Sizes.of(shape).step_bytes(1, 128 + FULL.outputs / 2, fp8=True)
            with fleet(directory, "qwen3-8b", [*flags, *FP8_FLAGS]) as url:
                one_stream(url, FULL, "decode, 1 stream, FP8 weights and pages", report, limit=limit, target=400.0)
    print(f"hand-offs by transport: {used}")
    if set(used) != {"cuda_ipc"}:
        report.faults.append(f"pages went over {used}")
    document = {"machine": described, "rows": report.rows, "kernels": kernel_lines, "faults": report.faults}
    options.out.mkdir(parents=True, exist_ok=True)
    slug = re.sub(r"[^a-z0-9]+", "-", described["gpu"].lower()).strip("-")
    path = options.out / f"{slug}.json"
    path.write_text(json.dumps(document, indent=1) + "\n")
    print(f"written: {path}")
    for fault in report.faults:
        print(f"FAULT: {fault}")
    return 1 if report.faults else 0


if __name__ == "__main__":
    sys.exit(main())
