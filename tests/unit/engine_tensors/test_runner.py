"""Plans in, tokens out: rows that do not sample, rows that fail, memory of the pool, sizing."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch
from support.engine_driver import Driver

from engine.kv_pool import kv_page_bytes, page_shape, pool_over
from engine.memory import available_memory_bytes, plan_pool
from engine.plan import Failed, Row, Sampled, StepPlan
from engine.runner import ModelRunner
from fleet.errors import SettingsError
from fleet.types import SamplingParams

CheckpointOf = Callable[[str], Path]
MIB = 2**20


def test_only_rows_that_sample_get_tokens(checkpoint: CheckpointOf) -> None:
    driver = Driver(checkpoint("llama3"))
    long, short = driver.admit(range(40), room=1), driver.admit([5, 6], room=1)
    first, second = driver.step([long, short], max_chunk=16)
    assert first is None
    assert isinstance(second, Sampled)
    assert long.num_computed_tokens == 16
    timing = driver.runner.last_timing
    assert timing is not None
    assert timing.num_tokens == 18
    assert min(timing.inputs_s, timing.forward_s, timing.sample_s) > 0


def test_a_stream_does_not_depend_on_chunks_company_or_where_it_is_replayed(checkpoint: CheckpointOf) -> None:
    params = SamplingParams(temperature=0.9, top_p=0.95, seed=1234, max_tokens=64, frequency_penalty=0.4)
    prompt = [7, 8, 9, 10, 11]
    alone = Driver(checkpoint("qwen3"))
    (stream,) = alone.generate([alone.admit(prompt, params, room=24)], 24)
    crowd = Driver(checkpoint("qwen3"), page_size=8)
    others = [crowd.admit(range(start, start + 30), params, room=24) for start in (1, 50, 100)]
    assert crowd.generate([*others, crowd.admit(prompt, params, room=24)], 24, max_chunk=3)[3] == stream
    replay = Driver(checkpoint("qwen3"))
    resumed = replay.admit([*prompt, *stream[:11]], params, room=13)
    resumed.passport = msgspec.structs.replace(resumed.passport, prompt_len=5)
    assert replay.generate([resumed], 24) == [stream]


def test_a_bad_row_fails_alone(checkpoint: CheckpointOf) -> None:
    directory = checkpoint("mistral-window")
    quiet = Driver(directory)
    expected = quiet.generate([quiet.admit(range(20), room=6)], 6)
    driver = Driver(directory)
    good = driver.admit(range(20), room=6)
    foreign = driver.admit([1, 320, 2])
    homeless = driver.admit([1, 2, 3])
    homeless.page_table = []
    lost = driver.admit([1, 2, 3])
    lost.page_table = [9999]
    sick = driver.admit(range(60), room=1)
    results = driver.step([foreign, good, homeless, lost])
    assert isinstance(results[0], Failed)
    assert "320" in results[0].message
    assert isinstance(results[1], Sampled)
    assert isinstance(results[2], Failed)
    assert isinstance(results[3], Failed)
    driver.step([sick])
    driver.pool[sick.page_table] = torch.nan  # as if its keys had overflowed
    sick.token_ids.append(1)
    while good.num_output_tokens < 6:
        outcome = driver.step([sick, good])
        assert isinstance(outcome[0], Failed)
        sick.num_computed_tokens -= 1
    assert [good.token_ids[20:]] == expected


def test_a_plan_of_bad_rows_only_is_answered(checkpoint: CheckpointOf) -> None:
    driver = Driver(checkpoint("llama"))
    sequence = driver.admit([1, 2, 3])
    output = driver.runner.run(StepPlan((Row(sequence, 2, 5, sample=True), Row(sequence, 0, 0, sample=False))))
    assert all(isinstance(result, Failed) for result in output.sampled)


def test_the_pool_lies_over_shared_memory(checkpoint: CheckpointOf) -> None:
    model = Driver(checkpoint("llama3")).model
    page_bytes = kv_page_bytes(model.config, 4, model.dtype)
    assert page_bytes == 3 * 2 * 2 * 4 * 16 * 4
    memory = mmap.mmap(-1, 8 * page_bytes)
    pool = pool_over(memory, config=model.config, num_pages=8, page_size=4, dtype=model.dtype)
    assert pool.shape == (8, *page_shape(model.config, 4))
    driver = Driver(checkpoint("llama3"))
    sequence = driver.admit([1, 2, 3, 4, 5])
    sequence.page_table = [6, 2]
    ModelRunner(model, pool, 4).run(StepPlan((Row(sequence, 0, 5, sample=True),)))
    written = [page for page in range(8) if any(memory[page * page_bytes : (page + 1) * page_bytes])]
    assert written == [2, 6]


def test_pools_of_another_shape_dtype_or_size_are_refused(checkpoint: CheckpointOf) -> None:
    driver = Driver(checkpoint("llama3"))
    with pytest.raises(ValueError, match="pool pages"):
        ModelRunner(driver.model, driver.pool, 8)
    with pytest.raises(ValueError, match="bfloat16"):
        ModelRunner(driver.model, driver.pool.to(torch.bfloat16), 4)
    config = driver.model.config
    with pytest.raises(ValueError, match="read-only"):
        pool_over(bytes(MIB), config=config, num_pages=2, page_size=4, dtype=torch.float32)
    with pytest.raises(ValueError, match="buffer"):
        pool_over(bytearray(64), config=config, num_pages=2, page_size=4, dtype=torch.float32)


def test_the_pool_is_sized_by_fraction_setting_ceiling_and_need() -> None:
    common = {"page_bytes": MIB, "page_size": 16, "available_bytes": 1000 * MIB}
    roomy = plan_pool(**common, max_model_len=1600, max_num_seqs=100)
    assert (roomy.num_pages, roomy.max_model_len, roomy.num_tokens) == (500, 1600, 8000)
    assert "5 sequences of 1600 tokens" in roomy.sentence
    assert roomy.total_bytes == 500 * MIB
    assert plan_pool(**common, max_model_len=1600, max_num_seqs=2).num_pages == 200
    assert plan_pool(**common, max_model_len=1600, max_num_seqs=9, kv_cache_bytes=300 * MIB).num_pages == 300
    assert plan_pool(**common, max_model_len=1600, max_num_seqs=9, ceiling_bytes=250 * MIB).num_pages == 250
    tight = plan_pool(**common, max_model_len=100_000, max_num_seqs=9)
    assert (tight.num_pages, tight.max_model_len) == (500, 8000)
    assert "cut from 100000 to 8000" in tight.sentence


def test_a_pool_that_cannot_be_had_or_used_is_refused_by_setting() -> None:
    common = {"page_bytes": MIB, "page_size": 16, "max_model_len": 4096, "max_num_seqs": 4}
    with pytest.raises(SettingsError, match=r"kv_cache_bytes is 2\.0 GiB"):
        plan_pool(**common, available_bytes=1000 * MIB, kv_cache_bytes=2048 * MIB)
    with pytest.raises(SettingsError, match="at least 128"):
        plan_pool(**common, available_bytes=1000 * MIB, kv_cache_bytes=7 * MIB)
    assert plan_pool(**common, available_bytes=1000 * MIB, kv_cache_bytes=8 * MIB).max_model_len == 128


def test_a_containers_limit_counts(tmp_path: Path) -> None:
    none = tmp_path / "none"
    machine = available_memory_bytes(cgroup_v2=none, cgroup_v1=none)
    (tmp_path / "memory.max").write_text(f"{500 * MIB}\n")
    (tmp_path / "memory.current").write_text(f"{480 * MIB}\n")
    (tmp_path / "memory.stat").write_text(f"anon 1\ninactive_file {70 * MIB}\n")
    assert available_memory_bytes(cgroup_v2=tmp_path, cgroup_v1=none) == min(machine, 90 * MIB)
    (tmp_path / "memory.max").write_text("max\n")
    assert available_memory_bytes(cgroup_v2=tmp_path, cgroup_v1=none) > 90 * MIB
