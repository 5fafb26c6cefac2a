"""The HTML report: one file that needs nothing else, with tables and plots."""

import html
import importlib.util
import json
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import msgspec

from loadtest.document import write_whole
from loadtest.errors import BadArgument
from loadtest.metrics import Distribution
from loadtest.run import Result


class Section(msgspec.Struct, frozen=True, kw_only=True):
    """A part of the page: heading, lines of text, a table (first row its header), plots as SVG."""

    heading: str
    lines: Sequence[str] = ()
    table: Sequence[Sequence[str]] = ()
    plots: Sequence[str] = ()


def require_plots() -> None:
    """Raises: BadArgument where matplotlib, which draws, is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise BadArgument("--html", "needs matplotlib: pip install matplotlib")


def write_page(path: Path, *, title: str, subtitle: str, sections: Iterable[Section], facts: dict[str, Any]) -> None:
    """Write the page, whole or not at all; ``facts`` are shown folded at its end. Raises: OSError."""
    style = resources.files("loadtest").joinpath("page.css").read_text()
    body = "\n".join(map(_section, sections))
    text = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>\n{style}</style></head><body>\n'
        f'<h1>{html.escape(title)}</h1>\n<p class="sub">{html.escape(subtitle)}</p>\n{body}\n'
        f"<details><summary>Settings and machine</summary><pre>{html.escape(json.dumps(facts, indent=2))}</pre>"
        "</details>\n</body></html>\n"
    )
    write_whole(path, text.encode())


def run_sections(results: dict[str, Result]) -> list[Section]:
    """What a single run, or several side by side, have to show."""
    from loadtest import plots  # matplotlib takes a while to load

    records = {name: result.records for name, result in results.items()}
    sections = [
        Section(heading="Requests", table=_counts(results)),
        Section(heading="Latency, ms", table=_latencies(results), plots=plots.latency_plots(records)),
        Section(heading="Over time", plots=plots.time_plots(records)),
    ]
    for name, result in results.items():
        if result.samples:
            heading = "The server" if len(results) == 1 else f"The server: {name}"
            sections.append(Section(heading=heading, plots=plots.gauge_plots(result.samples)))
    sections.append(Section(heading="Was it the client?", lines=[_verdict(n, r) for n, r in results.items()]))
    notes = [f"{name}: {note}" for name, result in results.items() for note in result.notes]
    if notes:
        sections.append(Section(heading="Notes", lines=notes))
    return sections


def _counts(results: dict[str, Result]) -> list[list[str]]:
    rows = [["", "sent", "ok", "429", "failed", "req/s", "input tok/s", "output tok/s", "goodput req/s", "good"]]
    for name, result in results.items():
        summary, good = result.summary, result.summary.goodput
        rows.append(
            [
                name,
                str(summary.num_sent),
                str(summary.num_ok),
                str(summary.num_rejected),
                str(summary.num_failed),
                f"{summary.requests_per_s:.3f}",
                f"{summary.input_tokens_per_s:.0f}",
                f"{summary.output_tokens_per_s:.1f}",
                "-" if good is None else f"{good.requests_per_s:.3f}",
                "-" if good is None else f"{good.share:.1%}",
            ]
        )
    return rows


def _latencies(results: dict[str, Result]) -> list[list[str]]:
    rows = [["", "mean", "p50", "p90", "p95", "p99", "max", "samples"]]
    for name, result in results.items():
        summary = result.summary
        for label, figures in (
            ("TTFT", summary.ttft_s),
            ("ITL", summary.itl_s),
            ("TPOT", summary.tpot_s),
            ("E2E", summary.e2e_s),
        ):
            head = label if len(results) == 1 else f"{label}, {name}"
            rows.append([head, *_cells(figures)])
    return rows


def _cells(figures: Distribution | None) -> list[str]:
    if figures is None:
        return ["-"] * 6 + ["0"]
    values = (figures.mean, figures.p50, figures.p90, figures.p95, figures.p99, figures.max)
    return [*(f"{value * 1e3:.2f}" for value in values), str(figures.count)]


def _verdict(name: str, result: Result) -> str:
    health = result.health
    lag = "" if health.loop_lag_s is None else f"event-loop lag p99 {health.loop_lag_s.p99 * 1e3:.2f} ms, "
    verdict = "DISTORTED: " + "; ".join(health.problems) if health.problems else "the client kept up"
    return f"{name}: {lag}{health.cpu_share:.0%} of a core; {verdict}"


def _section(section: Section) -> str:
    parts = [f"<h2>{html.escape(section.heading)}</h2>"]
    if section.lines:
        parts.append("<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in section.lines) + "</ul>")
    if section.table:
        head, *rows = section.table
        cells = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
        lines = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows)
        parts.append(f"<table><thead><tr>{cells}</tr></thead><tbody>{lines}</tbody></table>")
    if section.plots:
        parts.append('<div class="plots">' + "".join(section.plots) + "</div>")
    return "\n".join(parts)
