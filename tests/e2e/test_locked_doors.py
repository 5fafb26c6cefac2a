"""A fleet over two machines with a cluster secret: it serves, and who has no secret or another one gets nowhere."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial

import pytest
from support.fleet import DEMO, ROOT, Fleet, until
from support.namespaces import NotPermitted, OtherMachine, other_machine
from support.redis_server import RedisServer

pytestmark = pytest.mark.e2e

SECRET = "correct horse battery"
WORKER = {"model": DEMO, "served_model_name": "demo", "dtype": "float32", "transports": "tcp"}
LEASE_S = 1.5


@pytest.fixture(scope="module")
def machine() -> Iterator[OtherMachine]:
    """In a network namespace of its own, or where that is not permitted on another loopback address."""
    try:
        with other_machine() as machine:
            yield machine
    except NotPermitted as refusal:
        print(f"on loopback addresses, since {refusal}")
        yield OtherMachine("127.0.0.1", "127.0.0.2")


@pytest.fixture(scope="module")
def fleet(
    machine: OtherMachine, module_redis: RedisServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Fleet]:
    """Gateway and prefill worker here, the decode worker there: pages and tokens cross the wire."""
    settings = {"cluster_secret": SECRET, "lease_s": str(LEASE_S)}
    with Fleet(module_redis, tmp_path_factory.mktemp("fleet"), settings=settings) as fleet:
        fleet.start("decode_svc", "d", prefix=machine.prefix, bind_host=machine.far, **WORKER)
        fleet.start("prefill_svc", "p", bind_host=machine.near, **WORKER)
        fleet.gateway(bind_host=machine.near)
        fleet.wait_ready()
        yield fleet


def address_of(fleet: Fleet, name: str) -> str:
    """Of its inbox, as its log says."""
    ready = next(line for line in fleet.services[name].text().splitlines() if "ready" in line and "address=" in line)
    return ready.partition("address=")[2].split()[0]


def answer(fleet: Fleet) -> str:
    with fleet.client() as client:
        return (
            client.completions.create(model="demo", prompt="Once", max_tokens=40, temperature=1, seed=1).choices[0].text
        )


def refused(fleet: Fleet, name: str) -> float:
    if name == "g":
        return fleet.metric("baton_gateway_bus_refused_handshakes")
    return fleet.metric("baton_worker_bus_refused_handshakes", worker=name)


def test_who_lacks_the_secret_gets_nowhere(fleet: Fleet, machine: OtherMachine) -> None:
    expected = answer(fleet)
    given = partial(fleet.metric, "baton_worker_hand_offs_total", transport="tcp", outcome="given")
    until(given, within_s=5 * LEASE_S, what="a heartbeat tells of the hand-off")
    assert given() == 1
    assert [refused(fleet, name) for name in fleet.services] == [0, 0, 0]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    script = [sys.executable, "-m", "support.stranger"]
    for name in list(fleet.services):
        command = [*machine.prefix, *script, address_of(fleet, name), machine.far]
        spoken = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
        assert spoken.stdout.strip() == "0", "nobody answers a stranger"
    for name, service in fleet.services.items():
        until(partial(refused, fleet, name), within_s=5 * LEASE_S, what=f"{name} counts it")
        assert "somebody without our key was sent away" in service.text()
        assert service.process.poll() is None
    for kind in ("gateway", "worker"):
        assert fleet.metric(f"baton_{kind}_bus_lost_messages") == 0
    assert "stranger" not in "".join(service.text() for service in fleet.services.values())
    assert answer(fleet) == expected


def test_a_worker_with_another_secret_joins_nobody(fleet: Fleet, machine: OtherMachine) -> None:
    expected = answer(fleet)
    settings = {**WORKER, "cluster_secret": SECRET + "!"}
    other = fleet.start("decode_svc", "other", prefix=machine.prefix, bind_host=machine.far, **settings)
    gateway = fleet.services["g"]
    until(lambda: "peer refuses our key" in gateway.text(), within_s=30, what="the gateway has tried it")
    assert fleet.metric("baton_worker_pages", worker="other") == 0
    assert "gateway joined" not in other.text()
    assert answer(fleet) == expected
    assert fleet.forget("other").stop() == 0
