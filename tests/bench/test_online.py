"""bench online: what is sent in which order, and what the report says of it; without servers."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from aurora_lit.bench import online
from aurora_lit.bench.online import ClientAnswer
from aurora_lit.config import AuroraConfig, load_config, versions_folder
from aurora_lit.errors import ConfigError
from aurora_lit.learn.pretrain.prompts import Prompt


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Five prompts of each of two domains."""
    paths = []
    for domain in ("billing", "support"):
        lines = [
            {"id": f"{domain}-{i}", "domain": domain, "messages": [{"role": "user", "content": f"{domain} {i}"}]}
            for i in range(5)
        ]
        paths.append(tmp_path / f"{domain}.jsonl")
        paths[-1].write_text("\n".join(map(json.dumps, lines)) + "\n")
    return paths


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """Text and `store` of every request. The draft gets better with stored ones: a round accepts as many tokens."""
    found: list[tuple[str, bool]] = []
    clock = itertools.count()

    def ask(client: Any, model: str, number: int, prompt: Prompt, *, store: bool, **_: Any) -> ClientAnswer:
        found.append((prompt.messages[0], store))
        learned = sum(was_stored for _, was_stored in found)
        fields: dict[str, Any] = {"number": number, "domain": prompt.domain, "text": prompt.messages[0]}
        return ClientAnswer(
            **fields, started_s=float(next(clock)), seconds=2.0, tokens=8, rounds=1, accepted=learned, draft_versions=()
        )

    @contextlib.contextmanager
    def server(config: Any, log: Path) -> Iterator[str]:
        found.clear()
        yield "http://nowhere"

    monkeypatch.setattr(online, "_ask", ask)
    monkeypatch.setattr(online, "running_server", server)
    monkeypatch.setattr(online, "_status", lambda url: {})
    monkeypatch.setattr(online, "find_target", lambda config: None)
    monkeypatch.setattr(online, "save_online_plot", lambda *_: True)
    return found


def run(files: list[Path], out: Path, **changes: Any) -> dict[str, Any]:
    options: dict[str, Any] = {"requests": 6, "measure_requests": 2, "concurrency": 1, "window": 2, "max_tokens": 8}
    config = load_config(None, changes.pop("overrides", ["memory.capacity_mb=0"]))
    options |= {"arms": ["learning"], "measure": files, **changes}
    return online.run(config, prompts=files, out=out, **options)


def test_traffic_of_all_files_is_mixed_and_measured_before_and_after(
    files: list[Path], sent: list[tuple[str, bool]], tmp_path: Path
) -> None:
    report = run(files, tmp_path / "out")
    measured = [("billing 0", False), ("support 0", False)]
    traffic = [(f"{domain} {i}", True) for i in range(3) for domain in ("billing", "support")]
    assert sent == [*measured, *traffic, *measured]
    arm = report["arms"]["learning"]
    assert [each["accepted_length"] for each in (arm["before"], arm["after"])] == [1.0, 7.0]
    assert [point["after"] for point in arm["measured"]] == ["", "all"]
    assert report["outputs_equal"]


def test_phases_come_one_after_the_other_and_each_is_followed_by_a_measurement(
    files: list[Path], sent: list[tuple[str, bool]], tmp_path: Path
) -> None:
    report = run(files, tmp_path / "out", phases=True)
    measured = [("billing 0", False), ("support 0", False)]
    first, second = ([(f"{domain} {i}", True) for i in range(3)] for domain in ("billing", "support"))
    assert sent == [*measured, *first, *measured, *second, *measured]
    found = report["arms"]["learning"]["measured"]
    assert [point["after"] for point in found] == ["", "billing", "support"]
    for domain in ("billing", "support"):
        assert [point["by_domain"][domain]["accepted_length"] for point in found] == [1.0, 4.0, 7.0]
        assert [point["by_domain"][domain]["client_tokens_per_s"] for point in found] == [4.0] * 3


def test_arms_that_do_not_learn_may_get_the_first_requests_of_each_phase_only(
    files: list[Path], sent: list[tuple[str, bool]], tmp_path: Path
) -> None:
    for few in (1, 2):  # at least one of each
        run(files, tmp_path / "out", phases=True, arms=["static"], static_requests=few)
        assert [text for text, stored in sent if stored] == ["billing 0", "support 0"]


def test_an_answer_that_changes_is_seen(
    files: list[Path], sent: list[tuple[str, bool]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = itertools.count()
    original = online._ask
    monkeypatch.setattr(
        online,
        "_ask",
        lambda *args, **kwargs: dataclasses.replace(original(*args, **kwargs), text=str(next(answers) == 9)),
    )
    assert not run(files, tmp_path / "out")["outputs_equal"]


def test_a_failed_answer_is_not_an_equal_one_and_without_measured_prompts_nothing_is_compared(
    files: list[Path], sent: list[tuple[str, bool]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(files, tmp_path / "none", measure=[])["outputs_equal"] is None
    original = online._ask

    def fail(*args: Any, **kwargs: Any) -> ClientAnswer:
        return dataclasses.replace(original(*args, **kwargs), text="", error="BadRequestError: too long")

    monkeypatch.setattr(online, "_ask", fail)
    assert run(files, tmp_path / "failed")["outputs_equal"] is False


def test_rounds_without_proposals_count_in_tokens_a_round_only() -> None:
    fields: dict[str, Any] = {"domain": "d", "started_s": 0.0, "seconds": 1.0, "draft_versions": (), "text": ""}
    careful = ClientAnswer(**fields, number=0, tokens=12, rounds=1, accepted=3)  # and 8 rounds that propose nothing
    daring = ClientAnswer(**fields, number=1, tokens=12, rounds=4, accepted=6)  # and 2
    windows = [online._window([answer]) for answer in (careful, daring)]
    assert [window.accepted_length for window in windows] == [4.0, 2.5]
    assert [window.tokens_per_round for window in windows] == [12 / 9, 2.0]
    assert online._window([careful, daring]).tokens_per_round == 24 / 15
    failed = ClientAnswer(**fields, number=2, tokens=0, rounds=0, accepted=0, error="lost")
    assert online._window([failed]).tokens_per_round == 1.0


def test_less_traffic_for_arms_that_do_not_learn_needs_a_server_without_memory(
    files: list[Path], sent: list[tuple[str, bool]], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="--static-requests 3: .*memory.capacity_mb=0"):
        run(files, tmp_path / "out", arms=["static"], static_requests=3, overrides=[])
    assert not sent


def test_the_target_is_there_before_a_server_starts(
    files: list[Path], sent: list[tuple[str, bool]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    start = online.running_server
    monkeypatch.setattr(online, "find_target", lambda config: order.append("target"))
    monkeypatch.setattr(online, "running_server", lambda *args: order.append("server") or start(*args))
    run(files, tmp_path / "out", arms=["static", "learning"])
    assert order == ["target", "server", "server"]


def test_each_run_learns_into_folders_of_its_own_and_leaves_none_behind(
    files: list[Path], sent: list[tuple[str, bool]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two containers too, in which the process has the same number."""
    folders: list[Path] = []

    @contextlib.contextmanager
    def server(config: AuroraConfig, log: Path) -> Iterator[str]:
        folders.append(versions_folder(config))
        folders[-1].mkdir(parents=True)
        yield "http://nowhere"

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(online, "running_server", server)
    for _ in range(2):
        run(files, tmp_path / "out", arms=["static", "learning"])
    assert len(set(folders)) == 4
    assert not any(folder.parent.exists() for folder in folders)


def test_without_openai_nothing_is_started(
    files: list[Path], sent: list[tuple[str, bool]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ConfigError, match=r"pip install 'aurora-lit\[bench\]'"):
        run(files, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_arm_is_a_server_of_its_own() -> None:
    config = load_config(None, ["server.api_key=secret", "learn.enabled=true"])
    arms = {arm: online._arm_config(config, arm, "drafts") for arm in online.ARMS}
    assert {arm: (each.engine.speculate, each.learn.enabled) for arm, each in arms.items()} == {
        "plain": (False, False),
        "static": (True, False),
        "learning": (True, True),
    }
    assert len({each.checkpoint.run for each in arms.values()}) == 3, "no arm serves what another one has learned"
    assert {each.server.api_key for each in arms.values()} == {None}


def test_a_request_has_the_systems_turn() -> None:
    made: list[Any] = []

    def create(**fields: Any) -> None:
        made.append(fields["messages"])
        raise ConnectionError

    client = SimpleNamespace(chat=SimpleNamespace(completions=SimpleNamespace(create=create)))
    prompt = Prompt(domain="d", messages=("first", "second"), system="be brief")
    online._ask(client, "m", 0, prompt, max_tokens=4, store=False, begun=0.0)
    assert made == [[{"role": "system", "content": "be brief"}, {"role": "user", "content": "first"}]]
