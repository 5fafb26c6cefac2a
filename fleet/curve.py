"""CURVE keys derived from the cluster secret, so that one secret locks every socket of a fleet.

All inboxes share one server key and all senders one client key, both drawn from the secret by keyed BLAKE2b; who
lacks the secret knows neither the public key to address nor the private key to be let in with.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import zmq
import zmq.utils.z85

MIN_SECRET_LEN = 16


@dataclass(frozen=True, slots=True)
class CurvePair:
    """A Curve25519 key pair in Z85, as ZeroMQ wants it (40 bytes each)."""

    public: bytes
    secret: bytes


@dataclass(frozen=True, slots=True)
class CurveKeys:
    """The fleet's two pairs."""

    server: CurvePair
    client: CurvePair

    @classmethod
    def derive(cls, cluster_secret: str) -> CurveKeys:
        """Derive both pairs; equal secrets give equal keys on every machine."""
        return cls(server=_pair(cluster_secret, b"server"), client=_pair(cluster_secret, b"client"))


def _pair(cluster_secret: str, use: bytes) -> CurvePair:
    raw = hashlib.blake2b(cluster_secret.encode(), digest_size=32, person=b"baton-curve-" + use[:4]).digest()
    secret = zmq.utils.z85.encode(raw)
    return CurvePair(public=zmq.curve_public(secret), secret=secret)
