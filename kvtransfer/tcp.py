"""Hand-offs over the bus: pages ride as payload frames beside their message, and the taker copies them.

How many pages may be under way is the giver's window, moved by PagesTaken (`HandOffLimits.window_bytes`).
"""

from __future__ import annotations

from fleet.hand_off_messages import Offer


class TcpTransport:
    """A carried transport; it works wherever the bus does."""

    name = "tcp"

    def can_take(self, offer: Offer) -> bool:  # noqa: ARG002  # the Protocol asks; here anybody may send
        """Always: whoever could send the Offer can send pages."""
        return True

    def close(self) -> None:
        """Nothing is held."""
