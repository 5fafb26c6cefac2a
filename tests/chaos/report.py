"""What all rounds of a fault came to: a row of the table, and a record for machines."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from chaos.rounds import Outcome

MIN_THROUGHPUT = 0.5
"""Of the normal one, as the median over a fault's rounds: a fleet that is not itself again within 2 s is below that."""
_COLUMNS = (
    "fault",
    "rounds",
    "hit",
    "finished",
    "lost",
    "repeated",
    "pages leaked",
    "other leaks",
    "moved",
    "replayed",
    "pause p50",
    "p99",
    "max",
    "throughput after",
)


def rows(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """One record per fault, in the order in which they first came."""
    grouped: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        grouped.setdefault(outcome.title, []).append(outcome)
    return [_row(name, group) for name, group in grouped.items()]


def _row(name: str, group: Sequence[Outcome]) -> dict[str, Any]:
    pauses_ms = sorted(pause_s * 1e3 for outcome in group for pause_s in outcome.pauses_s)
    return {
        "fault": name,
        "rounds": len(group),
        "streams": sum(o.streams - o.excused for o in group),
        "hit": sum(o.hit for o in group),
        "finished": sum(o.finished for o in group),
        "lost": sum(o.lost for o in group),
        "repeated": sum(o.repeated for o in group),
        "pages leaked": sum(o.leaks.pages for o in group),
        "other leaks": sum(len(o.leaks.others) for o in group),
        "moved": round(sum(o.migrations for o in group)),
        "replayed": round(sum(o.replays for o in group)),
        "pause p50": _quantile(pauses_ms, 0.5),
        "p99": _quantile(pauses_ms, 0.99),
        "max": _quantile(pauses_ms, 1.0),
        "throughput after": round(statistics.median(o.throughput for o in group), 2),
        "broken promises": [
            f"round {number}: {problem}"
            for number, outcome in enumerate(group)
            for problem in (*outcome.wrong, *outcome.leaks.others, *_pages(outcome))
        ]
        + _slow(group),
    }


def _pages(outcome: Outcome) -> list[str]:
    return [f"{outcome.leaks.pages} pages leaked"] if outcome.leaks.pages else []


def _slow(group: Sequence[Outcome]) -> list[str]:
    """Judged from five rounds on, since a single figure of a busy machine says little."""
    median = statistics.median(o.throughput for o in group)
    return [f"throughput is only {median:.0%} of the normal"] if len(group) >= 5 and median < MIN_THROUGHPUT else []


def _quantile(ordered: Sequence[float], share: float) -> int | None:
    return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))]) if ordered else None


def table(records: Sequence[dict[str, Any]]) -> str:
    """As Markdown; pauses in milliseconds, `finished` with the number of streams that had to."""
    lines = ["| " + " | ".join(_COLUMNS) + " |", "| --- |" + " ---: |" * (len(_COLUMNS) - 1)]
    for record in records:
        cells = [str(record[column]) for column in _COLUMNS]
        cells[3] = f"{record['finished']} of {record['streams']}"
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
