"""The commands beside a single run, and the files they write."""

import csv
import json
import math
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from fake_openai import Fake, serve

from loadtest.cli import main
from loadtest.compare import ratio_of
from loadtest.errors import BadArgument
from loadtest.search import Plan, bracket

SMALL = ["--no-progress", "--prompt-len", "20", "--output-len", "6"]


def figures_of(page: Path) -> list[str]:
    """Return the titles of a page's plots, after checking that each is well-formed SVG with something drawn."""
    text = page.read_text()
    assert "http://" not in text.replace("http://127.0.0.1", "").replace("http://www.w3.org", "")
    titles = []
    for piece in text.split("<svg")[1:]:
        root = ET.fromstring("<svg" + piece.partition("</svg>")[0] + "</svg>")  # noqa: S314  # our own file
        assert len(list(root.iter("{http://www.w3.org/2000/svg}path"))) > 4
        titles += [node.text or "" for node in root.iter("{http://www.w3.org/2000/svg}text")]
    return titles


def test_a_run_writes_page_and_table(tmp_path: Path) -> None:
    page, table = tmp_path / "run.html", tmp_path / "run.csv"
    with serve(Fake(ttft_s=0.01, itl_s=0.002, fault=lambda n: "reject" if n == 3 else None)) as fake:
        words = [
            "--concurrency",
            "2",
            "--num-requests",
            "8",
            "--html",
            str(page),
            "--csv",
            str(table),
            "--ttft-ms",
            "500",
        ]
        assert main(["--url", fake.url, *SMALL, *words]) == 0
    titles = figures_of(page)
    for title in ("Time to first token", "Inter-token latency", "TTFT over time", "Output tokens per second"):
        assert title in titles
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["outcome"] for row in rows].count("ok") == 7
    assert [row["status"] for row in rows].count("429") == 1
    assert all(float(row["ttft_s"]) >= 0.009 for row in rows if row["outcome"] == "ok")


def test_compare_alternates_and_finds_the_slower_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, report = tmp_path / "c.html", tmp_path / "c.json"
    with serve(Fake(ttft_s=0.01, itl_s=0.004)) as fast, serve(Fake(ttft_s=0.04, itl_s=0.016)) as slow:
        words = [
            "--concurrency",
            "2",
            "--num-requests",
            "8",
            "--rounds",
            "3",
            "--html",
            str(page),
            "--json",
            str(report),
        ]
        assert main(["compare", "--urls", fast.url, slow.url, "--names", "fast", "slow", *SMALL, *words]) == 0
    assert len(fast.measured) == len(slow.measured) == 24
    assert fast.measured == slow.measured  # the same requests, in every round
    outcome = json.loads(report.read_text())["outcome"]
    ratio = outcome["loads"][0]["ratios"]["ITL p50"]
    assert 2 < ratio["low"] <= ratio["mean"] <= ratio["high"] < 8
    assert len(outcome["loads"][0]["rounds"]) == 3
    printed = capsys.readouterr()
    assert "slow / fast" in printed.out
    assert printed.err.index("round 2 of 3: slow") < printed.err.index("round 2 of 3: fast")
    assert "Ratio to fast, 95 % interval" in figures_of(page)


def test_compare_at_several_rates_draws_goodput(tmp_path: Path) -> None:
    page = tmp_path / "c.html"
    with serve(Fake(ttft_s=0.005, itl_s=0.001)) as fake:
        words = ["--rates", "20,40", "--num-requests", "6", "--rounds", "1", "--ttft-ms", "900", "--html", str(page)]
        assert main(["compare", "--urls", fake.url, fake.url, *SMALL, *words]) == 0
    assert "Offered rate and goodput" in figures_of(page)


def test_ratios_carry_an_honest_interval() -> None:
    same = ratio_of([(2.0, 4.0), (3.0, 6.0), (5.0, 10.0)])
    assert (same.low, same.mean, same.high) == pytest.approx((2.0, 2.0, 2.0))
    # logarithms 0 and ln 4: mean ln 2, standard error ln 2, one degree of freedom
    wide = ratio_of([(1.0, 1.0), (1.0, 4.0)])
    assert wide.mean == pytest.approx(2.0)
    assert wide.high == pytest.approx(2.0 * math.exp(12.706 * math.log(2)), rel=1e-3)
    assert ratio_of([(1.0, 3.0)]).high == pytest.approx(3.0)


@pytest.mark.parametrize("capacity", [0.02, 0.3, 1.0, 7.3, 30.0, 500.0])
async def test_a_search_brackets_the_capacity(capacity: float) -> None:
    asked: list[float] = []

    async def passes(rate: float) -> bool:
        asked.append(rate)
        return rate <= capacity

    plan = Plan(start_rate=1.0, max_rate=64.0, tolerance=0.1)
    found = await bracket(passes, plan, lambda: False)
    expected = min(capacity, 64.0)
    assert found <= expected
    assert found >= expected / 1.1001
    assert len(asked) <= 16


async def test_a_search_gives_up_on_a_server_that_passes_nothing() -> None:
    async def passes(_: float) -> bool:
        return False

    assert await bracket(passes, Plan(), lambda: False) == 0.0


def test_a_search_probes_a_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, report = tmp_path / "s.html", tmp_path / "s.json"
    with serve(Fake(ttft_s=0.01, itl_s=0.002)) as fake:
        words = ["--num-requests", "5", "--ttft-ms", "2000", "--start-rate", "30", "--max-rate", "60"]
        code = main(["search", "--url", fake.url, *SMALL, *words, "--html", str(page), "--json", str(report)])
    assert code == 0
    assert "highest rate with 90% good requests: 60.000 req/s" in capsys.readouterr().out
    assert [probe["rate"] for probe in json.loads(report.read_text())["outcome"]["probes"]] == [30.0, 60.0]
    assert "Offered rate and goodput" in figures_of(page)


def test_interference_compares_phases(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, report = tmp_path / "i.html", tmp_path / "i.json"
    with serve(Fake(ttft_s=0.01, itl_s=0.005)) as fake:
        words = ["--concurrency", "3", "--duration-s", "1.5", "--intruder-len", "200", "--html", str(page)]
        assert main(["interference", "--url", fake.url, *SMALL, *words, "--json", str(report)]) == 0
    outcome = json.loads(report.read_text())["outcome"]
    assert 0.3 < outcome["itl_p50_ratio"] < 3
    assert outcome["phases"]["prompts_beside"]["num_ok"] > 3
    assert 0.2 < outcome["prompt_progress"] < 5
    assert "Interference" in capsys.readouterr().out
    assert "ITL over time" in figures_of(page)


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        (["search", "--duration-s", "1"], "--ttft-ms"),
        (["search", "--ttft-ms", "5", "--share", "2"], "--share"),
        (["compare", "--urls", "http://a/v1", "http://b/v1", "--names", "x", "x", "--concurrency", "1"], "--names"),
        (["compare", "--urls", "http://a/v1", "http://b/v1", "--concurrency", "1", "--rounds", "0"], "--rounds"),
        (["interference", "--rate", "4"], "closed loop"),
        (["--trace", "/nowhere.csv"], "--trace"),
        (["--rate", "1", "--rate-profile", "0:1"], "excludes --rate"),
        (["--concurrency", "1", "--turns", "2", "--endpoint", "completions"], "--endpoint chat"),
    ],
)
def test_bad_words_exit_with_2_and_advice(words: list[str], advice: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    assert advice in capsys.readouterr().err


def test_a_page_needs_matplotlib(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert main(["--concurrency", "1", "--html", "run.html"]) == BadArgument.exit_code
    assert "pip install matplotlib" in capsys.readouterr().err
