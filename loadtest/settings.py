"""What a run was asked to do: frozen, checked once, written into the JSON report."""

import math
import os
from enum import StrEnum
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec

from loadtest.arrivals import Burst, RateProfile
from loadtest.errors import BadArgument
from loadtest.lengths import Lengths

DEFAULT_NUM_REQUESTS = 100


class Endpoint(StrEnum):
    """Which interface carries the prompt."""

    CHAT = "chat"
    COMPLETIONS = "completions"


class PromptForm(StrEnum):
    """Whether a prompt travels as text or as an array of token ids."""

    TEXT = "text"
    TOKENS = "tokens"


class ItlRule(StrEnum):
    """Which figure of a request is held against the ITL target.

    ``MEAN`` is its TPOT, the usual definition; the others take that percentile of its gaps between
    chunks, so one long pause makes the request fail.
    """

    MEAN = "mean"
    P95 = "p95"
    P99 = "p99"
    MAX = "max"


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """All options of a run.

    ``rate``, ``profile``, ``burst`` or ``trace`` mean an open loop (``concurrency``, if set, caps it); else a
    closed loop of ``concurrency`` users. At most one of ``num_requests`` and ``duration_s`` is set, and exactly
    one unless a trace, which ends by itself, is replayed. ``ignore_eos`` is ``None`` for "where the server
    accepts it".
    Raises: BadArgument from the constructor, naming the option and what to give.
    """

    url: str
    rate: float | None = None
    concurrency: int | None = None
    burstiness: float = 1.0
    profile: RateProfile | None = None
    burst: Burst | None = None
    trace: str | None = None
    trace_speed: float = 1.0
    trace_scale: float = 1.0
    turns: Lengths = Lengths("fixed", 1, 1)
    think_s: float = 0.0
    num_requests: int | None = None
    duration_s: float | None = None
    prompt_len: Lengths = Lengths("fixed", 128, 128)
    output_len: Lengths = Lengths("fixed", 64, 64)
    prompt_form: PromptForm = PromptForm.TEXT
    shared_prefix_len: int = 0
    num_prefixes: int = 1
    model: str | None = None
    api_key: str | None = None
    headers: dict[str, str] = msgspec.field(default_factory=dict)
    extra_body: dict[str, Any] = msgspec.field(default_factory=dict)
    endpoint: Endpoint = Endpoint.CHAT
    temperature: float = 0.0
    ignore_eos: bool | None = None
    seed: int = 0
    warmup: int = 0
    timeout_s: float = 300.0
    ttft_ms: float | None = None
    itl_ms: float | None = None
    itl_rule: ItlRule = ItlRule.MEAN
    processes: int = 1
    server_metrics: bool = True
    json_path: str | None = None
    csv_path: str | None = None
    html_path: str | None = None
    chunk_times: bool = True
    progress: bool = True

    def __post_init__(self) -> None:
        self._check_url()
        self._check_load()
        self._check_prompts()
        if self.temperature < 0:
            raise BadArgument("--temperature", f"{self.temperature} is negative; give 0 or more")
        if self.seed < 0:
            raise BadArgument("--seed", f"{self.seed} is negative; give 0 or more")
        for option, path in (("--json", self.json_path), ("--csv", self.csv_path), ("--html", self.html_path)):
            if path is not None and not Path(path).absolute().parent.is_dir():
                raise BadArgument(option, f"the folder of {path!r} does not exist; make it first")

    def _check_url(self) -> None:
        try:
            parts = urlsplit(self.url)
            port = parts.port
        except ValueError as error:
            raise BadArgument("--url", f"cannot read {self.url!r}: {error}") from error
        if parts.scheme not in {"http", "https"} or not parts.hostname or port == 0:
            raise BadArgument("--url", f"{self.url!r} is not an HTTP address; give one like http://127.0.0.1:8000/v1")
        if parts.username is not None:
            raise BadArgument("--url", "holds a user name; put credentials into --api-key or --header")
        for name, value in self.headers.items():
            if not (f"{name}{value}".isprintable() and f"{name}{value}".isascii() and name):
                raise BadArgument("--header", f"{name!r} holds a character that no HTTP header may hold")
        if self.api_key is not None and not (self.api_key.isprintable() and self.api_key.isascii()):
            raise BadArgument("--api-key", "holds a character that no HTTP header may hold")

    def _check_load(self) -> None:
        clocks = {
            "--rate": self.rate is not None,
            "--rate-profile": self.profile is not None,
            "--trace": self.trace is not None,
        }
        given = [option for option, is_given in clocks.items() if is_given]
        if len(given) > 1:
            raise BadArgument(given[1], f"excludes {given[0]}: each says when requests are sent")
        if not self.open_loop and self.concurrency is None:
            raise BadArgument("--rate", "give --rate R for an open loop or --concurrency C for a closed one (or both)")
        if self.trace is not None and self.burst is not None:
            raise BadArgument("--burst", "excludes --trace, which brings bursts of its own")
        positive: list[tuple[str, float | None]] = [
            ("--rate", self.rate),
            ("--concurrency", self.concurrency),
            ("--num-requests", self.num_requests),
            ("--duration-s", self.duration_s),
            ("--timeout-s", self.timeout_s),
            ("--ttft-ms", self.ttft_ms),
            ("--itl-ms", self.itl_ms),
            ("--num-prefixes", self.num_prefixes),
            ("--trace-speed", self.trace_speed),
            ("--trace-scale", self.trace_scale),
            ("--processes", self.processes),
        ]
        for option, value in positive:
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise BadArgument(option, f"{value} cannot be used; give a number above 0")
        if not self.burstiness > 0:
            raise BadArgument("--burstiness", f"{self.burstiness} cannot be used; give a number above 0")
        if self.rate is None and self.profile is None and self.burstiness != 1.0:
            raise BadArgument("--burstiness", "shapes the arrivals of a rate, and there is none; add --rate")
        if self.num_requests is not None and self.duration_s is not None:
            raise BadArgument("--duration-s", "excludes --num-requests; give one of the two")
        if self.num_requests is None and self.duration_s is None and self.trace is None:
            raise BadArgument("--num-requests", "give it or --duration-s")
        if self.warmup < 0:
            raise BadArgument("--warmup", f"{self.warmup} is negative; give 0 or more requests")

    def _check_prompts(self) -> None:
        if self.shared_prefix_len < 0:
            raise BadArgument("--shared-prefix-len", "is negative; give 0 or more tokens")
        if self.shared_prefix_len >= self.prompt_len.low and self.shared_prefix_len > 0:
            raise BadArgument(
                "--shared-prefix-len",
                f"{self.shared_prefix_len} leaves nothing unique in prompts of {self.prompt_len.low} tokens; "
                "the prompt length includes the prefix, so make --prompt-len larger",
            )
        if self.num_prefixes > 1 and self.shared_prefix_len == 0:
            raise BadArgument("--num-prefixes", "needs --shared-prefix-len")
        if self.think_s < 0:
            raise BadArgument("--think-s", f"{self.think_s} is negative; give seconds")
        if self.turns.high > 1 and self.endpoint is not Endpoint.CHAT:
            raise BadArgument("--turns", "conversations need --endpoint chat")
        if self.trace is not None and self.turns.high > 1:
            raise BadArgument("--turns", "excludes --trace, whose prompts hold their own history")
        if self.trace is not None and not Path(self.trace).is_file():
            raise BadArgument("--trace", f"{self.trace!r} is no file")
        if self.prompt_form is PromptForm.TOKENS and self.endpoint is not Endpoint.COMPLETIONS:
            raise BadArgument("--prompt-form", "token arrays need --endpoint completions")

    @property
    def open_loop(self) -> bool:
        """Whether arrivals follow a clock rather than the answers."""
        return not (self.rate is None and self.profile is None and self.burst is None and self.trace is None)

    @property
    def load(self) -> str:
        """The load in a few words, for headings."""
        if self.trace is not None:
            words = f"replay of {Path(self.trace).name} at {self.trace_speed:g} times its speed"
        elif self.profile is not None:
            words = f"open loop, rate profile {self.profile}"
        elif self.rate is not None:
            words = f"open loop, {self.rate:g} req/s"
        else:
            words = "open loop" if self.burst is not None else "closed loop"
        if self.burst is not None:
            words += f", {self.burst.size} more at once every {self.burst.every_s:g} s"
        if self.concurrency is not None:
            words += f", at most {self.concurrency} in flight" if self.open_loop else f" of {self.concurrency} users"
        return words

    def public(self) -> dict[str, Any]:
        """Return the settings for a report: without the key, with the names only of the extra headers."""
        fields: dict[str, Any] = msgspec.to_builtins(self)
        fields["api_key_set"] = fields.pop("api_key") is not None
        fields["headers"] = sorted(self.headers)
        # JSON has no infinity.
        fields["burstiness"] = self.burstiness if math.isfinite(self.burstiness) else "inf"
        return fields


def api_key_from_environment() -> str | None:
    """Return ``OPENAI_API_KEY``, which every OpenAI client reads, or None if it is unset or empty."""
    return os.environ.get("OPENAI_API_KEY") or None
