"""Whole runs against a fake server with known delays and faults, through the command."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from fake_openai import TEMPLATE_TOKENS, Fake, limit_of, serve, tokens_of

from loadtest.cli import main


def command(fake: Fake, path: Path, *words: str) -> tuple[int, dict[str, Any]]:
    """Run the command; return its exit code and its JSON report."""
    report = path / "report.json"
    common = ["--url", fake.url, "--json", str(report), "--no-progress", "--prompt-len", "32", "--timeout-s", "5"]
    code = main([*common, *words])
    return code, json.loads(report.read_text())


def test_an_open_loop_measures_what_the_server_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serve(Fake(ttft_s=0.05, itl_s=0.02)) as fake:
        words = ["--rate", "40", "--num-requests", "24", "--output-len", "6", "--warmup", "2"]
        code, report = command(fake, tmp_path, *words, "--ttft-ms", "5000", "--itl-ms", "2000")
    assert code == 0
    assert (report["schema"], report["schema_version"]) == ("baton.loadtest", 1)
    assert len(fake.measured) == 26  # the warm-up is sent, and not reported
    assert all(body["stream_options"] == {"include_usage": True} for body in fake.measured)
    assert all(body["ignore_eos"] is True for body in fake.measured)
    summary = report["summary"]
    assert (summary["num_sent"], summary["num_ok"], summary["output_tokens"]) == (24, 24, 144)
    assert summary["input_tokens"] == 24 * 32  # /tokenize makes prompts exact, template included
    # Above, only what a busy machine cannot reach and a mistaken unit would.
    assert 0.045 < summary["ttft_s"]["p50"] < 2
    assert 0.019 < summary["itl_s"]["p50"] < 1
    assert 0.019 < summary["tpot_s"]["p50"] < 1
    assert summary["itl_s"]["count"] == 24 * 5
    assert 0.145 < summary["e2e_s"]["p50"] < 7
    assert summary["goodput"]["count"] == 24
    assert summary["goodput"]["requests_per_s"] == pytest.approx(24 / summary["duration_s"])
    due = [one["scheduled_s"] for one in report["requests"]]
    assert due == sorted(due)
    for one in report["requests"]:
        # The event loop's timers have a grain of a millisecond, either way.
        assert one["scheduled_s"] - 0.002 <= one["sent_s"] < one["content_times_s"][0] <= one["end_s"]
        assert (one["outcome"], one["status"], one["num_chunks"]) == ("ok", 200, 6)
    assert report["client"]["loop_lag_s"]["count"] > 10
    printed = capsys.readouterr().out
    for word in ("TTFT", "ITL", "TPOT", "E2E", "goodput", "event-loop lag", "TTFT <= 5000 ms"):
        assert word in printed


def test_a_closed_loop_never_exceeds_its_concurrency(tmp_path: Path) -> None:
    with serve(Fake(ttft_s=0.01, itl_s=0.002)) as fake:
        code, report = command(fake, tmp_path, "--concurrency", "3", "--num-requests", "20", "--output-len", "4:9")
    assert code == 0
    assert fake.peak_running == 3
    assert report["summary"]["peak_running"] == 3
    assert len(report["requests"]) == 20
    assert {limit_of(body) for body in fake.measured} <= set(range(4, 10))


def test_a_capped_open_loop_holds_and_tells(tmp_path: Path) -> None:
    with serve(Fake(ttft_s=0.1)) as fake:
        words = ["--rate", "100", "--concurrency", "2", "--duration-s", "0.5", "--output-len", "2"]
        _, report = command(fake, tmp_path, *words)
    assert fake.peak_running == 2
    client = report["client"]
    assert client["num_unsent"] > 20  # due in half a second, and never sent
    assert client["held_s"]["max"] > 0.1
    assert client["send_delay_s"]["p99"] < client["held_s"]["max"] / 2  # the wait for the cap is not the client's fault
    assert all(one["sent_s"] < 0.6 for one in report["requests"])


def test_failures_are_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    faults = ["reject", "unavailable", "error_event", "cut", "unfinished", "garbage", "plain", "hang", None]
    with serve(Fake(ttft_s=0.005, itl_s=0.005, fault=lambda number: faults[number])) as fake:
        words = ["--concurrency", "9", "--num-requests", "9", "--output-len", "3", "--timeout-s", "0.6"]
        code, report = command(fake, tmp_path, *words)
        deadline = time.monotonic() + 2
        while not fake.abandoned and time.monotonic() < deadline:
            time.sleep(0.01)
    assert code == 0
    outcomes = sorted(one["outcome"] for one in report["requests"])
    assert outcomes == [
        "bad_answer",
        "bad_answer",
        "disconnected",
        "disconnected",
        "http_error",
        "ok",
        "rejected",
        "stream_error",
        "timeout",
    ]
    summary = report["summary"]
    assert (summary["num_ok"], summary["num_rejected"], summary["num_failed"]) == (1, 1, 7)
    assert summary["errors"]["http 503"] == 1
    [rejected] = [one for one in report["requests"] if one["outcome"] == "rejected"]
    assert (rejected["status"], rejected["error"], rejected["retry_after_s"]) == (429, "full", 0.2)
    [timed_out] = [one for one in report["requests"] if one["outcome"] == "timeout"]
    assert 0.59 < timed_out["e2e_s"] < 2
    assert fake.abandoned >= 1  # the server saw the client leave
    printed = capsys.readouterr().out
    assert "http 503: 1" in printed
    assert "worker lost" in printed


def test_a_closed_loop_rests_after_a_rejection(tmp_path: Path) -> None:
    with serve(Fake(fault=lambda _: "reject")) as fake:
        code, report = command(fake, tmp_path, "--concurrency", "1", "--num-requests", "3", "--output-len", "3")
    assert code == 1  # every request failed
    sent = [one["sent_s"] for one in report["requests"]]
    assert sent[1] - sent[0] > 0.19
    assert sent[2] - sent[1] > 0.19


def test_chunks_of_several_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serve(Fake(itl_s=0.04, tokens_per_chunk=4)) as fake:
        words = ["--concurrency", "4", "--num-requests", "4", "--output-len", "16", "--no-chunk-times"]
        _, report = command(fake, tmp_path, *words)
    summary = report["summary"]
    assert (summary["output_tokens"], summary["tokens_per_chunk"]) == (64, 4.0)
    assert summary["itl_s"]["p50"] >= 0.039
    assert summary["tpot_s"]["p50"] == pytest.approx(summary["itl_s"]["mean"] * 3 / 15, rel=0.3)
    assert "content_times_s" not in report["requests"][0]
    assert "4.00 tokens per chunk" in capsys.readouterr().out


def test_a_plain_server_without_extras(tmp_path: Path) -> None:
    refused = frozenset({"ignore_eos", "stream_options"})
    with serve(Fake(tokenizer=False, refused_fields=refused)) as fake:
        words = ["--concurrency", "2", "--num-requests", "4", "--output-len", "5", "--endpoint", "completions"]
        code, report = command(fake, tmp_path, *words)
    assert code == 0
    assert report["target"]["dialect"] == {
        "ignore_eos": False,
        "limit_field": "max_tokens",
        "include_usage": False,
    }
    assert report["target"]["prompt_sizing"] == "guess"
    assert {one["token_count"] for one in report["requests"]} == {"chunks"}
    assert report["summary"]["output_tokens"] == 20
    assert len(report["notes"]) == 2


def test_probing_sizes_prompts_without_a_tokenizer(tmp_path: Path) -> None:
    refused = frozenset({"max_tokens"})
    with serve(Fake(tokenizer=False, refused_fields=refused)) as fake:
        words = ["--concurrency", "4", "--num-requests", "12", "--output-len", "2", "--prompt-len", "300"]
        _, report = command(fake, tmp_path, *words)
    assert report["target"]["prompt_sizing"] == "probe"
    assert report["target"]["dialect"]["limit_field"] == "max_completion_tokens"
    lengths = [len(tokens_of(body["messages"][0]["content"])) + TEMPLATE_TOKENS for body in fake.measured]
    assert sum(lengths) / len(lengths) == pytest.approx(300, rel=0.1)
    assert report["summary"]["input_tokens"] == sum(lengths)


def test_token_arrays_travel_as_arrays(tmp_path: Path) -> None:
    with serve(Fake()) as fake:
        words = ["--concurrency", "2", "--num-requests", "4", "--output-len", "2"]
        code, report = command(fake, tmp_path, *words, "--endpoint", "completions", "--prompt-form", "tokens")
    assert code == 0
    assert {len(body["prompt"]) for body in fake.measured} == {32}
    assert report["summary"]["input_tokens"] == 4 * 32


def test_the_key_is_used_and_never_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with serve(Fake(api_key="sk-hush")) as fake:
        words = ["--concurrency", "1", "--num-requests", "1", "--output-len", "2", "--header", "X-Tag: sk-hush"]
        code, report = command(fake, tmp_path, *words, "--api-key", "sk-hush")
        assert code == 0
        assert report["config"]["api_key_set"] is True
        assert "sk-hush" not in json.dumps(report) + capsys.readouterr().out
        monkeypatch.setenv("OPENAI_API_KEY", "sk-hush")
        assert main(["--url", fake.url, *words, "--no-progress"]) == 0
        monkeypatch.setenv("OPENAI_API_KEY", "sk-wrong")
        assert main(["--url", fake.url, *words, "--no-progress"]) == 3
    assert "--api-key" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("models", "words", "hint"),
    [
        (("a", "b"), [], "a, b; name one with --model"),
        ((), [], "no model at all"),
        (("a",), ["--model", "z"], "no model 'z'"),
    ],
)
def test_the_model_must_be_plain(
    models: tuple[str, ...], words: list[str], hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with serve(Fake(models=models)) as fake:
        assert main(["--url", fake.url, "--concurrency", "1", *words]) == 3
    assert hint in capsys.readouterr().err


def test_an_unreachable_server_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        url = f"http://127.0.0.1:{held.getsockname()[1]}/v1"
        assert main(["--url", url, "--rate", "1"]) == 3
    complaint = capsys.readouterr().err
    assert f"cannot reach {url}" in complaint
    assert "--url" in complaint


def test_a_refusing_server_is_quoted(capsys: pytest.CaptureFixture[str]) -> None:
    with serve(Fake(refused_fields=frozenset({"top_k"}))) as fake:
        code = main(["--url", fake.url, "--concurrency", "1", "--extra-body", '{"top_k": 1}'])
    assert code == 3
    assert "unknown field top_k" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        ([], "give --rate R for an open loop or --concurrency C"),
        (["--rate", "0"], "--rate: 0.0 cannot be used"),
        (["--rate", "nan"], "--rate: nan cannot be used"),
        (["--rate", "fast"], "invalid float value"),
        (["--concurrency", "-1"], "--concurrency: -1 cannot be used"),
        (["--concurrency", "2", "--burstiness", "0.5"], "add --rate"),
        (["--rate", "1", "--num-requests", "5", "--duration-s", "5"], "not allowed with argument"),
        (["--rate", "1", "--prompt-len", "abc"], "cannot read 'abc'; give tokens as"),
        (["--rate", "1", "--shared-prefix-len", "200"], "make --prompt-len larger"),
        (["--rate", "1", "--num-prefixes", "2"], "needs --shared-prefix-len"),
        (["--rate", "1", "--url", "localhost:8000"], "give one like http://127.0.0.1:8000/v1"),
        (["--rate", "1", "--url", "http://me:pw@localhost/v1"], "put credentials into --api-key"),
        (["--rate", "1", "--prompt-form", "tokens"], "need --endpoint completions"),
        (["--rate", "1", "--json", "/no/such/folder/x.json"], "does not exist; make it first"),
        (["--rate", "1", "--header", "nocolon"], "give 'Name: value'"),
        (["--rate", "1", "--api-key", "a\nb"], "no HTTP header may hold"),
        (["--rate", "1", "--extra-body", "[1]"], "not a JSON object"),
    ],
)
def test_bad_arguments_exit_with_2_and_advice(words: list[str], hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    assert hint in capsys.readouterr().err


def test_an_interrupt_still_reports(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    with serve(Fake(ttft_s=0.01, itl_s=0.05)) as fake:
        words = ["--url", fake.url, "--concurrency", "2", "--num-requests", "500", "--output-len", "6"]
        process = subprocess.Popen(
            [sys.executable, "-m", "loadtest", *words, "--json", str(report)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )
        deadline = time.monotonic() + 20
        while len(fake.measured) < 5 and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        printed, complaint = process.communicate(timeout=20)
    assert process.returncode == 130, complaint
    assert "(interrupted)" in printed
    written = json.loads(report.read_text())
    assert written["interrupted"] is True
    assert written["summary"]["num_ok"] >= 2
    assert 1 <= written["summary"]["num_cancelled"] <= 2
    assert "error: " not in complaint
