"""The command line: options, help and their turning into :class:`~loadtest.settings.Settings`."""

import argparse
from collections.abc import Sequence
from typing import Any

import msgspec

from loadtest import __version__
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

_EPILOG = """\
examples:
  open loop, 4 requests/s arriving at random, at most 32 at a time, for a minute:
    python -m loadtest --url http://127.0.0.1:8000/v1 --rate 4 --concurrency 32 --duration-s 60
  closed loop, 16 users, each sending its next request when the last one is answered:
    python -m loadtest --concurrency 16 --num-requests 500 --prompt-len 64:512 --output-len 128
  goodput for targets, prompts sharing one of 4 system prompts, everything written down:
    python -m loadtest --rate 8 --shared-prefix-len 256 --num-prefixes 4 --prompt-len 300:600 \\
        --ttft-ms 500 --itl-ms 50 --json run.json

exit code: 0 done; 1 every request failed; 2 bad argument; 3 server or model unusable; 130 interrupted
"""


def parse_arguments(argv: Sequence[str] | None = None) -> Settings:
    """Turn command-line words into settings.

    Raises: SystemExit(2) after printing what is wrong and what to give instead; SystemExit(0) for ``--help``
    and ``--version``.
    """
    parser = _parser()
    fields = vars(parser.parse_args(argv))
    if fields["api_key"] is None:
        fields["api_key"] = api_key_from_environment()
    if fields["num_requests"] is None and fields["duration_s"] is None:
        fields["num_requests"] = DEFAULT_NUM_REQUESTS
    fields["headers"] = dict(fields["headers"])
    try:
        return Settings(**fields)
    except BadArgument as error:
        parser.error(str(error))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m loadtest",
        description="Measure an OpenAI-compatible server under load.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"loadtest {__version__}")
    _add_server(parser.add_argument_group("server"))
    _add_load(parser.add_argument_group("load"))
    _add_requests(parser.add_argument_group("requests"))
    _add_report(parser.add_argument_group("targets and report"))
    return parser


def _add_server(group: Any) -> None:
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


def _add_load(group: Any) -> None:
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
    amount = group.add_mutually_exclusive_group()
    amount.add_argument("--num-requests", type=int, help=f"stop after this many (default {DEFAULT_NUM_REQUESTS})")
    amount.add_argument("--duration-s", type=float, help="send for this long; requests in flight are then finished")
    group.add_argument("--warmup", type=int, default=0, help="requests sent first and not measured")
    group.add_argument("--seed", type=int, default=0, help="arrivals, lengths and prompts follow from it")


def _add_requests(group: Any) -> None:
    spec = "128, 64:512, normal:MEAN:STD[:MIN:MAX] or lognormal:MEDIAN:SIGMA[:MIN:MAX]"
    group.add_argument(
        "--prompt-len",
        "--prompt-len-range",
        type=_lengths("--prompt-len"),
        default="128",
        metavar="TOKENS",
        help=f"prompt tokens, chat template included: {spec} (default 128)",
    )
    group.add_argument(
        "--output-len",
        "--output-len-range",
        type=_lengths("--output-len"),
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
    group.add_argument("--temperature", type=float, default=0.0, help="default %(default)s")
    group.add_argument(
        "--ignore-eos",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="make outputs run to their full length (default: where the server accepts the field)",
    )
    group.add_argument("--extra-body", type=_json_object, default={}, metavar="JSON", help="fields added to every body")


def _add_report(group: Any) -> None:
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
    group.add_argument(
        "--chunk-times",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep each chunk's time in the JSON (default: yes)",
    )
    group.add_argument(
        "--progress", action=argparse.BooleanOptionalAction, default=True, help="live line (default: yes)"
    )


def _lengths(option: str) -> Any:
    def parse(text: str) -> Lengths:
        try:
            return parse_lengths(option, text)
        except BadArgument as error:
            # argparse names the option itself.
            raise argparse.ArgumentTypeError(str(error).removeprefix(f"{option}: ")) from error

    return parse


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
