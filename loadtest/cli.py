"""The command: arguments in, report and exit code out."""

import asyncio
import sys
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from loadtest.arguments import parse_arguments
from loadtest.document import environment, make_document, write_document, write_table
from loadtest.errors import LoadTestError
from loadtest.page import require_plots, run_sections, write_page
from loadtest.report import print_report
from loadtest.run import Result, run
from loadtest.scenarios import JOBS
from loadtest.settings import Settings

T = TypeVar("T")

_PLAIN_WIDTH = 120
_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0, 1 (all failed), 2, 3 (set-up) or 130 (interrupted).

    The report goes to standard output, everything else to standard error. Raises: SystemExit from the
    argument parser.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    errors, out = _console(stderr=True), _console(stderr=False)
    try:
        if words and words[0] in JOBS:
            job = JOBS[words[0]](words[1:])
            _check_page(job.settings)
            return _loop(job.start(errors, out))
        settings = parse_arguments(words)
        _check_page(settings)
        return _report(_loop(run(settings, errors)), out)
    except LoadTestError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201  # a command's own message
        return error.exit_code
    except OSError as error:
        print(f"error: cannot write the report: {error}", file=sys.stderr)  # noqa: T201
        return 1
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("interrupted before anything was measured", file=sys.stderr)  # noqa: T201
        return _INTERRUPTED


def _report(result: Result, out: Console) -> int:
    settings = result.settings
    print_report(result, out)
    if settings.json_path is not None:
        write_document(make_document(result), Path(settings.json_path))
    if settings.csv_path is not None:
        write_table(result.records, Path(settings.csv_path))
    if settings.html_path is not None:
        write_page(
            Path(settings.html_path),
            title=f"Load test: {result.target.model}",
            subtitle=f"{settings.url}, {settings.load}",
            sections=run_sections({"this run": result}),
            facts={"config": settings.public(), "environment": environment()},
        )
    if result.interrupted:
        return _INTERRUPTED
    return 0 if result.summary.num_ok else 1


def _check_page(settings: Settings) -> None:
    if settings.html_path is not None:
        require_plots()


def _loop(work: Coroutine[Any, Any, T]) -> T:
    # Not uvloop: with more than a thousand sockets ready it keeps reading before it looks at its timers, so
    # requests are sent late, and for this client's few callbacks it saves no processor time.
    return asyncio.run(work)


def _console(*, stderr: bool) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    # Rich assumes 80 columns for a pipe, which would fold the tables.
    return Console(file=stream, width=None if stream.isatty() else _PLAIN_WIDTH)
