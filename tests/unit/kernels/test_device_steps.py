"""Decode steps whose tokens are chosen where their logits are: the same streams as by the host's sampler."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from kernel_kit import eagerly, with_kernels
from support.checkpoints import VOCAB_SIZE, make_checkpoint
from support.engine_driver import Driver

from engine.decode_graphs import DecodeGraphs
from engine.device_sampler import MAX_BIAS, DeviceSampler
from engine.kernel_backend import KernelBackend
from engine.kernels.penalties import Penalties, note_chosen
from engine.plan import Failed, Pending, Row, Sampled, StepOutput, StepPlan
from engine.runner import ModelRunner
from engine.sequence import Sequence
from engine.token_counts import TokenCounts
from fleet.types import SamplingParams
from fleet.worker_metrics import CHOSEN

NUM_TOKENS = 6
STOPS = tuple(range(0, VOCAB_SIZE, 2))
PARAMS = [
    SamplingParams(temperature=0.0, max_tokens=64, logprobs=3),
    SamplingParams(temperature=1.0, seed=2**63 + 5, max_tokens=64),
    SamplingParams(temperature=1.3, top_k=12, top_p=0.9, min_p=0.02, seed=7, max_tokens=64, logprobs=0),
    SamplingParams(temperature=0.7, seed=3, repetition_penalty=1.4, max_tokens=64),
    SamplingParams(temperature=0.0, presence_penalty=1.5, frequency_penalty=0.7, max_tokens=64, logprobs=1),
    SamplingParams(temperature=1.0, seed=11, logit_bias={1: 4.0, 5: -100.0}, max_tokens=64),
    SamplingParams(temperature=1.0, seed=12, stop_token_ids=STOPS, min_tokens=4, max_tokens=64),
]


class Device:
    """A model by kernels whose decode steps choose their tokens themselves; eager calls stand for graphs."""

    def __init__(self, directory: Path, *, max_rows: int = 8) -> None:
        self.driver = with_kernels(directory)
        driver, backend = self.driver, self.driver.model.transformer.backend
        assert isinstance(backend, KernelBackend)
        self.graphs = DecodeGraphs(
            driver.model.transformer,
            backend,
            driver.pool,
            driver.runner._input_shape,
            max_rows=max_rows,
            max_model_len=64,
            capture=eagerly,
        )
        self.runner = ModelRunner(driver.model, driver.pool, driver.page_size, driver.grammars, self.graphs)

    def launch(self, rows: list[Row]) -> Pending:
        plan = StepPlan(tuple(rows))
        assert self.runner.feeds_next(plan)
        pending = self.runner.launch(plan)
        assert not isinstance(pending, StepOutput)
        return pending


def admit(driver: Driver, params: list[SamplingParams]) -> list[Sequence]:
    draw = random.Random(3)
    prompts = [[draw.randrange(VOCAB_SIZE) for _ in range(3 + at)] for at in range(len(params))]
    return [driver.admit(prompt, one, room=24) for prompt, one in zip(prompts, params, strict=True)]


def book(rows: list[Row], output: StepOutput) -> list[Sampled]:
    sampled = []
    for row, result in zip(rows, output.sampled, strict=True):
        assert isinstance(result, Sampled), result
        row.sequence.token_ids.append(result.token_id)
        row.sequence.num_computed_tokens = row.start + 1
        sampled.append(result)
    return sampled


def row_of(sequence: Sequence) -> Row:
    return Row(sequence, sequence.num_computed_tokens, 1, sample=True)


def assert_same(ours: list[Sampled], theirs: list[object]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert isinstance(other, Sampled)
        assert one.token_id == other.token_id
        assert (one.logprob is None) == (other.logprob is None)
        if one.logprob is not None and other.logprob is not None:
            assert one.logprob.logprob == pytest.approx(other.logprob.logprob, abs=1e-4)
            assert [top.token_id for top in one.logprob.top] == [top.token_id for top in other.logprob.top]


def test_steps_launched_behind_each_other_give_the_hosts_tokens(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / "qwen3", "qwen3")
    host, device = Driver(directory), Device(directory)
    theirs, ours = admit(host, PARAMS), admit(device.driver, PARAMS)
    host.step(theirs)
    device.driver.step(ours)  # the prompts, and the first tokens
    expected = [host.step(theirs) for _ in range(NUM_TOKENS)]
    rows = [row_of(one) for one in ours]
    pending = device.launch(rows)
    for number in range(NUM_TOKENS):
        order = list(range(len(rows)))
        random.Random(number).shuffle(order)
        behind = [Row(rows[at].sequence, rows[at].start + 1, 1, sample=True, follows=at) for at in order]
        following = device.launch(behind)  # before anything of this step is known
        sampled = dict(zip([row.sequence for row in rows], book(rows, pending.wait()), strict=True))
        assert_same([sampled[one] for one in ours], list(expected[number]))
        rows, pending = behind, following
    assert len({tuple(one.token_ids[one.prompt_len :]) for one in ours}) == len(ours)
    assert device.runner.num_steps == {"device": NUM_TOKENS + 1}


def test_host_steps_in_between_change_nothing(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / "qwen3", "qwen3")
    host, device = Driver(directory), Device(directory)
    theirs, ours = admit(host, PARAMS), admit(device.driver, PARAMS)
    for number in range(NUM_TOKENS):
        expected = host.step(theirs)
        if number % 3:
            rows = [row_of(one) for one in ours]
            assert_same(book(rows, device.launch(rows).wait()), list(expected))
        else:
            assert_same([one for one in device.driver.step(ours) if isinstance(one, Sampled)], list(expected))


def test_what_the_device_cannot_choose_goes_to_the_host_and_is_counted(tmp_path: Path) -> None:
    device = Device(make_checkpoint(tmp_path / "qwen3", "qwen3"), max_rows=2)
    driver, runner = device.driver, device.runner
    (odd,) = admit(driver, [SamplingParams(logit_bias={VOCAB_SIZE: 1.0}, max_tokens=9)])
    odd.token_ids.append(3)
    plan = StepPlan((Row(odd, odd.prompt_len, 1, sample=True),))
    assert not runner.feeds_next(plan)
    assert isinstance(runner.launch(plan), StepOutput)
    assert runner.num_steps["logit_bias"] == 1
    good = admit(driver, PARAMS[:3])
    plans = {
        "prompt": StepPlan((Row(good[0], 0, 3, sample=True),)),
        "batch": StepPlan(tuple(Row(one, one.prompt_len - 1, 1, sample=True) for one in good)),
        "bad_row": StepPlan((Row(good[0], 60, 1, sample=True),)),
    }
    for reason, plan in plans.items():
        output = runner.launch(plan)
        assert isinstance(output, StepOutput)
        assert isinstance(output.sampled[0], Failed) == (reason == "bad_row")
        assert runner.num_steps[reason] == 1
    penalised = [SamplingParams(presence_penalty=1.0, max_tokens=9)] * 3
    rows = [Row(one, one.prompt_len - 1, 1, sample=True) for one in admit(driver, penalised)]
    sampler = DeviceSampler(vocab_size=VOCAB_SIZE, max_rows=2, device=torch.device("cpu"))
    assert sampler.why_host(rows[:2]) is None
    assert sampler.why_host(rows) == "penalties"
    banned = SamplingParams(stop_token_ids=STOPS, min_tokens=5, max_tokens=9)
    (many,) = admit(driver, [banned])
    row = Row(many, many.prompt_len - 1, 1, sample=True)
    assert sampler.why_host([row]) is None
    assert sampler.why_host([row] * (1 + MAX_BIAS // len(STOPS))) == "logit_bias"
    edited = [SamplingParams(logit_bias={3: 1.0}, max_tokens=9), *penalised[:2]]
    rows = [Row(one, one.prompt_len - 1, 1, sample=True) for one in admit(driver, edited)]
    assert sampler.why_host(rows) == "logit_bias", "no room for that many edited rows"
    assert {*runner.num_steps, "penalties", "device", "device_grammar"} == set(CHOSEN)


def test_a_row_without_a_choice_fails_alone_and_so_does_what_follows_it(tmp_path: Path) -> None:
    device = Device(make_checkpoint(tmp_path / "qwen3", "qwen3"))
    good, bad = admit(device.driver, [PARAMS[0]] * 2)
    device.driver.step([good, bad])
    device.driver.pool[bad.page_table[0]] = torch.nan
    rows = [row_of(bad), row_of(good)]
    first = device.launch(rows)
    behind = [Row(row.sequence, row.start + 1, 1, sample=True, follows=at) for at, row in enumerate(rows)]
    second = device.launch(behind)
    for results in (first.wait().sampled, second.wait().sampled):
        assert isinstance(results[0], Failed)
        assert "finite" in results[0].message
        assert isinstance(results[1], Sampled)


def test_counts_change_owners_when_rows_are_few(tmp_path: Path) -> None:
    driver = Driver(make_checkpoint(tmp_path / "qwen3", "qwen3"))
    counts = TokenCounts(2, VOCAB_SIZE, torch.device("cpu"))
    sequences = admit(driver, [SamplingParams(presence_penalty=1.0, max_tokens=9)] * 3)
    draw = random.Random(9)
    for _ in range(40):
        chosen = draw.sample(sequences, k=draw.choice([1, 2]))
        penalised = [(at, Row(one, len(one.token_ids) - 1, 1, sample=True)) for at, one in enumerate(chosen)]
        places = dict(counts.places(penalised))
        assert len(set(places.values())) == len(chosen)
        for at, one in enumerate(chosen):
            expected = torch.zeros(VOCAB_SIZE, dtype=torch.int32)
            for token in one.token_ids[one.prompt_len :]:
                expected[token] += 2
            expected[one.token_ids[: one.prompt_len]] += 1
            assert torch.equal(counts.counts[places[at]], expected)
        tokens = [draw.randrange(-1, VOCAB_SIZE) for _ in chosen]
        none = torch.zeros(len(chosen))
        rows = torch.tensor([places[at] for at in range(len(chosen))]).int()
        note_chosen(Penalties(rows, counts.counts, none, none.double(), none.double()), torch.tensor(tokens))
        for one, token in zip(chosen, tokens, strict=True):
            if token >= 0:
                one.token_ids.append(token)
