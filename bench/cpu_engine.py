"""The engine alone, in this process, on the CPU: decoding and prefill, each beside the limit of the same run.

    python bench/cpu_engine.py [--threads 2] [--batches 1,8,32] [--context 160] [--prompts 1024,4096] [--split]
                               [--weights DIR] [--quantization int8]

The model is a random-weight Qwen3-0.6B in bfloat16 (`bench/random_checkpoint.py`). The limit of a decode step is the
larger of reading weights, as they lie in memory, and pages once at the measured bandwidth and of its operations at the
measured matrix rate; the limit of a prompt is its operations, causal attention counted once. `--split` says where a
step's time goes, by a clock around every operation of the backend. `--weights` maps packed weights from a file there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from machine import describe
from machine_limits import Limits, measure
from random_checkpoint import random_checkpoint

from engine.cpu.backend import suits_own_products
from engine.cpu.panels import EIGHT_BITS, PLAIN, RECORD_BYTES, RECORD_WEIGHTS, TWELVE_BITS
from engine.cpu.weight_cache import WeightCache
from engine.kv_pool import allocate_pool
from engine.load import LoadedModel, load_model
from engine.model_config import ModelConfig
from engine.plan import Row, Sampled, StepPlan
from engine.runner import ModelRunner
from engine.sequence import Sequence
from fleet.types import Passport, PeerRef, SamplingParams

PAGE_SIZE = 16
CHUNK = 512  # the default of a prefill worker
NOBODY = PeerRef(name="bench", incarnation=1, address="tcp://127.0.0.1:1")
PARTS = ("rms_norm", "add_rms_norm", "gated_silu", "rotate_and_write", "attention")


class Split:
    """Seconds by operation, taken by wrapping the backend's methods and products; costs a few microseconds a call."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call`, with its time booked under `name`."""

        def clocked(*arguments: Any, **named: Any) -> Any:
            began_s = time.perf_counter()
            try:
                return call(*arguments, **named)
            finally:
                self.seconds[name] += time.perf_counter() - began_s

        return clocked


class Engine:
    """A loaded model, its pool and runner, with sequences made by hand; pages are dealt in order."""

    def __init__(self, model: LoadedModel, num_tokens: int) -> None:
        num_pages = num_tokens // PAGE_SIZE + 256
        self.model = model
        self.pool = allocate_pool(
            config=model.config, num_pages=num_pages, page_size=PAGE_SIZE, dtype=model.kv_dtype, device=model.device
        ).zero_()
        self.runner = ModelRunner(model, self.pool, PAGE_SIZE)
        self.free = list(range(num_pages))

    def admit(self, length: int, room: int) -> Sequence:
        """A greedy sequence of random ids with pages for `room` more."""
        ids = torch.randint(3, self.model.config.vocab_size, (length,)).tolist()
        params = SamplingParams(temperature=0.0, max_tokens=1 << 20)
        passport = Passport(
            request_id=f"r{len(self.free)}",
            epoch=0,
            model="bench",
            token_ids=ids,
            prompt_len=length,
            params=params,
            gateway=NOBODY,
        )
        sequence = Sequence.from_passport(passport, arrival=0)
        needed = -(-(length + room) // PAGE_SIZE)
        sequence.page_table, self.free = self.free[:needed], self.free[needed:]
        return sequence

    def release(self, sequence: Sequence) -> None:
        """Put its pages back."""
        self.free = sequence.page_table + self.free

    def step(self, rows: list[Row]) -> float:
        """Run, book and time one step."""
        began_s = time.perf_counter()
        out = self.runner.run(StepPlan(tuple(rows)))
        elapsed_s = time.perf_counter() - began_s
        for row, result in zip(rows, out.sampled, strict=True):
            row.sequence.num_computed_tokens = row.start + row.count
            if isinstance(result, Sampled):
                row.sequence.token_ids.append(result.token_id)
        return elapsed_s

    def decode_s(self, batch: int, context: int, steps: int) -> list[float]:
        """Times of `steps` decode steps of `batch` sequences that begin at `context` tokens (of empty pages)."""
        running = [self.admit(context, steps + 3) for _ in range(batch)]
        for sequence in running:
            sequence.num_computed_tokens = context - 1
        times = [self.step([Row(s, len(s.token_ids) - 1, 1, sample=True) for s in running]) for _ in range(steps + 2)]
        for sequence in running:
            self.release(sequence)
        return times[2:]

    def prefill_s(self, length: int, chunk: int) -> float:
        """Time of one prompt in chunks, first token included."""
        sequence = self.admit(length, 1)
        total = 0.0
        while (start := sequence.num_computed_tokens) < length:
            count = min(chunk, length - start)
            total += self.step([Row(sequence, start, count, sample=start + count == length)])
        self.release(sequence)
        return total


def matrix_weights(config: ModelConfig) -> tuple[int, int]:
    """Numbers in all layers' matrices, and in the vocabulary head."""
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    layer = config.hidden_size * (2 * q_size + 2 * kv_size + 3 * config.intermediate_size)
    return config.num_layers * layer, config.vocab_size * config.hidden_size


def decode_limit_s(
    config: ModelConfig, limits: Limits, batch: int, context: int, *, quantization: str = "auto"
) -> float:
    """No step can be shorter: bytes over bandwidth, operations over matrix rate, whichever is more."""
    layers, head = matrix_weights(config)
    token_bytes = 2 * config.num_layers * config.num_kv_heads * config.head_dim * 2
    head_form = TWELVE_BITS if suits_own_products() else PLAIN
    layer_form = EIGHT_BITS if quantization == "int8" else head_form
    weight_bytes = (layers * RECORD_BYTES[layer_form] + head * RECORD_BYTES[head_form]) / RECORD_WEIGHTS
    read_s = (weight_bytes + batch * context * token_bytes) / (limits.read_gb_s * 1e9)
    attention = 4 * config.num_layers * config.num_heads * config.head_dim * context
    return max(read_s, batch * (2 * (layers + head) + attention) / (limits.gflop_s * 1e9))


def prefill_limit_s(config: ModelConfig, limits: Limits, length: int) -> float:
    """Operations over the matrix rate: each token through the layers, one through the head, the causal triangle.

    Of the last layer only keys and values are needed of each token, the rest of the last token alone.
    """
    layers, head = matrix_weights(config)
    layers -= config.hidden_size * (2 * config.num_heads * config.head_dim + 3 * config.intermediate_size)
    attention = 2 * (config.num_layers - 1) * config.num_heads * config.head_dim * length * length
    return (2 * layers * length + 2 * head + attention) / (limits.gflop_s * 1e9)


def watch(model: LoadedModel, split: Split) -> LoadedModel:
    """The same model with a clock around every operation."""
    transformer = model.transformer
    backend = transformer.backend
    for name in PARTS:
        if hasattr(backend, name):
            setattr(backend, name, split.timed(name, getattr(backend, name)))
    layers = tuple(
        replace(
            layer,
            qkv=split.timed("qkv", layer.qkv),
            output=split.timed("output", layer.output),
            gate_up=split.timed("gate_up", layer.gate_up),
            down=split.timed("down", layer.down),
        )
        for layer in transformer.layers
    )
    return replace(
        model, transformer=replace(transformer, layers=layers, lm_head=split.timed("lm_head", transformer.lm_head))
    )


def print_split(split: Split, runner: ModelRunner, total_s: float, steps: int) -> None:
    """Milliseconds per step by operation; `other` is what no operation covers."""
    known = sum(split.seconds.values())
    timing = runner.last_timing
    parts = sorted(split.seconds.items(), key=lambda item: -item[1])
    line = ", ".join(f"{name} {seconds / steps * 1e3:.2f}" for name, seconds in parts)
    last = f"; last step: inputs {timing.inputs_s * 1e3:.2f}, sample {timing.sample_s * 1e3:.2f}" if timing else ""
    print(f"    ms per step: {line}, other {(total_s - known) / steps * 1e3:.2f}{last}")
    split.seconds.clear()


def main() -> None:
    """Measure and print; with `--json FILE` write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--context", type=int, default=160)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--prompts", default="1024,4096")
    parser.add_argument("--chunk", type=int, default=CHUNK)
    parser.add_argument("--weights", type=Path, help="directory of packed weights; without it, in memory of its own")
    parser.add_argument("--quantization", default="auto", choices=("auto", "int8"))
    parser.add_argument("--split", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    limits = measure(options.threads)
    split = Split()
    weights = WeightCache(options.weights) if options.weights else None
    model = load_model(random_checkpoint(), weight_cache=weights, quantization=options.quantization)
    print(
        f"loaded in {model.load_s:.1f} s, weights {model.weight_bytes / 2**20:.0f} MiB; "
        f"{limits.threads} threads read {limits.read_gb_s:.1f} GB/s, bfloat16 {limits.gflop_s:.0f} GFLOP/s"
    )
    if options.split:
        model = watch(model, split)
    batches = [int(word) for word in options.batches.split(",") if word]
    prompts = [int(word) for word in options.prompts.split(",") if word]
    tokens = max([batch * (options.context + options.steps + 32) for batch in batches] + prompts + [0])
    engine = Engine(model, tokens)
    figures: dict[str, Any] = {"decode": {}, "prefill": {}}
    for batch in batches:
        split.seconds.clear()
        times = engine.decode_s(batch, options.context, options.steps)
        middle_s = statistics.median(times)
        limit_s = decode_limit_s(model.config, limits, batch, options.context, quantization=options.quantization)
        print(
            f"decode {batch:3d} x {options.context}: {middle_s * 1e3:7.1f} ms, {batch / middle_s:7.1f} tokens/s "
            f"(limit {batch / limit_s:7.1f}: {limit_s / middle_s:.0%})"
        )
        if options.split:
            print_split(split, engine.runner, sum(times) * (len(times) + 2) / len(times), len(times) + 2)
        figures["decode"][batch] = {"tokens_per_s": batch / middle_s, "limit_tokens_per_s": batch / limit_s}
    for length in prompts:
        engine.prefill_s(min(length, options.chunk), options.chunk)
        split.seconds.clear()
        elapsed_s, limit_s = engine.prefill_s(length, options.chunk), prefill_limit_s(model.config, limits, length)
        print(
            f"prefill {length:5d} in {options.chunk}: {elapsed_s:6.2f} s, {length / elapsed_s:7.1f} tokens/s "
            f"(limit {length / limit_s:7.1f}: {limit_s / elapsed_s:.0%})"
        )
        if options.split:
            print_split(split, engine.runner, elapsed_s, -(-length // options.chunk))
        figures["prefill"][length] = {"tokens_per_s": length / elapsed_s, "limit_tokens_per_s": length / limit_s}
    if options.json:
        limits_seen = {"threads": limits.threads, "read_gb_s": limits.read_gb_s, "gflop_s": limits.gflop_s}
        options.json.write_text(json.dumps({**describe(), "limits": limits_seen, **figures}, indent=1) + "\n")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
