"""What an endpoint is made of, and the machines built from that."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from fleet.hand_off_messages import HandOffMessage
from fleet.types import Fingerprint, PeerRef
from kvtransfer.bank import NoBank, PageBank
from kvtransfer.desk import HandOffDesk
from kvtransfer.events import HandOffEvents
from kvtransfer.giver import Giver
from kvtransfer.host import ProcessWatch, ProcProcessWatch, host_identity, own_process
from kvtransfer.limits import HandOffLimits
from kvtransfer.outgoing_book import GiverConfig
from kvtransfer.pool_memory import Region
from kvtransfer.pulse import Pulse
from kvtransfer.stats import TransferStats
from kvtransfer.taker import Taker, TakerConfig
from kvtransfer.transport import DirectTransport, Transports

Sender = Callable[[str, HandOffMessage, Sequence[memoryview]], bool]
"""`send(address, message, payload)`: queue a message without blocking; False if it was dropped. `fleet.bus.Bus.send` is
one. A sender that does not copy the payload is safe: bytes that change after a hand-off has ended are dropped by
the taker, whose grant is closed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointConfig:
    """What an endpoint is made of.

    Attributes:
        peer: this process, with the address of its inbox.
        region: its pages; the owner closes it after `run` has returned.
        fingerprint: of the pages.
        bank: who owns the pages that are taken; None for a process that only gives.
        transports: best first, from `build_transports`.
        send: how messages leave.
        events: who hears the news.
        limits: times and sizes.
        watch: tells whether givers on this host are dead.
        seed: of the jitter in pauses.
    """

    peer: PeerRef
    region: Region
    fingerprint: Fingerprint
    bank: PageBank | None
    transports: Transports
    send: Sender
    events: HandOffEvents
    limits: HandOffLimits = field(default_factory=HandOffLimits)
    watch: ProcessWatch = field(default_factory=ProcProcessWatch)
    seed: int = 0


def build_desk(config: EndpointConfig, stats: TransferStats) -> HandOffDesk:
    """Giver, taker and pulse of this process; without a bank it refuses every Offer. Late messages count in `stats`."""
    giver = Giver(
        GiverConfig(
            peer=config.peer,
            fingerprint=config.fingerprint,
            page_bytes=config.region.ref.page_bytes,
            transports={name: isinstance(t, DirectTransport) for name, t in config.transports.items()},
            host=host_identity(),
            process=own_process(),
            limits=config.limits,
            rng=random.Random(config.seed),  # noqa: S311  # jitter, not a secret
            stale=stats.stale,
        )
    )
    taker = Taker(
        TakerConfig(
            peer=config.peer,
            fingerprint=config.fingerprint,
            pool=config.region.ref,
            transports=config.transports,
            bank=config.bank or NoBank(),
            gate=config.region,
            watch=config.watch,
            limits=config.limits,
            stale=stats.stale,
        )
    )
    if config.bank is None:
        taker.drain()
    return HandOffDesk(giver, taker, Pulse(config.peer, config.limits), stats.stale)
