"""A giver in a process of its own, for tests that kill or freeze it: offers, writes some pages, then hangs.

`python -m support.giver_process TRANSPORT NAME INCARNATION ADDRESS`, the last three of the taker, prints `writing`
once pages have moved.
"""

from __future__ import annotations

import asyncio
import sys

from fleet.types import PeerRef
from support.hand_off_side import Gift, Side, until


async def main(transport: str, target: PeerRef) -> None:
    """Hand over half a sequence and wait for fate."""
    async with Side("p", transport, {}) as giver:
        gift = Gift(giver, "r", 30)
        giver.endpoint.offer(gift.passport, page_hashes=gift.hashes, num_pages=len(gift.pages), targets=[target])
        gift.chunk(4)
        await until(lambda: giver.endpoint.lag("r", 0) == 0)
        print("writing", giver.region.ref.name, flush=True)
        await asyncio.sleep(60)


if __name__ == "__main__":
    _, chosen, name, incarnation, address = sys.argv
    asyncio.run(main(chosen, PeerRef(name, int(incarnation), address)))
