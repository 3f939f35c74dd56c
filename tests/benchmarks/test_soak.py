"""benchmarks/soak: the order of faults, the search for a text, and what counts as broken."""

from __future__ import annotations

import struct
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.soak import canary, hostile
from benchmarks.soak.clients import Call, make_pool
from benchmarks.soak.faults import BY_NAME, FAULTS, schedule
from benchmarks.soak.watch import Done, failed_without_cause, speed

TOKENS = [11, 40_000, 5, 49_151, 7, 300, 2, 45_000, 9, 10_000]
INNER = TOKENS[1:9]


def test_a_seed_draws_every_fault_before_one_comes_again() -> None:
    names = [fault.name for fault in FAULTS]
    found = schedule(seed=3, number=60, names=names)
    assert found == schedule(seed=3, number=60, names=names)
    assert found != schedule(seed=4, number=60, names=names)
    assert len(found) == 60
    assert set(found[: len(names)]) == set(names) == set(BY_NAME)
    assert set(Counter(found).values()) <= {60 // len(names), 60 // len(names) + 1}


@pytest.mark.parametrize(
    ("form", "content"),
    [
        ("text", b"bcd-fgh"),
        ("int16", struct.pack("<8H", *INNER)),
        ("int32", struct.pack("<8i", *INNER)),
        ("int64", struct.pack("<8q", *INNER)),
        ("JSON", b"40000, 5, 49151, 7, 300, 2, 45000, 9"),
        ("short JSON", b"40000,5,49151,7,300,2,45000,9"),
    ],
    ids=("text", "int16", "int32", "int64", "json", "short json"),
)
def test_a_planted_text_is_found_in_every_form(form: str, content: bytes, tmp_path: Path) -> None:
    what = canary.needles("hidden", "bcd-fgh", TOKENS)
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "file").write_bytes(bytes(4097) + content + b"\1" + content[:-1] + b"\1" + content)
    (tmp_path / "empty").touch()
    found = canary.search(what, [*canary.files_in(tmp_path), tmp_path / "gone"])
    assert dict(found.hits) == {f"hidden as {form}": 2}
    assert found.size == 4097 + 3 * len(content) + 1
    assert found.files == 2


def test_large_ids_and_short_texts_have_fewer_forms() -> None:
    assert "hidden as int16" not in canary.needles("hidden", "a", [*TOKENS, 1 << 16][3:])
    assert list(canary.needles("hidden", "a", TOKENS[:7])) == ["hidden as text"]


def test_files_from_before_and_links_are_left_out(tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    for folder in (tmp_path, inner):
        (folder / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "file")
    assert set(canary.files_in(tmp_path)) == {tmp_path / "file", inner / "file"}
    assert list(canary.files_in(tmp_path, is_deep=False)) == [tmp_path / "file"]
    now_s = (tmp_path / "file").stat().st_mtime
    assert not list(canary.files_in(tmp_path, since=now_s + 1))


def test_what_is_found_where_it_must_not_be_counts_and_what_is_missing_where_it_must_be() -> None:
    nothing, hidden, kept = (
        canary.Found(1, 9, hits) for hits in ({}, {"hidden as text": 2}, {"consented as int32": 1})
    )
    assert canary.faults({"planted": hidden, "run folder": kept, "logs": nothing}) == []
    assert canary.faults({"planted": hidden, "logs": hidden}) == ["logs: hidden as text, 2 times"]
    assert canary.faults({"planted": nothing, "recorded traces": nothing}) == [
        "planted: hidden was not found",
        "recorded traces: consented was not found",
    ]
    assert canary.faults({"planted": hidden, "run folder": hidden}) == [
        "run folder: consented was not found",
        "run folder: hidden as text, 2 times",
    ]


def test_every_request_with_a_hidden_text_opts_out_and_has_it() -> None:
    found = canary.requests("bcd-fgh", store=False)
    assert all("bcd-fgh" in f"{path}{body}" for path, body in found)
    assert {path for path, body in found if "store" not in body} == {"/tokenize", "/v1/bcd-fgh"}


def test_a_pool_has_all_kinds_and_follows_the_seed() -> None:
    pool = make_pool(seed=1, fills_holes=True)
    assert pool == make_pool(seed=1, fills_holes=True) != make_pool(seed=2, fills_holes=True)
    assert set(Counter(request.kind for request in pool).values()) == {12}
    assert all(request.body["temperature"] == 0 or "seed" in request.body for request in pool)
    assert not any("suffix" in request.body for request in make_pool(seed=1, fills_holes=False))


def call(outcome: str, sent_s: float, ended_s: float, detail: str = "") -> Call:
    return Call("whole", sent_s, ended_s, outcome, 10, detail)


def test_calls_may_fail_in_faults_that_end_processes_alone() -> None:
    kill = Done("KILL worker", 100.0, 101.0, 5.0, 1, "", [])
    stop = Done("KILL learner", 200.0, 201.0, 0.0, 0, "", [])
    during = [call("failed", 90.0, 100.5), call("refused", 104.0, 104.1), call("same", 300.0, 301.0)]
    full = [call("refused", 300.0, 300.1, "429: full")]
    beside = [call("failed", 90.0, 99.0), call("failed", 200.0, 200.5), call("refused", 107.1, 107.2, "500: no")]
    assert failed_without_cause([*during, *full, *beside], [kill, stop]) == beside
    assert failed_without_cause([call("failed", 90.0, 99.0)], []) != []


def test_speed_counts_compared_answers_that_ended_in_a_window() -> None:
    calls = [call("same", 0.0, 9.9), call("same", 9.0, 10.0), call("same", 15.0, 19.9), call("same", 15.0, 20.0)]
    assert speed([*calls, calls[1]._replace(client="cancel")], (10.0, 20.0)) == 2.0


def test_an_attack_is_compared_with_the_quiet_streams() -> None:
    quiet = hostile.Beside("quiet", 100, 10.0, 20.0, 900.0, 800.0, 800.0, 0, 0, 0.0, {})
    stood = quiet._replace(name="idle", p99_ms=40.0, longest_ms=500.0, after_mb=832.0)
    assert hostile.faults([quiet, quiet._replace(name="an eighth client", p99_ms=99.0), stood]) == []
    broken = stood._replace(p99_ms=41.0, longest_ms=501.0, after_mb=833.0, restarts=1, failed=2)
    assert hostile.faults([quiet, broken]) == [
        "idle: p99 41 ms, quiet 20 ms",
        "idle: a gap of 501 ms",
        "idle: 800 → 833 MB",
        "idle: 1 restarts",
        "idle: 2 streams failed",
    ]
