"""The stages of `bench/gpu_acceptance.py`: what is run, and what each figure is held against.

Decoding reads all weights and the context's keys and values once per step, so its limit is the measured copy rate over
those bytes; a prompt costs two operations per weight and token plus attention, over the measured product rate.
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import child_process
from fleet_process import Fleets, FleetSpec
from kernel_parts import BEGIN, PARTS
from model_sizes import Sizes
from stage_results import Booking, Fault, Results
from stages import Clock, Stage

COPY, PRODUCT, FP8_PRODUCT = "device copy, read and written", "bfloat16 product", "FP8 product"
FP8_FLAGS = ("--quantization", "fp8", "--kv-cache-dtype", "fp8_e4m3")
START_S = 180.0
PART_S = 100.0
"""For one part of the kernels; compiling is most of it."""
QUESTION = "What is TTFT?"


@dataclass(frozen=True)
class Scale:
    """What a run asks for; the rehearsal asks for little.

    Attributes:
        streams: for the saturated figure. outputs: tokens of each answer there and at batch 1.
        prompts: prompt lengths whose prefill is timed. long_prompt: of hand-offs and intruders.
        sizes: of the model, None where there are no limits and targets to compare with.
        profiled: arguments of `bench/idle_gaps.py`.
        transport: that hand-offs must take, empty for any.
        tests: files or folders of the kernels' tests.
    """

    streams: int
    saturated_requests: int
    outputs: int
    prompts: tuple[int, ...]
    long_prompt: int
    phase_s: float
    sizes: Sizes | None
    profiled: tuple[str, ...]
    transport: str
    tests: tuple[str, ...]


class GpuStages:
    """All stages over one set of fleets.

    Args:
        fleets: runs them.
        results: where the limits are looked up.
        scale: of the run.
        model, small: directories of the measured model and of one with weights that answers make sense of.
        flags: of `baton up` for the measured model.
        device: `cuda`, in the rehearsal `cpu`.
        environment: of processes that use the card; logs: folder of what they say.
    """

    def __init__(
        self,
        fleets: Fleets,
        results: Results,
        scale: Scale,
        *,
        model: Path,
        small: Path,
        flags: tuple[str, ...],
        device: str,
        environment: dict[str, str],
        logs: Path,
    ) -> None:
        self._fleets = fleets
        self._results = results
        self._scale = scale
        self._main = FleetSpec("main", model, (*flags, "--device", device))
        self._fp8 = FleetSpec("fp8", model, (*flags, "--device", device, *FP8_FLAGS))
        self._small = (
            FleetSpec("small", small, ("--device", device)),
            FleetSpec("reference", small, ("--device", "cpu", "--dtype", "float32")),
        )
        self._environment = environment
        self._logs = logs

    def all(self, *, fp8: bool) -> list[Stage]:
        """In the order in which they are worth having; the one of FP8 weights where the card has `fp8`."""
        main, of_fp8 = self._need(self._main), self._need(self._fp8)
        stages = [
            Stage("limits", 90, self.limits),
            Stage("kernels", 200, self.kernels),
            Stage("answers", 150, self.answers),
            Stage("one_stream", 60, partial(self.one_stream, fp8=False), main),
            Stage("prefill", 60, self.prefill, main),
            Stage("hand_off", 60, self.hand_off, main),
            Stage("saturated", 150, self.saturated, main),
            Stage("interference", 150, self.interference, main),
            Stage("idle_gaps", 120, self.idle_gaps),
        ]
        if fp8:
            stages.append(Stage("one_stream_fp8", 60, partial(self.one_stream, fp8=True), of_fp8))
        return [*stages, Stage("gateway", 60, self.gateway), Stage("kernel_tests", 240, self.kernel_tests)]

    def limits(self, booking: Booking, clock: Clock) -> None:
        """Copy and product rates of the device."""
        found = self._run_for_json(clock, "bench/device_limits.py")
        if found is None:
            booking.say("no GPU, no limits")
            return
        booking.add(COPY, found["copy_bytes_per_s"] / 1e9, "GB/s")
        booking.add(PRODUCT, found["flops"] / 1e12, "TFLOP/s")
        booking.add(FP8_PRODUCT, found["fp8_flops"] / 1e12, "TFLOP/s")

    def kernels(self, booking: Booking, clock: Clock) -> None:
        """Every kernel against its twin; a part that ends or hangs the process leaves the parts after it to another."""
        left = list(PARTS)
        while left:
            part = Clock(PART_S, clock)
            begun: list[str] = []

            def hear(line: str, part: Clock = part, begun: list[str] = begun) -> None:
                booking.say(line)
                if line.startswith(BEGIN):
                    begun.append(line.removeprefix(BEGIN))
                    part.restart()

            try:
                self._run(part, "bench/kernels.py", "--parts", *left, on_line=hear)
            except Fault as fault:
                booking.fault(str(fault))
                if not begun or clock.left_s == 0:
                    return
                left = left[left.index(begun[-1]) + 1 :]
            else:
                return

    def answers(self, booking: Booking, clock: Clock) -> None:
        """The trained demo model, greedily: the device says what plain float32 on a CPU says."""
        said = []
        for spec in self._small:
            booking.add(f"start to ready, {spec.name}", self._fleets.need(spec, clock) or 0.0, "s")
            body = {"model": spec.name, "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 64}
            answer = json.loads(self._fleets.ask("/v1/chat/completions", body | {"temperature": 0}))
            said.append(str(answer["choices"][0]["message"]["content"]))
            booking.say(f"{spec.name}: {said[-1]!r}")
        first, second = (text.split() for text in said)
        pairs = enumerate(zip(first, second, strict=False))
        alike = next((at for at, (one, other) in pairs if one != other), min(len(first), len(second)))
        booking.add("words alike before rounding tells", alike, "words", target=8.0)

    def one_stream(self, booking: Booking, clock: Clock, *, fp8: bool) -> None:
        """Decoding speed of a single stream, on a fleet that is warmed up first."""
        self._fleets.load(
            clock, "--concurrency", "2", "--num-requests", "8", "--prompt-len", "64", "--output-len", "32"
        )
        outputs = self._scale.outputs
        single = self._fleets.load(clock, "--concurrency", "1", "--num-requests", "3", "--output-len", str(outputs))
        limit = self._decode_limit(1, fp8=fp8)
        target = None if limit is None else 400.0 if fp8 else 0.85 * limit
        name = f"decode, 1 stream{', FP8 weights and pages' if fp8 else ''}"
        booking.add(name, 1 / single["summary"]["tpot_s"]["p50"], "tokens/s", limit=limit, target=target)

    def saturated(self, booking: Booking, clock: Clock) -> None:
        """Tokens per second of as many streams as run at once."""
        scale = self._scale
        many = self._fleets.load(
            clock, "--concurrency", str(scale.streams), "--num-requests", str(scale.saturated_requests),
            "--output-len", str(scale.outputs), "--timeout-s", "600",
        )["summary"]  # fmt: skip
        booking.add(
            f"128 in, {scale.outputs} out, {scale.streams} streams", many["output_tokens_per_s"], "tokens/s",
            limit=self._decode_limit(scale.streams), target=16_000.0 if scale.sizes else None,
        )  # fmt: skip

    def prefill(self, booking: Booking, clock: Clock) -> None:
        """Prompts alone, one after the other."""
        flops, sizes = self._results.value("limits", PRODUCT), self._scale.sizes
        for length in self._scale.prompts:
            one = self._fleets.load(
                clock, "--concurrency", "1", "--num-requests", "5", "--prompt-len", str(length), "--output-len", "1"
            )["summary"]
            limit = flops * 1e12 / (sizes.prompt_flops(length) / length) if flops and sizes else None
            target = 0.75 * limit if limit else None
            booking.add(
                f"prefill, {length} tokens", length / one["ttft_s"]["p50"], "tokens/s", limit=limit, target=target
            )

    def hand_off(self, booking: Booking, clock: Clock) -> None:
        """What a long prompt's second token waits beyond a step, and that pages go the way they should."""
        length = self._scale.long_prompt
        longs = self._fleets.load(
            clock, "--concurrency", "1", "--num-requests", "8", "--prompt-len", str(length), "--output-len", "16"
        )["requests"]
        first, rest = [], []
        for one in longs:
            gaps = [b - a for a, b in zip(one["content_times_s"], one["content_times_s"][1:], strict=False)]
            first += gaps[:1]  # a slow machine's answer may come as one piece
            rest += gaps[1:]
        used = self._fleets.hand_offs()
        booking.say(f"hand-offs by transport: { {name: each.count for name, each in used.items()} }")
        for name, each in used.items():
            limit = self._results.value("limits", COPY) if name == "cuda_ipc" else None
            rate = 2 * each.num_bytes / max(each.copy_s, 1e-9) / 1e9  # each byte is read and written
            target = 0.8 * limit if limit else None
            booking.add(f"copying by {name}, read and written", rate, "GB/s", limit=limit, target=target)
        if self._scale.transport and set(used) != {self._scale.transport}:
            booking.fault(f"pages went over {', '.join(used) or 'nothing'}, not {self._scale.transport} alone")
        if not rest:
            raise Fault("every answer came in one or two pieces: this machine is too slow to time a hand-off")
        over_ms = (statistics.median(first) - statistics.median(rest)) * 1e3
        target = 10.0 if self._scale.sizes else None
        booking.add(f"hand-off of {length} tokens, beyond a step, p50", over_ms, "ms", target=target, at_most=True)

    def interference(self, booking: Booking, clock: Clock) -> None:
        """Streams while long prompts keep coming."""
        both = self._fleets.load(
            clock, "interference", "--concurrency", "8", "--duration-s", str(self._scale.phase_s),
            "--output-len", "256", "--intruder-len", str(self._scale.long_prompt),
        )["outcome"]  # fmt: skip
        median, late = both["itl_p50_ratio"], both["itl_p99_to_undisturbed_median"]
        booking.add("median ITL with long prompts, to undisturbed", median, "times", target=2.0, at_most=True)
        booking.add("ITL p99 with long prompts, to undisturbed median", late, "times", target=2.5, at_most=True)
        booking.add("prompts' speed beside streams, to alone", both["prompt_progress"], "times")

    def idle_gaps(self, booking: Booking, clock: Clock) -> None:
        """What the device waits between the kernels of decode steps."""
        self._fleets.close()
        found = self._run_for_json(clock, "bench/idle_gaps.py", *self._scale.profiled)
        target = 3.0 if self._scale.sizes else None
        booking.add(f"decode step, {found['batch']} streams, profiled", found["step_ms"], "ms")
        booking.add("idle between its kernels", found["idle_share"] * 100, "%", target=target, at_most=True)
        booking.add("of it in gaps beyond 5 us", found["long_gap_share"] * 100, "%")

    def gateway(self, booking: Booking, clock: Clock) -> None:
        """What the gateway adds on this machine's CPU, with made-up workers."""
        report = self._logs / "gateway_overhead.json"
        self._run(clock, "bench/gateway_overhead.py", "--duration-s", "5", "--tokens", "500", "--json", str(report))
        found = json.loads(report.read_text())
        for row in found["latency"]:
            booking.add(f"{row['name']}, p95", row["p95_ms"], "ms", target=2.0, at_most=True)
        booking.add("streamed", found["throughput"]["tokens_per_core_s"], "tokens per core and s", target=20_000.0)

    def kernel_tests(self, booking: Booking, clock: Clock) -> None:
        """The kernels' own tests, whole models among them, compiled where there is a GPU and interpreted elsewhere."""
        if importlib.util.find_spec("pytest") is None:
            raise Fault("pytest is not installed")
        self._fleets.close()
        # Our configuration asks for plugins that a bare machine lacks.
        plain = ("-c", os.devnull, "--rootdir", ".", "-o", "pythonpath=. tests", "-p", "no:cacheprovider")
        said = self._run(clock, "-m", "pytest", "-q", "--tb=short", *plain, *self._scale.tests)
        booking.say(said.splitlines()[-1])

    def _decode_limit(self, streams: int, *, fp8: bool = False) -> float | None:
        """Tokens per second at which all bytes are read once per step."""
        copy, sizes = self._results.value("limits", COPY), self._scale.sizes
        if not copy or not sizes:
            return None
        return streams * copy * 1e9 / sizes.step_bytes(streams, 128 + self._scale.outputs / 2, fp8=fp8)

    def _need(self, spec: FleetSpec) -> tuple[Callable[[Clock], None], float]:
        def need(clock: Clock) -> None:
            took_s = self._fleets.need(spec, clock)
            if took_s is not None:
                print(f"fleet {spec.name} ready after {took_s:.1f} s", flush=True)

        return need, START_S

    def _run(self, clock: Clock, *words: str, on_line: Callable[[str], None] | None = None) -> str:
        return child_process.run(words, clock, self._log(words), environment=self._environment, on_line=on_line)

    def _run_for_json(self, clock: Clock, *words: str) -> Any:
        return child_process.run_for_json(words, clock, self._log(words), environment=self._environment)

    def _log(self, words: tuple[str, ...]) -> Path:
        return self._logs / f"{Path(words[1] if words[0] == '-m' else words[0]).stem}.log"
