"""Traffic out of a git repository, and what is made of the answers to it."""

from __future__ import annotations

import itertools
import subprocess
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from aurora_lit.bench import repository
from aurora_lit.bench.load import Answer
from aurora_lit.bench.repository import WITH_LEARNER, Timed, run, summarise
from aurora_lit.bench.repository_traffic import enclosing_function, repository_requests
from aurora_lit.config import AuroraConfig
from aurora_lit.errors import AuroraError, ConfigError

FUNCTION = "def half(value):\n    low = value - 1\n    high = value + {n}\n    return low + high\n"


def git(folder: Path, *words: str) -> None:
    who = ("-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
    subprocess.run(["git", "-C", str(folder), *who, *words], check=True, capture_output=True)


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve commits: a Python function changes in each, a vendored file too, and a binary one."""
    folder = tmp_path_factory.mktemp("repository")
    git(folder, "init", "-q")
    for number in range(12):
        for name in ("code.py", "vendor/code.py"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text("import os\n\n\n" + FUNCTION.format(n=number))
        (folder / "logo.c").write_bytes(bytes([0, number]))
        git(folder, "add", "-A")
        git(folder, "commit", "-qm", f"Add {number}")
    return folder


def commits_of(folder: Path) -> list[str]:
    """Oldest first."""
    command = ["git", "-C", str(folder), "rev-list", "--reverse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def test_traffic_is_in_the_order_of_history_and_whole_commits_are_held_out(history: Path) -> None:
    requests = repository_requests(history, held_out_every=4)
    assert requests == repository_requests(history, held_out_every=4)
    assert {each.path for each in requests} == {"code.py"}
    commits = subprocess.run(
        ["git", "-C", str(history), "rev-list", "HEAD"], capture_output=True, text=True, check=True
    )
    oldest_first = commits.stdout.split()[::-1]
    places = [oldest_first.index(each.commit) for each in requests]
    assert places == sorted(places)
    assert {place for place, each in zip(places, requests, strict=True) if each.is_held_out} == {3, 7, 11}
    assert len({each.kind for each in requests}) >= 4
    assert requests != repository_requests(history, held_out_every=4, seed=1)


def test_a_hole_is_where_the_commit_changed_the_file_and_an_edit_begins_with_the_old_function(history: Path) -> None:
    requests = [each for seed in range(4) for each in repository_requests(history, seed=seed)]
    commits = subprocess.run(
        ["git", "-C", str(history), "rev-list", "HEAD"], capture_output=True, text=True, check=True
    )
    number = {commit: place for place, commit in enumerate(commits.stdout.split()[::-1])}
    for hole in (each.body for each in requests if each.kind == "hole"):
        assert hole["prompt"] == "import os\n\n\ndef half(value):\n    low = value - 1\n    "
        assert hole["suffix"] == "\n    return low + high\n"
    edits = [each for each in requests if each.kind == "edit"]
    assert edits
    for each in edits:
        assert FUNCTION.format(n=number[each.commit] - 1) in each.body["messages"][0]["content"]
        assert f"Add {number[each.commit]}" in each.body["messages"][0]["content"]


def test_functions_are_found_by_braces_too() -> None:
    code = "func add(a, b int) int {\n\tif (a > b) {\n\t\treturn a\n\t}\n\treturn b\n}\n\nvar x = 1\n"
    assert enclosing_function(code, 3, "go") == code.split("\n\n")[0] + "\n"
    assert enclosing_function(code, 8, "go") == ""
    assert enclosing_function("def broken(:\n", 1, "python") == ""


def test_what_is_no_repository_or_has_no_history_is_refused(history: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="git repository"):
        repository_requests(tmp_path)
    with pytest.raises(ConfigError, match="more history"):
        repository_requests(history, most_commits=2)


def timed(way: str, number: int, speed: float, text: str = "a") -> Timed:
    return Timed(number, way, speed, speed / 10, text)


def test_ratios_are_of_requests_that_were_timed_in_all_ways() -> None:
    answers = [timed(way, n, 10 * (1 + place) * (1 + n)) for n in range(4) for place, way in enumerate(WITH_LEARNER)]
    answers.append(timed("plain", 4, 1.0))
    rows = summarise(answers, WITH_LEARNER, requests_sent=7)
    assert [row["over_plain"] for row in rows] == pytest.approx([1, 2, 3])
    assert [row["held_out"] for row in rows] == [4] * 3
    answers[1] = answers[1]._replace(text="other")
    assert [row["unequal"] for row in summarise(answers, WITH_LEARNER, requests_sent=7)] == [0, 1, 0]
    with pytest.raises(AuroraError, match="--minutes"):
        summarise(answers[:9], WITH_LEARNER, requests_sent=7)


def test_held_out_requests_are_never_stored_and_a_way_without_memory_has_a_salt(
    history: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that answers at once; its learner is stopped while held-out requests run."""
    sent: list[tuple[bool, dict[str, Any]]] = []
    stopped = [False]
    clock = itertools.count()

    def ask(_: str, body: dict[str, Any]) -> Answer:
        sent.append((stopped[0], body))
        at = float(next(clock))
        return Answer(sent_s=at, ended_s=at + 1, text="x", tokens=20, pieces_s=(at, at + 0.5))

    @contextmanager
    def running_server(config: AuroraConfig, log: Path) -> Any:
        assert config.checkpoint.dir != AuroraConfig().checkpoint.dir
        yield f"{config.learn.enabled}"

    @contextmanager
    def stopped_learner(url: str) -> Any:
        assert url == "True"
        stopped[0] = True
        yield
        stopped[0] = False

    for name, fake in (("ask", ask), ("running_server", running_server), ("_stopped_learner", stopped_learner)):
        monkeypatch.setattr(repository, name, fake)
    rows = run(AuroraConfig(), history, minutes=0.01, clients=1, seed=0, out=tmp_path)
    assert [row["way"] for row in rows] == ["plain", "frozen", "memory", "plain", "learner", "both"]
    measured = [(was, body) for was, body in sent if "speculate" in body]
    assert all(body["store"] is False for _, body in measured)
    assert sum("cache_salt" in body for _, body in measured) == len(measured) * 2 / 3
    assert sum(not body["speculate"] for _, body in measured) == len(measured) / 3
    assert sum(was for was, _ in measured) == len(measured) / 2
    assert all("store" not in body and not was for was, body in sent if "speculate" not in body)
    assert {"repository.json", "repository.png"} <= {path.name for path in tmp_path.iterdir()}
