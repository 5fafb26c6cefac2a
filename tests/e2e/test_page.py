"""The chat page in a real Chromium, on a real fleet: an answer, a stop, a worker killed under it, keys, errors."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from support.fleet import DEMO, Fleet, until
from support.redis_server import RedisServer

from fleet.keys import KeyRegistry
from fleet.redis_client import connect

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(
        CHROMIUM is None or DRIVER is None,
        reason="no chromium and chromedriver: `make browser`, or apt install chromium chromium-driver",
    ),
]
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1180,860",
)
WITHIN_S = 30.0
LONG = "Tell me a very long story about a lighthouse."
ENDLESS = {"temperature": 0, "max_tokens": 600, "frequency_penalty": -2}
"""Rewards repetition, so that an answer is still under way when something is done to it."""


class Page:
    """The page, open in a browser."""

    def __init__(self, driver: webdriver.Chrome, url: str) -> None:
        self.driver = driver
        self.url = url
        driver.get(url)

    def find(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def run(self, script: str, *arguments: object) -> Any:
        return self.driver.execute_script(script, *arguments)  # type: ignore[no-untyped-call]

    def texts(self, selector: str) -> list[str]:
        """What is to be read, all in one look, since the page redraws itself meanwhile."""
        found = "return [...document.querySelectorAll(arguments[0])].map((one) => one.innerText.trim())"
        return list(self.run(found, selector))

    def has(self, selector: str) -> bool:
        shown = "return [...document.querySelectorAll(arguments[0])].some((one) => one.checkVisibility())"
        return bool(self.run(shown, selector))

    def until(self, selector: str, *, says: str = "") -> str:
        """Wait until the last such element is there and says something; its text."""

        def saying() -> str | None:
            texts = self.texts(selector)
            return texts[-1] if texts and says in texts[-1] and texts[-1] else None

        return str(until(saying, within_s=WITHIN_S, what=f"{selector} says {says!r}"))

    def put(self, name: str, value: object) -> None:
        field = self.find(f"#{name}")
        field.clear()
        field.send_keys(str(value))

    def ask(self, text: str) -> None:
        until(lambda: self.find("#model").get_attribute("value"), within_s=WITHIN_S, what="models are listed")
        self.find("#text").send_keys(text, Keys.ENTER)

    def ended(self) -> str:
        """Wait for the end of the last answer; its text."""
        until(lambda: not self.has(".live") and self.has(".assistant"), within_s=WITHIN_S, what="the answer ends")
        return self.texts(".assistant .body")[-1]

    def complaints(self) -> list[str]:
        """What the browser itself has to complain of: errors of scripts, and what the policy blocked.

        That a request is not in Redis yet when the page first looks for it is no fault.
        """
        logged = self.driver.get_log("browser")  # type: ignore[no-untyped-call]
        found = [str(entry["message"]) for entry in logged if entry["level"] == "SEVERE"]
        return [message for message in found if not ("/v1/requests/" in message and "404" in message)]


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=str(DRIVER)))
    try:
        yield browser
    finally:
        browser.quit()


@pytest.fixture(scope="module")
def fleet(module_redis: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    worker = {"model": DEMO, "served_model_name": "demo,org/demo", "dtype": "float32"}
    with Fleet(module_redis, tmp_path_factory.mktemp("fleet"), settings={"lease_s": "2"}) as fleet:
        fleet.start("prefill_svc", "prefill-1", max_step_tokens=64, **worker)
        for number in (1, 2):
            fleet.start("decode_svc", f"decode-{number}", **worker)
        fleet.gateway()
        fleet.wait_ready(decode=2)
        yield fleet


@pytest.fixture
def page(driver: webdriver.Chrome, fleet: Fleet) -> Iterator[Page]:
    opened = Page(driver, fleet.url)
    yield opened
    assert opened.complaints() == []


def test_an_answer_comes_with_its_figures_and_its_path(page: Page, fleet: Fleet) -> None:
    page.put("system", "You are a helpful assistant.")
    for name, value in {"temperature": 0, "max_tokens": 24, "seed": 7}.items():
        page.put(name, value)
    page.ask("What is TTFT?")
    text = page.ended()
    messages = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "What is TTFT?"},
    ]
    fields = {"model": "demo", "messages": messages, "temperature": 0, "max_tokens": 24, "seed": 7}
    direct = httpx.post(f"{fleet.url}/v1/chat/completions", json=fields, timeout=30).json()
    assert text == direct["choices"][0]["message"]["content"].strip()
    figures = page.until(".figures", says="cached")
    assert f"of {direct['usage']['prompt_tokens']} prompt tokens cached" in figures
    assert f"{direct['usage']['completion_tokens']} tokens" in figures
    assert "ms to first token" in figures
    assert "tokens/s" in figures
    until(lambda: len(page.texts(".path .hop")) == 2, within_s=WITHIN_S, what="the whole path")
    first, second = page.texts(".path .hop")
    assert first.split() == ["prefill-1", "prefill"]
    assert second.split() in (["decode-1", "decode"], ["decode-2", "decode"])
    assert page.texts(".path .why") == []
    page.ask("And what is that good for?")
    page.ended()
    assert len(page.texts(".user")) == 2
    cached = page.until(".assistant:last-child .figures", says="cached")
    assert "0 of" not in cached, "the second turn begins with the first one's tokens"
    page.find("#new").click()
    assert page.texts("#messages li") == []
    page.find("#model").send_keys("org/demo")
    assert page.find("#model").get_attribute("value") == "org/demo"


def test_an_answer_can_be_stopped_and_frees_its_workers(page: Page, fleet: Fleet) -> None:
    page.put("frequency_penalty", ENDLESS["frequency_penalty"])
    page.ask(LONG)
    page.until(".live .body")
    page.find("#text").send_keys(Keys.ESCAPE)
    page.ended()
    assert "stopped by you" in page.until(".figures", says="stopped")
    until(lambda: fleet.metric("baton_requests_live") == 0, within_s=WITHIN_S, what="the request is cancelled")


def test_refusals_are_shown_plainly(page: Page, fleet: Fleet) -> None:
    page.put("temperature", 3)
    page.ask("hi")
    assert page.texts(".user") == [], "the form itself refuses"
    page.put("temperature", "")
    page.put("max_tokens", 10**6)
    page.find("#text").send_keys(Keys.ENTER)
    assert "maximum context length" in page.until(".failed")
    assert page.find("#send").is_displayed()
    refused = [entry for entry in page.complaints() if "400" in entry]
    assert len(refused) == 1, "the browser logs the refusal it was given"
    assert fleet.metric("baton_requests_live") == 0


def test_it_can_be_used_on_a_narrow_screen(page: Page) -> None:
    page.driver.set_window_size(420, 760)
    try:
        width = "return document.documentElement.scrollWidth <= innerWidth"
        assert page.run(width)
        assert not page.has("#settings")
        page.find("#toggle").click()
        assert page.has("#settings")
        page.find("#system").send_keys(Keys.ESCAPE)
        assert not page.has("#settings")
        page.ask("How are you?")
        page.ended()
        assert page.run(width)
    finally:
        page.driver.set_window_size(1180, 860)


def test_a_server_with_keys_asks_for_one_and_keeps_it_in_the_tab(
    driver: webdriver.Chrome, module_redis: RedisServer, fleet: Fleet
) -> None:
    async def make_keys() -> list[str]:
        redis = connect(module_redis.url)
        try:
            keys = KeyRegistry(redis, namespace=fleet.namespace)
            return [(await keys.create(name, admin=name == "boss"))[1] for name in ("guest", "boss")]
        finally:
            await redis.aclose()

    async def revoke_all() -> None:
        redis = connect(module_redis.url)
        try:
            await redis.delete(f"{fleet.namespace}:keys")
        finally:
            await redis.aclose()

    guest, boss = asyncio.run(make_keys())

    def answers(status: int) -> None:
        def does() -> bool:
            return httpx.get(f"{fleet.url}/v1/models").status_code == status

        until(does, within_s=WITHIN_S, what=f"the gateway answers {status}")

    try:
        answers(401)
        page = Page(driver, fleet.url)
        assert "API key" in page.until("#problem")
        assert not page.find("#model").is_enabled()
        for secret in ("bt-wrong", guest):
            page.put("key", secret)
            page.find("#key").send_keys(Keys.TAB)
            if secret != guest:
                page.until("#problem", says="Incorrect API key")
        page.put("max_tokens", 3)
        page.ask("hi")
        page.ended()
        assert "admin key" in page.until(".path")
        stored = "return [Object.values(sessionStorage), localStorage.length, document.cookie]"
        assert page.run(stored) == [[guest], 0, ""]
        page.put("key", boss)
        page.find("#key").send_keys(Keys.TAB)
        page.ask("hi again")
        page.until(".assistant:last-child .path .hop")
        page.run("sessionStorage.clear()")
        page.complaints()
    finally:
        asyncio.run(revoke_all())
        answers(200)


def test_a_killed_worker_shows_in_the_path_and_costs_no_token(page: Page, fleet: Fleet, tmp_path: Path) -> None:
    for name, value in ENDLESS.items():
        page.put(name, value)
    page.ask(LONG)
    holder = until(
        lambda: [hop for hop in page.texts(".live .path .hop") if hop.startswith("decode")],
        within_s=WITHIN_S,
        what="a decode worker has it",
    )[0].split()[0]
    before = page.until(".live .body")
    fleet.forget(holder).kill()
    assert "worker lost: replayed" in page.until(".path .why", says="replayed")
    text = page.ended()
    assert text.startswith(before)
    until(lambda: len(page.texts(".path .hop")) == 4, within_s=WITHIN_S, what="the path is whole")
    names = [hop.split()[0] for hop in page.texts(".path .hop")]
    other = {"decode-1": "decode-2", "decode-2": "decode-1"}[holder]
    assert names == ["prefill-1", holder, "prefill-1", other]
    fields = {"model": "demo", "messages": [{"role": "user", "content": LONG}], **ENDLESS}
    direct = httpx.post(f"{fleet.url}/v1/chat/completions", json=fields, timeout=60).json()
    assert text == direct["choices"][0]["message"]["content"].strip()
    directory = Path(os.environ.get("BATON_SCREENSHOTS") or tmp_path)
    assert page.driver.save_screenshot(str(directory / "page.png"))
