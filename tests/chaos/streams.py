"""What clients got for what they asked, and how far that is from what an undisturbed fleet says."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from itertools import pairwise
from typing import Any

import httpx
from support.fleet import DEMO
from tokenizers import Tokenizer

from chaos.asks import Ask

LOGPROB_TOLERANCE = 1e-3
TIMEOUT_S = 90.0


@dataclass
class Answer:
    """What a client got: by choice its text and end, all log-probabilities, usage; when, and what went wrong.

    A call's name and arguments are part of the text.
    """

    texts: dict[int, str] = field(default_factory=dict)
    finishes: dict[int, str] = field(default_factory=dict)
    logprobs: list[float] = field(default_factory=list)
    usage: tuple[int, int] | None = None
    times_s: list[float] = field(default_factory=list)
    error: str | None = None

    def longest_gap_s(self, since_s: float) -> float:
        """The longest wait for a next chunk that ended after this moment."""
        return max((later - earlier for earlier, later in pairwise(self.times_s) if later >= since_s), default=0.0)


async def ask(client: httpx.AsyncClient, url: str, asked: Ask, *, seen: Callable[[], object] = lambda: None) -> Answer:
    """Send it and read the whole answer; `seen` is called at each chunk. Failures are told in the answer."""
    answer = Answer()
    try:
        async with client.stream("POST", url + asked.path, json=asked.body, timeout=TIMEOUT_S) as response:
            if response.status_code != 200:
                answer.error = f"{response.status_code}: {(await response.aread()).decode()[:300]}"
            elif asked.streamed:
                async for event in _events(response):
                    _take(answer, event)
                    answer.times_s.append(time.monotonic())
                    seen()
            else:
                _take(answer, json.loads(await response.aread()))
                seen()
    except httpx.HTTPError as error:
        answer.error = f"{type(error).__name__}: {error}"
    if answer.error is None and not answer.finishes:
        answer.error = "the stream ended without a finish reason"
    return answer


async def _events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    async for line in response.aiter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))


def _take(answer: Answer, body: dict[str, Any]) -> None:
    """Add a whole answer, one chunk of it, or one event of the Responses API."""
    if body.get("error"):
        answer.error = str(body["error"])
    elif "type" in body:
        _take_event(answer, body)
    else:
        _take_choices(answer, body)


def _take_event(answer: Answer, event: dict[str, Any]) -> None:
    match event["type"]:
        case "response.output_text.delta":
            answer.texts[0] = answer.texts.get(0, "") + event["delta"]
        case "response.completed" | "response.incomplete" as kind:
            usage = event["response"]["usage"]
            answer.finishes[0] = kind.removeprefix("response.")
            answer.usage = (usage["input_tokens"], usage["output_tokens"])
        case "response.failed":
            answer.error = str(event["response"]["error"])
        case "error":
            answer.error = str(event)


def _take_choices(answer: Answer, body: dict[str, Any]) -> None:
    for choice in body["choices"]:
        index = choice["index"]
        message = choice.get("delta") or choice.get("message") or {}
        functions = [call["function"] for call in message.get("tool_calls") or []]
        called = "".join((function.get("name") or "") + (function.get("arguments") or "") for function in functions)
        text = choice.get("text") or message.get("content") or ""
        answer.texts[index] = answer.texts.get(index, "") + text + called
        if choice.get("finish_reason"):
            answer.finishes[index] = choice["finish_reason"]
        logprobs = choice.get("logprobs") or {}
        answer.logprobs += logprobs.get("token_logprobs") or [one["logprob"] for one in logprobs.get("content") or []]
    if usage := body.get("usage"):
        answer.usage = (usage["prompt_tokens"], usage["completion_tokens"])


class Judge:
    """Compares answers with those of the undisturbed fleet, in tokens of the demo model."""

    def __init__(self, expected: dict[int, Answer]) -> None:
        self.expected = expected
        self._tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))

    def differences(self, asked: Ask, answer: Answer) -> tuple[int, int]:
        """How many tokens are lost, and how many too many (repeated or wrong). A difference of anything is not (0, 0).

        Usage, finish reasons and log-probabilities count: what differs there alone counts as one token too many.
        """
        expected = self.expected[asked.number]
        lost = repeated = 0
        for index, text in expected.texts.items():
            got = answer.texts.get(index, "")
            if got != text:
                less, more = self._token_differences(text, got)
                lost, repeated = lost + less, repeated + more
        equal = (
            answer.finishes == expected.finishes
            and answer.usage == expected.usage
            and len(answer.logprobs) == len(expected.logprobs)
            and all(abs(a - b) < LOGPROB_TOLERANCE for a, b in zip(answer.logprobs, expected.logprobs, strict=True))
        )
        return (lost, repeated) if equal or lost or repeated else (0, 1)

    def _token_differences(self, expected: str, got: str) -> tuple[int, int]:
        before, after = self._tokenizer.encode(expected).ids, self._tokenizer.encode(got).ids
        lost = repeated = 0
        for kind, a, b, c, d in SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
            if kind != "equal":
                lost, repeated = lost + b - a, repeated + d - c
        return (lost, repeated) if lost or repeated else (1, 0)
