"""`make chaos ARGS="--seed 1 --rounds 5 --faults kill,link"`: exit code 0 only if every promise held."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec
import psutil
from support.fleet import Fleet
from support.redis_server import RedisServer

from chaos.arena import LEASE_S, Arena
from chaos.faults import Fault, all_faults
from chaos.report import rows, table
from chaos.rounds import Outcome, Rounds


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="make chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="of prompts, faults' order, victims and moments")
    parser.add_argument("--rounds", type=int, default=20, help="times that each fault is tried")
    parser.add_argument("--faults", default="", help="only those whose title contains one of these, comma-separated")
    parser.add_argument("--streams", type=int, default=16, help="live streams in each round")
    parser.add_argument("--tokens", type=int, default=100, help="output tokens of each")
    parser.add_argument("--storm", type=int, default=500, help="requests of an abort storm")
    parser.add_argument("--transports", default="shm,tcp", help="hand-off transports, best first")
    parser.add_argument("--budget-s", type=float, default=float("inf"), help="begin no round after so many seconds")
    parser.add_argument("--logs", type=Path, help="existing directory that keeps the services' logs")
    parser.add_argument("--json", type=Path, help="file for the whole record")
    parser.add_argument("--earlier", type=Path, nargs="*", default=[], help="records of runs to be counted in, as one")
    return parser.parse_args(arguments)


def chosen(wanted: str) -> list[Fault]:
    """Faults by parts of their titles; all for an empty wish."""
    parts = [part.strip().lower() for part in wanted.split(",") if part.strip()]
    faults = all_faults()
    if not parts:
        return faults
    return [fault for fault in faults if any(part in fault.title.lower() for part in parts)]


class Stop:
    """SIGTERM ends the run after the round under way, with the table of what was played; a second one ends it at once.

    Attributes:
        asked: whether one has come.
    """

    asked = False

    def ask(self, *_: object) -> None:
        """The signal's handler. Leaving by an exception takes the fleet along."""
        if self.asked:
            sys.exit("asked to stop")
        self.asked = True


async def play(
    arena: Arena, options: argparse.Namespace, stop: Stop, say: Callable[[str], None]
) -> tuple[list[Outcome], dict[str, Any]]:
    """All rounds, the faults of each in an order of their own, so that a run cut short has tried all alike."""
    rounds = Rounds(
        arena, num_streams=options.streams, max_tokens=options.tokens, num_storm=options.storm, seed=options.seed
    )
    await rounds.learn()
    before = arena.figures()
    faults, order, outcomes = chosen(options.faults), random.Random(options.seed), list[Outcome]()
    began_s = time.monotonic()
    for number in range(options.rounds):
        for fault in order.sample(faults, len(faults)):
            if fault.awaits and number % 2 == 1:
                continue
            if stop.asked or time.monotonic() - began_s > options.budget_s:
                break
            outcome = await rounds.play(fault)
            outcomes.append(outcome)
            problems = [*outcome.wrong, *outcome.leaks.others]
            parts = ", ".join(f"{part} {part_s:.1f}" for part, part_s in outcome.parts_s.items())
            say(
                f"{number + 1:3} {outcome.title:42} {outcome.finished}/{outcome.streams - outcome.excused} "
                f"finished, {outcome.hit} hit, {outcome.took_s:.1f} s ({parts}) {'; '.join(problems)}"
            )
    return outcomes, {"before": before, "after": arena.figures(), "idle": arena.stock.idle}


def main(arguments: list[str] | None = None) -> int:
    """Run it; 1 if a promise was broken."""
    options = parse(arguments)
    stop = Stop()
    signal.signal(signal.SIGTERM, stop.ask)
    with (
        tempfile.TemporaryDirectory(prefix="baton-chaos-") as scratch,
        RedisServer(Path(scratch)) as redis,
        Fleet(redis, options.logs or Path(scratch), namespace="chaos") as fleet,
    ):
        fleet.settings = {
            "lease_s": str(LEASE_S),
            "hand_off_liveness_s": str(LEASE_S),
            "transports": options.transports,
            "log_format": "json",
        }
        with Arena(fleet, options.seed) as arena:
            outcomes, figures = asyncio.run(play(arena, options, stop, lambda line: print(line, flush=True)))
            fleet.stop_all()
            tracebacks = arena.tracebacks()
    earlier = [json.loads(path.read_bytes())["outcomes"] for path in options.earlier]
    played = [*outcomes, *(one for part in earlier for one in msgspec.convert(part, list[Outcome]))]
    titles = [fault.title for fault in all_faults()]
    records = rows(sorted(played, key=lambda outcome: titles.index(outcome.title)))
    broken = [f"{record['fault']}, {what}" for record in records for what in record["broken promises"]]
    broken += [f"{name} logged an exception" for name in tracebacks]
    machine = {"cores": os.cpu_count(), "load": os.getloadavg(), "memory_gib": psutil.virtual_memory().total >> 30}
    print(f"\n{table(records)}\n\n{json.dumps({'machine': machine, 'fleet': figures}, indent=1)}")
    print("\n".join(["broken promises:", *broken] if broken else ["every promise held"]))
    if options.json is not None:
        record = {
            "options": vars(options),
            "machine": machine,
            "fleet": figures,
            "rows": records,
            "broken": broken,
            "outcomes": [asdict(outcome) for outcome in outcomes],
        }
        options.json.write_text(json.dumps(record, indent=2, default=str), encoding="utf-8")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
