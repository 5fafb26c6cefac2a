"""The commands beside a single run: their options, and what they write."""

import argparse
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from rich.console import Console

from loadtest import compare, interference, search
from loadtest.arguments import (
    add_load,
    add_report,
    add_requests,
    add_server,
    lengths_of,
    make_parser,
    settings_from,
)
from loadtest.document import SCHEMA_VERSION, environment, write_document, write_table
from loadtest.errors import BadArgument
from loadtest.page import Section, run_sections, write_page
from loadtest.run import Result, interrupts, opened
from loadtest.settings import Settings

_DEFAULT_PHASE_S = 20.0
_DEFAULT_STREAMS = 8

T = TypeVar("T")


class Job(msgspec.Struct, frozen=True):
    """A command that is ready to run: its settings, and what to await with consoles for errors and for output.

    Awaiting it prints, writes what the settings ask for and returns the exit code. It raises LoadTestError and OSError.
    """

    settings: Settings
    start: Callable[[Console, Console], Coroutine[Any, Any, int]]


def search_job(argv: Sequence[str]) -> Job:
    """`search`: the highest rate that meets the targets. Raises: SystemExit."""
    parser = make_parser(
        "python -m loadtest search",
        "Find the highest rate at which enough requests meet --ttft-ms and --itl-ms.",
        "Each probe is an open loop of --duration-s (default 20) at one rate.",
    )
    group = parser.add_argument_group("search")
    group.add_argument("--start-rate", type=float, default=1.0, help="first rate, req/s (default 1)")
    group.add_argument("--max-rate", type=float, default=1024.0, help="highest rate to try (default 1024)")
    group.add_argument("--share", type=float, default=0.9, help="good requests that a rate needs (default 0.9)")
    group.add_argument("--tolerance", type=float, default=0.1, help="how near is near enough (default 0.1)")
    _add_common(parser)
    fields = vars(parser.parse_args([*argv, "--rate", "1"]))
    own = _take(fields, "start_rate", "max_rate", "share", "tolerance")
    plan, settings = _made(parser, lambda: search.Plan(**own)), _settings(parser, fields)
    if settings.ttft_ms is None and settings.itl_ms is None:
        parser.error("--ttft-ms: give it or --itl-ms (or both): without a target every rate is good")

    async def start(errors: Console, out: Console) -> int:
        with interrupts() as on_interrupt:
            async with opened(settings, errors) as bench:
                await bench.warm_up()
                on_interrupt(bench.stop)
                found = await search.search(bench, settings, plan, errors)
        out.print(f"highest rate with {plan.share:.0%} good requests: {found.rate:.3f} req/s", highlight=False)
        best = found.best
        results = {} if best is None else {f"{found.rate:.3f} req/s": best}
        _write(settings, "search", search.document(found), lambda: [search.section(found)], results)
        return 0 if found.rate > 0 else 1

    return Job(settings, start)


def interference_job(argv: Sequence[str]) -> Job:
    """`interference`: running streams while prompts keep coming. Raises: SystemExit."""
    parser = make_parser(
        "python -m loadtest interference",
        "Measure what prompts that keep coming do to streams that run.",
        "The streams are a closed loop: --concurrency users (default 8) for --duration-s (default 20).",
    )
    group = parser.add_argument_group("intruders")
    group.add_argument("--intruders", type=int, default=1, help="users that send long prompts (default 1)")
    group.add_argument(
        "--intruder-len",
        type=lengths_of("--intruder-len"),
        default="2048:4096",
        metavar="TOKENS",
        help="their prompt tokens (default 2048:4096)",
    )
    group.add_argument("--intruder-output", type=int, default=4, help="their output tokens (default 4)")
    _add_common(parser)
    parser.set_defaults(concurrency=_DEFAULT_STREAMS)
    fields = vars(parser.parse_args(argv))
    own = _take(fields, "intruders", "intruder_len", "intruder_output")
    plan = _made(parser, lambda: interference.Plan(own["intruders"], own["intruder_len"], own["intruder_output"]))
    settings = _settings(parser, fields)
    if settings.open_loop or settings.duration_s is None or settings.processes > 1:
        parser.error("--concurrency: interference is a closed loop of one process over a time (--duration-s)")

    async def start(errors: Console, out: Console) -> int:
        with interrupts():
            async with opened(settings, errors) as bench:
                await bench.warm_up()
                found = await interference.interfere(bench, settings, plan, errors)
        interference.print_found(found, out)
        results = {"streams alone": found.alone, "streams disturbed": found.disturbed}
        _write(settings, "interference", interference.document(found), lambda: [interference.section(found)], results)
        return 0

    return Job(settings, start)


def compare_job(argv: Sequence[str]) -> Job:
    """`compare`: two servers, round about. Raises: SystemExit."""
    parser = make_parser(
        "python -m loadtest compare",
        "Measure two servers under the same load in alternating rounds; print ratios with confidence intervals.",
        "Each round is --duration-s (default 20) or --num-requests long.",
    )
    group = parser.add_argument_group("servers")
    group.add_argument("--urls", nargs=2, required=True, metavar=("A", "B"), help="addresses, as --url elsewhere")
    group.add_argument("--names", nargs=2, default=("A", "B"), metavar=("A", "B"), help="what to call them")
    group.add_argument("--models", nargs=2, default=(None, None), metavar=("A", "B"), help="where they differ")
    group.add_argument("--rounds", type=int, default=5, help="of each load (default 5)")
    group.add_argument("--rates", type=_rates, default=(), metavar="R,R,...", help="open loops at these rates")
    _add_common(parser, url=False)
    fields = vars(parser.parse_args(argv))
    own = _take(fields, "urls", "names", "models", "rounds", "rates")
    plan = _made(
        parser,
        lambda: compare.Plan(
            urls=(own["urls"][0], own["urls"][1]),
            names=(own["names"][0], own["names"][1]),
            models=(own["models"][0], own["models"][1]),
            rounds=own["rounds"],
            rates=own["rates"],
        ),
    )
    fields["url"] = plan.urls[0]
    if plan.rates:
        fields["rate"] = plan.rates[0]
    settings = _settings(parser, fields)

    async def start(errors: Console, out: Console) -> int:
        with interrupts() as on_interrupt:
            found = await compare.compare(settings, plan, errors, on_interrupt)
        compare.print_found(found, out)
        last = compare.last_round(found)
        _write(settings, "compare", compare.document(found), lambda: compare.sections(found), last)
        return 0 if last else 1

    return Job(settings, start)


JOBS = {"search": search_job, "interference": interference_job, "compare": compare_job}
"""What makes each command's job from the words after its name."""


def _add_common(parser: argparse.ArgumentParser, *, url: bool = True) -> None:
    add_server(parser.add_argument_group("server"), url=url)
    add_load(parser.add_argument_group("load"))
    add_requests(parser.add_argument_group("requests"))
    add_report(parser.add_argument_group("targets and report"))


def _take(fields: dict[str, Any], *names: str) -> dict[str, Any]:
    """Take these options out of ``fields``."""
    return {name: fields.pop(name) for name in names}


def _settings(parser: argparse.ArgumentParser, fields: dict[str, Any]) -> Settings:
    if fields["num_requests"] is None and fields["duration_s"] is None:
        fields["duration_s"] = _DEFAULT_PHASE_S
    return settings_from(parser, fields)


def _made(parser: argparse.ArgumentParser, make: Callable[[], T]) -> T:
    try:
        return make()
    except BadArgument as error:
        parser.error(str(error))


def _rates(text: str) -> tuple[float, ...]:
    try:
        rates = tuple(float(word) for word in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"cannot read {text!r}; give req/s as 2,4,8") from error
    if not all(0 < rate < float("inf") for rate in rates):
        raise argparse.ArgumentTypeError(f"{text!r} needs rates above 0")
    return rates


def _write(
    settings: Settings,
    name: str,
    outcome: dict[str, Any],
    sections: Callable[[], list[Section]],
    results: dict[str, Result],
) -> None:
    """Write the files that were asked for. Raises: OSError."""
    facts = {"command": name, "config": settings.public(), "environment": environment()}
    if settings.json_path is not None:
        head = {"schema": f"baton.loadtest.{name}", "schema_version": SCHEMA_VERSION}
        write_document(head | facts | {"outcome": outcome}, Path(settings.json_path))
    if settings.csv_path is not None:
        write_table([record for result in results.values() for record in result.records], Path(settings.csv_path))
    if settings.html_path is not None:
        write_page(
            Path(settings.html_path),
            title=f"Load test: {name}",
            subtitle=f"{settings.url}, {settings.load}",
            sections=[*sections(), *(run_sections(results) if results else [])],
            facts=facts,
        )
