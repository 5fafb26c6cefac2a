"""Worker records for tests that do not care about them."""

from __future__ import annotations

import msgspec

from fleet.types import Fingerprint, PeerRef, Role, WorkerRecord


def make_record(peer: PeerRef, role: Role = Role.DECODE, **changes: object) -> WorkerRecord:
    """The record of a small worker, with these fields changed."""
    made = WorkerRecord(
        peer=peer,
        role=role,
        model="m",
        fingerprint=Fingerprint("f", "float32", 1, 1, 8, 16, "page-major-1", 1),
        model_files="d",
        max_model_len=100,
        max_num_seqs=4,
        page_size=16,
        num_pages=30,
        host="h",
        pid=1,
        transports=("tcp",),
    )
    return msgspec.structs.replace(made, **changes)
