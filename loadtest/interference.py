"""What prompts that keep coming do to streams that run: `python -m loadtest interference`.

Three phases on one server: streams alone, streams while prompts keep coming, prompts alone. An engine that computes
both in one batch stretches its token intervals by the length of a prompt; one that computes them apart does not.
"""

import asyncio
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from loadtest.errors import BadArgument
from loadtest.lengths import Lengths
from loadtest.page import Section
from loadtest.run import Bench, Result
from loadtest.settings import Settings


class Plan(msgspec.Struct, frozen=True):
    """The intruders: ``prompt_users`` that each send their next prompt when the last is answered.

    Raises: BadArgument from the constructor.
    """

    prompt_users: int = 1
    prompts: Lengths = Lengths("uniform", 2048, 4096)
    answer_tokens: int = 4

    def __post_init__(self) -> None:
        if self.prompt_users < 1:
            raise BadArgument("--intruders", f"{self.prompt_users} cannot be used; give at least 1")


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """The three phases, and the prompts that ran beside the streams in the second."""

    alone: Result
    disturbed: Result
    beside: Result
    prompts_alone: Result

    @property
    def median_ratio(self) -> float:
        """Median ITL disturbed over undisturbed."""
        return _itl(self.disturbed)[0] / _itl(self.alone)[0]

    @property
    def p99_ratio(self) -> float:
        """ITL p99 disturbed over the undisturbed median."""
        return _itl(self.disturbed)[1] / _itl(self.alone)[0]

    @property
    def progress(self) -> float:
        """Prompt tokens per second beside streams over prompts alone."""
        full = self.prompts_alone.summary.input_tokens_per_s
        return self.beside.summary.input_tokens_per_s / full if full else 0.0


async def interfere(bench: Bench, settings: Settings, plan: Plan, console: Console) -> Found:
    """Run the phases; ``settings`` are the streams', a closed loop with a duration."""
    intruders = msgspec.structs.replace(
        settings,
        concurrency=plan.prompt_users,
        prompt_len=plan.prompts,
        output_len=Lengths("fixed", plan.answer_tokens, plan.answer_tokens),
        seed=settings.seed + 1,
        shared_prefix_len=0,
        num_prefixes=1,
        progress=False,
        server_metrics=False,
    )
    console.print("1 of 3: streams alone", markup=False)
    alone = await bench.measure(settings)
    console.print("2 of 3: streams, while prompts keep coming", markup=False)
    again = msgspec.structs.replace(settings, seed=settings.seed + 2)
    disturbed, beside = await asyncio.gather(bench.measure(again), bench.measure(intruders))
    console.print("3 of 3: prompts alone", markup=False)
    prompts_alone = await bench.measure(msgspec.structs.replace(intruders, seed=settings.seed + 3))
    return Found(alone=alone, disturbed=disturbed, beside=beside, prompts_alone=prompts_alone)


def _itl(result: Result) -> tuple[float, float]:
    figures = result.summary.itl_s
    if figures is None:
        raise BadArgument("--output-len", "the streams had no gaps between chunks; ask for longer outputs")
    return figures.p50, figures.p99


def table_rows(found: Found) -> list[list[str]]:
    """Return the outcome as rows, header first."""
    rows = [["", "ITL p50, ms", "ITL p99, ms", "prompt tok/s"]]
    for name, streams, prompts in (
        ("streams alone", found.alone, None),
        ("both", found.disturbed, found.beside),
        ("prompts alone", None, found.prompts_alone),
    ):
        p50, p99 = (f"{value * 1e3:.2f}" for value in _itl(streams)) if streams is not None else ("-", "-")
        speed = "-" if prompts is None else f"{prompts.summary.input_tokens_per_s:.0f}"
        rows.append([name, p50, p99, speed])
    rows.append(
        [
            "ratio",
            f"{found.median_ratio:.2f}",
            f"{found.p99_ratio:.2f} (p99 to undisturbed median)",
            f"{found.progress:.2f}",
        ]
    )
    return rows


def print_found(found: Found, console: Console) -> None:
    """Print the outcome."""
    head, *rows = table_rows(found)
    table = Table(title="Interference", title_justify="left", box=None, pad_edge=False)
    for column in head:
        table.add_column(column, justify="left" if not column else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def document(found: Found) -> dict[str, Any]:
    """Return what the JSON report says of the phases."""
    phases = {
        "streams_alone": found.alone,
        "streams_disturbed": found.disturbed,
        "prompts_beside": found.beside,
        "prompts_alone": found.prompts_alone,
    }
    return {
        "itl_p50_ratio": found.median_ratio,
        "itl_p99_to_undisturbed_median": found.p99_ratio,
        "prompt_progress": found.progress,
        "phases": {name: msgspec.to_builtins(result.summary) for name, result in phases.items()},
    }


def section(found: Found) -> Section:
    """Return the page's part about the phases."""
    lines = [
        f"median ITL grows {found.median_ratio:.2f} times while prompts keep coming",
        f"its 99th percentile is {found.p99_ratio:.2f} times the undisturbed median",
        f"prompts progress at {found.progress:.0%} of their speed alone",
    ]
    return Section(heading="Interference", lines=lines, table=table_rows(found))
