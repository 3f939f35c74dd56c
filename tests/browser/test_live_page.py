"""The live page in a browser: it loads, chats, shows a swap, and says what goes wrong."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.fake_drafts import publish_draft
from support.fake_server import FakeServer

playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is missing: pip install -e '.[browser]'")
pytestmark = pytest.mark.browser
expect = playwright.expect
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as running:
        try:
            found = running.chromium.launch(executable_path=CHROMIUM)
        except playwright.Error as error:
            pytest.skip(f"NO CHROMIUM, the page is not tested: apt install chromium, or playwright install. {error}")
        yield found
        found.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A tab in which neither the console nor the content security policy may complain."""
    tab = browser.new_page(viewport={"width": 1280, "height": 900})
    tab.set_default_timeout(10_000)
    complaints: list[str] = []
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.on("console", lambda line: line.type == "error" and complaints.append(line.text))
    tab.complaints = complaints
    yield tab
    tab.close()
    # The browser itself reports every answer of 400 and above.
    assert [each for each in complaints if "Failed to load resource" not in each] == []


def ask(page: Any, text: str) -> None:
    page.get_by_label("Message").fill(text)
    page.get_by_role("button", name="Send").click()


def test_it_loads_and_is_live(page: Any) -> None:
    with FakeServer() as server:
        page.goto(server.url)
        expect(page.get_by_role("status")).to_have_text("live")
        expect(page.get_by_role("heading", level=1)).to_contain_text("gets better while you watch")
        expect(page.locator("#model")).to_have_text("tiny")
        sizes = page.evaluate("performance.getEntriesByType('resource').map((e) => new URL(e.name).host)")
        assert set(sizes) == {f"127.0.0.1:{server.port}"}


def test_it_says_why_a_learner_ended(page: Any) -> None:
    with FakeServer(learner="dies") as server:
        page.goto(server.url)
        expect(page.locator("#learner-note")).to_have_text("dead; exit code 3")


def test_a_chat_streams_with_its_sources_speed_and_accepted_length(page: Any) -> None:
    """The fake repeats its prompt; of every three tokens two are the draft's, but for the last round's."""
    with FakeServer(options={"round_s": 0.02}) as server:
        page.goto(server.url)
        ask(page, "hello world")
        answer = page.locator(".answer")
        expect(answer).to_contain_text("hello world")
        expect(page.get_by_role("button", name="Send")).to_be_visible()
        assert page.locator(".answer .draft").count() > 3
        assert abs(page.locator(".answer .target").count() - page.locator(".answer .draft").count()) <= 1
        expect(page.locator(".meta")).to_contain_text(re.compile(r"\d+ tokens/s, 400 tokens, accepted length 2\.99"))
        expect(page.locator("#spoken")).to_contain_text("Answer: ")
        expect(page.locator("#length")).to_have_text("2.99")
        expect(page.locator("#share-draft")).to_contain_text("67 %")
        expect(page.locator("#service")).to_contain_text("First token, last minute")
        expect(page.locator("#length-chart svg")).to_have_attribute("aria-label", re.compile(r"now 2\.99"))


def test_code_is_in_blocks_that_are_copied_and_markup_stays_text(page: Any) -> None:
    texts = ["See <b>", ":\n``", "`html\n<i", ">x</i>\n", "y\n`", "``\nend"]
    sources = [{"text": text, "source": "draft" if number % 2 else "target"} for number, text in enumerate(texts)]
    chunks = [{"choices": [{"index": 0, "delta": {}, "token_sources": [source]}]} for source in sources]
    stream = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
    with FakeServer() as server:
        page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        page.route("**/v1/chat/completions", lambda route: route.fulfill(body=stream, content_type="text/event-stream"))
        page.goto(server.url)
        ask(page, "hello")
        code = page.locator(".answer .code code")
        expect(code).to_have_text("<i>x</i>\ny\n")
        expect(page.locator(".answer .code .head")).to_contain_text("html")
        expect(page.locator(".answer")).to_contain_text("end")
        assert page.locator(".answer b, .answer i").count() == 0
        assert code.locator(".draft, .target").count() == 3
        page.get_by_role("button", name="Copy").click()
        expect(page.get_by_role("button", name="Copied")).to_be_visible()
        assert page.evaluate("navigator.clipboard.readText()") == "<i>x</i>\ny\n"


def test_the_time_saved_its_worth_and_kinds_are_shown(page: Any, tmp_path: Path) -> None:
    sums = {"since": "2026-11-30", "seconds": 7200, "day": "2026-11-30", "seconds_today": 60}
    (tmp_path / "live").mkdir()
    (tmp_path / "live" / "savings.json").write_text(json.dumps(sums))
    with FakeServer(checkpoints=tmp_path, server={"price_per_hour": 1.5}) as server:
        page.goto(server.url)
        expect(page.locator("#saved")).to_have_text("0.0 s")
        expect(page.locator("#saved-note")).to_have_text("worth 0.00; 2.0 h since 30 Nov, worth 3.00")
        ask(page, "hello world")
        expect(page.locator("#kinds th")).to_have_text(["chat"])


def test_the_switches_are_sent(page: Any) -> None:
    with FakeServer() as server:
        page.goto(server.url)
        page.get_by_label("Speculation").uncheck()
        page.get_by_label("Memory").uncheck()
        with page.expect_request("**/v1/chat/completions") as sent:
            ask(page, "hello")
        body = sent.value.post_data_json
        assert (body["speculate"], len(body["cache_salt"])) == (False, 32)
        expect(page.get_by_role("button", name="Send")).to_be_visible()
        expect(page.locator(".answer .draft")).to_have_count(0)


def test_a_question_that_was_stopped_before_its_answer_is_not_sent_again(page: Any) -> None:
    with FakeServer(options={"round_s": 5.0}) as server:
        page.goto(server.url)
        ask(page, "hello")
        page.get_by_role("button", name="Stop").click()
        expect(page.locator(".meta")).to_contain_text("stopped")
        with page.expect_request("**/v1/chat/completions") as sent:
            ask(page, "hello world")
        assert sent.value.post_data_json["messages"] == [{"role": "user", "content": "hello world"}]
        page.get_by_role("button", name="Stop").click()


def test_a_swap_appears_and_a_reload_shows_the_past(page: Any, tmp_path: Path) -> None:
    publish_draft(tmp_path)
    with FakeServer(checkpoints=tmp_path) as server:
        page.goto(server.url)
        expect(page.locator("#version")).to_have_text("No. 1")
        publish_draft(tmp_path)
        expect(page.locator("#version")).to_have_text("No. 2")
        expect(page.locator("#events")).to_contain_text("draft-000002 serves")
        page.reload()
        expect(page.locator("#events")).to_contain_text("draft-000002 serves")


@pytest.mark.parametrize(
    ("text", "said"), [("forbidden", "the chat template refuses them"), ("<|crash|>", "the engine failed")]
)
def test_an_error_is_said(page: Any, text: str, said: str) -> None:
    with FakeServer(options={"worker_grace_s": 60.0}) as server:
        page.goto(server.url)
        ask(page, text)
        expect(page.get_by_role("alert").filter(has_text=said)).to_be_visible()
        expect(page.get_by_role("button", name="Send")).to_be_visible()


@pytest.mark.parametrize("label", ["constructor", "__proto__"])
def test_a_domain_may_have_the_name_of_a_member_of_every_object(page: Any, label: str) -> None:
    with FakeServer() as server:
        page.goto(server.url)
        expect(page.get_by_role("status")).to_have_text("live")
        body = {"messages": [{"role": "user", "content": "hello"}], "metadata": {"aurora_domain": label}}
        httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=20).raise_for_status()
        expect(page.locator("#domains th")).to_have_text([label])
        expect(page.get_by_role("status")).to_have_text("live")


def test_a_server_that_has_gone_is_said(page: Any) -> None:
    with FakeServer() as server:
        page.goto(server.url)
        expect(page.get_by_role("status")).to_have_text("live")
        server.end()
        expect(page.get_by_role("status")).to_contain_text("no connection")


@contextlib.contextmanager
def stopped(pids: list[int]) -> Iterator[None]:
    """Inside the context, these processes stand still."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def test_a_connection_that_falls_silent_is_said_and_begun_anew(page: Any) -> None:
    with FakeServer() as server:
        page.goto(server.url)
        expect(page.get_by_role("status")).to_have_text("live")
        with stopped(server.family):
            expect(page.get_by_role("status")).to_contain_text("nothing came for 10 s", timeout=20_000)
        expect(page.get_by_role("status")).to_have_text("live", timeout=20_000)


def test_an_engine_that_hangs_is_said(page: Any) -> None:
    with FakeServer() as server:
        page.goto(server.url)
        expect(page.get_by_role("status")).to_have_text("live")
        with stopped([server.status()["worker"]["pid"]]):
            expect(page.get_by_role("status")).to_have_text("the engine gave no sign of life for 10 s", timeout=20_000)
        expect(page.get_by_role("status")).to_have_text("live")


def test_the_key_is_asked_for_kept_in_the_tab_and_sent(page: Any) -> None:
    with FakeServer(server={"api_key": "secret"}) as server:
        page.goto(server.url)
        key = page.get_by_label("API key")
        expect(page.locator("main")).to_be_hidden()
        key.fill("wrong")
        page.get_by_role("button", name="Open").click()
        expect(page.get_by_role("alert").filter(has_text="API key is missing or wrong")).to_be_visible()
        key.fill("secret")
        page.get_by_role("button", name="Open").click()
        expect(page.get_by_role("status")).to_have_text("live")
        ask(page, "hello")
        expect(page.locator(".answer")).to_contain_text("hello")
        page.reload()
        expect(page.get_by_role("status")).to_have_text("live")
        assert page.evaluate("localStorage.length") == 0


@pytest.mark.parametrize("secret", ["schlüssel", "ключах"])
def test_the_key_may_have_any_letters(page: Any, secret: str) -> None:
    with FakeServer(server={"api_key": secret}) as server:
        page.goto(server.url)
        page.get_by_label("API key").fill(secret)
        page.get_by_role("button", name="Open").click()
        expect(page.get_by_role("status")).to_have_text("live")
        ask(page, "hello")
        expect(page.locator(".answer")).to_contain_text("hello")


def test_it_is_used_by_keyboard_and_fits_a_phone(page: Any) -> None:
    with FakeServer() as server:
        page.set_viewport_size({"width": 360, "height": 740})
        page.goto(server.url)
        expect(page.get_by_role("status")).to_have_text("live")
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")  # the link that skips to the chat
        page.keyboard.type("hello")
        page.keyboard.press("Enter")
        expect(page.locator(".answer")).to_contain_text("hello")


CONTRAST = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const light = (colours) => {
    canvas.clearRect(0, 0, 1, 1);
    for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
    const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map((v) => v / 255)
      .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const paper = getComputedStyle(document.body).backgroundColor;
  const found = {};
  for (const element of document.querySelectorAll("body *")) {
    const says = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    if (!says || !element.checkVisibility() || element.closest("svg, .hidden")) continue;
    const own = getComputedStyle(element);
    const behind = light([paper, own.backgroundColor]), ink = light([paper, own.backgroundColor, own.color]);
    found[`${element.tagName}.${element.className} ${own.color}`] =
      (Math.max(behind, ink) + 0.05) / (Math.min(behind, ink) + 0.05);
  }
  return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast(page: Any, scheme: str) -> None:
    """4.5 to 1, as WCAG 2.2 asks of text in level AA."""
    with FakeServer(options={"round_s": 0.01}) as server:
        page.emulate_media(color_scheme=scheme)
        page.goto(server.url)
        ask(page, "hello world")
        expect(page.locator(".meta")).to_contain_text("accepted length")
        ratios = page.evaluate(CONTRAST)
        assert len(ratios) > 10
        assert {name: ratio for name, ratio in ratios.items() if ratio < 4.5} == {}
