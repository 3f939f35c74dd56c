"""A server under load, then its drafts: what is sent, what a phase is said to have brought, and what is compared."""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.fake_engine import tiny_tokenizer

from aurora_lit.errors import ConfigError
from benchmarks import live_learning
from benchmarks.live_learning import Sent, arms_of, phase_report, read_arrivals, send
from benchmarks.load import Answer, Chat, Json

SYSTEM = {"role": "system", "content": "be brief"}
STATUS = {"version": "start", "steps": 4, "positions": 500, "published": 0, "refused": 1, "shifts": 2}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float | None]]:
    """Prompts and temperatures of the requests that were sent; each takes a hundredth of a second."""
    found: list[tuple[str, float | None]] = []

    def ask(url: str, body: Json) -> Answer:
        found.append((body["messages"][-1]["content"], body.get("temperature")))
        began = time.monotonic()
        time.sleep(0.01)
        return Answer(sent_s=began, ended_s=time.monotonic(), text="text", tokens=7)

    monkeypatch.setattr(live_learning, "ask", ask)
    return found


def chats(texts: Iterable[str]) -> Iterator[Chat]:
    return ([{"role": "user", "content": text}] for text in texts)


def test_every_second_prompt_is_greedy_and_too_few_are_an_error(asked: list[tuple[str, float | None]]) -> None:
    sent = send("", chats(map(str, itertools.count())), seconds=0.2, clients=4, max_tokens=8)
    assert len(asked) == sent.requests > 4
    assert sent.tokens == 7 * sent.requests
    assert 0.01 <= sent.median_s <= sent.p95_s
    assert sent.token_ms == pytest.approx(1e3 * sent.median_s / 7, rel=0.5)
    counts = Counter(temperature for _, temperature in asked)
    assert abs(counts[0.0] - counts[None]) <= 1
    with pytest.raises(ConfigError, match="--phases"):
        send("", chats(["a", "b"]), seconds=60.0, clients=2, max_tokens=8)


def test_arrival_times_begin_with_zero_and_are_as_many_as_asked_for(tmp_path: Path) -> None:
    times = tmp_path / "times.csv"
    times.write_text("timestamp_s,prompt_tokens\n" + "".join(f"{100 + i / 4},3\n" for i in range(6)))
    assert read_arrivals(times, 3) == [0.0, 0.25, 0.5]
    with pytest.raises(ConfigError, match="has 6 arrivals for 7 requests"):
        read_arrivals(times, 7)
    times.write_text("a\n1\n")
    with pytest.raises(ConfigError, match="column timestamp_s"):
        read_arrivals(times, 1)


def test_a_phase_reports_what_it_added() -> None:
    after = {**STATUS, "version": "draft-000001", "steps": 10, "positions": 2500, "shifts": 3, "processor_s": 9.0}
    found = phase_report({**STATUS, "processor_s": 5.0}, after, Sent.of([(100, 2.0)] * 80))
    assert (found["version"], found["steps"], found["positions"], found["shifts"]) == ("draft-000001", 6, 2000, 1)
    assert (found["share_learned"], found["ms_a_position"]) == (0.25, 2.0)


def test_a_phase_without_steps_has_no_cost_a_position() -> None:
    same = {**STATUS, "processor_s": 5.0}
    assert phase_report(same, same, Sent.of([(8, 1.0)]))["ms_a_position"] is None


def test_the_last_draft_is_compared_where_it_is_another_one() -> None:
    assert list(arms_of("a", "b")) == ["shipped", "learned", "learned, memory", "last", "plain"]
    assert "last" not in arms_of("b", "b")
    assert arms_of(None, None)["learned"] == arms_of(None, None)["shipped"]


@pytest.mark.slow
def test_a_file_that_comes_again_goes_on_and_each_phase_is_kept(
    asked: list[tuple[str, float | None]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its prompts keep their system turn, and too long ones are left out before the held-out ones are counted."""
    files = {}
    for name in ("a", "b"):
        turns = [f"{name}{i}" + " much too long" * 600 * (i % 7 == 3) for i in range(200)]
        files[name] = tmp_path / f"{name}.jsonl"
        files[name].write_text(
            "".join(json.dumps({"messages": [SYSTEM, {"role": "user", "content": t}]}) + "\n" for t in turns)
        )

    @contextlib.contextmanager
    def server(config: Any, log: Path) -> Iterator[str]:
        yield "http://nowhere"

    compared = []

    def measure(arms: Any, options: Any) -> list[dict[str, Any]]:
        compared.append((options.prompts[0].stem, options.skip))
        if len(compared) == 3:
            raise KeyboardInterrupt
        return [{"unequal": 0}]

    class Store:
        """One more version at each look."""

        def __init__(self, folder: Path, *, keep: int) -> None:
            self.folder, self.number = tmp_path / "versions", 0

        def current(self) -> str:
            self.number += 1
            (self.folder / f"draft-{self.number}").mkdir(parents=True)
            return f"draft-{self.number}"

    monkeypatch.setattr(live_learning, "DraftStore", Store)
    monkeypatch.setattr(live_learning, "load_tokenizer", lambda _: tiny_tokenizer())
    monkeypatch.setattr(live_learning, "running_server", server)
    monkeypatch.setattr(live_learning, "learner_status", lambda _: {**STATUS, "processor_s": 1.0})
    monkeypatch.setattr(live_learning.one_process, "measure", measure)
    phases = [str(files[name]) for name in ("a", "b", "a")]
    how = ["--seconds", "0.5", "--clients", "1", "--turns", "2", "--warm-up", "1", "--max-tokens", "8"]
    out = tmp_path / "out"
    monkeypatch.setattr("sys.argv", ["live_learning", "--phases", *phases, *how, "--out", str(out)])
    with pytest.raises(KeyboardInterrupt):
        live_learning.main()
    texts = [text for text, _ in asked]
    assert len(texts) == len(set(texts)), "the second phase of a goes on where the first one stopped"
    assert [name for name, _ in itertools.groupby(text[0] for text in texts)] == ["a", "b", "a"]
    assert not any("long" in text for text in texts)
    assert compared == [("a", 171 - 6), ("b", 171 - 6), ("a", 171 - 6)]
    assert sorted(path.name for path in out.glob("after-*")) == ["after-1-a", "after-2-b", "after-3-a"]
    report = json.loads((out / "report.json").read_text())
    assert [phase["traffic"] for phase in report["phases"]] == ["a", "b", "a"]
    assert [row["traffic"] for row in report["rows"]] == ["a", "b"], "what was measured before it was killed"
