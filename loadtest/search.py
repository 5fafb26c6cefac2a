"""The highest rate that a server carries within its targets: `python -m loadtest search`."""

import math
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from rich.console import Console

from loadtest.errors import BadArgument
from loadtest.page import Section
from loadtest.run import Bench, Result
from loadtest.settings import Settings


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """How to search: from ``start_rate`` by doubling up to ``max_rate``, then by halving the bracket.

    A rate passes if at least ``share`` of all requests sent meet both targets. The search ends when the bracket is
    narrower than a factor of ``1 + tolerance``. Raises: BadArgument.
    """

    start_rate: float = 1.0
    max_rate: float = 1024.0
    share: float = 0.9
    tolerance: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.start_rate <= self.max_rate < math.inf:
            raise BadArgument("--start-rate", "must be above 0 and at most --max-rate")
        if not 0 < self.share <= 1:
            raise BadArgument("--share", f"{self.share} is no share; give more than 0 and at most 1")
        if not self.tolerance > 0:
            raise BadArgument("--tolerance", f"{self.tolerance} would never end; give more than 0")


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """What a search found. ``rate`` is the highest that passed, 0 where none did; ``probes`` are in their order."""

    plan: Plan
    rate: float
    probes: list[Result]

    @property
    def best(self) -> Result | None:
        """The probe at ``rate``."""
        return next((one for one in self.probes if one.settings.rate == self.rate), None)


async def search(bench: Bench, settings: Settings, plan: Plan, console: Console) -> Found:
    """Probe rate after rate, each in a measured phase of its own. An interrupt ends it with what is known."""
    probes: list[Result] = []

    async def passes(rate: float) -> bool:
        result = await bench.measure(msgspec.structs.replace(settings, rate=rate, seed=settings.seed + len(probes)))
        probes.append(result)
        good = result.summary.goodput
        share = 0.0 if good is None else good.share
        verdict = "passes" if share >= plan.share else "fails"
        console.print(f"{rate:8.3f} req/s: {share:6.1%} good, {verdict}", markup=False, highlight=False)
        return share >= plan.share

    rate = await bracket(passes, plan, lambda: bench.stopped)
    return Found(plan=plan, rate=rate, probes=probes)


async def bracket(passes: Callable[[float], Awaitable[bool]], plan: Plan, stopped: Callable[[], bool]) -> float:
    """Return the highest rate found to pass, 0 for none; asks ``passes`` about as few rates as it can."""
    low, rate = 0.0, plan.start_rate
    while not stopped() and await passes(rate):
        low = rate
        if rate >= plan.max_rate:
            return low
        rate = min(2 * rate, plan.max_rate)
    high = rate
    # Nothing passed yet: go down by quarters, but not for ever.
    floor = plan.start_rate / 64
    while low == 0.0 and high > floor and not stopped():
        if await passes(high / 4):
            low = high / 4
        else:
            high /= 4
    while low > 0.0 and high / low > 1 + plan.tolerance and not stopped():
        middle = math.sqrt(low * high)
        if await passes(middle):
            low = middle
        else:
            high = middle
    return low


def points(found: Found) -> list[tuple[float, float, float]]:
    """Offered rate, goodput and share of each probe, by rate."""
    rows = []
    for probe in found.probes:
        good = probe.summary.goodput
        if good is not None:
            rows.append((probe.settings.rate or 0.0, good.requests_per_s, good.share))
    return sorted(rows)


def document(found: Found) -> dict[str, Any]:
    """Return what the JSON report says of the search itself."""
    return {
        "plan": msgspec.to_builtins(found.plan),
        "rate": found.rate,
        "probes": [
            {"rate": probe.settings.rate, "summary": msgspec.to_builtins(probe.summary)} for probe in found.probes
        ],
    }


def section(found: Found) -> Section:
    """Return the page's part about the search."""
    from loadtest import plots  # matplotlib takes a while to load

    curve = points(found)
    rows = [["offered req/s", "goodput req/s", "good"]]
    rows += [[f"{rate:.3f}", f"{good:.3f}", f"{share:.1%}"] for rate, good, share in curve]
    first = found.probes[0].summary.goodput if found.probes else None
    definition = "" if first is None else f" ({first.definition})"
    line = f"highest rate with {found.plan.share:.0%} good requests: {found.rate:.3f} req/s{definition}"
    return Section(
        heading="Goodput search",
        lines=[line],
        table=rows,
        plots=[plots.goodput_plot({"measured": curve}, share=found.plan.share)],
    )
