"""What clients ask for, in many kinds; what they got, and how far that is from what an undisturbed fleet says."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from difflib import SequenceMatcher
from itertools import pairwise
from typing import Any

import httpx
from support.fleet import DEMO
from tokenizers import Tokenizer

LOGPROB_TOLERANCE = 1e-3
TIMEOUT_S = 90.0
_FREE = {"model": "demo", "temperature": 1.0, "ignore_eos": True}
_WAYS: list[dict[str, Any]] = [
    {"stream": True},
    {"stream": True, "logprobs": 3},
    {"stream": True, "frequency_penalty": 0.7, "presence_penalty": 0.4},
    {"stream": True, "top_p": 0.9, "repetition_penalty": 1.2, "top_k": 50},
    {"stream": True, "stops": True},
    {"stream": True, "chat": True},
    {"n": 2},
    {"chat": True, "logprobs": True, "top_logprobs": 2},
]


@dataclass(frozen=True)
class Ask:
    """One request of a client. `stops` asks for a stop string, which is cut out of the undisturbed text."""

    number: int
    path: str
    body: dict[str, Any]
    stops: bool = False

    @property
    def streamed(self) -> bool:
        """Whether tokens are seen one by one."""
        return bool(self.body.get("stream"))

    def stopping_in(self, text: str) -> Ask:
        """The same, ended by a string that the undisturbed text has at about two thirds."""
        begin = len(text) * 2 // 3
        return replace(self, body={**self.body, "stop": [text[begin : begin + 6]]}, stops=False)


@dataclass
class Answer:
    """What a client got: by choice its text and end, all log-probabilities, usage; when, and what went wrong."""

    texts: dict[int, str] = field(default_factory=dict)
    finishes: dict[int, str] = field(default_factory=dict)
    logprobs: list[float] = field(default_factory=list)
    usage: tuple[int, int] | None = None
    times_s: list[float] = field(default_factory=list)
    error: str | None = None

    def longest_gap_s(self, since_s: float) -> float:
        """The longest wait for a next chunk that ended after this moment."""
        return max((later - earlier for earlier, later in pairwise(self.times_s) if later >= since_s), default=0.0)


def asks(count: int, *, seed: int, max_tokens: int) -> list[Ask]:
    """So many requests, of all kinds in turn, with prompts of several lengths."""
    made = []
    for number in range(count):
        way = dict(_WAYS[number % len(_WAYS)])
        chat, stops = way.pop("chat", False), way.pop("stops", False)
        prompt = f"Tell me of page number {number} of book {seed}. " * (1 + 6 * (number % 4))
        body = {**_FREE, **way, "max_tokens": max_tokens, "seed": seed * 1000 + number}
        if way.get("stream"):
            body["stream_options"] = {"include_usage": True}
        if chat:
            made.append(Ask(number, "/v1/chat/completions", body | {"messages": [{"role": "user", "content": prompt}]}))
        else:
            made.append(Ask(number, "/v1/completions", body | {"prompt": prompt}, stops))
    return made


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
    """Add a whole answer or one chunk of it."""
    if "error" in body:
        answer.error = str(body["error"])
        return
    for choice in body["choices"]:
        index = choice["index"]
        message = choice.get("delta") or choice.get("message") or {}
        answer.texts[index] = answer.texts.get(index, "") + (choice.get("text") or message.get("content") or "")
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
