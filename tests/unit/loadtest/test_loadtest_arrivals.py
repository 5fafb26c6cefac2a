"""Arrival times, lengths and prompts: their statistics and that they follow from the seed alone."""

import asyncio
import itertools
import math
from typing import Any

import msgspec
import numpy as np
import pytest
from fake_openai import TEMPLATE_TOKENS, tokens_of

from loadtest.arrivals import arrival_times
from loadtest.errors import BadArgument
from loadtest.lengths import parse_lengths
from loadtest.server import Server
from loadtest.settings import Endpoint, PromptForm, Settings
from loadtest.sizing import Method, Sizes, from_probes, measure_words, probe_text, with_overhead
from loadtest.words import WORDS
from loadtest.workload import Dialect, Workload


def gaps_of(rate: float, burstiness: float, seed: int, number: int = 20_000) -> np.ndarray:
    times = arrival_times(rate, burstiness, np.random.default_rng(seed))
    return np.diff([0.0, *itertools.islice(times, number)])


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_have_the_mean_of_the_rate_and_the_spread_of_the_shape(burstiness: float) -> None:
    gaps = gaps_of(8.0, burstiness, seed=1)
    assert gaps.min() >= 0
    assert gaps.mean() == pytest.approx(1 / 8, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(1 / math.sqrt(burstiness), rel=0.05)


def test_poisson_gaps_are_exponential() -> None:
    gaps = gaps_of(5.0, 1.0, seed=2)
    for seconds in (0.05, 0.2, 0.6):
        assert (gaps > seconds).mean() == pytest.approx(math.exp(-5 * seconds), abs=0.01)


def test_infinite_burstiness_spaces_arrivals_exactly() -> None:
    assert list(itertools.islice(arrival_times(4.0, math.inf, np.random.default_rng(0)), 4)) == [
        0.25,
        0.5,
        0.75,
        1.0,
    ]


def test_the_seed_decides_arrivals() -> None:
    assert gaps_of(3.0, 1.0, seed=7, number=50).tolist() == gaps_of(3.0, 1.0, seed=7, number=50).tolist()
    assert gaps_of(3.0, 1.0, seed=7, number=50).tolist() != gaps_of(3.0, 1.0, seed=8, number=50).tolist()


def test_lengths_keep_their_bounds_and_centre() -> None:
    rng = np.random.default_rng(0)
    uniform = [parse_lengths("-", "64:66").draw(rng) for _ in range(300)]
    assert set(uniform) == {64, 65, 66}
    assert parse_lengths("-", "17").draw(rng) == 17
    normal = [parse_lengths("-", "normal:200:40:100:250").draw(rng) for _ in range(4000)]
    assert min(normal) >= 100
    assert max(normal) == 250
    assert np.median(normal) == pytest.approx(200, rel=0.02)
    lognormal = [parse_lengths("-", "lognormal:300:0.5").draw(rng) for _ in range(4000)]
    assert np.median(lognormal) == pytest.approx(300, rel=0.05)
    assert max(lognormal) <= 2400


@pytest.mark.parametrize("text", ["", "x", "0", "-3", "9:4", "1:2:3", "normal:5", "normal:5:-1", "lognormal:nan:1"])
def test_unusable_lengths_name_the_option(text: str) -> None:
    with pytest.raises(BadArgument, match="--output-len"):
        parse_lengths("--output-len", text)


async def count_like_the_fake(text: str) -> list[int]:
    return tokens_of(text)


def workload(sizes: Sizes, *, warmup: bool = False, **options: Any) -> Workload:
    settings = Settings(url="http://127.0.0.1:1/v1", rate=1, num_requests=1, **options)
    server = Server(settings, lambda: 0.0)
    return Workload(settings, server, "m", Dialect(), sizes, warmup=warmup)


def bodies_of(work: Workload, number: int) -> list[dict[str, Any]]:
    return [msgspec.json.decode(work.next_call().request.partition(b"\r\n\r\n")[2]) for _ in range(number)]


def prompts_of(work: Workload, number: int) -> list[str]:
    return [body["messages"][0]["content"] for body in bodies_of(work, number)]


def exact_sizes() -> Sizes:
    sizes = asyncio.run(measure_words(count_like_the_fake))
    return with_overhead(sizes, 4, len(tokens_of(probe_text(4))) + TEMPLATE_TOKENS)


def test_measured_words_match_the_tokenizer() -> None:
    sizes = exact_sizes()
    assert sizes.method is Method.TOKENIZE
    assert sizes.overhead == TEMPLATE_TOKENS
    assert sizes.costs == tuple(float(len(tokens_of(word))) for word in WORDS)
    assert set(sizes.token_ids) <= {token for word in WORDS for token in tokens_of(word)}


@pytest.mark.parametrize("tokens", [6, 7, 50, 513])
def test_prompts_come_out_at_the_exact_length(tokens: int) -> None:
    work = workload(exact_sizes(), prompt_len=parse_lengths("-", str(tokens)))
    for prompt in prompts_of(work, 20):
        assert len(tokens_of(prompt)) + TEMPLATE_TOKENS == tokens


def test_expensive_words_still_fill_a_prompt_exactly() -> None:
    # As under a byte tokenizer: no word of one token, so a careless choice leaves a rest of one.
    sizes = Sizes(Method.TOKENIZE, ("aa", "bbb", "ccccccc"), (2.0, 3.0, 7.0), 0.0)
    work = workload(sizes, prompt_len=parse_lengths("-", "40:60"))
    for _ in range(50):
        call = work.next_call()
        body = msgspec.json.decode(call.request.partition(b"\r\n\r\n")[2])
        words = body["messages"][0]["content"].split()
        assert sum(len(word) for word in words) == call.prompt_tokens


def test_a_length_below_the_template_gives_one_word() -> None:
    assert [
        len(prompt.split()) for prompt in prompts_of(workload(exact_sizes(), prompt_len=parse_lengths("-", "2")), 3)
    ] == [1, 1, 1]


def test_shared_prefixes_repeat_and_the_rest_does_not() -> None:
    options: dict[str, Any] = {"prompt_len": parse_lengths("-", "60:90"), "shared_prefix_len": 40, "num_prefixes": 3}
    prompts = prompts_of(workload(exact_sizes(), **options), 60)
    assert len(set(prompts)) == 60
    starts = {" ".join(prompt.split()[:15]) for prompt in prompts}
    assert len(starts) == 3
    warm = prompts_of(workload(exact_sizes(), warmup=True, **options), 60)
    assert {" ".join(prompt.split()[:15]) for prompt in warm} == starts
    assert not set(warm) & set(prompts)


def test_the_seed_decides_prompts() -> None:
    sizes = exact_sizes()
    assert prompts_of(workload(sizes, seed=3), 5) == prompts_of(workload(sizes, seed=3), 5)
    assert prompts_of(workload(sizes, seed=3), 5) != prompts_of(workload(sizes, seed=4), 5)


def test_token_arrays_have_the_asked_length_and_known_ids() -> None:
    sizes = exact_sizes()
    work = workload(
        sizes,
        endpoint=Endpoint.COMPLETIONS,
        prompt_form=PromptForm.TOKENS,
        prompt_len=parse_lengths("-", "30"),
        shared_prefix_len=10,
    )
    prompts = [body["prompt"] for body in bodies_of(work, 10)]
    assert {len(prompt) for prompt in prompts} == {30}
    assert len({tuple(prompt[:10]) for prompt in prompts}) == 1
    assert len({tuple(prompt) for prompt in prompts}) == 10
    assert {token for prompt in prompts for token in prompt} <= set(sizes.token_ids)


def test_two_probes_give_cost_and_overhead() -> None:
    sizes = from_probes((4, 17), (104, 167))
    assert (sizes.method, sizes.overhead, set(sizes.costs)) == (Method.PROBE, 11.0, {1.5})
    [prompt] = prompts_of(workload(sizes, prompt_len=parse_lengths("-", "161")), 1)
    assert len(prompt.split()) == 100
    assert from_probes((4, None), (104, None)).method is Method.GUESS
