"""Pools in device memory, with host memory in the device's place: handles, runs of pages, revoked grants."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.host_device import HostDevice

from fleet.hand_off_messages import Grant, PoolRef
from fleet.types import PeerRef
from kvtransfer.cuda_ipc import CudaIpcTransport
from kvtransfer.device_region import DeviceRegion
from kvtransfer.errors import GrantRevoked, RegionRejected, TransportUnavailable
from kvtransfer.pool_memory import PoolPlace
from kvtransfer.region import PoolRegion
from kvtransfer.transports import build_transports

PAGE_BYTES = 96
GENERATION = 77


@pytest.fixture
def pools() -> Iterator[tuple[DeviceRegion, DeviceRegion]]:
    """A giver's and a taker's, each with a device of its own; pages of the giver hold their number."""
    made = [DeviceRegion.create(name, num_pages=8, page_bytes=PAGE_BYTES, memory=HostDevice()) for name in ("p", "d")]
    for page_id in range(8):
        made[0].store(page_id, memoryview(bytes([page_id + 1]) * PAGE_BYTES))
        made[1].store(page_id, memoryview(bytes(PAGE_BYTES)))
    yield made[0], made[1]
    for region in made:
        region.unlink()
        region.close()
        region.close()


def grant_of(taker: DeviceRegion, page_ids: list[int]) -> Grant:
    return Grant(
        request_id="r",
        epoch=0,
        offer=1,
        generation=GENERATION,
        taker=PeerRef("d", 1, "tcp://127.0.0.1:1"),
        transport="cuda_ipc",
        num_held_pages=0,
        page_ids=page_ids,
        pool=taker.ref,
    )


def device(region: DeviceRegion) -> HostDevice:
    assert isinstance(region.memory, HostDevice)
    return region.memory


def test_neighbours_are_copied_as_one_run(pools: tuple[DeviceRegion, DeviceRegion]) -> None:
    giver, taker = pools
    transport = CudaIpcTransport(giver)
    grant = grant_of(taker, [2, 3, 4, 7])
    taker.open_pages(grant.page_ids, GENERATION)
    transport.write(grant, 0, [0, 1, 2, 3])
    assert [bytes(taker.frame(page_id))[0] for page_id in range(8)] == [0, 0, 1, 2, 3, 0, 0, 4]
    assert [[size for _, _, size in runs] for runs in device(giver).copies] == [[3 * PAGE_BYTES, PAGE_BYTES]]
    transport.write(grant, 3, [6])
    assert bytes(taker.frame(7)) == bytes([7]) * PAGE_BYTES
    assert device(giver).num_open == 1  # opened once for the peer's life
    transport.forget(grant.taker.address)
    assert device(giver).num_open == 0
    transport.close()


def test_a_revoked_page_and_later_ones_stay_as_they_are(pools: tuple[DeviceRegion, DeviceRegion]) -> None:
    giver, taker = pools
    transport = CudaIpcTransport(giver)
    grant = grant_of(taker, [0, 1, 2])
    taker.open_pages([0, 1, 2], GENERATION)
    taker.close_pages([1])
    with pytest.raises(GrantRevoked, match="page 1 "):
        transport.write(grant, 0, [0, 1, 2])
    assert [bytes(taker.frame(page_id))[0] for page_id in range(3)] == [1, 0, 0]
    transport.close()


def test_pools_that_cannot_be_opened_are_refused(pools: tuple[DeviceRegion, DeviceRegion]) -> None:
    giver, taker = pools
    transport = CudaIpcTransport(giver)
    foreign = PoolRef(name="../../etc/passwd", num_pages=8, page_bytes=PAGE_BYTES)
    with pytest.raises(RegionRejected):
        DeviceRegion.attach(foreign, device(giver))
    stale = PoolRegion.create("x", num_pages=8, page_bytes=64, shared=True)  # no handle in it
    try:
        ref = PoolRef(name=stale.ref.name, num_pages=8, page_bytes=PAGE_BYTES)
        with pytest.raises(TransportUnavailable):
            DeviceRegion.attach(ref, device(giver))
    finally:
        stale.unlink()
        stale.close()
    with pytest.raises(IndexError):
        taker.address(8)
    transport.close()


def test_torch_would_take_the_pool_without_a_copy(pools: tuple[DeviceRegion, DeviceRegion]) -> None:
    interface = pools[0].buffer.__cuda_array_interface__
    assert interface["shape"] == (8 * PAGE_BYTES,)
    assert interface["data"] == (pools[0].address(0), False)
    assert (interface["typestr"], interface["version"]) == ("|u1", 3)


def test_transports_that_do_not_suit_the_memory_stop_the_start(pools: tuple[DeviceRegion, DeviceRegion]) -> None:
    with pytest.raises(TransportUnavailable, match="shm transport is configured, but the pages are in GPU memory"):
        build_transports(("shm", "tcp"), pools[0])
    host = PoolRegion.create("x", num_pages=1, page_bytes=8, shared=False)
    with pytest.raises(TransportUnavailable, match="cuda_ipc transport is configured, but"):
        build_transports(("cuda_ipc",), host)
    host.close()
    assert PoolPlace.of("cpu", ()).transports == ("shm", "tcp")
    assert PoolPlace.of("cuda:1", ()) == PoolPlace(1, ("cuda_ipc", "tcp"))
    assert PoolPlace.of("cuda", ("tcp",)) == PoolPlace(0, ("tcp",))
    with pytest.raises(TransportUnavailable, match="cupy"):
        PoolPlace.of("cuda", ()).create("x", num_pages=1, page_bytes=8)
