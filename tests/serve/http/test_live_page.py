"""The live page: one sampler for all viewers, streams that end, files without data, and no data without the key."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from support import in_loop
from support.fake_server import FakeServer

from aurora_lit.config import load_config, shows_page
from aurora_lit.errors import RequestError
from aurora_lit.ipc.engine_status import EngineStatusPage
from aurora_lit.ipc.learner_status import LearnerStatusPage
from aurora_lit.serve.http import live_page
from aurora_lit.serve.http.live_page import HEADERS, MAX_VIEWERS, LivePage
from aurora_lit.serve.http.status import engine_json, learner_json

FILES = ("/", "/aurora/page.css", "/aurora/page.js", "/aurora/fences.js")
EVENTS = "/v1/aurora/events"
KEY = {"Authorization": "Bearer secret"}


class Reports:
    """A report whose draft has another version each time that it is read."""

    def __init__(self, folder: Path) -> None:
        engine = engine_json(EngineStatusPage.create(folder / "status").read(), None)
        self._report = engine | {
            "model": "of\u2028two lines",
            "kinds": {},
            "learner": learner_json(LearnerStatusPage.create(folder / "learner").read()),
        }
        self.count = 0

    def __call__(self) -> dict[str, Any]:
        self.count += 1
        return {**self._report, "draft": {**self._report["draft"], "version": f"draft-{self.count:06}"}}


@pytest.fixture
def reports(tmp_path) -> Reports:
    return Reports(tmp_path)


def parsed(message: str) -> tuple[str, Any]:
    assert len(message.splitlines()) == 3, "name, data, and an empty line"
    name, data = re.fullmatch(r"event: (\w+)\ndata: ([^\n]+)\n\n", message).groups()
    return name, json.loads(data)


async def after(stream: AsyncIterator[str], count: int) -> list[tuple[str, Any]]:
    """The next messages of a stream."""
    return [parsed(await asyncio.wait_for(anext(stream), 5)) for _ in range(count)]


@in_loop
async def test_a_viewer_gets_the_past_and_then_each_sample_once(reports, monkeypatch) -> None:
    monkeypatch.setattr(live_page, "SAMPLE_S", 0.02)
    monkeypatch.setattr(live_page, "IDLE_SAMPLE_S", 0.02)
    page = LivePage(reports, dict)
    async with page.sampling():
        await asyncio.sleep(0.2)
        stream = page.messages()
        (name, history), *samples = await after(stream, 6)
        assert name == "history"
        assert history.keys() == {"points", "events", "report", "first_lengths"}
        assert len(history["points"]) > 3
        assert [name for name, _ in samples] == ["sample"] * 5
        assert all(each.keys() == {"point", "events", "report", "first_lengths"} for _, each in samples)
        versions = [event["version"] for _, each in [(name, history), *samples] for event in each["events"]]
        assert versions == [f"draft-{number:06}" for number in range(2, len(versions) + 2)]
        assert samples[-1][1]["report"]["draft"]["version"] == versions[-1]
        times = [point["time"] for point in history["points"]] + [each["point"]["time"] for _, each in samples]
        assert times == sorted(times)
        await stream.aclose()
    assert page.num_viewers == 0


@in_loop
async def test_one_sampler_serves_all_viewers(reports, monkeypatch) -> None:
    monkeypatch.setattr(live_page, "SAMPLE_S", 0.05)
    page = LivePage(reports, dict)
    async with page.sampling():
        streams = [page.messages() for _ in range(8)]
        for stream in streams:
            await after(stream, 1)
        before = reports.count
        seen = await asyncio.gather(*(after(stream, 4) for stream in streams))
        assert reports.count - before == 4
        assert all(each == seen[0] for each in seen)


class FakeClock:
    """Stands in for the module `time`."""

    CLOCK_MONOTONIC = 1

    def __init__(self, *, asleep_too: int) -> None:
        """asleep_too: the clock that counts sleep: Linux' CLOCK_BOOTTIME, or macOS' CLOCK_MONOTONIC."""
        if asleep_too != self.CLOCK_MONOTONIC:
            self.CLOCK_BOOTTIME = asleep_too
        self._asleep_too = asleep_too
        self.boot_s, self.now_s, self.awake_s = 100.0, 1000.0, 100.0

    def time(self) -> float:
        return self.now_s

    def monotonic(self) -> float:
        return self.awake_s

    def clock_gettime(self, clock: int) -> float:
        assert clock == self._asleep_too
        return self.boot_s

    def pass_s(self, seconds: float, *, asleep: bool = False) -> None:
        self.boot_s, self.now_s = self.boot_s + seconds, self.now_s + seconds
        self.awake_s += 0 if asleep else seconds


@pytest.mark.parametrize("asleep_too", [7, FakeClock.CLOCK_MONOTONIC])
@in_loop
async def test_times_are_right_after_the_machine_has_slept_and_once_the_clock_is_set(
    asleep_too: int, reports, monkeypatch
) -> None:
    clock = FakeClock(asleep_too=asleep_too)
    monkeypatch.setattr(live_page, "time", clock)
    page = LivePage(reports, dict)
    stream = page.messages()
    ((name, history),) = await after(stream, 1)
    clock.pass_s(28_800, asleep=True)
    page._sample()
    ((name, sample),) = await after(stream, 1)
    assert (name, sample["point"]["time"]) == ("sample", 29_800)
    clock.pass_s(10)
    clock.now_s -= 20_000
    page._sample()
    ((name, history),) = await after(stream, 1)
    assert name == "history", "a viewer's older times are corrected too"
    assert [point["time"] for point in history["points"]] == [-19_000, 9_800, 9_810]
    assert [event["time"] for event in history["events"]] == [9_800, 9_810]
    clock.pass_s(1)
    page._sample()
    ((name, sample),) = await after(stream, 1)
    assert (name, sample["point"]["time"]) == ("sample", 9_811)
    await stream.aclose()


@in_loop
async def test_a_slow_viewer_misses_samples_and_no_event(reports, monkeypatch) -> None:
    monkeypatch.setattr(live_page, "SAMPLE_S", 0.01)
    page = LivePage(reports, dict)
    async with page.sampling():
        slow, quick = page.messages(), page.messages()
        ((_, history),) = await after(slow, 1)
        await after(slow, 1)
        await after(quick, 12)
        ((_, sample),) = await after(slow, 1)
        numbers = [event["number"] for event in sample["events"]]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
        assert len(numbers) > 5
        assert sample["point"]["time"] > history["points"][-1]["time"]


@in_loop
async def test_without_viewers_the_status_is_read_rarely(reports, monkeypatch) -> None:
    monkeypatch.setattr(live_page, "SAMPLE_S", 0.01)
    page = LivePage(reports, dict)
    async with page.sampling():
        await asyncio.sleep(0.1)
        assert reports.count == 1
        stream = page.messages()
        await after(stream, 3)
        await stream.aclose()
        await asyncio.sleep(0.05)
        before = reports.count
        await asyncio.sleep(0.1)
        assert reports.count == before


def test_streams_end_when_the_server_shuts_down_or_the_sampler_fails(reports) -> None:
    async def ends(page: LivePage, *, after_s: float) -> None:
        async with page.sampling():
            stream = page.messages()
            await after(stream, 1)
            asyncio.get_running_loop().call_later(after_s, page.close)
            with pytest.raises(StopAsyncIteration):
                await asyncio.wait_for(anext(stream), 5)

    asyncio.run(ends(LivePage(reports, dict), after_s=0.01))

    def fails() -> dict[str, Any]:
        if reports.count == 2:
            raise ValueError("the page is torn")
        return reports()

    reports.count = 0
    asyncio.run(ends(LivePage(fails, dict), after_s=60))
    assert reports.count == 2


def test_too_many_viewers_are_refused(reports) -> None:
    page = LivePage(reports, dict)
    page.num_viewers = MAX_VIEWERS
    with pytest.raises(RequestError) as error:
        asyncio.run(page.events())
    assert error.value.status == 503


@pytest.mark.parametrize(
    ("host", "page", "shown"),
    [
        ("127.0.0.1", "auto", True),
        ("0.0.0.0", "auto", False),
        ("::", "auto", False),
        ("0.0.0.0", "on", True),
        ("127.0.0.1", "off", False),
    ],
)
def test_by_default_the_page_is_shown_on_loopback_only(host: str, page: str, shown: bool) -> None:
    assert shows_page(load_config(None, [f"server.host={host}", f"server.page={page}"])) is shown


# -- code in answers -----------------------------------------------------------------------------------------------

RUN_FENCES = """
const marked = (parts) => {
  let out = "";
  const turn = (language) => { out += language == null ? ")" : `(${language}:`; };
  const fences = new Fences((text) => { out += text; }, turn);
  for (const part of parts) fences.push(part, "draft");
  const before = out;
  fences.end();
  return [out, before];
};
const [texts, parts] = JSON.parse(process.argv[2]);
const cut = (text) => [[text], [...text], text.match(/[^]{1,2}/g), text.match(/[^]{1,3}/g)];
const found = texts.map((text) => [...new Set(cut(text).map((each) => marked(each)[0]))]);
console.log(JSON.stringify([found, marked(parts)]));
"""
FENCES = Path(live_page.__file__).with_name("static") / "fences.js"
CODE = {
    "a\n```py\nx = 1\n\ny\n```\nb": "a\n(py:x = 1\n\ny\n)b",
    "```\nx": "(:x",  # the answer ends, or was stopped, inside
    "```\nx\n```": "(:x\n)",
    "1. as\n   ``` js \n   x\n   ```  \n": "1. as\n(js:   x\n)",
    "````md\n```py\n```\n`````\n": "(md:```py\n```\n)",
    "```a\n```b\n  `` \n```": "(a:```b\n  `` \n)",
    "``\n`x` and ```y``` \n```z``` is text\n    w ": "``\n`x` and ```y``` \n```z``` is text\n    w ",
    "x ```\ny\n\n``": "x ```\ny\n\n``",
}
"""Text → the same with code in brackets, after its language and a colon."""


@pytest.mark.skipif(shutil.which("node") is None, reason="there is no Node")
def test_code_is_told_from_text_however_an_answer_comes_in_parts() -> None:
    given = json.dumps([list(CODE), ["so `", "`` ", "\n  ", "`", "`", "` p", "y\n", "x`", "\n", "``"]])
    command = ["node", "--input-type=module", "-", given]
    done = subprocess.run(command, input=FENCES.read_text() + RUN_FENCES, capture_output=True, text=True, timeout=20)
    assert done.returncode == 0, done.stderr
    found, (whole, before_the_end) = json.loads(done.stdout)
    assert dict(zip(CODE, found, strict=True)) == {text: [marked] for text, marked in CODE.items()}
    assert (whole, before_the_end) == ("so ``` \n(py:x`\n``", "so ``` \n(py:x`\n"), (
        "only what may be a fence is held back"
    )


# -- a real server -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server():
    with FakeServer(server={"api_key": "secret"}) as running:
        yield running


def test_the_page_is_small_self_contained_and_has_a_strict_policy(server) -> None:
    answers = [httpx.get(server.url + path) for path in FILES]
    assert sum(len(answer.content) for answer in answers) < 60_000
    kinds = ("text/html", "text/css", "text/javascript", "text/javascript")
    for answer, kind in zip(answers, kinds, strict=True):
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith(kind)
        for name, value in HEADERS.items():
            assert answer.headers[name] == value
        links = set(re.findall(r"https?://[\w.]+", answer.text))
        assert links <= {"http://www.w3.org"}  # names of XML, which nothing fetches
    page = answers[0].text
    assert "style=" not in page
    assert not re.search(r"<script(?![^>]*src=)|\son\w+=", page)
    assert "unsafe" not in HEADERS["Content-Security-Policy"]
    for script in answers[2:]:  # what comes from a model becomes text, not markup
        assert not re.search(r"\b(inner|outer)HTML|insertAdjacentHTML|document\.write|DOMParser|\beval\(", script.text)


def test_without_the_key_there_is_no_data(server) -> None:
    page = "".join(httpx.get(server.url + path).text for path in FILES)
    assert "fake-000001" not in page
    for headers in ({}, {"Authorization": "Bearer wrong"}):
        with httpx.stream("GET", server.url + EVENTS, headers=headers, timeout=10) as answer:
            assert answer.status_code == 401
            assert json.loads(answer.read())["error"]["code"] == "invalid_api_key"
    with httpx.stream("GET", server.url + EVENTS, headers=KEY, timeout=10) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        first = next(answer.iter_text())
    name, history = parsed(first)
    assert (name, history["report"]["draft"]["version"]) == ("history", "fake-000001")
    assert history["report"].keys() == httpx.get(server.url + "/v1/aurora/status", headers=KEY).json().keys()


def test_a_viewer_that_leaves_frees_its_place(server) -> None:
    for _ in range(MAX_VIEWERS + 8):
        with httpx.stream("GET", server.url + EVENTS, headers=KEY, timeout=10) as answer:
            assert answer.status_code == 200
            next(answer.iter_text())
            time.sleep(0.02)


def test_endless_events_are_not_in_the_schema_that_programs_try_out(server) -> None:
    assert not {*FILES, EVENTS} & httpx.get(server.url + "/openapi.json").json()["paths"].keys()


@pytest.mark.process
def test_a_page_that_watches_does_not_hold_up_the_end() -> None:
    with FakeServer(server={"drain_s": 30.0}) as server:
        begun, ended = threading.Event(), threading.Event()

        def watch() -> None:
            with httpx.stream("GET", server.url + EVENTS, timeout=20) as answer:
                for _ in answer.iter_text():
                    begun.set()
            ended.set()

        threading.Thread(target=watch, daemon=True).start()
        assert begun.wait(10)
        began = time.monotonic()
        assert server.end()[0] == 0
        assert time.monotonic() - began < 8
        assert ended.wait(5)


def test_without_the_page_its_routes_do_not_exist() -> None:
    with FakeServer(server={"page": "off"}) as server:
        assert {httpx.get(server.url + path).status_code for path in (*FILES, EVENTS)} == {404}
        assert httpx.get(server.url + "/health").status_code == 200
