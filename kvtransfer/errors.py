"""The error tree of page transfer.

BatonError
└── TransferError
    ├── LayoutMismatch         two workers' pages cannot be exchanged; carries both fingerprints
    ├── TransportUnavailable   a configured transport cannot work here, or cannot reach this grant
    ├── GrantRevoked           the taker took the grant back while it was being written
    ├── HandOffExists          the giver already hands this request off
    └── RegionError            pool memory cannot be made or mapped
        ├── RegionTooLarge     /dev/shm has not enough room; says how much and what to set
        └── RegionRejected     a named region is not what its name and size promise
"""

from __future__ import annotations

from fleet.errors import BatonError
from fleet.types import Fingerprint


class TransferError(BatonError):
    """Root of everything that page transfer raises on purpose."""


class LayoutMismatch(TransferError):
    """Pages of the two sides cannot be exchanged. The message names every differing field and both fingerprints."""

    def __init__(self, *, expected: Fingerprint, got: Fingerprint) -> None:
        differing = ", ".join(
            f"{field} (expected {ours!r}, got {theirs!r})"
            for field in Fingerprint.__struct_fields__
            if (ours := getattr(expected, field)) != (theirs := getattr(got, field))
        )
        super().__init__(f"page layouts differ in {differing}; expected {expected}, got {got}")
        self.expected = expected
        self.got = got


class TransportUnavailable(TransferError):
    """A transport cannot work in this process, or cannot reach the memory that a grant names."""


class GrantRevoked(TransferError):
    """The taker closed the grant; pages from the revoked one on were not written."""


class HandOffExists(TransferError):
    """A hand-off of this `(request_id, epoch)` or of a newer epoch is already open on this giver."""


class RegionError(TransferError):
    """Pool memory cannot be made or mapped."""


class RegionTooLarge(RegionError):
    """The shared-memory file system has not enough room for the region."""


class RegionRejected(RegionError):
    """A named region does not exist, belongs to somebody else, or has not the promised size."""
