"""Which live requests matter to which worker, for what befalls workers."""

from __future__ import annotations

from collections import defaultdict

from fleet.types import PeerRef
from gateway.live import LiveRequest


class HolderIndex:
    """`LiveRequest.holders` the other way round; whoever changes them calls `follow`."""

    def __init__(self) -> None:
        self._of_peer: defaultdict[PeerRef, dict[str, LiveRequest]] = defaultdict(dict)
        self._known: dict[str, tuple[PeerRef, ...]] = {}

    def of(self, peer: PeerRef) -> list[LiveRequest]:
        """The requests that this life of a worker matters to."""
        return list(self._of_peer[peer].values()) if peer in self._of_peer else []

    def follow(self, live: LiveRequest) -> None:
        """Take over the holders as they are now."""
        before, now = self._known.get(live.request_id, ()), tuple(live.holders)
        if before == now:
            return
        for peer in before:
            requests = self._of_peer[peer]
            requests.pop(live.request_id, None)
            if not requests:
                del self._of_peer[peer]
        for peer in now:
            self._of_peer[peer][live.request_id] = live
        if now:
            self._known[live.request_id] = now
        else:
            del self._known[live.request_id]
