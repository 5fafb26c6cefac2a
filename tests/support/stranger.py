"""`python -m support.stranger ADDRESS FAR`: somebody without the fleet's secret speaks to an inbox, and listens at FAR.

He comes bare, and with CURVE keys of another secret; says that a gateway lives, that a worker does, that another is to
leave. Prints how many messages came back to him.
"""

from __future__ import annotations

import sys
import time

import zmq

from fleet.curve import CurveKeys
from fleet.messages import DrainRequest, GatewayHello, Heartbeat, Message
from fleet.types import PeerRef
from fleet.wire import encode
from support.records import make_record

OTHER_SECRET = "battery horse correct"
FOR_S = 1.0


def messages(me: PeerRef) -> list[Message]:
    """What would do harm if it were believed."""
    worker = make_record(me, model="demo")
    drain = DrainRequest(reason="stranger", within_s=0)
    return [GatewayHello(gateway=me), Heartbeat(record=worker, requests=[], metrics=[]), drain]


def speak(address: str, far: str) -> int:
    """All of it, both ways; returns how much came back."""
    keys = CurveKeys.derive(OTHER_SECRET)
    with zmq.Context() as context:
        ears = [context.socket(zmq.ROUTER) for _ in range(2)]
        mouths = [context.socket(zmq.DEALER) for _ in range(2)]
        ears[1].curve_server = True
        ears[1].curve_publickey, ears[1].curve_secretkey = keys.server.public, keys.server.secret
        mouths[1].curve_serverkey = keys.server.public
        mouths[1].curve_publickey, mouths[1].curve_secretkey = keys.client.public, keys.client.secret
        for ear, mouth in zip(ears, mouths, strict=True):
            port = ear.bind_to_random_port(f"tcp://{far}")
            mouth.connect(address)
            for message in messages(PeerRef("stranger", 1, f"tcp://{far}:{port}")):
                mouth.send_multipart(encode(message, []))
        time.sleep(FOR_S)
        heard = sum(bool(ear.poll(0)) for ear in ears)
        for sock in (*ears, *mouths):
            sock.close(linger=0)
    return heard


if __name__ == "__main__":
    print(speak(*sys.argv[1:3]))
