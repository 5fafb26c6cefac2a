"""`make compose-test`: the fleet in containers, real requests, and a decode worker killed in the middle of a stream.

Builds the image, starts 2 prefill and 3 decode containers, streams through the `openai` SDK, kills the container that
decodes a long stream, checks that the stream ends complete and unchanged, and takes everything down again. Variables
of compose.yaml (BASE_IMAGE, REDIS_IMAGE, PIP_EXTRA_ARGS, …) are passed on.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from openai import OpenAI

ROOT = Path(__file__).resolve().parents[2]
NUM_PREFILL, NUM_DECODE = 2, 3
NUM_STREAMS = 8
LONG_TOKENS = 3000
KILL_AFTER_CHUNKS = 40
READY_TIMEOUT_S = 300.0
STREAM_TIMEOUT_S = 180.0
PROMPT = "Write a story about a fox and a river."


class Failure(Exception):
    """A check did not hold; the message says which."""


def say(text: str) -> None:
    """One line of what is going on."""
    print(f"compose-test: {text}", flush=True)


def require(holds: bool, sentence: str) -> None:
    """Say what held, or raise Failure."""
    if not holds:
        raise Failure(sentence)
    say(f"ok: {sentence}")


class Compose:
    """A compose project of its own; works with Compose v2 (`docker compose`) and v1 (`docker-compose`)."""

    def __init__(self, port: int) -> None:
        docker = shutil.which("docker")
        if docker is None or self._fails([docker, "info"]):
            raise Failure("docker is not installed or its daemon is not running")
        self.docker = docker
        self._command = [docker, "compose"]
        if self._fails([*self._command, "version"]):
            old = shutil.which("docker-compose")
            if old is None:
                raise Failure("neither `docker compose` nor `docker-compose` is there")
            self._command = [old]
        self.project = f"baton-test-{secrets.token_hex(3)}"
        self._environ = os.environ | {
            "COMPOSE_PROJECT_NAME": self.project,
            "FLEET_IMAGE": os.environ.get("FLEET_IMAGE", "baton:test"),
            "BATON_CLUSTER_SECRET": secrets.token_hex(32),
            # In bfloat16 two ways to the same token may round differently; here every stream is compared.
            "BATON_DTYPE": "float32",
            "BATON_THREADS": "1",
            "BATON_MAX_NUM_SEQS": "16",
            "PORT": str(port),
        }

    @staticmethod
    def _fails(command: list[str]) -> bool:
        return subprocess.run(command, capture_output=True, check=False).returncode != 0

    def __call__(self, *arguments: str, quiet: bool = False) -> str:
        """Run one compose command and return what it prints; its output is shown unless `quiet`."""
        say(f"$ {' '.join([*(Path(part).name for part in self._command), *arguments])}")
        done = subprocess.run(
            [*self._command, *arguments],
            cwd=ROOT,
            env=self._environ,
            stdout=subprocess.PIPE if quiet else None,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise Failure(f"compose {arguments[0]} failed with exit code {done.returncode}")
        return done.stdout or ""

    def containers(self) -> list[str]:
        """Ids of this project's containers, stopped ones included."""
        label = f"label=com.docker.compose.project={self.project}"
        done = subprocess.run([self.docker, "ps", "-aq", "--filter", label], capture_output=True, text=True, check=True)
        return done.stdout.split()

    def redis(self, *command: str) -> list[str]:
        """Ask the fleet's Redis."""
        return self("exec", "-T", "redis", "redis-cli", *command, quiet=True).split()


def free_port() -> int:
    """A port on loopback that is free now."""
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        return int(trial.getsockname()[1])


def workers(base: str) -> tuple[int, int]:
    """How many prefill and decode workers the gateway knows; zeros while it does not answer."""
    try:
        with urllib.request.urlopen(f"{base}/health/ready", timeout=3) as answer:  # noqa: S310 - our own gateway
            health = json.load(answer)
    except (urllib.error.URLError, OSError):
        return 0, 0
    models = health["models"]
    return sum(model["prefill_workers"] for model in models), sum(model["decode_workers"] for model in models)


def wait_for(what: str, is_so: Callable[[], bool], timeout_s: float) -> None:
    """Poll until `is_so()`; Failure after `timeout_s`."""
    begun_s = time.monotonic()
    while not is_so():
        if time.monotonic() - begun_s > timeout_s:
            raise Failure(f"{what}: not within {timeout_s:g} s")
        time.sleep(0.5)
    say(f"ok: {what}, after {time.monotonic() - begun_s:.1f} s")


def long_stream(client: OpenAI, on_chunk: Callable[[int, str], None]) -> tuple[str, int, str]:
    """A greedy stream of exactly `LONG_TOKENS` tokens: its text, the tokens it counts, why it ended.

    `on_chunk` hears how many chunks have come, and the request's id.
    """
    text: list[str] = []
    tokens, reason, chunks = 0, "", 0
    stream = client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": PROMPT}],
        max_tokens=LONG_TOKENS,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    for chunk in stream:
        if chunk.usage is not None:
            tokens = chunk.usage.completion_tokens
        for choice in chunk.choices:
            text.append(choice.delta.content or "")
            reason = choice.finish_reason or reason
            chunks += 1
            on_chunk(chunks, chunk.id)
    return "".join(text), tokens, reason


def check_requests(client: OpenAI) -> None:
    """Plain and streamed answers, several at once, that agree with each other."""
    messages = [{"role": "user", "content": "What is TTFT?"}]
    arguments: dict[str, Any] = {"model": "demo", "messages": messages, "temperature": 0, "max_tokens": 60}
    plain = client.chat.completions.create(**arguments).choices[0].message.content

    def streamed(_: int) -> str:
        chunks = client.chat.completions.create(**arguments, stream=True)
        return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)

    with ThreadPoolExecutor(NUM_STREAMS) as pool:
        texts = list(pool.map(streamed, range(NUM_STREAMS)))
    require(bool(plain), f"a plain answer came: {plain!r}")
    require(all(text == plain for text in texts), f"{NUM_STREAMS} streams at once brought the same text")


def check_image(client: OpenAI, base: str) -> None:
    """What lies in the image beside the source: the chat page, and the library that holds outputs to a schema."""
    with urllib.request.urlopen(f"{base}/", timeout=10) as answer:  # noqa: S310 - our own gateway
        page = answer.read().decode()
    require("<html" in page and "Baton" in page, f"the chat page is served, {len(page)} characters")
    properties = {"sunny": {"type": "boolean"}}
    schema = {"type": "object", "properties": properties, "required": ["sunny"], "additionalProperties": False}
    text = (
        client.chat.completions.create(
            model="demo",
            messages=[{"role": "user", "content": "Is it sunny?"}],
            max_tokens=100,
            temperature=0,
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "weather", "schema": schema, "strict": True},
            },
        )
        .choices[0]
        .message.content
    )
    require(isinstance(json.loads(text or "null")["sunny"], bool), f"an answer keeps to its schema: {text}")


def decoding_container(compose: Compose, request_id: str) -> str:
    """Id of the container that decodes this request now, as Redis tells it; workers are named after containers."""
    state, worker = compose.redis("hmget", f"baton:request:{request_id}", "state", "decode_worker")
    if state != "decoding":
        raise Failure(f"request {request_id} is {state}, not decoding")
    return worker


def check_kill(compose: Compose, client: OpenAI, base: str) -> None:
    """Kill the decode container of a running stream; the client must not notice but for a pause."""
    begun_s = time.monotonic()
    reference, tokens, reason = long_stream(client, lambda _chunks, _id: None)
    took_s = time.monotonic() - begun_s
    require((tokens, reason) == (LONG_TOKENS, "length"), f"an undisturbed stream of {tokens} tokens: {took_s:.1f} s")
    longest_s, last_s, killed = 0.0, 0.0, ""

    def watch(chunks: int, request_id: str) -> None:
        nonlocal longest_s, last_s, killed
        if chunks == KILL_AFTER_CHUNKS:
            killed = decoding_container(compose, request_id)
            subprocess.run([compose.docker, "kill", killed], check=True, capture_output=True)
            say(f"killed decode container {killed} after {chunks} chunks")
            last_s = time.monotonic()
        elif killed:
            now_s = time.monotonic()
            longest_s, last_s = max(longest_s, now_s - last_s), now_s

    text, tokens, reason = long_stream(client, watch)
    require(bool(killed), "the container was killed while the stream was open")
    require((tokens, reason) == (LONG_TOKENS, "length"), f"the stream still brings {tokens} tokens and its end")
    require(text == reference, f"it is the undisturbed stream, letter by letter; longest pause {longest_s:.2f} s")
    wait_for("the gateway counts one decode worker less", lambda: workers(base)[1] == NUM_DECODE - 1, 30)
    with urllib.request.urlopen(f"{base}/metrics", timeout=3) as answer:  # noqa: S310 - our own gateway
        replays = [line for line in answer.read().decode().splitlines() if line.startswith("baton_replays_total")]
    require(bool(replays), f"the gateway counted the replay: {'; '.join(replays)}")


def run(*, build: bool) -> None:
    """The whole drive; takes everything down whatever happens."""
    port = free_port()
    compose = Compose(port)
    base = f"http://127.0.0.1:{port}"
    scale = ["--scale", f"prefill={NUM_PREFILL}", "--scale", f"decode={NUM_DECODE}"]
    try:
        if build:
            compose("build")
        compose("up", "-d", "--no-build", *scale)
        wait_for(
            f"{NUM_PREFILL} prefill and {NUM_DECODE} decode workers are ready",
            lambda: workers(base) == (NUM_PREFILL, NUM_DECODE),
            READY_TIMEOUT_S,
        )
        with OpenAI(base_url=f"{base}/v1", api_key="none", timeout=STREAM_TIMEOUT_S, max_retries=0) as client:
            check_requests(client)
            check_image(client, base)
            check_kill(compose, client, base)
            compose("up", "-d", "--no-build", *scale)
            wait_for("a new decode worker has joined", lambda: workers(base)[1] == NUM_DECODE, READY_TIMEOUT_S)
            check_requests(client)
    except BaseException:
        compose("ps")
        compose("logs", "--tail=30")
        raise
    finally:
        compose("down", "--volumes", "--remove-orphans")
    require(not compose.containers(), "nothing is left of the project")


def main() -> int:
    """Parse the arguments, drive, and say how it went."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--no-build", action="store_true", help="use the image that is there")
    arguments = parser.parse_args()
    begun_s = time.monotonic()
    try:
        run(build=not arguments.no_build)
    except Failure as failure:
        say(f"FAILED: {failure}")
        return 1
    say(f"passed in {time.monotonic() - begun_s:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
