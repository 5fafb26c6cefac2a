"""Pool memory: shared by name with the same user alone, revocable page by page, and never left behind."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import overload

import pytest

from fleet.hand_off_messages import Grant, PoolRef
from fleet.types import PeerRef
from kvtransfer.copying import write_granted
from kvtransfer.errors import (
    GrantRevoked,
    RegionError,
    RegionRejected,
    RegionTooLarge,
    TransportUnavailable,
)
from kvtransfer.host import SHM_DIRECTORY, ProcessIdentity, ProcProcessWatch, host_identity, own_process
from kvtransfer.mapped_peers import MappedPeers
from kvtransfer.region import PoolRegion, is_named, sweep_stale
from kvtransfer.shm import ShmTransport
from kvtransfer.transports import build_transports

PAGE_BYTES = 4096 + 8
ROOT = Path(__file__).parents[3]


@pytest.fixture(params=[True, False], ids=["shared", "private"])
def region(request: pytest.FixtureRequest) -> Iterator[PoolRegion]:
    made = PoolRegion.create("test pool", num_pages=5, page_bytes=PAGE_BYTES, shared=bool(request.param))
    yield made
    made.unlink()
    made.close()


@pytest.fixture
def shared() -> Iterator[PoolRegion]:
    made = PoolRegion.create("test pool", num_pages=5, page_bytes=PAGE_BYTES, shared=True)
    yield made
    made.unlink()
    made.close()


def test_pages_lie_one_after_the_other_and_apart_from_the_words(region: PoolRegion) -> None:
    for page in range(5):
        region.page(page)[:] = bytes([page + 1]) * PAGE_BYTES
    region.open_pages(range(5), 2**62)
    assert region.buffer.nbytes == 5 * PAGE_BYTES
    assert bytes(region.buffer) == b"".join(bytes([page + 1]) * PAGE_BYTES for page in range(5))
    assert [region.writer(page) for page in range(5)] == [2**62] * 5
    for outside in (-1, 5):
        with pytest.raises(IndexError):
            region.page(outside)


def test_a_shared_region_is_private_to_its_user_and_sparse(shared: PoolRegion) -> None:
    found = (SHM_DIRECTORY / shared.ref.name).stat()
    assert stat.S_IMODE(found.st_mode) == 0o600
    assert found.st_blocks == 0
    assert shared.ref.name.startswith(f"baton-{os.getpid()}-")


def test_an_attached_region_is_the_same_memory(shared: PoolRegion) -> None:
    other = PoolRegion.attach(shared.ref)
    other.page(3)[:] = b"x" * PAGE_BYTES
    shared.open_pages([3], 7)
    assert bytes(shared.page(3)) == b"x" * PAGE_BYTES
    assert other.writer(3) == 7
    other.close()


@pytest.mark.parametrize(
    "ref",
    [
        PoolRef(name="../etc/passwd", num_pages=5, page_bytes=PAGE_BYTES),
        PoolRef(name="", num_pages=5, page_bytes=PAGE_BYTES),
        PoolRef(name="baton-1-1-0123456789abcdef", num_pages=5, page_bytes=PAGE_BYTES),
    ],
)
def test_only_our_existing_names_are_attached(ref: PoolRef) -> None:
    with pytest.raises(RegionRejected):
        PoolRegion.attach(ref)


def test_a_region_of_another_size_or_behind_a_link_is_rejected(shared: PoolRegion) -> None:
    with pytest.raises(RegionRejected, match="promised"):
        PoolRegion.attach(PoolRef(name=shared.ref.name, num_pages=500, page_bytes=PAGE_BYTES))
    link = SHM_DIRECTORY / "baton-1-1-00000000000000ff"
    link.symlink_to(SHM_DIRECTORY / shared.ref.name)
    try:
        with pytest.raises(RegionRejected):
            PoolRegion.attach(PoolRef(name=link.name, num_pages=5, page_bytes=PAGE_BYTES))
    finally:
        link.unlink()


def test_too_little_shared_memory_is_said_in_a_sentence_that_helps() -> None:
    before = set(SHM_DIRECTORY.iterdir())
    with pytest.raises(RegionTooLarge, match=r"MiB of shared memory.*shm_size.*tcp transport"):
        PoolRegion.create("huge", num_pages=2**40, page_bytes=PAGE_BYTES, shared=True)
    assert set(SHM_DIRECTORY.iterdir()) == before
    with pytest.raises(RegionError):
        PoolRegion.create("none", num_pages=0, page_bytes=PAGE_BYTES, shared=False)


def test_memory_in_use_outlives_close(region: PoolRegion) -> None:
    page = region.page(0)
    region.close()
    page[:] = b"y" * PAGE_BYTES
    assert bytes(page[:2]) == b"yy"


OWNER = """
import sys, time
from kvtransfer.region import PoolRegion
print(PoolRegion.create("left", num_pages=2, page_bytes=64, shared=True).ref.name, flush=True)
time.sleep(60)
"""


def test_what_a_killed_owner_leaves_is_swept_and_nothing_else(shared: PoolRegion) -> None:
    with subprocess.Popen(  # the name must outlive its owner, so a real process has to die
        [sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as owner:
        assert owner.stdout is not None
        name = owner.stdout.readline().strip()
        assert name not in sweep_stale(), "its owner lives"
        assert (SHM_DIRECTORY / name).exists()
        identity = ProcessIdentity(owner.pid, int(name.split("-")[2]))
        watch = ProcProcessWatch()
        owner.send_signal(signal.SIGSTOP)
        assert not watch.is_gone(identity), "a stopped process lives"
        owner.kill()
        os.waitid(os.P_PID, owner.pid, os.WEXITED | os.WNOWAIT)
        assert watch.is_gone(identity), "a zombie writes no more"
    assert watch.is_gone(identity)
    assert name in sweep_stale()
    assert not (SHM_DIRECTORY / name).exists()
    assert (SHM_DIRECTORY / shared.ref.name).exists()


def test_a_process_is_known_by_its_start_time_too() -> None:
    own = own_process()
    watch = ProcProcessWatch()
    assert not watch.is_gone(own)
    assert watch.is_gone(ProcessIdentity(own.pid, own.start_ticks + 1)), "the id was reused"


def test_the_host_identity_names_what_must_be_shared() -> None:
    parts = host_identity().split("/")
    assert [part.split(":")[0] for part in parts[1:]] == ["pid", "ipc", "shm", "uid"]


class RevokedMidway(Sequence[memoryview]):
    """Three pages; the taker takes its grant back while the second is fetched."""

    def __init__(self, region: PoolRegion) -> None:
        self.region = region

    def __len__(self) -> int:
        return 3

    @overload
    def __getitem__(self, index: int) -> memoryview: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[memoryview]: ...
    def __getitem__(self, index: int | slice) -> memoryview | Sequence[memoryview]:
        if isinstance(index, slice) or index >= 3:
            raise IndexError(index)
        if index == 1:
            self.region.close_pages([0, 1, 2])
        return memoryview(b"n" * PAGE_BYTES)


def test_a_revoked_grant_is_not_written_to(shared: PoolRegion) -> None:
    mapped = PoolRegion.attach(shared.ref)
    shared.open_pages([0, 1, 2], 9)
    with pytest.raises(GrantRevoked, match="page 1"):
        write_granted(mapped, [0, 1, 2], 9, RevokedMidway(shared))
    assert bytes(shared.page(0)) == b"n" * PAGE_BYTES
    assert bytes(shared.buffer[PAGE_BYTES:]) == bytes(4 * PAGE_BYTES)
    shared.open_pages([0], 10)
    with pytest.raises(GrantRevoked):
        write_granted(mapped, [0], 9, [memoryview(b"o" * PAGE_BYTES)])
    assert bytes(shared.page(0)) == b"n" * PAGE_BYTES
    mapped.close()


def make_grant(region: PoolRegion, *, incarnation: int = 1) -> Grant:
    return Grant(
        request_id="r",
        epoch=0,
        offer=1,
        generation=5,
        taker=PeerRef(name="t", incarnation=incarnation, address="sim://t"),
        transport="shm",
        num_held_pages=0,
        page_ids=[2, 0],
        pool=region.ref,
    )


def test_the_shm_transport_writes_runs_of_a_grant_and_maps_once_per_life(shared: PoolRegion) -> None:
    own = PoolRegion.create("g", num_pages=3, page_bytes=PAGE_BYTES, shared=True)
    for page_id, letter in enumerate(b"abc"):
        own.store(page_id, memoryview(bytes([letter]) * PAGE_BYTES))
    transport = ShmTransport(own)
    grant = make_grant(shared)
    shared.open_pages(grant.page_ids, grant.generation)
    transport.write(grant, 1, [1])
    shared.unlink()
    transport.write(grant, 0, [0])
    assert (bytes(shared.page(2)[:1]), bytes(shared.page(0)[:1])) == (b"a", b"b")
    with pytest.raises(TransportUnavailable):
        transport.write(make_grant(shared, incarnation=2), 0, [2])
    transport.forget(grant.taker.address)
    with pytest.raises(TransportUnavailable):
        transport.write(grant, 0, [2])
    transport.close()
    own.unlink()
    own.close()


def test_pools_whose_name_is_gone_are_unmapped_when_the_next_one_is_mapped(shared: PoolRegion) -> None:
    gone = PoolRegion.create("gone", num_pages=3, page_bytes=PAGE_BYTES, shared=True)
    peers = MappedPeers(PoolRegion.attach, exists=is_named)
    kept = weakref.ref(peers.of(make_grant(gone)))
    gone.unlink()
    assert kept() is not None
    peers.of(make_grant(shared, incarnation=2))
    assert kept() is None
    gone.close()


def test_a_configured_transport_that_cannot_work_stops_the_start(shared: PoolRegion) -> None:
    private = PoolRegion.create("p", num_pages=1, page_bytes=8, shared=False)
    assert list(build_transports(["shm", "tcp"], shared)) == ["shm", "tcp"]
    with pytest.raises(TransportUnavailable, match="not in shared memory"):
        build_transports(["shm"], private)
    for names in (["carrier-pigeon"], [], ["tcp", "tcp"], ["loopback"]):
        with pytest.raises(TransportUnavailable):
            build_transports(names, private)
    private.close()
