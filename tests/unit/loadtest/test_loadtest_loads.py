"""Loads beyond a steady rate: profiles, bursts, traces, conversations, and the sharing among processes."""

import gzip
import itertools
import json
import math
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from fake_openai import Fake, serve

from loadtest.arrivals import Burst, RateProfile, merged, parse_burst, parse_profile, profile_times
from loadtest.cli import main
from loadtest.errors import BadArgument
from loadtest.gauges import read_gauges
from loadtest.lengths import Lengths
from loadtest.server import Server
from loadtest.settings import Settings
from loadtest.sizing import Method, Sizes
from loadtest.traces import Entry, read_trace, scaled
from loadtest.words import WORDS
from loadtest.workload import Dialect, Share, Workload

SIZES = Sizes(Method.TOKENIZE, WORDS, (1.0,) * len(WORDS), 5.0)


def workload(*, trace: list[Entry] | None = None, share: Share | None = None, **options: Any) -> Workload:
    settings = Settings(url="http://h/v1", **({"concurrency": 1, "num_requests": 9} | options))
    return Workload(settings, Server(settings, lambda: 0.0), "m", Dialect(), SIZES, share=share, trace=trace or [])


def prompt_of(request: bytes) -> str:
    body = msgspec.json.decode(request.partition(b"\r\n\r\n")[2])
    return str(body["messages"][-1]["content"])


def test_a_profile_sends_at_its_rate_everywhere() -> None:
    profile = parse_profile("0:2,10:10,20:10,20.5:0,30:0,31:4")
    times = np.array(list(itertools.takewhile(lambda at: at < 40, profile_times(profile, math.inf, _rng()))))
    assert np.all(np.diff(times) >= 0)
    for start, end, expected in ((0, 10, 60), (10, 20, 100), (20.6, 29.9, 0), (31, 40, 36)):
        assert abs(int(((times > start) & (times <= end)).sum()) - expected) <= 2
    # the first half of a ramp from 2 to 10 holds 10 * (2 + 6) / 2 / 2 = 20 of its 60
    assert abs(int((times <= 5).sum()) - 20) <= 1


def test_a_profile_that_ends_at_zero_ends() -> None:
    times = list(profile_times(RateProfile(((0.0, 4.0), (5.0, 0.0))), math.inf, _rng()))
    assert len(times) == 10
    assert times[-1] == pytest.approx(5.0)


def test_bursts_come_between_other_arrivals() -> None:
    times = list(itertools.islice(merged(iter([0.5, 1.5, 3.5]), Burst(2, 1.0).times()), 8))
    assert times == [0.5, 1.0, 1.0, 1.5, 2.0, 2.0, 3.0, 3.0]


@pytest.mark.parametrize("text", ["", "5", "1:2", "0:1,0:2", "0:-1", "0:0,5:0", "0:1,x:2", "0:inf"])
def test_unusable_profiles_say_so(text: str) -> None:
    with pytest.raises(BadArgument, match="--rate-profile"):
        parse_profile(text)


@pytest.mark.parametrize("text", ["", "5", "0:1", "3:0", "3:-1", "a:b"])
def test_unusable_bursts_say_so(text: str) -> None:
    with pytest.raises(BadArgument, match="--burst"):
        parse_burst(text)


def test_both_trace_forms_are_read_and_ticks_are_spread(tmp_path: Path) -> None:
    azure = tmp_path / "azure.csv"
    azure.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:17:03.9799600,4808,10\n2023-11-16 18:17:04.4799600,3180,8\n"
    )
    assert read_trace(azure) == [Entry(0.0, 4808, 10), Entry(0.5, 3180, 8)]
    mooncake = tmp_path / "mooncake.jsonl.gz"
    rows = [(0, 600, 5, [0, 1]), (0, 900, 6, [0, 2]), (3000, 10, 7, [0])]
    with gzip.open(mooncake, "wt") as file:
        for at, prompt, output, ids in rows:
            file.write(
                json.dumps({"timestamp": at, "input_length": prompt, "output_length": output, "hash_ids": ids}) + "\n"
            )
    entries = read_trace(mooncake)
    assert [entry.at_s for entry in entries] == [0.0, 1.5, 3.0]
    assert entries[1].prefix_ids == (0, 2)
    assert scaled(entries, speed=2, scale=0.1)[1] == Entry(0.75, 90, 1, (0, 2))
    bad = tmp_path / "bad.csv"
    bad.write_text("nonsense\n1\n")
    with pytest.raises(BadArgument, match="--trace"):
        read_trace(bad)


def test_equal_trace_ids_make_equal_beginnings_and_lengths_are_kept() -> None:
    trace = [Entry(0, 1100, 4, (7, 8)), Entry(0, 1100, 4, (7, 9)), Entry(0, 600, 4, (3, 4))]
    work = workload(trace=trace)
    first, second, third = (prompt_of(work.next_call().request).split() for _ in range(3))
    assert (len(first), len(second), len(third)) == (1095, 1095, 595)  # 5 tokens are the template's
    assert first[:512] == second[:512]
    assert first[512:1024] != second[512:1024]
    assert third[:512] != first[:512]


def test_shares_together_make_the_same_requests_as_one_process() -> None:
    whole = workload(prompt_len=_uniform(20, 60))
    alone = [whole.next_call().request for _ in range(9)]
    parts = [workload(prompt_len=_uniform(20, 60), share=Share(at, 3)) for at in range(3)]
    together = [parts[number % 3].next_call() for number in range(9)]
    assert [call.request for call in together] == alone
    assert [call.index for call in together] == list(range(9))
    assert [Share(at, 3).count_of(10) for at in range(3)] == [4, 3, 3]


def test_a_conversation_carries_what_was_said(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    with serve(Fake(ttft_s=0.005, itl_s=0.001)) as fake:
        words = ["--turns", "3", "--think-s", "0.01", "--concurrency", "1", "--num-requests", "12", "--output-len", "3"]
        code = main(
            ["--url", fake.url, "--json", str(report), "--no-progress", "--prompt-len", "20", "--no-ignore-eos", *words]
        )
    assert code == 0
    bodies = fake.measured
    by_length = {turns: [b for b in bodies if len(b["messages"]) == turns] for turns in (1, 3, 5)}
    assert [len(found) for found in by_length.values()] == [4, 4, 4]
    last = by_length[5][0]["messages"]
    assert [message["role"] for message in last] == ["user", "assistant", "user", "assistant", "user"]
    assert last[1]["content"] == "é é é "  # what the server answered
    assert any(body["messages"] == last[:3] for body in by_length[3])
    requests = json.loads(report.read_text())["requests"]
    assert sorted(one["turn"] for one in requests) == [0] * 4 + [1] * 4 + [2] * 4


def test_processes_share_a_load_and_their_results_are_one(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    with serve(Fake(ttft_s=0.005, itl_s=0.001)) as fake:
        words = ["--rate", "60", "--num-requests", "21", "--output-len", "4", "--processes", "2"]
        code = main(["--url", fake.url, "--json", str(report), "--no-progress", "--prompt-len", "20", *words])
    assert code == 0
    read = json.loads(report.read_text())
    assert [one["index"] for one in read["requests"]] == list(range(21))
    assert {one["outcome"] for one in read["requests"]} == {"ok"}
    due = [one["scheduled_s"] for one in read["requests"]]
    assert due == sorted(due)
    assert any("2 client processes" in note for note in read["notes"])


def test_gauges_of_known_servers_are_read() -> None:
    text = (
        "# TYPE baton_worker_pages gauge\n"
        'baton_worker_pages{state="used",worker="d1",role="decode"} 12.0\n'
        'baton_worker_pages{state="free",worker="d1",role="decode"} 80.0\n'
        'vllm:num_requests_running{engine="0",model_name="m"} 3.0\n'
        "python_gc_objects_collected_total 9\n"
    )
    samples = read_gauges(text, 1.5)
    assert [(one.figure, one.pool, one.worker, one.value) for one in samples] == [
        ("pages", "decode", "d1", 12.0),
        ("running", "", "0", 3.0),
    ]


def _rng() -> np.random.Generator:
    return np.random.default_rng(0)


def _uniform(low: int, high: int) -> Lengths:
    return Lengths("uniform", low, high)
