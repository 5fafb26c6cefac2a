"""The wire: every message survives the trip, and no bytes take the decoder down."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.records import make_record

from fleet.errors import Malformed, WireError, WrongVersion
from fleet.hand_off_messages import Pages
from fleet.messages import Cancel, Heartbeat, Publication, RequestFinished, TokenChunk
from fleet.types import (
    FinishReason,
    PeerRef,
    TokenLogprob,
    TopLogprob,
    WorkerLoad,
)
from fleet.wire import PROTOCOL_VERSION, decode, encode

PEER = PeerRef("w", 2**62, "tcp://127.0.0.1:1")
RECORD = make_record(PEER, load=WorkerLoad(num_running=1, free_pages=2))
CHUNK = TokenChunk(
    request_id="r", epoch=1, index=3, token_ids=[5], logprobs=[TokenLogprob(-0.5, [TopLogprob(5, -0.5)])]
)


@pytest.mark.parametrize(
    "message",
    [
        Cancel(request_id="r", epoch=2),
        Heartbeat(record=RECORD, requests=[]),
        Publication(
            worker=PEER,
            events=[
                CHUNK,
                RequestFinished(request_id="r", epoch=1, reason=FinishReason.STOP, num_output_tokens=4),
            ],
        ),
        Pages(request_id="r", epoch=0, generation=7, first=0, count=2),
    ],
)
def test_messages_survive_the_trip(message: object) -> None:
    frames = encode(message, [b"abc", memoryview(b"de")])  # type: ignore[arg-type]
    arrived, payload = decode([bytes(frame) for frame in frames])
    assert arrived == message
    assert [bytes(view) for view in payload] == [b"abc", b"de"]


def test_another_version_is_named() -> None:
    frames = [bytes(frame) for frame in encode(Cancel(request_id="r", epoch=0))]
    frames[0] = b"BT" + bytes((PROTOCOL_VERSION + 1, 0))
    with pytest.raises(WrongVersion, match=f"version {PROTOCOL_VERSION + 1}"):
        decode(frames)


def test_a_negative_epoch_is_refused() -> None:
    body = msgspec.msgpack.encode({"type": "Cancel", "request_id": "r", "epoch": -1})
    with pytest.raises(Malformed):
        decode([bytes(encode(Cancel(request_id="r", epoch=0))[0]), body])


def test_a_passport_without_its_prompt_is_refused() -> None:
    gateway = {"name": "g", "incarnation": 1, "address": "tcp://127.0.0.1:1"}
    passport = {"request_id": "r", "epoch": 0, "model": "m", "token_ids": [], "prompt_len": 1, "params": {}}
    message = {"type": "PrefillRequest", "passport": passport | {"gateway": gateway}, "targets": []}
    with pytest.raises(Malformed, match="prompt"):
        decode([bytes(encode(Cancel(request_id="r", epoch=0))[0]), msgspec.msgpack.encode(message)])


def test_a_message_without_body_is_refused() -> None:
    with pytest.raises(Malformed, match="1 frames"):
        decode([b"BT\x01\x00"])


@given(st.lists(st.binary(max_size=64), max_size=5))
def test_random_frames_never_raise_anything_else(frames: list[bytes]) -> None:
    try:
        decode(frames)
    except WireError:
        return
    assert frames[0][:2] == b"BT"


@given(st.binary(max_size=200), st.integers(0, 200))
def test_mutilated_messages_never_raise_anything_else(noise: bytes, cut: int) -> None:
    header, body = (bytes(frame) for frame in encode(Heartbeat(record=RECORD, requests=[])))
    for broken in (body[:cut], body[:cut] + noise, noise + body[cut:]):
        try:
            message, _ = decode([header, broken])
        except WireError:
            continue
        assert msgspec.msgpack.encode(message)
