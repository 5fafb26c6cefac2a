"""Which Offers a taker may grant, whatever room it has; and what it remembers for that of cancels and epochs."""

from __future__ import annotations

from fleet.hand_off_messages import Commit, Offer, Refuse, RefuseReason
from fleet.types import Fingerprint, PeerRef
from kvtransfer.errors import LayoutMismatch
from kvtransfer.layout import require_equal
from kvtransfer.limits import HandOffLimits
from kvtransfer.remembered import Remembered
from kvtransfer.transport import Transports


class Admission:
    """Refuses Offers by layout, drain, Cancel, epoch and transport, in this order."""

    def __init__(self, peer: PeerRef, fingerprint: Fingerprint, transports: Transports, limits: HandOffLimits) -> None:
        self._peer = peer
        self._fingerprint = fingerprint
        self._transports = transports
        self._limits = limits
        memory_s, max_entries = limits.memory_s, limits.memory_entries
        self._cancelled: Remembered[str, int] = Remembered(memory_s=memory_s, max_entries=max_entries)
        self._newest: Remembered[str, int] = Remembered(memory_s=memory_s, max_entries=max_entries)
        self._draining = False

    def refusal(self, offer: Offer, now_s: float) -> Refuse | None:
        """Why the Offer cannot be taken; None if it can, and then its epoch is remembered as seen."""
        request_id, epoch = offer.passport.request_id, offer.passport.epoch
        try:
            require_equal(expected=self._fingerprint, got=offer.fingerprint)
        except LayoutMismatch as error:
            return self.refuse(offer, RefuseReason.LAYOUT, str(error))
        if max(1, len(offer.page_hashes)) > offer.num_pages:
            message = f"{len(offer.page_hashes)} full pages are named, but only {offer.num_pages} pages offered"
            return self.refuse(offer, RefuseReason.LAYOUT, message)
        if self._draining:
            return self.refuse(offer, RefuseReason.DRAINING, "takes nothing new")
        if self.is_cancelled(request_id, epoch, now_s):
            return self.refuse(offer, RefuseReason.CANCELLED, "was cancelled")
        newest = self._newest.get(request_id, now_s)
        if newest is not None and epoch < newest:
            return self.refuse(offer, RefuseReason.STALE, f"offered is epoch {epoch}, epoch {newest} was here")
        if self.transport_for(offer) is None:
            message = f"offered {offer.transports} from {offer.host}, takes {tuple(self._transports)}"
            return self.refuse(offer, RefuseReason.TRANSPORT, message)
        self._newest.put(request_id, epoch, now_s)
        return None

    def refuse(self, message: Offer | Commit, reason: RefuseReason, why: str) -> Refuse:
        """The answer that says no."""
        return Refuse(
            request_id=message.passport.request_id,
            epoch=message.passport.epoch,
            offer=message.offer if isinstance(message, Offer) else 0,
            generation=message.generation if isinstance(message, Commit) else 0,
            reason=reason,
            message=why,
            taker=self._peer,
            retry_after_ms=self._limits.full_retry_ms if reason is RefuseReason.FULL else 0,
        )

    def transport_for(self, offer: Offer) -> str | None:
        """The first offered transport that works here."""
        for name in offer.transports:
            transport = self._transports.get(name)
            if transport is not None and transport.can_take(offer):
                return name
        return None

    def cancel(self, request_id: str, epoch: int, now_s: float) -> None:
        """Remember a Cancel up to and including `epoch`."""
        self._cancelled.put(request_id, max(epoch, self._cancelled.get(request_id, now_s) or 0), now_s)

    def is_cancelled(self, request_id: str, epoch: int, now_s: float) -> bool:
        """Whether a Cancel of this epoch or a later one is remembered."""
        cancelled = self._cancelled.get(request_id, now_s)
        return cancelled is not None and epoch <= cancelled

    def drain(self) -> None:
        """Refuse every Offer from now on."""
        self._draining = True
