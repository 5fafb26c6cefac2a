"""What a fleet does at three times its capacity: whom it admits, what those get, and what the rest are told.

    python bench/overload.py [--duration-s 60] [--factor 3] [--max-queue-wait-s 2] [--rounds 2]

Real processes with the demo model. First a closed loop measures the capacity in requests per second; then requests
arrive at a constant rate of `factor` times that, a tenth each as `service_tier` priority and flex. A refused request is
not asked again. Two seconds after the last stream the capacity is measured again, and the whole is repeated: what grows
in the second round too is a leak. Told and true: beside each `Retry-After` stands how long the default request admitted
last before it waited for its first token, which is what the header foretells.

Everything runs on the cores of one machine, the client too. Its own lag (how much later than planned requests leave)
and the gateway's own time for a refusal (`baton_refusal_seconds`) stand beside what clients see.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import psutil
from machine import quantile
from support.fleet import DEMO, Fleet  # type: ignore[import-not-found]  # of the tests, found by the path above
from support.redis_server import RedisServer  # type: ignore[import-not-found]  # likewise

from loadtest.connection import Pool

MAX_TOKENS = 40
SEATS = 8
ALL_TOKENS = f'"completion_tokens":{MAX_TOKENS}'.encode()
TIERS = ("priority", "default", "flex")
ARRIVALS = ("priority", *["default"] * 8, "flex")


@dataclass
class Outcome:
    """One request, as a `loadtest.connection.Sink`: times in seconds after it left, and what it was told."""

    tier: str
    lag_s: float = 0.0
    came_s: float = field(default_factory=time.monotonic)
    status: int = 0
    first_s: float = 0.0
    answered_s: float = 0.0
    whole: bool = False
    retry_after_s: float = 0.0

    def on_head(self, status: int, headers: dict[str, str], at_s: float) -> None:
        """Status and what a refused client is told."""
        self.status = status
        self.retry_after_s = float(headers.get("retry-after", 0))
        self.answered_s = at_s - self.came_s

    def on_body(self, data: bytes, at_s: float) -> None:
        """Events of the stream."""
        if not self.first_s and b"data: {" in data:
            self.first_s = at_s - self.came_s
        self.whole |= ALL_TOKENS in data


async def ask(pool: Pool, number: int, tier: str, lag_s: float = 0.0) -> Outcome:
    """One stream to its end."""
    body = {
        "model": "demo",
        "prompt": f"Tell me of page number {number}.",
        "max_tokens": MAX_TOKENS,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
        "service_tier": tier,
    }
    content = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(content)}"
    )
    outcome = Outcome(tier, lag_s)
    await pool.send(f"{head}\r\n\r\n".encode() + content, outcome)
    return outcome


async def capacity(pool: Pool) -> float:
    """Requests per second of a closed loop that keeps all seats taken."""
    done, end_s = 0, time.monotonic() + 8

    async def loop(number: int) -> None:
        nonlocal done
        while time.monotonic() < end_s:
            await ask(pool, number, "default")
            done += 1

    began_s = time.monotonic()
    await asyncio.gather(*(loop(number) for number in range(SEATS + 2)))
    return done / (time.monotonic() - began_s)


async def overload(pool: Pool, rate: float, duration_s: float) -> list[Outcome]:
    """Requests at a constant rate, whatever becomes of them."""
    began_s = time.monotonic()
    async with asyncio.TaskGroup() as tasks:
        running = []
        for number in range(int(rate * duration_s)):
            due_s = began_s + number / rate
            await asyncio.sleep(max(0.0, due_s - time.monotonic()))
            lag_s = time.monotonic() - due_s
            running.append(tasks.create_task(ask(pool, number, ARRIVALS[number % len(ARRIVALS)], lag_s)))
    return [task.result() for task in running]


def show(outcomes: list[Outcome]) -> None:
    """The table, by tier and altogether."""
    columns = ("offered", "admitted", "429", "other", "TTFT p50", "p99 s", "429 p50 ms", "p99", "told p50 s")
    print(f"{'tier':<10}" + "".join(f"{column:>12}" for column in columns))
    for tier in (*TIERS, "all"):
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
            f"{quantile([o.answered_s for o in refused], 0.5) * 1e3:.0f}",
            f"{quantile([o.answered_s for o in refused], 0.99) * 1e3:.0f}",
            f"{quantile([o.retry_after_s for o in refused], 0.5):.0f}",
        )
        print(f"{tier:<10}" + "".join(f"{cell:>12}" for cell in cells))
    lags = [outcome.lag_s for outcome in outcomes]
    print(f"client's own lag: p50 {quantile(lags, 0.5) * 1e3:.1f} ms, p99 {quantile(lags, 0.99) * 1e3:.1f} ms")


def show_truth(outcomes: list[Outcome]) -> None:
    """`Retry-After` beside the wait of the default request that was admitted last before the refusal."""
    errors: list[float] = []
    last: Outcome | None = None
    for outcome in outcomes:
        if outcome.tier != "default":
            continue
        if outcome.status == 200:
            last = outcome
        elif outcome.status == 429 and last is not None:
            errors.append(outcome.retry_after_s - last.first_s)
    if errors:
        print(
            f"Retry-After less the wait of who was admitted last: p50 {statistics.median(errors):+.2f} s, "
            f"p5 {quantile(errors, 0.05):+.2f} s, p95 {quantile(errors, 0.95):+.2f} s (whole seconds, rounded up)"
        )


def show_refusals(fleet: Fleet, before: dict[str, float]) -> None:
    """How long the gateway itself took for its refusals of this round: buckets of its histogram."""
    now = refusals(fleet)
    total = now["+Inf"] - before["+Inf"]
    shares = (f"{now[le] - before[le]:.0f} within {le} s" for le in now if le != "+Inf")
    num_displaced = fleet.metric("baton_requests_rejected_total", reason="displaced")
    print(f"at the gateway, of {total:.0f} refusals: " + ", ".join(shares) + f"; displaced so far: {num_displaced:.0f}")


def refusals(fleet: Fleet) -> dict[str, float]:
    """Cumulative counts of the gateway's refusals by the upper bound of their duration."""
    return {le: fleet.metric("baton_refusal_seconds_bucket", le=le) for le in ("0.005", "0.02", "0.1", "0.5", "+Inf")}


def memory_mb(fleet: Fleet) -> dict[str, tuple[int, int]]:
    """Of every service, its own memory and what it has touched of shared memory: a pool's pages, up to its size."""
    return {name: resident_mb(service.process.pid) for name, service in fleet.services.items()}


def resident_mb(pid: int) -> tuple[int, int]:
    """Resident memory, anonymous and shared (`/proc/PID/status`, in KiB there)."""
    lines = (line.partition(":") for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines())
    kib = {name: int(value.split()[0]) for name, _, value in lines if name in {"RssAnon", "RssShmem"}}
    return kib["RssAnon"] >> 10, kib["RssShmem"] >> 10


def cpu_s(fleet: Fleet) -> dict[str, float]:
    """CPU seconds that every service and this client have used."""
    processes = {name: psutil.Process(s.process.pid) for name, s in fleet.services.items()}
    processes["client"] = psutil.Process()
    return {name: sum(process.cpu_times()[:2]) for name, process in processes.items()}


async def run(fleet: Fleet, factor: float, duration_s: float, rounds: int) -> None:
    """Measure capacity, overload, print, as often as asked."""
    url = urlsplit(fleet.url)
    pool = Pool(str(url.hostname), url.port or 80, None, time.monotonic, connect_timeout_s=30)
    rate = await capacity(pool)
    memory = memory_mb(fleet)
    print(f"capacity {rate:.1f} requests/s; {factor:g} times that for {duration_s:g} s")
    for number in range(rounds):
        refused, used = refusals(fleet), cpu_s(fleet)
        outcomes = await overload(pool, rate * factor, duration_s)
        print(f"\nround {number + 1}")
        show(outcomes)
        show_truth(outcomes)
        show_refusals(fleet, refused)
        print("CPU seconds: " + ", ".join(f"{name} {now - used[name]:.0f}" for name, now in cpu_s(fleet).items()))
        num_whole = sum(outcome.whole for outcome in outcomes if outcome.status == 200)
        print(f"admitted streams with all their tokens: {num_whole}")
        await asyncio.sleep(2)
        before, memory = memory, memory_mb(fleet)
        grown = (
            f"{name} {before[name][0]} + {before[name][1]} -> {own} + {pool}" for name, (own, pool) in memory.items()
        )
        print("memory, MiB, own + touched of pools: " + ", ".join(grown))
        live, pages = fleet.metric("baton_requests_live"), fleet.metric("baton_worker_pages", state="used")
        print(f"2 s afterwards: {live:g} requests live, {pages:g} pages used, capacity {await capacity(pool):.1f}/s")
    pool.close()


def main() -> None:
    """Parse, start, run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--duration-s", type=float, default=60)
    parser.add_argument("--factor", type=float, default=3)
    parser.add_argument("--max-queue-wait-s", type=float, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as path, RedisServer(Path(path)) as redis:
        worker = {"model": DEMO, "served_model_name": "demo", "dtype": "float32"}
        with Fleet(redis, Path(path), namespace="overload") as fleet:
            fleet.start("prefill_svc", "prefill-1", **worker)
            fleet.start("decode_svc", "decode-1", max_num_seqs=SEATS, **worker)
            fleet.gateway(max_queue_wait_s=arguments.max_queue_wait_s)
            fleet.wait_ready()
            asyncio.run(run(fleet, arguments.factor, arguments.duration_s, arguments.rounds))
            fleet.stop_all()


if __name__ == "__main__":
    main()
