"""What a decode step of a small model costs beside the model: schedule, tensors, forward, sample, publish.

    python bench/step_overhead.py [--batches 1,8,32,64,128] [--contexts 128,1024,4000] [--threads 1] [--dtype auto]
                                   [--temperature 1] [--top-p 1]

The demo model, in this process. Scheduling is that of a decode worker with everything adopted; publishing is what a
worker does with a step's tokens: one Publication, encoded for the wire. Each figure is a median over steps, in
microseconds; the service's own parts (all but forward) are what a faster device would leave.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from engine.decode_scheduler import DecodeScheduler
from engine.kv_pool import allocate_pool
from engine.limits import DecodeLimits
from engine.load import LoadedModel, load_model
from engine.pages import PagePool
from engine.prefix_cache import PrefixCache
from engine.progress import StepProgress
from engine.runner import ModelRunner
from fleet import wire
from fleet.messages import Publication, TokenChunk
from fleet.types import Fingerprint, Passport, PeerRef, SamplingParams

ROOT = Path(__file__).resolve().parents[1]
PAGE_SIZE = 16
STEPS = 60
WARM_STEPS = 8
ME = PeerRef(name="decode", incarnation=1, address="tcp://127.0.0.1:1")
PARTS = ("schedule", "tensors", "forward", "sample", "commit", "publish")


class Worker:
    """Scheduler and runner over one pool, with sequences adopted as if they had been handed over."""

    def __init__(
        self,
        model: LoadedModel,
        batch: int,
        context: int,
        *,
        steps: int = STEPS,
        sampling: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        config = model.config
        per_row = -(-(context + steps + WARM_STEPS + 2) // PAGE_SIZE)
        num_pages = batch * (per_row + 9) + 1
        pool = PagePool(num_pages, PAGE_SIZE)
        fingerprint = Fingerprint(
            "demo", model.dtype_name, config.num_layers, config.num_kv_heads, config.head_dim, PAGE_SIZE, "bench", 1
        )
        cache = PrefixCache(pool, fingerprint, enabled=False)
        limits = DecodeLimits(max_model_len=per_row * PAGE_SIZE, max_num_seqs=batch)
        tensor = allocate_pool(
            config=config, num_pages=num_pages, page_size=PAGE_SIZE, dtype=model.dtype, device=model.device
        )
        self.runner = ModelRunner(model, tensor.zero_(), PAGE_SIZE)
        self.scheduler = DecodeScheduler(pool, cache, limits)
        for number in range(batch):
            params = SamplingParams(**sampling, seed=number, max_tokens=steps + WARM_STEPS + 2)  # type: ignore[arg-type]  # floats
            passport = Passport(
                request_id=f"request-{number}", epoch=0, model="demo", token_ids=[3 + number % 90] * context,
                prompt_len=context - 1, params=params, gateway=ME,
            )  # fmt: skip
            reservation = self.scheduler.reserve(passport, [])
            if reservation is None:
                raise SystemExit(f"a pool of {num_pages} pages does not take {batch} sequences of {context} tokens")
            self.scheduler.adopt(reservation, passport, context - 1)

    def step(self) -> dict[str, float]:
        """One step; seconds by part."""
        at = [time.perf_counter()]
        plan = self.scheduler.schedule()
        if plan is None:
            raise SystemExit("nothing to compute")
        at.append(time.perf_counter())
        out = self.runner.run(plan)
        at.append(time.perf_counter())
        progress = self.scheduler.commit(plan, out)
        at.append(time.perf_counter())
        publish(progress)
        at.append(time.perf_counter())
        timing = self.runner.last_timing
        assert timing is not None, "a step has run"  # noqa: S101
        return {
            "schedule": at[1] - at[0],
            "tensors": timing.inputs_s,
            "forward": timing.forward_s,
            "sample": timing.sample_s,
            "commit": at[3] - at[2],
            "publish": at[4] - at[3],
        }


def publish(progress: StepProgress) -> None:
    """As a decode worker does after each step."""
    chunks = [
        TokenChunk(
            request_id=row.sequence.request_id,
            epoch=row.sequence.epoch,
            index=row.index,
            token_ids=[row.sampled.token_id],
        )
        for row in progress.rows
        if row.sampled is not None
    ]
    wire.encode(Publication(worker=ME, events=[*chunks]))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", default="1,8,32,64,128")
    parser.add_argument("--contexts", default="128,1024,4000")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = load_model(ROOT / "models" / "demo", options.dtype)
    model.transformer.backend.warm(model.config, PAGE_SIZE)
    batches = [int(word) for word in options.batches.split(",")]
    contexts = [int(word) for word in options.contexts.split(",")]
    sampling = {"temperature": options.temperature, "top_p": options.top_p}
    print(f"{model.dtype_name}, {options.threads} thread(s), {sampling}; medians of {STEPS} steps, microseconds")
    print("| batch | context | " + " | ".join(PARTS) + " | all but forward |")
    print("| --- | --- |" + " --- |" * (len(PARTS) + 1))
    for batch, context in [(batch, contexts[0]) for batch in batches] + [(8, context) for context in contexts[1:]]:
        length = min(context, model.config.max_length - STEPS - WARM_STEPS - 2)
        worker = Worker(model, batch, length, sampling=sampling)
        for _ in range(WARM_STEPS):
            worker.step()
        steps = [worker.step() for _ in range(STEPS)]
        medians = {part: statistics.median(step[part] for step in steps) * 1e6 for part in PARTS}
        rest = sum(value for part, value in medians.items() if part != "forward")
        print(f"| {batch} | {context} | " + " | ".join(f"{medians[part]:.0f}" for part in PARTS) + f" | {rest:.0f} |")


if __name__ == "__main__":
    main()
