"""What the clients ask for: requests of every kind that Baton promises to carry through a fault."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

_SCHEMA = {
    "type": "object",
    "properties": {
        "facts": {"type": "array", "minItems": 9, "maxItems": 9, "items": {"type": "string", "minLength": 12}},
        "pages": {"type": "integer"},
    },
    "required": ["facts", "pages"],
    "additionalProperties": False,
}
_TOOL = {"type": "function", "function": {"name": "note_facts", "parameters": _SCHEMA}}
_STREAM: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}

Body = dict[str, Any]


@dataclass(frozen=True)
class Ask:
    """One request of a client. `stops` asks for a stop string, which is cut out of the undisturbed text."""

    number: int
    path: str
    body: Body
    stops: bool = False

    @property
    def streamed(self) -> bool:
        """Whether tokens are seen one by one."""
        return bool(self.body.get("stream"))

    def stopping_in(self, text: str) -> Ask:
        """The same, ended by a string that the undisturbed text has at about two thirds."""
        begin = len(text) * 2 // 3
        return replace(self, body={**self.body, "stop": [text[begin : begin + 6]]}, stops=False)


@dataclass(frozen=True)
class _Kind:
    """How requests of a kind differ: fields beside those that all have, and how the prompt stands in the body."""

    path: str
    fields: Body
    prompt: Callable[[str], Body]
    limit: str = "max_tokens"
    stops: bool = False


def _completion(*, stops: bool = False, **fields: Any) -> _Kind:
    return _Kind("/v1/completions", fields, lambda prompt: {"prompt": prompt}, stops=stops)


def _chat(**fields: Any) -> _Kind:
    return _Kind("/v1/chat/completions", fields, lambda prompt: {"messages": [{"role": "user", "content": prompt}]})


def _response(**fields: Any) -> _Kind:
    return _Kind("/v1/responses", fields, lambda prompt: {"input": prompt}, limit="max_output_tokens")


_FREE: dict[str, Any] = {"ignore_eos": True}
_JSON = {"type": "json_schema", "json_schema": {"name": "facts", "schema": _SCHEMA, "strict": True}}
_KINDS = [
    _completion(**_STREAM, **_FREE),
    _chat(**_STREAM, response_format=_JSON),
    _completion(**_STREAM, **_FREE, logprobs=3),
    _chat(**_STREAM, tools=[_TOOL], tool_choice={"type": "function", "function": {"name": "note_facts"}}),
    _completion(**_STREAM, **_FREE, frequency_penalty=0.7, presence_penalty=0.4),
    _response(**_FREE, stream=True),
    _completion(**_FREE, n=2),
    _completion(**_STREAM, guided_regex="([a-z]{3,9} ){60}end"),
    _completion(**_STREAM, **_FREE, top_p=0.9, repetition_penalty=1.2, top_k=50),
    _completion(**_STREAM, **_FREE, stops=True),
    _chat(**_STREAM, **_FREE),
    _chat(**_FREE, logprobs=True, top_logprobs=2),
]


def asks(count: int, *, seed: int, max_tokens: int) -> list[Ask]:
    """So many requests, of all kinds in turn, with prompts of several lengths; temperature 1 and a seed for each."""
    made = []
    for number in range(count):
        kind = _KINDS[number % len(_KINDS)]
        prompt = f"Tell me of page number {number} of book {seed}. " * (1 + 6 * (number % 4))
        common = {"model": "demo", "temperature": 1.0, "seed": seed * 1000 + number, kind.limit: max_tokens}
        made.append(Ask(number, kind.path, {**common, **kind.fields, **kind.prompt(prompt)}, kind.stops))
    return made


def probes(count: int, *, max_tokens: int) -> list[Ask]:
    """Short requests of one kind, by which throughput is measured."""
    fields = {"model": "demo", "max_tokens": max_tokens, **_FREE}
    return [Ask(n, "/v1/completions", {**fields, "prompt": f"Probe {n}"}) for n in range(count)]
