"""The final tables."""

from rich.console import Console
from rich.table import Table

from loadtest.metrics import Distribution, Summary
from loadtest.run import Result

_MANY_TOKENS = 1.05


def print_report(result: Result, console: Console) -> None:
    """Print everything a reader needs to judge the run to ``console``."""
    settings, summary = result.settings, result.summary
    console.print()
    state = " (interrupted)" if result.interrupted else ""
    console.print(f"{result.target.model} at {settings.url}: {settings.load}{state}", markup=False, highlight=False)
    for table in (_counts(result), _latencies(summary), _client(result)):
        console.print()
        console.print(table)
    for line in _remarks(result):
        console.print(line, markup=False, highlight=False)


def _grid(title: str) -> Table:
    table = Table(title=title, title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _counts(result: Result) -> Table:
    summary = result.summary
    table = _grid("Requests")
    table.add_row("duration", f"{summary.duration_s:.2f} s")
    table.add_row("sent", f"{summary.num_sent} (at most {result.peak_running} at once)")
    table.add_row("succeeded", str(summary.num_ok))
    rejected = str(summary.num_rejected)
    if summary.retry_after_s is not None:
        rejected += f" (Retry-After mean {summary.retry_after_s.mean:.1f} s, max {summary.retry_after_s.max:.1f} s)"
    table.add_row("rejected (429)", rejected)
    kinds = ", ".join(f"{kind}: {count}" for kind, count in summary.errors.items())
    table.add_row("failed", f"{summary.num_failed} ({kinds})" if kinds else str(summary.num_failed))
    if summary.num_cancelled:
        table.add_row("cancelled", str(summary.num_cancelled))
    table.add_row("request throughput", f"{summary.requests_per_s:.3f} req/s")
    asked = f", {summary.asked_input_tokens} asked" if summary.num_ok else ""
    table.add_row("input tokens", f"{summary.input_tokens_per_s:.1f} tok/s ({summary.input_tokens} in all{asked})")
    table.add_row("output tokens", f"{summary.output_tokens_per_s:.1f} tok/s ({summary.output_tokens} in all)")
    if summary.goodput is None:
        table.add_row("goodput", "not defined: give --ttft-ms and --itl-ms")
    else:
        good = summary.goodput
        table.add_row("goodput", f"{good.requests_per_s:.3f} req/s ({good.count} requests, {good.share:.1%})")
        table.add_row("", f"= {good.definition}")
    return table


def _latencies(summary: Summary) -> Table:
    table = Table(title="Latency, ms", title_justify="left", box=None, pad_edge=False)
    table.add_column("")
    for column in ("mean", "p50", "p90", "p95", "p99", "max", "samples"):
        table.add_column(column, justify="right")
    rows = (("TTFT", summary.ttft_s), ("ITL", summary.itl_s), ("TPOT", summary.tpot_s), ("E2E", summary.e2e_s))
    for name, figures in rows:
        if figures is None:
            table.add_row(name, *["-"] * 6, "0")
        else:
            table.add_row(name, *_milliseconds(figures), str(figures.count))
    return table


def _milliseconds(figures: Distribution) -> list[str]:
    values = (figures.mean, figures.p50, figures.p90, figures.p95, figures.p99, figures.max)
    return [f"{value * 1e3:.2f}" for value in values]


def _client(result: Result) -> Table:
    health = result.health
    table = _grid("This client")
    for name, figures in (("event-loop lag", health.loop_lag_s), ("sent after due", health.send_delay_s)):
        if figures is not None:
            table.add_row(
                name,
                f"p50 {figures.p50 * 1e3:.2f}, p99 {figures.p99 * 1e3:.2f}, max {figures.max * 1e3:.2f} ms",
            )
    if health.held_s is not None or health.num_unsent:
        held = health.held_s
        count, mean_s = (held.count, held.mean) if held is not None else (0, 0.0)
        table.add_row(
            "held by the cap",
            f"{count} requests, {mean_s * 1e3:.0f} ms on average; {health.num_unsent} due but never sent",
        )
    table.add_row("processor", f"{health.cpu_share:.0%} of a core")
    if health.problems:
        table.add_row("verdict", "DISTORTED: " + "; ".join(health.problems))
        table.add_row("", "use a less busy machine, or several clients with less load each")
    else:
        table.add_row("verdict", "the client kept up")
    return table


def _remarks(result: Result) -> list[str]:
    summary = result.summary
    remarks = list(result.notes)
    if summary.tokens_per_chunk is not None and summary.tokens_per_chunk > _MANY_TOKENS:
        remarks.append(
            f"{summary.tokens_per_chunk:.2f} tokens per chunk: ITL is the gap between chunks, TPOT the time per token"
        )
    if summary.num_without_usage:
        remarks.append(
            f"{summary.num_without_usage} answers without usage: their content chunks were counted as tokens"
        )
    if summary.num_short_outputs:
        remarks.append(f"{summary.num_short_outputs} outputs ended before their full length")
    seen: dict[str, str] = {}
    for record in result.records:
        if record.error is not None:
            kind = f"{record.outcome} {record.status}" if record.status not in {None, 200} else record.outcome
            seen.setdefault(str(kind), record.error)
    remarks.extend(f"first {kind}: {error}" for kind, error in seen.items())
    return [f"note: {remark}" for remark in remarks]
