"""The command: arguments in, report and exit code out."""

import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from loadtest.arguments import parse_arguments
from loadtest.document import write_document
from loadtest.errors import LoadTestError
from loadtest.report import print_report
from loadtest.run import Result, run
from loadtest.settings import Settings

_PLAIN_WIDTH = 120
_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0, 1 (all failed), 2, 3 (set-up) or 130 (interrupted).

    The report goes to standard output, everything else to standard error. Raises: SystemExit from the
    argument parser.
    """
    settings = parse_arguments(argv)
    errors = _console(stderr=True)
    try:
        result = _run(settings, errors)
    except LoadTestError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201  # a command's own message
        return error.exit_code
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("interrupted before anything was measured", file=sys.stderr)  # noqa: T201
        return _INTERRUPTED
    print_report(result, _console(stderr=False))
    if settings.json_path is not None:
        try:
            write_document(result, Path(settings.json_path))
        except OSError as error:
            print(f"error: --json: cannot write {settings.json_path}: {error}", file=sys.stderr)  # noqa: T201
            return 1
    if result.interrupted:
        return _INTERRUPTED
    return 0 if result.summary.num_ok else 1


def _run(settings: Settings, console: Console) -> Result:
    # Not uvloop: with more than a thousand sockets ready it keeps reading before it looks at its timers, so
    # requests are sent late, and for this client's few callbacks it saves no processor time.
    return asyncio.run(run(settings, console))


def _console(*, stderr: bool) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    # Rich assumes 80 columns for a pipe, which would fold the tables.
    return Console(file=stream, width=None if stream.isatty() else _PLAIN_WIDTH)
