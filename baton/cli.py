"""The `baton` command line. Exit codes: 0 done, 1 it did not work, 2 the command or a setting is wrong."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn

from rich.console import Console

from baton import drain, keys, up, usage
from baton.errors import BAD_SETTINGS_CODE, CommandError, ServiceDied
from baton.flags import explain_unknown
from baton.settings import Surroundings, surroundings
from fleet.errors import BatonError, SettingsError
from fleet.version import version

Command = Callable[[argparse.Namespace, Surroundings, Console], int]


def build_parser() -> tuple[argparse.ArgumentParser, Mapping[str, argparse.ArgumentParser]]:
    """The parser of the whole command, and those of its sub-commands by name."""
    parser = argparse.ArgumentParser(
        prog="baton",
        description="Serve large language models by separate pools of prefill and decode workers.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"baton {version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    up_parser = commands.add_parser(
        "up",
        help="start a fleet on this machine and run it until Ctrl-C",
        usage="baton up [--model MODEL] [--prefill N] [--decode N] [--verbose] [--SETTING VALUE ...]",
        description="Start Redis (unless one is configured), workers and gateway, and run them until Ctrl-C. Every "
        "setting is also a variable (BATON_MAX_NUM_SEQS) and a key of baton.toml (max_num_seqs); flags win over "
        "variables, variables over the file. Without a model it serves the demo model of the source tree. "
        "Workers share the cores evenly unless --threads says otherwise.",
        allow_abbrev=False,
    )
    up.add_arguments(up_parser)
    doctor_parser = commands.add_parser(
        "doctor", help="say what this machine can do, and what stands in the way", allow_abbrev=False
    )
    doctor_parser.add_argument(
        "--redis-url", metavar="URL", help="the Redis to ask (default: BATON_REDIS_URL, else embedded)"
    )
    doctor_parser.add_argument("--json", action="store_true", help="print JSON")
    keys_parser = commands.add_parser("keys", help="make, list and revoke API keys", allow_abbrev=False)
    keys.add_arguments(keys_parser)
    drain_parser = commands.add_parser(
        "drain", help="ask a worker to move its streams away and leave", allow_abbrev=False
    )
    drain.add_arguments(drain_parser)
    usage_parser = commands.add_parser("usage", help="print usage per API key, model and hour", allow_abbrev=False)
    usage.add_arguments(usage_parser)
    return parser, {
        "drain": drain_parser,
        "up": up_parser,
        "doctor": doctor_parser,
        "keys": keys_parser,
        "usage": usage_parser,
    }


def run_doctor(arguments: argparse.Namespace, around: Surroundings, console: Console) -> int:
    """Print the diagnosis; 1 when this machine cannot serve."""
    import msgspec

    from baton.doctor import diagnose, show
    from baton.facts import gather
    from fleet.service_settings import GatewaySettings

    url = arguments.redis_url
    if url is None and around.is_given("redis_url"):
        url = around.load(GatewaySettings, {}).redis_url
    diagnosis = diagnose(gather(url))
    if arguments.json:
        console.print(msgspec.json.encode(diagnosis).decode(), markup=False, highlight=False, soft_wrap=True)
    else:
        show(diagnosis, console)
    return 0 if diagnosis.can_serve else 1


COMMANDS: Mapping[str, Command] = {
    "up": up.run,
    "drain": drain.run,
    "doctor": run_doctor,
    "keys": keys.run,
    "usage": usage.run,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    parser, subparsers = build_parser()
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        _refuse(subparsers[arguments.command], explain_unknown(subparsers[arguments.command], unknown))
    errors: list[BatonError] = []
    code = 0
    try:
        code = COMMANDS[arguments.command](arguments, surroundings(), Console())
    except* BatonError as group:
        errors = _leaves(group)
    except* KeyboardInterrupt:
        code = 130
    for error in errors:
        if isinstance(error, ServiceDied):
            for line in error.log_lines:
                print(f"  | {line}", file=sys.stderr)
        print(f"baton: {error}", file=sys.stderr)
        code = max(code, _code_of(error))
    return code


def _refuse(parser: argparse.ArgumentParser, sentence: str) -> NoReturn:
    parser.print_usage(sys.stderr)
    print(f"baton: {sentence}", file=sys.stderr)
    sys.exit(BAD_SETTINGS_CODE)


def _code_of(error: BatonError) -> int:
    if isinstance(error, SettingsError):
        return BAD_SETTINGS_CODE
    return error.exit_code if isinstance(error, CommandError) else 1


def _leaves(group: BaseExceptionGroup[BatonError]) -> list[BatonError]:
    found: list[BatonError] = []
    for error in group.exceptions:
        found.extend(_leaves(error) if isinstance(error, BaseExceptionGroup) else [error])
    return found
