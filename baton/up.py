"""`baton up`: a whole fleet on this machine, from an embedded Redis to the gateway, until Ctrl-C."""

from __future__ import annotations

import argparse
import asyncio
import os
import secrets
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from baton.child import ChildSpec
from baton.cleanup import Cleanup
from baton.cores import usable_cores
from baton.errors import NotReadyInTime, RedisUnusable
from baton.flags import add_setting_flags, overrides_of
from baton.follow import LogFollower
from baton.greeting import Greeting
from baton.notes import FleetNote, NoteBook, own_creation_s
from baton.plan import FleetPlan, Wish, embedded_redis, make_plan, require_port
from baton.probes import FleetProbe
from baton.report import LiveReporter, PlainReporter, make_reporter
from baton.settings import Surroundings
from baton.supervisor import Supervisor
from fleet.keys import KeyRegistry
from fleet.redis_client import Redis, connect
from fleet.registry import Registry
from fleet.service_settings import GatewaySettings
from fleet.types import Role

Reporters = PlainReporter | LiveReporter


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own options, then a flag for every setting."""
    parser.add_argument("--prefill", type=_count, default=1, metavar="N", help="prefill workers (default: 1)")
    parser.add_argument("--decode", type=_count, default=1, metavar="N", help="decode workers (default: 1)")
    parser.add_argument("--verbose", action="store_true", help="show what the services log, line by line")
    parser.add_argument(
        "--ready-timeout-s",
        type=float,
        default=1800.0,
        metavar="X",
        help="give up when the fleet is not ready by then; a first start may download the model (default: 1800)",
    )
    parser.add_argument(
        "--new-key", metavar="NAME", default="", help="make an API key of this name and show it (see `baton keys`)"
    )
    add_setting_flags(parser)


def run(arguments: argparse.Namespace, around: Surroundings, console: Console) -> int:
    """Run until stopped; returns the exit code.

    Raises:
        BatonError: it cannot start, or a service that cannot be spared keeps crashing.
    """
    overrides = overrides_of(arguments)
    embed = "redis_url" not in overrides and not around.is_given("redis_url")
    with Cleanup() as cleanup:
        first: list[ChildSpec] = []
        if embed:
            directory = Path(tempfile.mkdtemp(prefix="baton-"))
            cleanup.will_remove(directory)
            redis_spec, redis_url = embedded_redis(directory, around.environ)
            first.append(redis_spec)
        else:
            redis_url = overrides.get("redis_url") or around.load(GatewaySettings, overrides).redis_url
        cores = usable_cores()
        cores_file = _cores_file(cores)
        cleanup.will_remove(cores_file)
        wish = Wish(
            num_prefill=arguments.prefill,
            num_decode=arguments.decode,
            overrides=overrides,
            redis_url=redis_url,
            name_suffix="" if embed else f"-{secrets.token_hex(3)}",
            cores_file=str(cores_file),
        )
        plan = make_plan(wish, around, cores=cores)
        require_port(plan.gateway.host, plan.gateway.port)
        notes = NoteBook(around.state_dir)
        run_dir = notes.new_run_dir(os.getpid())
        cleanup.will_remove(notes.path(os.getpid()))
        reporter = make_reporter(console)
        _announce(plan, reporter, run_dir, embed=embed)
        job = UpJob(
            plan=plan,
            redis_specs=tuple(first),
            run_dir=run_dir,
            notes=notes,
            cleanup=cleanup,
            reporter=reporter,
            console=console,
            ready_timeout_s=arguments.ready_timeout_s,
            verbose=arguments.verbose,
            new_key_name=arguments.new_key,
        )
        try:
            asyncio.run(job.run())
        finally:
            reporter.close()
    return 0


def _cores_file(cores: int) -> Path:
    """What `BATON_SHARED_CORES` names: the file that says how many cores the workers lend each other."""
    number, name = tempfile.mkstemp(prefix="baton-cores-")
    with os.fdopen(number, "w") as file:
        file.write(str(cores))
    return Path(name)


@dataclass(frozen=True, slots=True, kw_only=True)
class UpJob:
    """One run of a fleet; see `run`."""

    plan: FleetPlan
    redis_specs: tuple[ChildSpec, ...]
    run_dir: Path
    notes: NoteBook
    cleanup: Cleanup
    reporter: Reporters
    console: Console
    ready_timeout_s: float
    verbose: bool
    new_key_name: str

    async def run(self) -> None:
        """Start, wait for the end, stop. Raises BatonError like `up.run`."""
        settings = self.plan.gateway
        redis = connect(settings.redis_url)
        registry = Registry(redis, namespace=settings.namespace, lease_s=settings.lease_s)
        probe = FleetProbe(redis, registry, self.plan.reach_host, settings.port)
        try:
            if not self.redis_specs and not await probe.redis_answers():
                raise RedisUnusable("the configured Redis does not answer PING; see BATON_REDIS_URL or --redis-url")
            await self._supervise(redis, registry, probe)
        finally:
            await redis.aclose()

    async def _supervise(self, redis: Redis, registry: Registry, probe: FleetProbe) -> None:
        supervisor = Supervisor(
            [*self.redis_specs, *self.plan.specs],
            run_dir=self.run_dir,
            probe=probe,
            reporter=self.reporter,
            on_group=self.cleanup.group,
        )
        keys = KeyRegistry(redis, namespace=self.plan.gateway.namespace)
        new_key = ""
        ready = asyncio.Event()
        timed_out = False

        async def redis_is_up() -> None:
            nonlocal new_key
            if self.new_key_name:
                _, new_key = await keys.create(self.new_key_name)

        async def greet() -> None:
            ready.set()
            self.reporter.close()
            self._leave_note()
            models = [worker.model for worker in await registry.workers() if worker.role is Role.PREFILL]
            Greeting(
                model=models[0] if models else "",
                api_url=self.plan.api_url,
                run_dir=str(self.run_dir),
                needs_key=bool(await keys.list()),
                new_key=new_key,
            ).show(self.console)

        async def give_up_late() -> None:
            nonlocal timed_out
            try:
                await asyncio.wait_for(ready.wait(), self.ready_timeout_s)
            except TimeoutError:
                timed_out = True
                supervisor.stop.set()

        with _signals(supervisor, self.reporter):
            async with asyncio.TaskGroup() as group:
                helpers = [group.create_task(give_up_late())]
                if self.verbose:
                    follower = LogFollower(self.run_dir, self.reporter.say)
                    helpers.append(group.create_task(follower.run()))
                try:
                    await supervisor.run(on_redis=redis_is_up, on_ready=greet)
                finally:
                    for helper in helpers:
                        helper.cancel()
        if timed_out:
            raise NotReadyInTime(
                f"the fleet was not ready after {self.ready_timeout_s:g} s; logs are in {self.run_dir}"
            )

    def _leave_note(self) -> None:
        pid = os.getpid()
        note = FleetNote(
            pid=pid,
            created_s=own_creation_s(pid),
            redis_url=self.plan.gateway.redis_url,
            namespace=self.plan.gateway.namespace,
            api_url=self.plan.api_url,
            run_dir=str(self.run_dir),
        )
        self.notes.write(note)


@contextmanager
def _signals(supervisor: Supervisor, reporter: Reporters) -> Iterator[None]:
    """While inside: the first signal stops in order, a second one at once."""
    loop = asyncio.get_running_loop()

    def heard(signum: signal.Signals) -> None:
        if supervisor.stop.is_set():
            supervisor.hurry.set()
            return
        reporter.close()
        reporter.say(f"{signum.name}: stopping gateway, prefill, decode, in this order; once more to stop at once")
        supervisor.stop.set()

    watched = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    for signum in watched:
        loop.add_signal_handler(signum, heard, signum)
    try:
        yield
    finally:
        for signum in watched:
            loop.remove_signal_handler(signum)


def _announce(plan: FleetPlan, reporter: Reporters, run_dir: Path, *, embed: bool) -> None:
    counts = {role: sum(spec.role == role for spec in plan.specs) for role in ("prefill", "decode")}
    where = "embedded Redis" if embed else "the configured Redis"
    reporter.say(
        f"model {plan.prefill.model}: {counts['prefill']} prefill, {counts['decode']} decode, "
        f"{plan.threads} compute threads each{', idle cores lent' if plan.decode.shared_cores else ''}, {where}"
    )
    reporter.say(f"logs in {run_dir}")


def _count(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if not 1 <= number <= 1024:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of workers from 1 on")
    return number
