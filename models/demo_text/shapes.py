"""The two shapes of text that the generator makes, and a question with a known answer."""

from dataclasses import dataclass, field
from typing import Any, Final, Literal

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True)
class Message:
    """One turn of a chat. ``tool_calls`` is the list that an OpenAI assistant message carries, if any."""

    role: Role
    content: str
    tool_calls: tuple[dict[str, Any], ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return the message as a chat template expects it."""
        plain: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.tool_calls:
            plain["tool_calls"] = list(self.tool_calls)
        return plain


@dataclass(frozen=True)
class Chat:
    """A conversation; the training loss counts its assistant turns in full."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Plain:
    """A running text without roles, for prompts of the completions endpoint."""

    text: str


Sample = Chat | Plain


@dataclass(frozen=True)
class Question:
    """A question, its answer and what a correct answer must contain (compared without regard to case).

    ``ask`` is empty where the history ends with what is to be answered: results of tools.
    """

    category: str
    ask: str
    answer: str
    keys: tuple[str, ...]
    history: tuple[Message, ...] = field(default=())
    tools: tuple[dict[str, Any], ...] = field(default=())

    def messages(self) -> tuple[Message, ...]:
        """Return the turns up to and including the question."""
        return (*self.history, Message("user", self.ask)) if self.ask else self.history

    def accepts(self, reply: str) -> bool:
        """Say whether ``reply`` holds every required phrase."""
        folded = reply.casefold()
        return all(key.casefold() in folded for key in self.keys)


END_OF_TEXT: Final = "<|endoftext|>"
TURN_START: Final = "<|im_start|>"
TURN_END: Final = "<|im_end|>"
