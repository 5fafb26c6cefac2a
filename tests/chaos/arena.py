"""The fleet that is broken: two workers of each kind, two gateways and Redis, each behind wires that can be cut."""

from __future__ import annotations

import json
import random
import signal
import time
from functools import partial
from types import TracebackType
from typing import Any, Self

import psutil
from support.fleet import DEMO, STOP_S, Fleet, Service, until

from chaos.stock import Leaks, Stock, own_bytes, role_of, scrape
from chaos.wires import Cut, Wires

LEASE_S = 1.5
GRACE_S = 15
SETTLE_S = 20.0
KNOWN_S = 30.0
NUM_EACH = 2


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
        self.stock = Stock(fleet)
        self._ready: set[str] = set()
        self._leaver = ""
        self._numbers: dict[str, int] = {}

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
        name, host = f"{role}-{number}", f"127.{1 + len(self.stock.pids) // 250}.0.{2 + len(self.stock.pids) % 250}"
        if role == "gateway":
            service = self.fleet.start("gateway", name, port=0, advertise_host=host)
        else:
            settings: dict[str, Any] = {
                "model": DEMO,
                "served_model_name": "demo",
                "dtype": "float32",
                "drain_timeout_s": GRACE_S,
            }
            if role == "prefill":
                settings["max_step_tokens"] = 64
            service = self.fleet.start(f"{role}_svc", name, advertise_host=host, **settings)
        self.stock.pids.add(service.process.pid)
        self.wires.know(name, service.process.pid)
        return name

    def remove(self, name: str, signum: int) -> int:
        """End a process and wait; returns its exit code."""
        code = self.fleet.services[name].stop(signum)
        self._forget(name)
        return code

    def _forget(self, name: str) -> None:
        self.fleet.forget(name)
        self.urls.pop(name, None)
        self._ready.discard(name)
        self.wires.drop(name)

    def replace(self, name: str, signum: int, *, wait: bool = False) -> int:
        """End a process, and start another one as whoever runs a fleet would; `wait`: until that is ready.

        Nobody reaches the new one before `await_whole` has found it ready. Returns the exit code of the old one.
        """
        code = self.remove(name, signum)
        successor = self.add(role_of(name))
        if wait:
            self._welcome(successor)
        return code

    def ask_to_leave(self, name: str) -> None:
        """SIGTERM, and on; `replace_leaver` waits for its end."""
        self._leaver = name
        self.signal(name, signal.SIGTERM)

    def replace_leaver(self) -> None:
        """Whoever was asked to leave and has not been killed is waited for, and replaced.

        Raises:
            RuntimeError: it ended with another exit code than 0.
        """
        name, self._leaver = self._leaver, ""
        if name not in self.fleet.services:
            return
        code = self.fleet.services[name].process.wait(timeout=STOP_S)
        self._forget(name)
        self.add(role_of(name))
        if code != 0:
            raise RuntimeError(f"{name} ended with {code}")

    def signal(self, name: str, signum: int) -> None:
        """Send a signal to a process."""
        self.fleet.services[name].process.send_signal(signum)

    def rest(self, seconds: float) -> None:
        """Let time pass, in the thread that strikes."""
        time.sleep(seconds)

    def cut(self, name: str, how: Cut) -> None:
        """Cut its wires."""
        self.wires.cut(name, how)

    def await_whole(self) -> list[str]:
        """Wait until every process started is ready, and both gateways see two workers of each kind.

        Returns what kept somebody from that, in words; who it was is replaced.
        """
        problems = list[str]()
        while True:
            for name in list(self.fleet.services):
                self._welcome(name)
            lost = self._lost_ones()
            if not lost:
                return problems
            for name in lost:
                code = self.fleet.services[name].process.poll()
                how = f"is not known everywhere after {KNOWN_S:g} s" if code is None else f"ended with {code}"
                problems.append(f"{name} {how}")
                self.remove(name, signal.SIGABRT)  # its log tells where it stood
                self.add(role_of(name))

    def _lost_ones(self) -> list[str]:
        """Who has ended, at once; whom not every gateway knows, and gateways that do not answer, after `KNOWN_S`."""
        deadline_s = time.monotonic() + KNOWN_S
        while True:
            if dead := [name for name, service in self.fleet.services.items() if service.process.poll() is not None]:
                return dead
            workers = set(self.names("prefill") + self.names("decode"))
            unknown = set[str]()
            for gateway, url in self.urls.items():
                samples = scrape(url)
                known = {sample.labels["worker"] for sample in samples if sample.name == "baton_worker_running"}
                unknown |= workers - known if samples else {gateway}
                if known - workers:
                    unknown.add(gateway)
            if not unknown or time.monotonic() > deadline_s:
                return sorted(unknown)
            time.sleep(0.02)

    def _welcome(self, name: str) -> None:
        if name not in self._ready:
            service = self.fleet.services[name]
            text = until(partial(_ready_line, self.fleet, service), within_s=60, what=f"{name} is ready")
            self._lead(name, text)
            self._ready.add(name)

    def _lead(self, name: str, ready: dict[str, str]) -> None:
        if name.startswith("gateway"):
            self.urls[name] = ready["url"]
        host, _, port = ready["address"].removeprefix("tcp://").rpartition(":")
        self.wires.lead(name, host, int(port))

    # taking stock

    def learn_idle(self) -> None:
        """The fleet is idle and warm: from now on it is held to what it has."""
        self.stock.learn(self.urls)

    def take_stock(self) -> Leaks:
        """Wait until all is back where it was; what is not after `SETTLE_S` has leaked."""
        deadline_s = time.monotonic() + SETTLE_S
        while True:
            leaks = self.stock.leaks(self.urls)
            if not (leaks.pages or leaks.others) or time.monotonic() > deadline_s:
                return leaks
            time.sleep(0.1)

    def figures(self) -> dict[str, float]:
        """Memory and descriptors of all processes, for the record."""
        processes = list(self.fleet.services.values())
        return {
            "own_mib": round(sum(map(own_bytes, processes)) / 2**20, 1),
            "fds": sum(psutil.Process(service.process.pid).num_fds() for service in processes),
        }

    def total(self, metric: str) -> float:
        """Sum of a gateway metric over the gateways."""
        return sum(s.value for url in self.urls.values() for s in scrape(url) if s.name == metric)

    def tracebacks(self) -> list[str]:
        """Processes whose log shows an exception that nobody expected."""
        return sorted(path.stem for path in self.fleet.directory.glob("*.log") if "Traceback" in path.read_text())


def _ready_line(fleet: Fleet, service: Service) -> dict[str, str] | None:
    """The fields of the line with which a service says that it is ready."""
    fleet._require_alive(service)
    for line in service.text().splitlines():
        if line.startswith("{"):
            fields: dict[str, str] = json.loads(line)
            if fields.get("event") == "ready":
                return fields
    return None
