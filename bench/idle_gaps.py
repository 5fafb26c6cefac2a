"""How long a device waits between the kernels of decode steps: one decode worker's engine and step loop, profiled.

    python bench/idle_gaps.py [--model DIRECTORY] [--batch 32] [--context 512] [--steps 60]

Scheduler, runner and step loop are a decode worker's; each step's tokens are published as there, into nothing. On a
CUDA device every kernel and copy is timed by CUPTI (`torch.profiler`), which itself costs time, so the step is longer
than without. On a CPU the model's own calls stand for the kernels: what is left is what the loop costs around them.
Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from step_overhead import ME, publish
from torch._C._autograd import DeviceType

from engine.assembly import open_model
from engine.decode_scheduler import DecodeScheduler
from engine.limits import DecodeLimits
from engine.plan import Pending, Runner, StepOutput, StepPlan
from engine.progress import StepProgress
from engine.step_loop import StepLoop
from fleet.service_settings import DecodeSettings
from fleet.types import Fingerprint, Passport, SamplingParams

ROOT = Path(__file__).resolve().parents[1]
LONG_GAP_S = 5e-6
"""Gaps beyond this are waits for the host; within a graph kernels lie a microsecond or so apart."""
WARM_STEPS = 10
"""Profiled and left out: starting the profile itself keeps the device waiting."""
Span = tuple[float, float]


def idle_figures(spans: Iterable[Span], num_steps: int) -> dict[str, float]:
    """What busy times of a device, in seconds and in any order, say of the time between them."""
    begin = end = None
    gaps: list[float] = []
    for start, stop in sorted(spans):
        if begin is None or end is None:
            begin, end = start, stop
            continue
        if start > end:
            gaps.append(start - end)
        end = max(end, stop)
    if begin is None or end is None:
        raise RuntimeError("the profile holds nothing that a device did")
    whole = end - begin
    return {
        "step_ms": whole / num_steps * 1e3,
        "idle_share": sum(gaps) / whole,
        "long_gap_share": sum(gap for gap in gaps if gap > LONG_GAP_S) / whole,
        "longest_gap_us": max(gaps, default=0.0) * 1e6,
    }


class Watched:
    """A runner whose calls are timed: on a CPU they are the device's work."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self.spans: list[Span] = []

    def feeds_next(self, plan: StepPlan) -> bool:
        """See `engine.plan.Runner`."""
        return self._runner.feeds_next(plan)

    def launch(self, plan: StepPlan) -> StepOutput | Pending:
        """See `engine.plan.Runner`."""
        began_s = time.perf_counter()
        started = self._runner.launch(plan)
        self.spans.append((began_s, time.perf_counter()))
        return started


async def steps(loop: StepLoop, done: asyncio.Event) -> None:
    """Run the loop until the event."""
    async with asyncio.TaskGroup() as group:
        task = group.create_task(loop.run())
        await done.wait()
        task.cancel()


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Prefill the prompts, decode to a steady state, profile some steps."""
    most = 2 * options.steps + WARM_STEPS + 8  # of output, so that nobody ends within the profile
    settings = DecodeSettings(
        model=str(options.model),
        device=options.device,
        max_num_seqs=options.batch,
        max_model_len=options.context + most + 1,
        kv_cache_bytes=options.kv_cache_bytes,
        load_format=options.load_format,
    )
    opened = open_model(settings, ceiling_bytes=None)
    facts, plan = opened.page_facts, opened.plan
    fingerprint = Fingerprint(
        "bench",
        facts["dtype"],
        facts["num_layers"],
        facts["num_kv_heads"],
        facts["head_dim"],
        plan.page_size,
        "bench",
        1,
    )
    engine = opened.over(None, fingerprint, decodes=True)
    watched = Watched(engine.runner)
    limits = DecodeLimits(max_model_len=plan.max_model_len, max_num_seqs=options.batch, lookahead_tokens=0)
    scheduler = DecodeScheduler(engine.pool, engine.cache, limits, feeds_next=watched.feeds_next)
    for number in range(options.batch):
        params = SamplingParams(temperature=1.0, top_p=0.95, seed=number, max_tokens=most)
        ids = [3 + (number + at) % 90 for at in range(options.context)]
        passport = Passport(
            request_id=f"request-{number}", epoch=0, model="bench", token_ids=ids, prompt_len=len(ids), params=params,
            gateway=ME,
        )  # fmt: skip
        reservation = scheduler.reserve(passport, [])
        if reservation is None:
            raise RuntimeError(
                f"{plan.num_pages} pages do not take {options.batch} sequences of {options.context} tokens"
            )
        scheduler.adopt(reservation, passport, 0)

    on_gpu = opened.model.device.type == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    profile = torch.profiler.profile(activities=[activity])
    done = asyncio.Event()
    seen = 0

    def on_step(plan: StepPlan, progress: StepProgress, step_s: float) -> None:
        nonlocal seen
        del step_s
        publish(progress)
        if plan.num_tokens > len(plan.rows):
            return  # prompts
        seen += 1
        if seen == options.steps // 2:
            watched.spans.clear()
            if on_gpu:
                profile.start()
        elif seen == options.steps // 2 + WARM_STEPS + options.steps:
            done.set()

    loop = StepLoop(scheduler, watched, on_step=on_step, on_scheduled=lambda _plan: None)
    asyncio.run(steps(loop, done))
    spans = watched.spans
    if on_gpu:
        torch.cuda.synchronize()
        profile.stop()
        spans = [
            (event.time_range.start / 1e6, event.time_range.end / 1e6)
            for event in profile.events() or ()  # type: ignore[no-untyped-call]
            if event.device_type is DeviceType.CUDA
        ]
    engine.grammars.close()
    steady = sorted(spans)[len(spans) * WARM_STEPS // (WARM_STEPS + options.steps) :]  # all steps are alike
    return {"batch": options.batch, "context": options.context, **idle_figures(steady, options.steps)}


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "demo")
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--kv-cache-bytes", type=int, default=0)
    print(json.dumps(measure(parser.parse_args())))


if __name__ == "__main__":
    main()
