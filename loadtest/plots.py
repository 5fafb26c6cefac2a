"""Plots of the HTML report, as SVG text. The one module that needs matplotlib (the ``client`` extra)."""

import io
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from loadtest import series
from loadtest.gauges import Sample
from loadtest.record import Record

_WIDTH, _HEIGHT = 5.6, 3.0
_COLOURS = ("#2f6db3", "#d1702c", "#3b8f4e", "#8a4fa3", "#b23a48", "#5f6b73")
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "svg.hashsalt": "baton",
}

Runs = Mapping[str, Sequence[Record]]
"""Records by the name under which they are drawn."""


def latency_plots(runs: Runs) -> list[str]:
    """Distributions of TTFT and ITL."""
    ttft = {name: series.ttfts(records)[1] * 1e3 for name, records in runs.items()}
    itl = {name: series.gaps(records, most=200_000)[1] * 1e3 for name, records in runs.items()}
    drawn = []
    for title, samples in (("Time to first token", ttft), ("Inter-token latency", itl)):
        figure, axes = _figure(title, "ms", "share of requests" if samples is ttft else "share of gaps")
        for (name, sample), colour in zip(samples.items(), _COLOURS, strict=False):
            if sample.size:
                axes.step(*series.cumulative(sample), where="post", label=name, color=colour)
        axes.set_ylim(0, 1.02)
        if any(sample.size and sample.max() > 20 * max(1e-9, float(sample.mean())) for sample in samples.values()):
            axes.set_xscale("log")
        drawn.append(_svg(figure, axes, legend=len(runs) > 1))
    return drawn


def time_plots(runs: Runs) -> list[str]:
    """TTFT, ITL, tokens per second and requests in flight over the run."""
    figures = {
        title: _figure(title, "s", unit)
        for title, unit in (
            ("TTFT over time", "ms"),
            ("ITL over time", "ms"),
            ("Output tokens per second", "tokens/s"),
            ("Requests in flight", "requests"),
        )
    }
    (_, ttft), (_, itl), (_, tokens), (_, flight) = figures.values()
    for (name, records), colour in zip(runs.items(), _COLOURS, strict=False):
        if not records:
            continue
        at_s, first_s = series.ttfts(records)
        ttft.plot(at_s, first_s * 1e3, ".", markersize=3, color=colour, label=name)
        at_s, gap_s = series.gaps(records)
        itl.plot(at_s, gap_s * 1e3, ".", markersize=2, alpha=0.5, color=colour, label=name)
        length_s = max(record.end_s for record in records)
        tokens.plot(*series.tokens_per_s(records, max(0.25, length_s / 100)), color=colour, label=name)
        flight.step(*series.running(records), where="post", color=colour, label=name)
    return [_svg(figure, axes, legend=len(runs) > 1) for figure, axes in figures.values()]


def gauge_plots(samples: Sequence[Sample]) -> list[str]:
    """What the server said of its workers: a plot for each figure and pool, a line for each worker."""
    drawn = []
    ordered = sorted(samples, key=lambda one: (one.figure, one.pool, one.worker, one.at_s))
    for (figure_name, pool), group in groupby(ordered, key=lambda one: (one.figure, one.pool)):
        heading = {"pages": "Pages in use"}.get(figure_name, figure_name.capitalize())
        figure, axes = _figure(f"{heading}{f', {pool} pool' if pool else ''}", "s", figure_name)
        for number, (worker, own) in enumerate(groupby(group, key=lambda one: one.worker)):
            points = list(own)
            colour = _COLOURS[number % len(_COLOURS)]
            axes.plot([one.at_s for one in points], [one.value for one in points], color=colour, label=worker)
        axes.set_ylim(bottom=0)
        drawn.append(_svg(figure, axes, legend=True))
    return drawn


def goodput_plot(curves: Mapping[str, Sequence[tuple[float, float, float]]], *, share: float | None) -> str:
    """Rate against goodput. ``curves`` hold (offered rate, goodput, share of good requests) by name."""
    figure, axes = _figure("Offered rate and goodput", "offered, req/s", "good, req/s")
    highest = max((rate for points in curves.values() for rate, _, _ in points), default=1.0)
    axes.plot([0, highest], [0, highest], ":", color="#999", label="all good")
    if share is not None:
        axes.plot([0, highest], [0, share * highest], "--", color="#999", label=f"{share:.0%} good")
    for (name, points), colour in zip(curves.items(), _COLOURS, strict=False):
        ordered = sorted(points)
        axes.plot(
            [rate for rate, _, _ in ordered],
            [good for _, good, _ in ordered],
            "o-",
            markersize=4,
            color=colour,
            label=name,
        )
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    return _svg(figure, axes, legend=True)


def ratio_plot(ratios: Sequence[tuple[str, float, float, float]], baseline: str) -> str:
    """Ratios with their confidence intervals: (label, low, middle, high), against ``baseline`` at 1."""
    figure, axes = _figure(f"Ratio to {baseline}, 95 % interval", "ratio", "")
    figure.set_figheight(0.9 + 0.28 * len(ratios))
    places = range(len(ratios), 0, -1)
    for place, (_, low, middle, high) in zip(places, ratios, strict=True):
        axes.errorbar(middle, place, xerr=[[middle - low], [high - middle]], fmt="o", color=_COLOURS[0], capsize=3)
    axes.set_xscale("log")
    axes.axvline(1.0, color="#999", linestyle=":")
    axes.set_yticks(list(places), [label for label, *_ in ratios])
    return _svg(figure, axes, legend=False)


def _figure(title: str, x: str, y: str) -> tuple[Figure, Axes]:
    with rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, _HEIGHT), layout="constrained")
        axes = figure.add_subplot()
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlabel(x)
        axes.set_ylabel(y)
    return figure, axes


def _svg(figure: Figure, axes: Axes, *, legend: bool) -> str:
    if legend and axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7, frameon=False)
    text = io.StringIO()
    with rc_context(_STYLE):
        figure.savefig(text, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return text.getvalue().partition("?>")[2].partition(">")[2]
