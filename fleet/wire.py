"""Bytes and messages: msgpack in, checked structs out, and nothing else ever.

A message on the wire is a list of frames: a 4-byte header (magic `BT`, protocol version, zero), the msgpack
bytes of one struct of `fleet.messages`, then payload frames that this module never looks into.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from fleet.errors import Malformed, WrongVersion
from fleet.messages import Message

PROTOCOL_VERSION = 1
MAX_MESSAGE_BYTES = 64 * 2**20
MAX_FRAMES = 4096
_MAGIC = b"BT"
_HEADER = _MAGIC + bytes((PROTOCOL_VERSION, 0))

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)

Frame = bytes | memoryview


def encode(message: Message, payload: Sequence[Frame] = ()) -> list[Frame]:
    """Frames of a message; payload frames are passed through uncopied."""
    return [_HEADER, _encoder.encode(message), *payload]


def decode(frames: Sequence[Frame]) -> tuple[Message, list[memoryview]]:
    """A checked message and views of its payload frames.

    Raises:
        WrongVersion: the peer speaks another version.
        Malformed: anything else is not as it must be.
    """
    if not 2 <= len(frames) <= MAX_FRAMES:
        raise Malformed(f"{len(frames)} frames; between 2 and {MAX_FRAMES} are allowed")
    header = bytes(frames[0])
    if len(header) != len(_HEADER) or header[:2] != _MAGIC:
        raise Malformed("not a Baton message")
    if header[2] != PROTOCOL_VERSION:
        raise WrongVersion(expected=PROTOCOL_VERSION, actual=header[2])
    body = frames[1]
    if len(body) > MAX_MESSAGE_BYTES:
        raise Malformed(f"message of {len(body)} bytes; at most {MAX_MESSAGE_BYTES} are allowed")
    try:
        message = _decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Malformed(f"message does not decode: {error}") from error
    return message, [memoryview(frame) for frame in frames[2:]]
