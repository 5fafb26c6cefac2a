"""Items of a conversation, as clients send them and as answers carry them, so that an answer can be sent back."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from gateway.api.decoding import convert_field
from gateway.errors import InvalidRequest


class _Item(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Base of items and their parts. Fields of type None exist in published objects and mean nothing here."""


class InputText(_Item, tag="input_text"):
    """A piece of text for the model."""

    text: str


class OutputText(_Item, tag="output_text"):
    """A piece of text of the model. `parsed` is what the SDK's `.parse` adds to an answer."""

    text: str
    annotations: list[Any] = msgspec.field(default_factory=list)
    logprobs: list[Any] | None = None
    parsed: Any = None


class Refusal(_Item, tag="refusal"):
    """A refusal of an earlier answer."""

    refusal: str


class SummaryText(_Item, tag="summary_text"):
    """A piece of a summary of reasoning."""

    text: str


class ReasoningText(_Item, tag="reasoning_text"):
    """A piece of reasoning."""

    text: str


ItemStatus = Literal["in_progress", "completed", "incomplete"]
Role = Literal["user", "assistant", "system", "developer"]


class MessageItem(_Item, tag="message"):
    """What somebody said; `type` may be left out."""

    role: Role
    content: str | list[InputText | OutputText | Refusal]
    id: str | None = None
    status: ItemStatus | None = None
    phase: str | None = None


class FunctionCallItem(_Item, tag="function_call"):
    """A call that an earlier answer made. `arguments` is JSON text."""

    call_id: str
    name: str
    arguments: str
    id: str | None = None
    status: ItemStatus | None = None
    caller: None = None
    namespace: None = None
    parsed_arguments: Any = None


class FunctionOutputItem(_Item, tag="function_call_output"):
    """What a call returned."""

    call_id: str
    output: str | list[InputText]
    id: str | None = None
    status: ItemStatus | None = None
    name: str | None = None
    caller: None = None
    namespace: None = None


class ReasoningItem(_Item, tag="reasoning"):
    """What the model thought before an earlier answer."""

    summary: list[SummaryText] = msgspec.field(default_factory=list)
    content: list[ReasoningText] | None = None
    id: str | None = None
    status: ItemStatus | None = None
    encrypted_content: None = None


Item = MessageItem | FunctionCallItem | FunctionOutputItem | ReasoningItem

_KINDS: dict[str, type[Item]] = {
    "message": MessageItem,
    "function_call": FunctionCallItem,
    "function_call_output": FunctionOutputItem,
    "reasoning": ReasoningItem,
}
_PREFIXES: dict[type[Item], str] = {
    MessageItem: "msg",
    FunctionCallItem: "fc",
    FunctionOutputItem: "fco",
    ReasoningItem: "rs",
}


def read_items(value: str | Sequence[Any], *, at: str = "input") -> list[Item]:
    """The items of `input`; a string is one user message. Raises: InvalidRequest naming the item and field."""
    if isinstance(value, str):
        return [MessageItem(role="user", content=value)]
    return [_read(entry, f"{at}[{place}]") for place, entry in enumerate(value)]


def _read(entry: Any, path: str) -> Item:
    if not isinstance(entry, dict):
        raise InvalidRequest(f"Invalid value for {path!r}: expected an object.", param=path, code="invalid_value")
    kind = entry.get("type") or "message"
    to = _KINDS.get(kind) if isinstance(kind, str) else None
    if to is None:
        known = ", ".join(sorted(_KINDS))
        raise InvalidRequest(
            f"Items of type {str(kind)[:100]!r} are not supported by this server; it takes {known}.",
            param=f"{path}.type",
            code="unsupported_value",
        )
    return convert_field({**entry, "type": kind}, to, at=path)


def as_stored(item: Item) -> Item:
    """The item as `input_items` shows it: with an id, a status, and content in parts."""
    item_id = item.id or f"{_PREFIXES[type(item)]}_{uuid.uuid4().hex}"
    stored: Item = msgspec.structs.replace(item, id=item_id, status=item.status or "completed")
    if isinstance(stored, MessageItem) and isinstance(stored.content, str):
        part = OutputText(text=stored.content) if stored.role == "assistant" else InputText(text=stored.content)
        stored = msgspec.structs.replace(stored, content=[part])
    return stored


def item_json(item: Item) -> dict[str, Any]:
    """The item as `input_items` writes it. `annotations` and `logprobs` are required of output text."""
    written: dict[str, Any] = msgspec.to_builtins(item)
    if isinstance(item, MessageItem) and isinstance(item.content, list):
        for part in written["content"]:
            if part["type"] == "output_text":
                part.setdefault("annotations", [])
                part["logprobs"] = part.get("logprobs") or []
    if isinstance(item, ReasoningItem):
        written.setdefault("summary", [])
    return written
