"""What a fleet does at three times its capacity: whom it admits, what those get, and what the rest are told.

    python bench/overload.py [--duration-s 60] [--factor 3] [--max-queue-wait-s 2]

Real processes with the demo model. First a closed loop measures the capacity in requests per second; then requests
arrive at a constant rate of `factor` times that, a tenth each as `service_tier` priority and flex (by the `priority`
field). A refused request is not asked again. Told and true: beside each `Retry-After` stands how long a request
admitted at that moment waited for its first token, which is what the header foretells.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import httpx
import psutil
from support.fleet import DEMO, Fleet  # type: ignore[import-not-found]  # of the tests, found by the path above
from support.redis_server import RedisServer  # type: ignore[import-not-found]  # likewise

MAX_TOKENS = 40
SEATS = 8
PRIORITIES = {"priority": -100, "default": 0, "flex": 100}


@dataclass
class Outcome:
    """One request: when it came, its status, first token and last token in seconds after that, and what it was told."""

    came_s: float
    tier: str
    status: int = 0
    first_s: float = 0.0
    answered_s: float = 0.0
    num_tokens: int = 0
    retry_after_s: float = 0.0


async def ask(client: httpx.AsyncClient, number: int, tier: str) -> Outcome:
    """One stream to its end."""
    outcome = Outcome(time.monotonic(), tier)
    body = {
        "model": "demo",
        "prompt": f"Tell me of page number {number}.",
        "max_tokens": MAX_TOKENS,
        "stream": True,
        "ignore_eos": True,
        "priority": PRIORITIES[tier],
    }
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        outcome.status = answer.status_code
        outcome.retry_after_s = float(answer.headers.get("retry-after", 0))
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                outcome.first_s = outcome.first_s or time.monotonic() - outcome.came_s
                outcome.num_tokens += 1
        outcome.answered_s = time.monotonic() - outcome.came_s
    return outcome


async def capacity(client: httpx.AsyncClient) -> float:
    """Requests per second of a closed loop that keeps all seats taken."""
    done, end_s = 0, time.monotonic() + 8

    async def loop(number: int) -> None:
        nonlocal done
        while time.monotonic() < end_s:
            await ask(client, number, "default")
            done += 1

    began_s = time.monotonic()
    await asyncio.gather(*(loop(number) for number in range(SEATS + 2)))
    return done / (time.monotonic() - began_s)


async def overload(client: httpx.AsyncClient, rate: float, duration_s: float) -> list[Outcome]:
    """Requests at a constant rate, whatever becomes of them."""
    tiers = ["priority", *["default"] * 8, "flex"]
    began_s = time.monotonic()
    async with asyncio.TaskGroup() as tasks:
        running = []
        for number in range(int(rate * duration_s)):
            await asyncio.sleep(max(0.0, began_s + number / rate - time.monotonic()))
            running.append(tasks.create_task(ask(client, number, tiers[number % len(tiers)])))
    return [task.result() for task in running]


def quantile(values: list[float], share: float) -> float:
    """Of values that need not be sorted; NaN of none."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else float("nan")


def show(outcomes: list[Outcome]) -> None:
    """The table, by tier and altogether."""
    columns = ("offered", "admitted", "429", "other", "TTFT p50", "p99 s", "429 p99 ms", "told p50 s")
    print(f"{'tier':<10}" + "".join(f"{column:>12}" for column in columns))
    for tier in (*PRIORITIES, "all"):
        mine = [outcome for outcome in outcomes if tier in ("all", outcome.tier)]
        served = [outcome for outcome in mine if outcome.status == 200]
        refused = [outcome for outcome in mine if outcome.status == 429]
        cells = (
            f"{len(mine)}",
            f"{len(served)}",
            f"{len(refused)}",
            f"{len(mine) - len(served) - len(refused)}",
            f"{quantile([o.first_s for o in served], 0.5):.2f}",
            f"{quantile([o.first_s for o in served], 0.99):.2f}",
            f"{quantile([o.answered_s for o in refused], 0.99) * 1e3:.0f}",
            f"{quantile([o.retry_after_s for o in refused], 0.5):.0f}",
        )
        print(f"{tier:<10}" + "".join(f"{cell:>12}" for cell in cells))


def show_truth(outcomes: list[Outcome]) -> None:
    """`Retry-After` beside the wait of the default request that was admitted last before the refusal."""
    waits: list[float] = []
    last: Outcome | None = None
    for outcome in outcomes:
        if outcome.tier != "default":
            continue
        if outcome.status == 200:
            last = outcome
        elif outcome.status == 429 and last is not None:
            waits.append(outcome.retry_after_s - last.first_s)
    if waits:
        print(
            f"Retry-After less the wait of who was admitted last: p50 {statistics.median(waits):+.2f} s, "
            f"p1 {quantile(waits, 0.01):+.2f} s, p99 {quantile(waits, 0.99):+.2f} s (whole seconds, rounded up)"
        )


def resident_mb(fleet: Fleet) -> dict[str, int]:
    """Resident memory of every service."""
    return {name: psutil.Process(s.process.pid).memory_info().rss >> 20 for name, s in fleet.services.items()}


async def run(fleet: Fleet, factor: float, duration_s: float) -> None:
    """Measure capacity, overload, print."""
    limits = httpx.Limits(max_connections=2000, max_keepalive_connections=200)
    async with httpx.AsyncClient(base_url=fleet.url, timeout=120, limits=limits) as client:
        rate = await capacity(client)
        before = resident_mb(fleet)
        print(f"capacity {rate:.1f} requests/s; {factor:g} times that for {duration_s:g} s")
        outcomes = await overload(client, rate * factor, duration_s)
        show(outcomes)
        show_truth(outcomes)
        whole = sum(outcome.num_tokens >= MAX_TOKENS // 2 for outcome in outcomes if outcome.status == 200)
        print(f"admitted streams with their tokens: {whole}")
        await asyncio.sleep(2)
        after = resident_mb(fleet)
        print("memory, MiB: " + ", ".join(f"{name} {before[name]} -> {after[name]}" for name in before))
        live, used = fleet.metric("baton_requests_live"), fleet.metric("baton_worker_pages", state="used")
        print(f"2 s afterwards: {live:g} requests live, {used:g} pages used, capacity {await capacity(client):.1f}/s")


def main() -> None:
    """Parse, start, run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--duration-s", type=float, default=60)
    parser.add_argument("--factor", type=float, default=3)
    parser.add_argument("--max-queue-wait-s", type=float, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as path, RedisServer(Path(path)) as redis:
        worker = {"model": DEMO, "served_model_name": "demo", "dtype": "float32"}
        with Fleet(redis, Path(path), namespace="overload") as fleet:
            fleet.start("prefill_svc", "prefill-1", **worker)
            fleet.start("decode_svc", "decode-1", max_num_seqs=SEATS, **worker)
            fleet.gateway(max_queue_wait_s=arguments.max_queue_wait_s)
            fleet.wait_ready()
            asyncio.run(run(fleet, arguments.factor, arguments.duration_s))
            fleet.stop_all()


if __name__ == "__main__":
    main()
