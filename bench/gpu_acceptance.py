"""One command on a machine with one GPU: limits, kernels beside their twins, the pipeline, a table, a result file.

    python bench/gpu_acceptance.py [--budget-s 540] [--only STAGE …] [--skip STAGE …] [--resume]
    python bench/gpu_acceptance.py --rehearse        # the same path on a CPU with the demo model

Runs from a bare checkout; docs/gpu.md says how, and how to go on from a fault. Each stage has its own time limit; what
goes wrong in one is booked as its fault, with the end of the log, and the next one follows. The result file is complete
after every figure. `--resume` keeps what it holds of other stages, and runs those that are not done or that `--only`
names.

The model has the shape of Qwen3-8B and random weights, made on the card. Gateway, one prefill and one decode worker
share it as processes of their own; hand-offs go over CUDA IPC, and any other transport in use is a fault. Processes
share the card by MPS where that is allowed, else by time slices; the result says which. `python -m loadtest` is the
client.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import signal
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType
from typing import Any

import child_process
from card_sharing import MODES, SharingRefused, shared_card
from fleet_process import Fleets
from gpu_stages import GpuStages, Scale
from model_directory import DEMO, QWEN3_8B, bare_directory
from model_sizes import Sizes
from stage_results import Fault, Results
from stages import Clock, choose, run

ROOT = Path(__file__).resolve().parents[1]
FACTS_S = 90.0
TESTS = "tests/unit/kernels"
_DUMMY = ("--load-format", "dummy")
FLAGS = (
    *_DUMMY, "--transports", "cuda_ipc", "--max-num-seqs", "256", "--max-step-tokens", "8192",
    "--max-model-len", "16384", "--kv-cache-bytes", str(14 * 2**30),
)  # fmt: skip


def scales(model: Path, *, rehearse: bool) -> Scale:
    """What is asked of the GPU, or of a CPU in a rehearsal."""
    if rehearse:
        return Scale(
            streams=8,
            saturated_requests=24,
            outputs=48,
            prompts=(128, 400),
            long_prompt=400,
            phase_s=4.0,
            sizes=None,
            profiled=("--device", "cpu", "--context", "64", "--steps", "20", *_DUMMY),
            transport="",
            tests=(f"{TESTS}/test_kernel_pages.py",),
        )
    return Scale(
        streams=256,
        saturated_requests=768,
        outputs=1024,
        prompts=(1024, 4096, 8192),
        long_prompt=8192,
        phase_s=20.0,
        sizes=Sizes.of(QWEN3_8B),
        profiled=("--device", "cuda", "--model", str(model), "--kv-cache-bytes", str(8 * 2**30), *_DUMMY),
        transport="cuda_ipc",
        tests=(TESTS,),
    )


def machine(logs: Path) -> dict[str, Any]:
    """See `bench/gpu_facts.py`. Raises Fault."""
    found: dict[str, Any] = child_process.run_for_json(["bench/gpu_facts.py"], Clock(FACTS_S), logs / "gpu_facts.log")
    print(json.dumps(found), flush=True)
    return found


def acceptance(options: argparse.Namespace, logs: Path) -> int:
    """Run the chosen stages; 0 if they and those of the file are all done.

    Raises:
        Fault, SharingRefused, ValueError: nothing can be run as asked.
    """
    budget = Clock(options.budget_s)
    found = machine(logs)
    if "gpu" not in found and not options.rehearse:
        raise Fault(f"no GPU here ({found['no_gpu']}); --rehearse runs the same path on a CPU")
    slug = "rehearsal" if options.rehearse else re.sub(r"[^a-z0-9]+", "-", found["gpu"]["name"].lower()).strip("-")
    results = Results(options.out / f"{slug}.json", found, resume=options.resume)
    model = DEMO if options.rehearse else bare_directory(logs / "qwen3-8b-shape", QWEN3_8B)
    with shared_card(options.sharing) as (environment, found["sharing"]):
        print(f"the card is shared by {found['sharing']}", flush=True)
        fleets = Fleets(logs, environment)
        stages = GpuStages(
            fleets,
            results,
            scales(model, rehearse=options.rehearse),
            model=model,
            small=DEMO,
            flags=_DUMMY if options.rehearse else FLAGS,
            device="cpu" if options.rehearse else "cuda",
            environment=environment,
            logs=logs,
        ).all(fp8=options.rehearse or found["gpu"]["fp8"])
        chosen = choose(stages, results, only=options.only, skip=options.skip)
        try:
            run(chosen, results, budget)
        finally:
            fleets.close()
            print(f"\n{results.table()}\nwritten: {options.out / slug}.json; logs: {logs}", flush=True)
    return 1 if results.failed else 0


def main() -> int:
    """1 after a fault, 2 if nothing could be run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of the result file (default: bench/results)")
    parser.add_argument("--logs", type=Path, help="folder of logs, kept (default: a new one)")
    parser.add_argument("--budget-s", type=float, default=540.0, help="for all stages together (default: 540)")
    parser.add_argument("--only", nargs="+", default=[], metavar="STAGE", help="run these, done or not")
    parser.add_argument("--skip", nargs="+", default=[], metavar="STAGE", help="leave these out")
    parser.add_argument("--resume", action="store_true", help="add to the result file instead of beginning anew")
    parser.add_argument("--sharing", choices=MODES, default="auto", help="how processes share the card (default: auto)")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, with the demo model")
    options = parser.parse_args()
    logs = (options.logs or Path(tempfile.mkdtemp(prefix="baton-gpu-"))).resolve()
    logs.mkdir(parents=True, exist_ok=True)
    if options.out is None:
        options.out = logs if options.rehearse else ROOT / "bench" / "results"
    child_process.adopt_orphans()
    signal.signal(signal.SIGTERM, _leave)
    began_s = time.monotonic()
    try:
        return acceptance(options, logs)
    except (Fault, SharingRefused, ValueError) as error:
        print(f"FAULT: {error}", file=sys.stderr)
        return 2
    finally:
        with contextlib.suppress(KeyboardInterrupt):
            child_process.end_all()
        print(f"{time.monotonic() - began_s:.0f} s in all", flush=True)


def _leave(signum: int, frame: FrameType | None) -> None:
    """End by an exception, so that whatever runs is ended in order."""
    del frame
    raise SystemExit(128 + signum)


if __name__ == "__main__":
    sys.exit(main())
