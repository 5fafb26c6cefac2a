"""A bus that only remembers what was sent."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fleet.messages import Message
from fleet.wire import Frame


class FakeBus:
    """Stands in for `fleet.bus.Bus` where a test plays all the others."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, Message]] = []
        self.forgotten: list[str] = []
        self.lost_callbacks: list[Callable[[str], None]] = []

    def send(self, address: str, message: Message, payload: Sequence[Frame] = ()) -> bool:  # noqa: ARG002
        self.sent.append((address, message))
        return True

    def forget(self, address: str) -> None:
        self.forgotten.append(address)

    def on_peer_lost(self, callback: Callable[[str], None]) -> None:
        self.lost_callbacks.append(callback)

    def take(self, kind: type) -> list[tuple[str, Message]]:
        """What was sent of this kind, forgetting it."""
        taken = [item for item in self.sent if isinstance(item[1], kind)]
        self.sent = [item for item in self.sent if not isinstance(item[1], kind)]
        return taken
