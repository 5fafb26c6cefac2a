"""The fleet that is broken: two workers of each kind, two gateways and Redis, each behind wires that can be cut."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Self

import httpx
import psutil
import redis
from support.fleet import DEMO, SHARED_MEMORY, Fleet, Service, until

from chaos.wires import Cut, Wires

LEASE_S = 1.5
GRACE_S = 15
SETTLE_S = 20.0
NUM_EACH = 2
FDS_AT_START = 70
FDS_PER_PEER = 8
MAX_GROWTH_BYTES = 96 * 2**20
PERSISTENT_KEYS = {"workers", "gateways", "keys"}


@dataclass
class Leaks:
    """What was not back at its idle count, in words; `pages` counts those that no request and no cache holds."""

    pages: int = 0
    others: list[str] = field(default_factory=list)


@dataclass
class _Life:
    """One process life: when it was ready it had this much memory of its own."""

    service: Service
    own_bytes: int


class Arena:
    """Starts the fleet, replaces what was broken, and takes stock. A context manager around `fleet` and its wires.

    Attributes:
        urls: of the gateways, by name.
    """

    def __init__(self, fleet: Fleet, seed: int) -> None:
        self.fleet = fleet
        self.luck = random.Random(seed)
        self.wires = Wires()
        self.urls: dict[str, str] = {}
        self._lives: dict[str, _Life] = {}
        self._numbers: dict[str, int] = {}
        self._pids: set[int] = set()

    def __enter__(self) -> Self:
        self.wires.__enter__()
        for role in ("prefill", "decode", "gateway"):
            for _ in range(NUM_EACH):
                self.add(role)
        self.await_whole()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.wires.__exit__(kind, error, trace)

    # processes

    def names(self, role: str) -> list[str]:
        """Live processes of a role."""
        return sorted(name for name in self.fleet.services if name.startswith(role))

    def pick(self, role: str) -> str:
        """One of them, by luck."""
        return self.luck.choice(self.names(role))

    def add(self, role: str) -> str:
        """Start one more process of a role; its wires are led once it is ready."""
        number = self._numbers[role] = self._numbers.get(role, 0) + 1
        name, host = f"{role}-{number}", f"127.{1 + len(self._pids) // 250}.0.{2 + len(self._pids) % 250}"
        if role == "gateway":
            service = self.fleet.start("gateway", name, port=0, advertise_host=host)
        else:
            settings = {"model": DEMO, "served_model_name": "demo", "dtype": "float32", "drain_timeout_s": GRACE_S}
            if role == "prefill":
                settings["max_step_tokens"] = 64
            service = self.fleet.start(f"{role}_svc", name, advertise_host=host, **settings)
        self._pids.add(service.process.pid)
        return name

    def remove(self, name: str, signum: int) -> int:
        """End a process and wait; returns its exit code."""
        service = self.fleet.forget(name)
        self.urls.pop(name, None)
        code = service.stop(signum)
        self._lives.pop(name, None)
        self.wires.drop(name)
        return code

    def signal(self, name: str, signum: int) -> None:
        """Send a signal to a process."""
        self.fleet.services[name].process.send_signal(signum)

    def rest(self, seconds: float) -> None:
        """Let time pass, in the thread that strikes."""
        time.sleep(seconds)

    def cut(self, name: str, how: Cut) -> None:
        """Cut its wires."""
        self.wires.cut(name, self.fleet.services[name].process.pid, how)

    def await_whole(self) -> None:
        """Wait until every process started is ready, and both gateways see two workers of each kind."""
        for name, service in list(self.fleet.services.items()):
            if name not in self._lives:
                text = until(partial(_ready_line, self.fleet, service), within_s=60, what=f"{name} is ready")
                self._lead(name, text)
        until(self._all_known, within_s=30, what="every gateway knows every worker")
        for name, service in self.fleet.services.items():
            if name not in self._lives:
                self._lives[name] = _Life(service, _own_bytes(service))

    def _lead(self, name: str, ready: dict[str, str]) -> None:
        if name.startswith("gateway"):
            self.urls[name] = ready["url"]
        host, _, port = ready["address"].removeprefix("tcp://").rpartition(":")
        with suppress(OSError):  # led before, by an earlier wait that failed
            self.wires.lead(name, host, int(port))

    def _all_known(self) -> bool:
        workers = set(self.names("prefill") + self.names("decode"))
        return all(
            {s.labels["worker"] for s in samples if s.name == "baton_worker_running"} == workers
            for samples in map(scrape, self.urls.values())
        )

    # taking stock

    def take_stock(self) -> Leaks:
        """Wait until all is back where it was; what is not after `SETTLE_S` has leaked."""
        deadline_s = time.monotonic() + SETTLE_S
        while True:
            leaks = self._stock()
            if not (leaks.pages or leaks.others) or time.monotonic() > deadline_s:
                return leaks
            time.sleep(0.1)

    def _stock(self) -> Leaks:
        leaks = Leaks()
        for name, url in self.urls.items():
            for sample in scrape(url):
                self._look_at(name, sample, leaks)
        leaks.others += [*self._process_leaks(), *self._file_leaks(), *self._key_leaks()]
        return leaks

    def _look_at(self, gateway: str, sample: Sample, leaks: Leaks) -> None:
        worker = sample.labels.get("worker", gateway)
        what = " ".join([sample.name, *(f"{k}={v}" for k, v in sample.labels.items() if k in ("state", "side"))])
        if sample.name == "baton_worker_pages" and sample.labels["state"] in ("used", "quarantined"):
            # Every gateway shows every worker's pages.
            leaks.pages = max(leaks.pages, int(sample.value))
        if sample.value and (
            sample.name
            in ("baton_requests_live", "baton_requests_queued", "baton_worker_running", "baton_worker_waiting")
            or sample.name == "baton_worker_hand_offs_open"
        ):
            leaks.others.append(f"{worker}: {what} is {sample.value:g}")
        # Prefill workers, decode workers and gateways: nobody has business with more.
        if sample.name.endswith("_bus_peers") and sample.value > 3 * NUM_EACH:
            leaks.others.append(f"{worker}: {sample.value:g} connections")
        if sample.name.endswith("_tasks") and sample.value > 40:
            leaks.others.append(f"{worker}: {sample.value:g} tasks")

    def _process_leaks(self) -> Iterator[str]:
        for name, life in self._lives.items():
            process = psutil.Process(life.service.process.pid)
            allowed = FDS_AT_START + FDS_PER_PEER * 3 * NUM_EACH
            if (num_fds := process.num_fds()) > allowed:
                yield f"{name}: {num_fds} file descriptors"
            if (grown := _own_bytes(life.service) - life.own_bytes) > MAX_GROWTH_BYTES:
                yield f"{name}: {grown >> 20} MiB more memory than at its start"

    def _file_leaks(self) -> Iterator[str]:
        live = {service.process.pid for service in self.fleet.services.values()}
        for path in SHARED_MEMORY.glob("baton-*"):
            pid = int(path.name.split("-")[1])
            if pid in self._pids and pid not in live:
                yield f"{path} of a process that is gone"

    def _key_leaks(self) -> Iterator[str]:
        with redis.Redis.from_url(self.fleet.redis.url, decode_responses=True) as client:
            prefix = f"{self.fleet.namespace}:"
            for key in client.scan_iter():
                tail = key.removeprefix(prefix)
                if not key.startswith(("LIMITS:", prefix)):
                    yield f"{key} is no key of ours"
                elif tail not in PERSISTENT_KEYS and client.ttl(key) == -1:
                    yield f"{key} has no time to live"
            for kind in ("worker", "gateway"):
                names = {key.removeprefix(f"{prefix}{kind}:") for key in client.scan_iter(f"{prefix}{kind}:*")}
                if gone := names - set(self.fleet.services):
                    yield f"{kind} {sorted(gone)} still in the registry"

    def figures(self) -> dict[str, float]:
        """Memory and descriptors of all processes, for the record."""
        processes = [life.service for life in self._lives.values()]
        return {
            "own_mib": round(sum(map(_own_bytes, processes)) / 2**20, 1),
            "fds": sum(psutil.Process(service.process.pid).num_fds() for service in processes),
        }

    def total(self, metric: str) -> float:
        """Sum of a gateway metric over the gateways."""
        return sum(s.value for url in self.urls.values() for s in scrape(url) if s.name == metric)

    def tracebacks(self) -> list[str]:
        """Processes whose log shows an exception that nobody expected."""
        return sorted(path.stem for path in self.fleet.directory.glob("*.log") if "Traceback" in path.read_text())


@dataclass(frozen=True)
class Sample:
    """One line of `/metrics`."""

    name: str
    labels: dict[str, str]
    value: float


def scrape(url: str) -> list[Sample]:
    """What a gateway shows; nothing if it does not answer."""
    try:
        text = httpx.get(f"{url}/metrics", timeout=5).text
    except httpx.HTTPError:
        return []
    return [_sample(line) for line in text.splitlines() if line.startswith("baton_")]


def _sample(line: str) -> Sample:
    head, _, value = line.rpartition(" ")
    name, _, rest = head.partition("{")
    pairs = (pair.partition("=") for pair in rest.rstrip("}").split(",") if pair)
    return Sample(name, {key: quoted.strip('"') for key, _, quoted in pairs}, float(value))


def _ready_line(fleet: Fleet, service: Service) -> dict[str, str] | None:
    """The fields of the line with which a service says that it is ready."""
    fleet._require_alive(service)
    for line in service.text().splitlines():
        if line.startswith("{") and (fields := json.loads(line)).get("event") == "ready":
            return fields
    return None


def _own_bytes(service: Service) -> int:
    """Memory that is this process's alone; the pages lie in shared memory and do not count."""
    with suppress(psutil.Error):
        facts = psutil.Process(service.process.pid).memory_info()
        return facts.rss - facts.shared
    return 0
