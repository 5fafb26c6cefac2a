"""Request traces: when requests came, how long they were, and which beginnings they shared.

Two published forms are read, plain or gzipped: Azure's LLM inference trace (CSV with ``TIMESTAMP``,
``ContextTokens``, ``GeneratedTokens``; Patel et al., Splitwise, ISCA 2024) and Mooncake's (JSON lines with
``timestamp`` in milliseconds, ``input_length``, ``output_length`` and ``hash_ids``, one for each 512 tokens of the
prompt; Qin et al., Mooncake, FAST 2025). Neither holds any text.
"""

import csv
import gzip
import itertools
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path

import msgspec

from loadtest.errors import BadArgument

TRACE_PAGE_TOKENS = 512
"""Tokens of a prompt that one of Mooncake's ``hash_ids`` stands for."""


class Entry(msgspec.Struct, frozen=True):
    """One request of a trace. Equal ids at the start of ``prefix_ids`` mean equal beginnings of prompts.

    ``at_s`` counts from the first request; lengths are tokens.
    """

    at_s: float
    prompt_tokens: int
    output_tokens: int
    prefix_ids: tuple[int, ...] = ()


class _Mooncake(msgspec.Struct):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: list[int] = []


def read_trace(path: Path) -> list[Entry]:
    """Read a trace, in the order of arrival. Raises: BadArgument where it cannot be read."""
    try:
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
            first = lines.readline()
            rest = itertools.chain([first], lines)
            entries = list(_read_mooncake(rest) if first.startswith("{") else _read_azure(rest))
    except (OSError, EOFError, ValueError, KeyError, msgspec.DecodeError) as error:
        raise BadArgument("--trace", f"cannot read {path}: {error}") from error
    if not entries:
        raise BadArgument("--trace", f"{path} holds no requests")
    entries.sort(key=lambda entry: entry.at_s)
    return _spread_ticks(entries)


def _read_azure(lines: Iterable[str]) -> Iterator[Entry]:
    start: datetime | None = None
    for row in csv.DictReader(lines):
        # Seven decimals, one more than datetime reads.
        at = datetime.fromisoformat(row["TIMESTAMP"][:26])
        start = start or at
        yield Entry((at - start).total_seconds(), int(row["ContextTokens"]), int(row["GeneratedTokens"]))


def _read_mooncake(lines: Iterable[str]) -> Iterator[Entry]:
    decode = msgspec.json.Decoder(_Mooncake).decode
    for line in lines:
        one = decode(line)
        yield Entry(one.timestamp / 1e3, one.input_length, one.output_length, tuple(one.hash_ids))


def _spread_ticks(entries: list[Entry]) -> list[Entry]:
    """Spread requests that share an instant evenly over the time to the next one.

    Some traces round their times to ticks of seconds; replayed as they are, each tick would be a burst that never was.
    """
    groups = [list(group) for _, group in itertools.groupby(entries, key=lambda entry: entry.at_s)]
    spread: list[Entry] = []
    for group, following in itertools.zip_longest(groups, groups[1:]):
        span_s = following[0].at_s - group[0].at_s if following else 0.0
        for place, entry in enumerate(group):
            spread.append(msgspec.structs.replace(entry, at_s=entry.at_s + span_s * place / len(group)))
    return spread


def scaled(entries: Iterable[Entry], *, speed: float, scale: float) -> list[Entry]:
    """Return the trace ``speed`` times as fast, its lengths times ``scale`` and at least one token."""
    return [
        Entry(
            entry.at_s / speed,
            max(1, round(entry.prompt_tokens * scale)),
            max(1, round(entry.output_tokens * scale)),
            entry.prefix_ids,
        )
        for entry in entries
    ]
