"""What the stages of the GPU bench make of what their processes say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import child_process
import pytest
from fleet_process import Fleets, HandOffs
from gpu_stages import COPY, PRODUCT, GpuStages, Scale
from model_directory import QWEN3_8B
from model_sizes import Sizes
from stage_results import Results
from stages import Clock, Stage, run

SIZES = Sizes.of(QWEN3_8B)
FAKE_KERNELS = """
import sys, time
for part in sys.argv[sys.argv.index("--parts") + 1:]:
    print("==", part, flush=True)
    print("line of", part, flush=True)
    if part == "decode":
        sys.exit("CUDA error: an illegal memory access was encountered")
    if part == "prefill":
        time.sleep(60)
"""


class FakeFleets(Fleets):
    """Answers of a load test that nobody ran."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, ...]] = []
        self.used = {"cuda_ipc": HandOffs(8.0, 8e9, 0.005)}

    def need(self, *_: object) -> float | None:
        return 1.0

    def load(self, _clock: object, *words: str) -> dict[str, Any]:
        self.asked.append(words)
        request = {"content_times_s": [0.0, 0.025, 0.030, 0.035]}
        summary = {"tpot_s": {"p50": 0.005}, "ttft_s": {"p50": 0.1}, "output_tokens_per_s": 17_000.0}
        return {"summary": summary, "requests": [request, request]}

    def hand_offs(self) -> dict[str, HandOffs]:
        return self.used


def made(tmp_path: Path, fleets: Fleets, results: Results, scale: Scale) -> dict[str, Stage]:
    stages = GpuStages(
        fleets, results, scale, model=tmp_path, small=tmp_path, flags=(), device="cuda", environment={}, logs=tmp_path
    )
    return {stage.name: stage for stage in stages.all(fp8=True)}


@pytest.fixture
def scale() -> Scale:
    return Scale(256, 768, 1024, (1024,), 8192, 20.0, SIZES, (), "cuda_ipc", ())


def test_figures_stand_beside_limits_of_the_file(tmp_path: Path, scale: Scale) -> None:
    results = Results(tmp_path / "results.json", {})
    with results.stage("limits") as booking:
        booking.add(COPY, 4000.0, "GB/s")
        booking.add(PRODUCT, 800.0, "TFLOP/s")
    fleets = FakeFleets()
    stages = made(tmp_path, fleets, results, scale)
    run(
        [stages[name] for name in ("one_stream", "one_stream_fp8", "saturated", "prefill", "hand_off")],
        results, Clock(60),
    )  # fmt: skip
    rows = {
        row["name"]: row for stage in json.loads((tmp_path / "results.json").read_text())["stages"].values()
        for row in stage["rows"]
    }  # fmt: skip
    one = rows["decode, 1 stream"]
    assert one["value"] == pytest.approx(200)
    assert one["limit"] == pytest.approx(4e12 / SIZES.step_bytes(1, 640))
    assert (one["target"], one["met"]) == (pytest.approx(0.85 * one["limit"]), one["value"] > 0.85 * one["limit"])
    assert rows["decode, 1 stream, FP8 weights and pages"]["target"] == 400.0
    many = rows["128 in, 1024 out, 256 streams"]
    assert (many["value"], many["met"]) == (17_000.0, True)
    assert many["limit"] == pytest.approx(256 * 4e12 / SIZES.step_bytes(256, 640))
    prompt = rows["prefill, 1024 tokens"]
    assert (prompt["value"], prompt["limit"]) == (10_240, pytest.approx(8e14 * 1024 / SIZES.prompt_flops(1024)))
    assert rows["hand-off of 8192 tokens, beyond a step, p50"]["value"] == pytest.approx(20.0)
    copying = rows["copying by cuda_ipc, read and written"]
    assert (copying["value"], copying["limit"], copying["target"]) == (pytest.approx(3200), 4000.0, 3200.0)
    assert results.failed == []


def test_pages_that_went_another_way_are_a_fault(tmp_path: Path, scale: Scale) -> None:
    results = Results(tmp_path / "results.json", {})
    fleets = FakeFleets()
    fleets.used = {"cuda_ipc": HandOffs(1.0, 1e9, 0.1), "tcp": HandOffs(7.0, 7e9, 1.0)}
    run([made(tmp_path, fleets, results, scale)["hand_off"]], results, Clock(60))
    assert results.failed == ["hand_off"]
    assert "pages went over cuda_ipc, tcp, not cuda_ipc alone" in results.table()


def test_a_kernel_that_takes_its_process_along_leaves_the_parts_after_it(
    tmp_path: Path, scale: Scale, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "kernels.py").write_text(FAKE_KERNELS)
    monkeypatch.setattr(child_process, "ROOT", tmp_path)
    monkeypatch.setattr("gpu_stages.PART_S", 2.0)
    results = Results(tmp_path / "results.json", {})
    run([made(tmp_path, FakeFleets(), results, scale)["kernels"]], results, Clock(60))
    entry = json.loads((tmp_path / "results.json").read_text())["stages"]["kernels"]
    parts = [line.removeprefix("line of ") for line in entry["lines"] if line.startswith("line of")]
    assert parts == ["rows", "decode", "prefill", "sampling", "copies", "fp8"]
    crashed, hung = entry["faults"]
    assert "illegal memory access" in crashed
    assert "time was up" in hung
