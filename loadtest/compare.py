"""Two servers under the same load, round about: `python -m loadtest compare`.

Rounds alternate (A B, B A, A B, …), so that a machine that slows down or warms up does so for both. Both get the same
requests in a round. What is compared is the ratio of each figure, round by round: its geometric mean, and a Student
confidence interval of the logarithms, which is honest about few rounds.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from loadtest.errors import BadArgument
from loadtest.metrics import Summary
from loadtest.page import Section
from loadtest.run import Result, opened
from loadtest.settings import Settings

# Two-sided 95 % quantiles of Student's t by degrees of freedom, from 1; beyond the last the normal one is near.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
_Z95 = 1.960

FIGURES: dict[str, Callable[[Summary], float | None]] = {
    "output tokens/s": lambda s: s.output_tokens_per_s,
    "requests/s": lambda s: s.requests_per_s,
    "goodput": lambda s: None if s.goodput is None else s.goodput.requests_per_s,
    "TTFT p50": lambda s: None if s.ttft_s is None else s.ttft_s.p50,
    "TTFT p99": lambda s: None if s.ttft_s is None else s.ttft_s.p99,
    "ITL p50": lambda s: None if s.itl_s is None else s.itl_s.p50,
    "ITL p99": lambda s: None if s.itl_s is None else s.itl_s.p99,
    "TPOT p50": lambda s: None if s.tpot_s is None else s.tpot_s.p50,
    "E2E p50": lambda s: None if s.e2e_s is None else s.e2e_s.p50,
}


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """Who is compared with whom, and how often. ``rates`` empty: the load of the settings. Raises: BadArgument."""

    names: tuple[str, str]
    urls: tuple[str, str]
    models: tuple[str | None, str | None] = (None, None)
    rounds: int = 5
    rates: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise BadArgument("--rounds", f"{self.rounds} cannot be used; give at least 1")
        if self.names[0] == self.names[1]:
            raise BadArgument("--names", "must differ")


class Ratio(msgspec.Struct, frozen=True):
    """``b`` over ``a`` of one figure: geometric mean over the rounds and the ends of its 95 % interval.

    ``a`` and ``b`` are the medians over the rounds. With a single round there is no interval: its ends are the mean.
    """

    a: float
    b: float
    low: float
    mean: float
    high: float
    rounds: int


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """Results by rate (None: the load of the settings), then by round: A's and B's."""

    plan: Plan
    rounds: dict[float | None, list[tuple[Result, Result]]]

    def ratios(self, rate: float | None) -> dict[str, Ratio]:
        """The figures that both servers have in every round, as ratios."""
        pairs = self.rounds[rate]
        ratios = {}
        for name, figure in FIGURES.items():
            values = [(figure(a.summary), figure(b.summary)) for a, b in pairs]
            sound = [(a, b) for a, b in values if a and b]
            if values and len(sound) == len(values):
                ratios[name] = ratio_of(sound)
        return ratios


def ratio_of(pairs: Sequence[tuple[float, float]]) -> Ratio:
    """Compare paired positive figures."""
    logs = [math.log(b / a) for a, b in pairs]
    mean = statistics.fmean(logs)
    half = 0.0
    if len(logs) > 1:
        t = _T95[len(logs) - 2] if len(logs) - 2 < len(_T95) else _Z95
        half = t * statistics.stdev(logs) / math.sqrt(len(logs))
    return Ratio(
        a=statistics.median(a for a, _ in pairs),
        b=statistics.median(b for _, b in pairs),
        low=math.exp(mean - half),
        mean=math.exp(mean),
        high=math.exp(mean + half),
        rounds=len(logs),
    )


async def compare(
    settings: Settings, plan: Plan, console: Console, on_stoppable: Callable[[Callable[[], None]], None]
) -> Found:
    """Measure both, round about. An interrupt ends it after the round at hand. Raises: SetupError."""
    async with AsyncExitStack() as stack:
        own = [
            msgspec.structs.replace(settings, url=url, model=model or settings.model)
            for url, model in zip(plan.urls, plan.models, strict=True)
        ]
        benches = [await stack.enter_async_context(opened(one, console)) for one in own]
        for bench in benches:
            await bench.warm_up()

        def stop() -> None:
            for bench in benches:
                bench.stop()

        on_stoppable(stop)
        rounds: dict[float | None, list[tuple[Result, Result]]] = {}
        for rate in plan.rates or (None,):
            rounds[rate] = []
            for number in range(plan.rounds):
                pair: dict[int, Result] = {}
                for side in (0, 1) if number % 2 == 0 else (1, 0):
                    console.print(_label(plan, rate, number, side), markup=False, highlight=False)
                    load = {"seed": settings.seed + number} | ({} if rate is None else {"rate": rate})
                    pair[side] = await benches[side].measure(msgspec.structs.replace(own[side], **load))
                if any(bench.stopped for bench in benches):
                    return Found(plan=plan, rounds=rounds)
                rounds[rate].append((pair[0], pair[1]))
    return Found(plan=plan, rounds=rounds)


def _label(plan: Plan, rate: float | None, number: int, side: int) -> str:
    at = "" if rate is None else f" at {rate:g} req/s"
    return f"round {number + 1} of {plan.rounds}{at}: {plan.names[side]}"


def print_found(found: Found, console: Console) -> None:
    """Print the ratios."""
    for rate in found.rounds:
        head, *rows = table_rows(found, rate)
        title = "Comparison" if rate is None else f"Comparison at {rate:g} req/s"
        table = Table(title=title, title_justify="left", box=None, pad_edge=False)
        for column in head:
            table.add_column(column, justify="left" if not column else "right")
        for row in rows:
            table.add_row(*row)
        console.print(table)


def table_rows(found: Found, rate: float | None) -> list[list[str]]:
    """Return the ratios at a rate as rows, header first; times in milliseconds."""
    a, b = found.plan.names
    rows = [["", a, b, f"{b} / {a}", "95 % interval", "rounds"]]
    for name, ratio in found.ratios(rate).items():
        is_time = name.split()[0] in {"TTFT", "ITL", "TPOT", "E2E"}
        scale, unit = (1e3, " ms") if is_time else (1.0, "")
        interval = "-" if ratio.rounds < 2 else f"{ratio.low:.3f} to {ratio.high:.3f}"
        rows.append(
            [
                name,
                f"{ratio.a * scale:.2f}{unit}",
                f"{ratio.b * scale:.2f}{unit}",
                f"{ratio.mean:.3f}",
                interval,
                str(ratio.rounds),
            ]
        )
    return rows


def document(found: Found) -> dict[str, Any]:
    """Return what the JSON report says of the comparison."""
    return {
        "plan": msgspec.to_builtins(found.plan),
        "loads": [
            {
                "rate": rate,
                "ratios": msgspec.to_builtins(found.ratios(rate)),
                "rounds": [[msgspec.to_builtins(a.summary), msgspec.to_builtins(b.summary)] for a, b in pairs],
            }
            for rate, pairs in found.rounds.items()
        ],
    }


def sections(found: Found) -> list[Section]:
    """Return the page's parts about the comparison."""
    from loadtest import plots  # matplotlib takes a while to load

    parts = []
    for rate in found.rounds:
        ratios = found.ratios(rate)
        heading = "Comparison" if rate is None else f"Comparison at {rate:g} req/s"
        drawn = [(name, one.low, one.mean, one.high) for name, one in ratios.items()]
        picture = [plots.ratio_plot(drawn, found.plan.names[0])] if drawn else []
        parts.append(Section(heading=heading, table=table_rows(found, rate), plots=picture))
    curves = _goodput_curves(found)
    if len(found.plan.rates) > 1 and all(curves.values()):
        parts.append(Section(heading="Goodput by rate", plots=[plots.goodput_plot(curves, share=None)]))
    return parts


def _goodput_curves(found: Found) -> dict[str, list[tuple[float, float, float]]]:
    curves: dict[str, list[tuple[float, float, float]]] = {}
    for side, name in enumerate(found.plan.names):
        curves[name] = []
        for rate, pairs in found.rounds.items():
            goods = [pair[side].summary.goodput for pair in pairs]
            sound = [good for good in goods if good is not None]
            if rate is not None and sound:
                middle = statistics.median(good.requests_per_s for good in sound)
                curves[name].append((rate, middle, statistics.median(good.share for good in sound)))
    return curves


def last_round(found: Found) -> dict[str, Result]:
    """Return the last round's results by name, for the plots over time."""
    pairs = [pair for at_rate in found.rounds.values() for pair in at_rate]
    return dict(zip(found.plan.names, pairs[-1], strict=True)) if pairs else {}
