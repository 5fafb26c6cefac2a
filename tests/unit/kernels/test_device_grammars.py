"""Constrained rows whose tokens are chosen on the device: forward passes run ahead, choices wait for masks."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest
from kernel_kit import eagerly, with_kernels
from support.checkpoints import make_checkpoint
from support.engine_driver import Driver
from support.passports import make_fingerprint, make_passport
from support.stepping import run_until_idle

from engine.decode_graphs import DecodeGraphs
from engine.decode_scheduler import DecodeScheduler
from engine.kernel_backend import KernelBackend
from engine.limits import DecodeLimits
from engine.pages import PagePool
from engine.plan import Pending, Runner, StepOutput, StepPlan
from engine.prefix_cache import PrefixCache
from engine.progress import StepProgress
from engine.runner import ModelRunner
from fleet.types import FinishReason, Grammar, GrammarKind, SamplingParams

DEMO = Path(__file__).parents[3] / "models" / "demo"
VOCAB_SIZE = 3072
MAX_MODEL_LEN = 64
STOP = 0


def constrained(source: str, *, seed: int, **more: object) -> SamplingParams:
    fields = {"temperature": 1.2, "seed": seed, "max_tokens": 30, "stop_token_ids": (STOP,), **more}
    return SamplingParams(grammar=Grammar(GrammarKind.REGEX, source), **fields)  # type: ignore[arg-type]


PARAMS = [
    SamplingParams(temperature=1.0, seed=1, top_p=0.9, max_tokens=9, logprobs=2),
    constrained("[0-9]{2,9}", seed=2, top_k=20),
    constrained("(red|green|blue)+", seed=3, presence_penalty=1.0, logprobs=1),
    constrained("ab", seed=4),
    constrained("(", seed=5),
    constrained("[a-z ]*", seed=6, temperature=0.0, logit_bias={5: 3.0}, max_tokens=12),
    constrained("(ab)*", seed=7, logit_bias={STOP: 100.0}, min_tokens=3),
]


class Counted:
    """A runner that counts constrained rows which were launched before what they follow was known."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self.num_unseen = 0

    def feeds_next(self, plan: StepPlan) -> bool:
        return self._runner.feeds_next(plan)

    def launch(self, plan: StepPlan) -> StepOutput | Pending:
        rows = [row for row in plan.rows if row.sequence.params.grammar is not None]
        self.num_unseen += sum(row.follows is not None for row in rows)
        return self._runner.launch(plan)


Ends = dict[str, tuple[list[int], list[int], FinishReason | None, str | None]]


async def drive(driver: Driver, runner: Runner) -> Ends:
    """Decode everything to its end by scheduler and step loop; by request, its tokens, the likeliest, and its end."""
    pool = PagePool(driver.pool.shape[0], driver.page_size)
    limits = DecodeLimits(max_model_len=MAX_MODEL_LEN, lookahead_tokens=0)
    scheduler = DecodeScheduler(pool, PrefixCache(pool, make_fingerprint()), limits, feeds_next=runner.feeds_next)
    for number, params in enumerate(PARAMS):
        passport = make_passport([7 + number, 8, 9], request_id=f"r{number}", params=params)
        reservation = scheduler.reserve(passport, [])
        assert reservation is not None
        scheduler.adopt(reservation, passport, 0)
    ends: Ends = {}

    def on_step(plan: StepPlan, progress: StepProgress, step_s: float) -> None:
        del plan, step_s
        for row in progress.rows:
            ids, likeliest, _, _ = ends.setdefault(row.sequence.request_id, ([], [], None, None))
            if row.sampled is not None:
                ids.append(row.sampled.token_id)
                likeliest += [one.token_id for one in row.sampled.logprob.top] if row.sampled.logprob else []
            ends[row.sequence.request_id] = ids, likeliest, row.finish, row.error

    await run_until_idle(scheduler, runner, on_step, timeout_s=100)
    pool.check()
    assert pool.num_used == 0
    return ends


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A small model with the demo's vocabulary."""
    directory = make_checkpoint(tmp_path / "qwen3", "qwen3", vocab_size=VOCAB_SIZE)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(DEMO / name, directory / name)
    return directory


def test_constrained_rows_run_ahead_and_choose_as_the_host_does(checkpoint: Path) -> None:
    host = Driver(checkpoint)
    expected = asyncio.run(drive(host, host.runner))
    assert [expected[f"r{at}"][2] for at in (3, 4)] == [FinishReason.STOP, FinishReason.ERROR]
    driver = with_kernels(checkpoint)
    backend = driver.model.transformer.backend
    assert isinstance(backend, KernelBackend)
    graphs = DecodeGraphs(
        driver.model.transformer,
        backend,
        driver.pool,
        driver.runner._input_shape,
        max_rows=8,
        max_model_len=MAX_MODEL_LEN,
        capture=eagerly,
    )
    runner = ModelRunner(driver.model, driver.pool, driver.page_size, driver.grammars, graphs)
    counted = Counted(runner)
    assert asyncio.run(drive(driver, counted)) == expected
    assert runner.num_steps["device_grammar"] > 8
    assert set(runner.num_steps) <= {"prompt", "device", "device_grammar"}
    assert counted.num_unseen > 20, "forward passes of constrained rows waited for tokens"
    for each in (host, driver):
        each.grammars.close()
