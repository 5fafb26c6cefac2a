"""The command line: options, help and their turning into :class:`~loadtest.settings.Settings`."""

import argparse
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import msgspec

from loadtest import __version__
from loadtest.arrivals import parse_burst, parse_profile
from loadtest.errors import BadArgument
from loadtest.lengths import Lengths, parse_lengths
from loadtest.settings import (
    DEFAULT_NUM_REQUESTS,
    Endpoint,
    ItlRule,
    PromptForm,
    Settings,
    api_key_from_environment,
)

T = TypeVar("T")

_EPILOG = """\
examples:
  open loop, 4 requests/s arriving at random, at most 32 at a time, for a minute:
    python -m loadtest --url http://127.0.0.1:8000/v1 --rate 4 --concurrency 32 --duration-s 60
  closed loop, 16 users, each sending its next request when the last one is answered:
    python -m loadtest --concurrency 16 --num-requests 500 --prompt-len 64:512 --output-len 128
  goodput for targets, prompts sharing one of 4 system prompts, everything written down:
    python -m loadtest --rate 8 --shared-prefix-len 256 --num-prefixes 4 --prompt-len 300:600 \\
        --ttft-ms 500 --itl-ms 50 --json run.json

  a ramp from 1 to 20 requests/s, then a burst of 50 every 10 s, with a report to look at:
    python -m loadtest --rate-profile 0:1,30:20,60:20 --burst 50:10 --html run.html
  ten minutes of a recorded day in one, with its prefixes, at a tenth of its prompt lengths:
    python -m loadtest --trace trace.jsonl.gz --trace-speed 10 --trace-scale 0.1 --duration-s 60
  conversations of 3 to 8 turns, 5 s to think on average:
    python -m loadtest --concurrency 64 --turns 3:8 --think-s 5 --duration-s 300
  further commands, each with its own --help:
    python -m loadtest search | interference | compare

exit code: 0 done; 1 every request failed; 2 bad argument; 3 server or model unusable; 130 interrupted
"""


def parse_arguments(argv: Sequence[str] | None = None) -> Settings:
    """Turn the words of a single run into settings.

    Raises: SystemExit(2) after printing what is wrong and what to give instead; SystemExit(0) for ``--help``
    and ``--version``.
    """
    parser = make_parser("python -m loadtest", "Measure an OpenAI-compatible server under load.", _EPILOG)
    add_server(parser.add_argument_group("server"))
    add_load(parser.add_argument_group("load"))
    add_requests(parser.add_argument_group("requests"))
    add_report(parser.add_argument_group("targets and report"))
    return settings_from(parser, vars(parser.parse_args(argv)))


def settings_from(parser: argparse.ArgumentParser, fields: dict[str, Any]) -> Settings:
    """Make settings of parsed options. Raises: SystemExit(2)."""
    if fields["api_key"] is None:
        fields["api_key"] = api_key_from_environment()
    if fields.get("num_requests") is None and fields.get("duration_s") is None and fields.get("trace") is None:
        profile = fields.get("profile")
        fields |= {"num_requests": DEFAULT_NUM_REQUESTS} if profile is None else {"duration_s": profile.end_s}
    fields["headers"] = dict(fields["headers"])
    try:
        return Settings(**fields)
    except BadArgument as error:
        parser.error(str(error))


def make_parser(prog: str, description: str, epilog: str) -> argparse.ArgumentParser:
    """Return an empty parser in this command's style."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"loadtest {__version__}")
    return parser


def add_server(group: Any, *, url: bool = True) -> None:
    """Which server, and how to speak to it."""
    if url:
        group.add_argument(
            "--url",
            default="http://127.0.0.1:8000/v1",
            help="address up to, not including, /chat/completions (default %(default)s)",
        )
    group.add_argument("--model", help="model name (default: the only one that /models lists)")
    group.add_argument("--api-key", help="bearer token (default: the variable OPENAI_API_KEY)")
    group.add_argument(
        "--header",
        dest="headers",
        action="append",
        default=[],
        type=_header,
        metavar="'NAME: VALUE'",
        help="extra header of every request; may be given several times",
    )
    group.add_argument("--endpoint", type=Endpoint, choices=list(Endpoint), default=Endpoint.CHAT)
    group.add_argument(
        "--timeout-s", type=float, default=300.0, help="limit for one whole request (default %(default)s)"
    )


def add_load(group: Any) -> None:
    """When requests are sent, and how many."""
    group.add_argument("--rate", type=float, help="open loop: mean arrivals per second")
    group.add_argument(
        "--concurrency", type=int, help="closed loop: number of users; with --rate: most requests in flight"
    )
    group.add_argument(
        "--burstiness",
        type=float,
        default=1.0,
        help="gamma shape of the gaps: 1 Poisson, <1 bursts, >1 more even, inf exact (default %(default)s)",
    )
    group.add_argument(
        "--rate-profile",
        dest="profile",
        type=_reader(parse_profile),
        metavar="T:R,...",
        help="open loop whose rate runs in straight lines through these points (seconds:requests per second)",
    )
    group.add_argument(
        "--burst", type=_reader(parse_burst), metavar="N:EVERY_S", help="N further arrivals at once every so often"
    )
    group.add_argument("--trace", metavar="FILE", help="replay a request trace (Azure CSV or Mooncake JSONL, or .gz)")
    group.add_argument("--trace-speed", type=float, default=1.0, help="2 replays it twice as fast")
    group.add_argument("--trace-scale", type=float, default=1.0, help="factor on the trace's token counts")
    amount = group.add_mutually_exclusive_group()
    amount.add_argument("--num-requests", type=int, help=f"stop after this many (default {DEFAULT_NUM_REQUESTS})")
    amount.add_argument("--duration-s", type=float, help="send for this long; requests in flight are then finished")
    group.add_argument("--warmup", type=int, default=0, help="requests sent first and not measured")
    group.add_argument("--seed", type=int, default=0, help="arrivals, lengths and prompts follow from it")
    group.add_argument("--processes", type=int, default=1, help="client processes that share the load")


def add_requests(group: Any) -> None:
    """What is sent."""
    spec = "128, 64:512, normal:MEAN:STD[:MIN:MAX] or lognormal:MEDIAN:SIGMA[:MIN:MAX]"
    group.add_argument(
        "--prompt-len",
        "--prompt-len-range",
        type=lengths_of("--prompt-len"),
        default="128",
        metavar="TOKENS",
        help=f"prompt tokens, chat template included: {spec} (default 128)",
    )
    group.add_argument(
        "--output-len",
        "--output-len-range",
        type=lengths_of("--output-len"),
        default="64",
        metavar="TOKENS",
        help="max_tokens of each request, same forms (default 64)",
    )
    group.add_argument(
        "--prompt-form",
        type=PromptForm,
        choices=list(PromptForm),
        default=PromptForm.TEXT,
        help="tokens: send arrays of token ids (completions only; needs the server's /tokenize)",
    )
    group.add_argument(
        "--shared-prefix-len", type=int, default=0, help="tokens at the start of each prompt that repeat"
    )
    group.add_argument("--num-prefixes", type=int, default=1, help="how many such prefixes; each request draws one")
    group.add_argument(
        "--turns",
        type=lengths_of("--turns"),
        default="1",
        help="requests of one conversation, each with all that went before in its prompt (default 1)",
    )
    group.add_argument("--think-s", type=float, default=0.0, help="mean pause between turns, exponential")
    group.add_argument("--temperature", type=float, default=0.0, help="default %(default)s")
    group.add_argument(
        "--ignore-eos",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="make outputs run to their full length (default: where the server accepts the field)",
    )
    group.add_argument("--extra-body", type=_json_object, default={}, metavar="JSON", help="fields added to every body")


def add_report(group: Any) -> None:
    """Targets, and where results go."""
    group.add_argument("--ttft-ms", type=float, help="goodput target: time to first token")
    group.add_argument("--itl-ms", type=float, help="goodput target: inter-token latency")
    group.add_argument(
        "--itl-rule",
        type=ItlRule,
        choices=list(ItlRule),
        default=ItlRule.MEAN,
        help="which figure of a request meets --itl-ms: its mean (TPOT) or a percentile of its gaps",
    )
    group.add_argument("--json", dest="json_path", metavar="FILE", help="write everything measured to FILE")
    group.add_argument("--csv", dest="csv_path", metavar="FILE", help="write a line per request to FILE")
    group.add_argument("--html", dest="html_path", metavar="FILE", help="write a report with plots to FILE")
    group.add_argument(
        "--server-metrics",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="read the server's /metrics once a second, for the report (default: yes)",
    )
    group.add_argument(
        "--chunk-times",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep each chunk's time in the JSON (default: yes)",
    )
    group.add_argument(
        "--progress", action=argparse.BooleanOptionalAction, default=True, help="live line (default: yes)"
    )


def lengths_of(option: str) -> Callable[[str], Lengths]:
    """Return a reader of token counts for argparse."""

    def parse(text: str) -> Lengths:
        try:
            return parse_lengths(option, text)
        except BadArgument as error:
            # argparse names the option itself.
            raise argparse.ArgumentTypeError(str(error).removeprefix(f"{option}: ")) from error

    return parse


def _reader(parse: Callable[[str], T]) -> Callable[[str], T]:
    def read(text: str) -> T:
        try:
            return parse(text)
        except BadArgument as error:
            raise argparse.ArgumentTypeError(str(error).partition(": ")[2]) from error

    return read


def _header(text: str) -> tuple[str, str]:
    name, colon, value = text.partition(":")
    if not colon or not name.strip():
        raise argparse.ArgumentTypeError(f"cannot read {text!r}; give 'Name: value'")
    return name.strip(), value.strip()


def _json_object(text: str) -> dict[str, Any]:
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeError) as error:
        raise argparse.ArgumentTypeError(f"not a JSON object: {error}") from error
