"""The table of `bench/peers.py`: a line per figure, a column per server, the limit, and Baton's ratio to vLLM."""

from __future__ import annotations

import re
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from cpu_engine import decode_limit_s, prefill_limit_s
from machine_limits import Limits
from peer_scale import Scale

from engine.model_config import ModelConfig

BASELINE = "vllm"
_MISS = "-"


def figures(entries: list[dict[str, Any]]) -> dict[str, float]:
    """One server's figures by the table's line, each the median over its rounds."""
    lists: dict[str, list[float]] = {}
    for entry in entries:
        flat = {"start to first answer, s": [entry["ready_s"]], "peak memory, GiB": [entry["memory_gib"]]}
        flat |= {_decode_line(n): [rate] for n, rate in entry.get("decode", {}).items()}
        flat |= {f"prefill {n}, tokens/s": rates for n, rates in entry.get("prefill", {}).items()}
        if "interference" in entry:
            each = entry["interference"]
            flat |= {
                "8 streams alone, ITL p50, ms": [each["alone_p50_s"] * 1e3],
                "while prompts come, ITL p50, ms": [each["disturbed_p50_s"] * 1e3],
                "while prompts come, ITL p99, ms": [each["disturbed_p99_s"] * 1e3],
                "that p99 / median alone": [each["p99_to_undisturbed_median"]],
                "prompts beside, tokens/s": [each["prompt_tokens_per_s_beside"]],
                "prompts beside / alone": [each["prompt_progress"]],
            }
        for name, values in flat.items():
            lists.setdefault(name, []).extend(values)
    return {name: statistics.median(values) for name, values in lists.items()}


def limit_lines(config: ModelConfig, limits: list[dict[str, float]], scale: Scale) -> dict[str, float]:
    """The limit of each line, from the best that any piece of the run measured."""
    best = Limits(0, max(each["read_gb_s"] for each in limits), max(each["gflop_s"] for each in limits))
    context = scale.stream_prompt + scale.outputs // 2
    lines = {_decode_line(n): n / decode_limit_s(config, best, n, context) for n in scale.streams}
    return lines | {f"prefill {n}, tokens/s": n / prefill_limit_s(config, best, n) for n in scale.prompts}


def table(document: dict[str, Any], config: ModelConfig, scale: Scale) -> str:
    """Markdown: a line per figure, a column per server, the limit, and Baton's ratio to vLLM."""
    by_server: dict[str, dict[str, float]] = {}
    for entry in document["runs"]:
        by_server.setdefault(entry["server"], {})
    for name in by_server:
        by_server[name] = figures([entry for entry in document["runs"] if entry["server"] == name])
    limits = limit_lines(config, document["limits"], scale)
    names = sorted(by_server, key=lambda name: name != "baton")  # Baton, then the others as they came
    lines = dict.fromkeys(line for name in names for line in by_server[name])
    rows = [["", *names, "limit", f"baton / {BASELINE}"], ["---"] * (len(names) + 3)]
    for line in sorted(lines, key=_order):
        cells = [_number(by_server[name].get(line)) for name in names]
        ours, theirs = by_server.get("baton", {}).get(line), by_server.get(BASELINE, {}).get(line)
        ratio = _MISS if ours is None or not theirs else f"{ours / theirs:.2f}"
        rows.append([line, *cells, _number(limits.get(line)), ratio])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _decode_line(streams: int | str) -> str:
    return f"decode, {streams} stream{'s' if int(streams) > 1 else ''}, tokens/s"


def _order(line: str) -> tuple[int, int]:
    kinds = ("decode", "prefill", "start", "peak", "8 streams", "while", "that", "prompts")
    kind = next(place for place, kind in enumerate(kinds) if line.startswith(kind))
    number = re.search(r"\d+", line)
    return kind, int(number.group()) if number and kind < 2 else 0


def _number(value: float | None) -> str:
    return _MISS if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
