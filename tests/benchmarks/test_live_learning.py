"""A server under load, then its drafts: what is sent, what a phase is said to have brought, and what is compared."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from aurora_lit.bench.load import Answer, Json
from aurora_lit.errors import ConfigError
from aurora_lit.learn.pretrain.prompts import Prompt
from benchmarks import live_learning
from benchmarks.live_learning import Sent, arms_of, phase_report, read_arrivals, send

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
        rounds = {"num_spec_steps": 3, "num_accepted_draft_tokens": 4}
        return Answer(sent_s=began, ended_s=time.monotonic(), text="text", tokens=7, speculation=rounds)

    monkeypatch.setattr(live_learning, "ask", ask)
    return found


def answer(tokens: int, seconds: float, *, ended_s: float = 60.0, rounds: int = 0, accepted: int = 0) -> Answer:
    speculation = {"num_spec_steps": rounds, "num_accepted_draft_tokens": accepted}
    return Answer(sent_s=ended_s - seconds, ended_s=ended_s, text="", tokens=tokens, speculation=speculation)


def chats(texts: Iterable[str]) -> Iterator[Prompt]:
    return (Prompt(domain="", messages=(text,)) for text in texts)


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
    found = phase_report({**STATUS, "processor_s": 5.0}, after, Sent.of([answer(100, 2.0)] * 80))
    assert (found["version"], found["steps"], found["positions"], found["shifts"]) == ("draft-000001", 6, 2000, 1)
    assert (found["share_learned"], found["ms_a_position"]) == (0.25, 2.0)


def test_a_phase_without_steps_has_no_cost_a_position() -> None:
    same = {**STATUS, "processor_s": 5.0}
    assert phase_report(same, same, Sent.of([answer(8, 1.0)]))["ms_a_position"] is None


def test_tokens_of_a_round_and_a_second_are_by_the_minute_in_which_requests_ended() -> None:
    first = [answer(30, 10.0, ended_s=10.0, rounds=9, accepted=3), answer(30, 9.0, ended_s=12.0, rounds=1, accepted=2)]
    third = [answer(60, 60.0, ended_s=130.0)]
    assert Sent.of([*third, *first]).minutes == [(0, 1.5, 1.0), (2, 1.0, 1.0)]


def test_the_last_draft_is_compared_where_it_is_another_one() -> None:
    assert list(arms_of("a", "b")) == ["shipped", "learned", "learned, memory", "last", "plain"]
    assert "last" not in arms_of("b", "b")
    assert arms_of(None, None)["learned"] == arms_of(None, None)["shipped"]
