"""Items to the messages of a chat, and which items to drop when they do not all fit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from gateway.api.requests import (
    AssistantMessage,
    CalledFunction,
    ChatMessage,
    DeveloperMessage,
    SystemMessage,
    TextPart,
    ToolCall,
    ToolMessage,
    UserMessage,
)
from gateway.api.responses_api.items import (
    FunctionCallItem,
    FunctionOutputItem,
    InputText,
    Item,
    MessageItem,
    OutputText,
    ReasoningItem,
    Refusal,
)
from gateway.errors import InvalidRequest


def messages_of(instructions: str | None, items: Iterable[Item]) -> list[ChatMessage]:
    """The chat that the model reads.

    What the model did in one turn (reasoning, text, calls) is one assistant message. Raises: InvalidRequest for the
    output of a call that nobody made.
    """
    messages: list[ChatMessage] = [] if instructions is None else [SystemMessage(content=instructions)]
    turn: AssistantMessage | None = None
    called: set[str] = set()
    for item in items:
        if isinstance(item, FunctionOutputItem):
            if item.call_id not in called:
                raise InvalidRequest(
                    f"No tool call found for function call output with call_id {item.call_id[:100]!r}.",
                    param="input",
                    code="invalid_value",
                )
            turn = None
            messages.append(ToolMessage(content=_text(item.output), tool_call_id=item.call_id))
        elif isinstance(item, MessageItem) and item.role != "assistant":
            turn = None
            messages.append(_message(item))
        else:
            if turn is None or _begins_turn(item, turn):
                turn = AssistantMessage()
                messages.append(turn)
            _extend(turn, item)
            if isinstance(item, FunctionCallItem):
                called.add(item.call_id)
    for message in messages:
        if isinstance(message, AssistantMessage) and message.content is None and not message.tool_calls:
            message.content = ""  # reasoning alone
    return messages


def droppable(items: Sequence[Item]) -> list[int]:
    """Where a conversation may begin instead, oldest first: places after which nothing refers to what was dropped."""
    places: list[int] = []
    for place in range(1, len(items)):
        item = items[place]
        if isinstance(item, MessageItem) and item.role != "assistant":
            places.append(place)
    return places


def _begins_turn(item: Item, turn: AssistantMessage) -> bool:
    if isinstance(item, ReasoningItem):
        return turn.content is not None or bool(turn.tool_calls)
    return isinstance(item, MessageItem) and (turn.content is not None or bool(turn.tool_calls))


def _extend(turn: AssistantMessage, item: Item) -> None:
    if isinstance(item, ReasoningItem):
        thoughts = "".join(part.text for part in item.content or item.summary)
        turn.reasoning_content = (turn.reasoning_content or "") + thoughts
    elif isinstance(item, FunctionCallItem):
        call = ToolCall(id=item.call_id, function=CalledFunction(name=item.name, arguments=item.arguments))
        turn.tool_calls = [*(turn.tool_calls or []), call]
    elif isinstance(item, MessageItem):
        turn.content = _text(item.content)


def _message(item: MessageItem) -> ChatMessage:
    content: str | list[TextPart] = (
        item.content if isinstance(item.content, str) else [TextPart(text=_of(part)) for part in item.content]
    )
    if isinstance(content, list) and not content:
        content = ""
    if item.role == "user":
        return UserMessage(content=content)
    return SystemMessage(content=content) if item.role == "system" else DeveloperMessage(content=content)


def _text(content: str | Sequence[InputText | OutputText | Refusal]) -> str:
    return content if isinstance(content, str) else "".join(map(_of, content))


def _of(part: InputText | OutputText | Refusal) -> str:
    return part.refusal if isinstance(part, Refusal) else part.text
