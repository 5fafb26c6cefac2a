"""A real fleet for end-to-end tests: Redis, gateways and workers as processes of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import openai

from support.redis_server import RedisServer

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "models" / "demo"
DEMO_WORKER: dict[str, object] = {"model": DEMO, "served_model_name": "demo,baton-demo", "dtype": "float32"}
DEMO_PREFILL = {**DEMO_WORKER, "max_step_tokens": 64}
"""Of the demo fleet: float32, so that answers are exactly repeatable; short steps, so that prompts take several."""
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - looked at, not written
POOL_BYTES = 256 * 2**20
"""Of each worker: a dozen of the demo model's longest sequences. Workers are many and fill their pools at start."""
START_S = 60.0
STOP_S = 20.0


def until(condition: Callable[[], Any], *, within_s: float, what: str) -> Any:
    """Poll until `condition` returns something true, and return that."""
    deadline = time.monotonic() + within_s
    while True:
        found = condition()
        if found:
            return found
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {within_s} s")
        time.sleep(0.02)


@dataclass
class Service:
    """One process of the fleet, its output in a file."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    def text(self) -> str:
        """What it logged so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def stop(self, signum: int = signal.SIGTERM) -> int:
        """Ask it to leave and wait; returns its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signum)
        try:
            return self.process.wait(timeout=STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait()


@dataclass
class Fleet:
    """Starts services against one Redis and one namespace; a context manager that leaves nothing behind."""

    redis: RedisServer
    directory: Path
    namespace: str = "test"
    settings: dict[str, str] = field(default_factory=dict)
    services: dict[str, Service] = field(default_factory=dict)
    url: str = ""

    def start(self, module: str, name: str, *, prefix: Sequence[str] = (), **settings: object) -> Service:
        """Start `python -m module` under this name, behind a command that starts others; settings as keywords."""
        environment = {key: value for key, value in os.environ.items() if not key.startswith("BATON_")}
        given: dict[str, object] = {"name": name, "redis_url": self.redis.url, "namespace": self.namespace}
        if module != "gateway":
            given |= {"threads": 1, "kv_cache_bytes": POOL_BYTES}
        merged = {**self.settings, **given, **settings}
        environment |= {f"BATON_{key.upper()}": str(value) for key, value in merged.items()}
        environment |= {"HF_HUB_OFFLINE": "1", "PYTHONFAULTHANDLER": "1"}
        log = self.directory / f"{name}.log"
        with log.open("ab") as output:
            process = subprocess.Popen(
                [*prefix, sys.executable, "-m", module],
                env=environment,
                cwd=self.directory,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        service = self.services[name] = Service(name, process, log)
        return service

    def gateway(self, name: str = "g", **settings: object) -> str:
        """Start a gateway and return its base URL once it listens."""
        service = self.start("gateway", name, port=0, **settings)
        marker = "url=http://"

        def listening() -> str | None:
            self._require_alive(service)
            text = service.text()
            return text.partition(marker)[2].split()[0] if marker in text else None

        self.url = f"http://{until(listening, within_s=START_S, what='gateway listens')}"
        return self.url

    def wait_ready(self, *, prefill: int = 1, decode: int = 1, model: str | None = None) -> None:
        """Wait until the gateway counts so many workers of a model."""

        def ready() -> bool:
            for service in self.services.values():
                self._require_alive(service)
            try:
                answer = httpx.get(f"{self.url}/health/ready", timeout=10).json()
            except httpx.TransportError:
                return False
            return any(
                entry["prefill_workers"] >= prefill and entry["decode_workers"] >= decode
                for entry in answer["models"]
                if model is None or entry["model"] == model
            )

        until(ready, within_s=START_S, what="fleet is ready")

    def _require_alive(self, service: Service) -> None:
        code = service.process.poll()
        if code is not None and service.name in self.services:
            raise RuntimeError(f"{service.name} exited with {code}:\n{service.text()[-4000:]}")

    def forget(self, name: str) -> Service:
        """Take a service that the test stops itself out of the fleet."""
        return self.services.pop(name)

    def client(self, **kwargs: Any) -> openai.OpenAI:
        """The real SDK, pointed here, without its own retries."""
        options = {"base_url": f"{self.url}/v1", "api_key": "none", "max_retries": 0, "timeout": 60.0}
        return openai.OpenAI(**{**options, **kwargs})

    def metric(self, name: str, **labels: str) -> float:
        """Sum of a metric's samples with these labels, as `/metrics` shows it."""
        total = 0.0
        for line in httpx.get(f"{self.url}/metrics").text.splitlines():
            if line.startswith((f"{name}{{", f"{name} ")) and all(f'{k}="{v}"' in line for k, v in labels.items()):
                total += float(line.rsplit(" ", 1)[1])
        return total

    def shared_memory(self) -> list[str]:
        """Shared-memory files of our processes."""
        pids = {str(service.process.pid) for service in self.services.values()}
        return [path.name for path in SHARED_MEMORY.glob("baton-*") if path.name.split("-")[1] in pids]

    def stop_all(self) -> None:
        """Stop every service."""
        for service in self.services.values():
            if service.process.poll() is None:
                service.process.send_signal(signal.SIGTERM)
        for service in self.services.values():
            service.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for service in self.services.values():
            service.process.kill()
            service.process.wait()
