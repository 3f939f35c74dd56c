"""The reservoir is a fair, bounded sample of past traces that survives a restart."""

from __future__ import annotations

import errno
import os
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from aurora_lit.learn.data import reservoir as reservoir_module
from aurora_lit.learn.data.reservoir import Reservoir
from aurora_lit.traces.record import Trace, from_bytes, to_bytes


def a_trace(*, domain: str = "a", length: int = 20, request_id: str = "r", mark: int = 0, client: str = "") -> Trace:
    """A greedy trace without rounds; `mark` can be found again in its tokens."""
    return Trace(
        request_id=request_id,
        domain=domain,
        client=client,
        verify="greedy",
        answer_start=4,
        token_ids_T=torch.full((length,), mark, dtype=torch.int32),
        aux_T3H=torch.zeros(length, 12, dtype=torch.bfloat16),
        last_TH=torch.zeros(length, 4, dtype=torch.bfloat16),
    )


def test_the_reservoir_keeps_a_fair_sample_within_its_bytes_and_spares_rare_domains(tmp_path: Path) -> None:
    size = a_trace().num_bytes
    reservoir = Reservoir(tmp_path / "r", limit_bytes=40 * (size + 1500), seed=0)
    for mark in range(5):
        reservoir.add(a_trace(domain="rare", mark=mark))
    for mark in range(1000):
        reservoir.add(a_trace(domain="busy", mark=mark))
        assert sum(path.stat().st_size for path in (tmp_path / "r").iterdir()) <= 40 * (size + 1500)
    assert reservoir.domains["rare"] == 5
    assert 25 <= reservoir.domains["busy"] <= 50
    found = [reservoir.sample() for _ in range(400)]
    domains = Counter(trace.domain for trace in found if trace)
    assert 140 < domains["rare"] < 260, "each domain is as likely"
    marks = {int(trace.token_ids_T[0]) for trace in found if trace and trace.domain == "busy"}
    assert 300 < sum(marks) / len(marks) < 700, "old and new alike"


def test_a_client_with_many_traces_neither_pushes_out_others_nor_is_replayed_more_often(tmp_path: Path) -> None:
    reservoir = Reservoir(tmp_path / "r", limit_bytes=20 * len(to_bytes(a_trace(client="b"))), seed=0)
    for mark in range(5):
        reservoir.add(a_trace(client="b", mark=mark))
    for mark in range(5, 300):
        reservoir.add(a_trace(client="a", mark=mark))
    assert reservoir.domains == {"a": 20}
    found = [trace for _ in range(400) if (trace := reservoir.sample())]
    assert {int(trace.token_ids_T[0]) for trace in found if trace.client == "b"} == set(range(5))
    assert 150 < sum(trace.client == "b" for trace in found) < 250


def test_traces_of_a_domain_that_went_into_another_are_of_that(tmp_path: Path) -> None:
    reservoir = Reservoir(tmp_path / "r", limit_bytes=1 << 20, seed=0)
    for mark, domain in enumerate(["a", "a", "b", "c", "c", "c"]):
        reservoir.add(a_trace(domain=domain, mark=mark))
    reservoir.rename_domain("a", "b")
    reservoir.rename_domain("c", "d")
    reservoir.rename_domain("unknown", "d")
    assert reservoir.domains == {"b": 3, "d": 3}
    num_bytes = reservoir.num_bytes
    found = {(trace.domain, int(trace.token_ids_T[0])) for _ in range(200) if (trace := reservoir.sample())}
    assert found == {("b", 0), ("b", 1), ("b", 2), ("d", 3), ("d", 4), ("d", 5)}
    assert num_bytes == sum(path.stat().st_size for path in (tmp_path / "r").iterdir())


def test_while_shared_memory_is_full_new_traces_still_replace_old_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = len(to_bytes(a_trace()))
    room, replace = [20], os.replace

    def on_a_small_disk(source: Path, destination: Path) -> None:
        if sum(path.stat().st_size for path in (tmp_path / "r").iterdir()) > room[0] * size + size // 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, destination)

    monkeypatch.setattr("aurora_lit.learn.data.reservoir.os.replace", on_a_small_disk)
    reservoir = Reservoir(tmp_path / "r", limit_bytes=1 << 30, seed=0)
    for mark in range(400):
        reservoir.add(a_trace(mark=mark))
    reservoir.add(a_trace(domain="new", mark=400))
    assert reservoir.domains["new"] == 1
    assert 15 < reservoir.domains["a"] < 20
    marks = {int(trace.token_ids_T[0]) for _ in range(300) if (trace := reservoir.sample())}
    assert 100 < sum(marks) / len(marks) < 300, "old and new alike"
    assert reservoir.num_bytes == sum(path.stat().st_size for path in (tmp_path / "r").iterdir())
    room[0] = 0
    assert not any(reservoir.add(a_trace()) for _ in range(60))
    assert len(reservoir) >= 14, "where others have taken all, little is gained by dropping"
    room[0] = 1000
    assert sum(reservoir.add(a_trace(mark=mark)) for mark in range(200)) > 100, "there is room again"


@pytest.mark.parametrize("room", [20, 200])
def test_some_shared_memory_is_left_to_others(room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An eighth, or less of much; and much of little is still used."""
    size = len(to_bytes(a_trace()))

    def a_small_disk(folder: Path) -> SimpleNamespace:
        used = sum(path.stat().st_size for path in folder.iterdir())
        return SimpleNamespace(f_bavail=room * size - used, f_frsize=1, f_blocks=room * size)

    monkeypatch.setattr(reservoir_module.os, "statvfs", a_small_disk)
    monkeypatch.setattr(reservoir_module, "_LEFT_BYTES", 12 * size)
    reservoir = Reservoir(tmp_path / "r", limit_bytes=1 << 30, seed=0)
    for mark in range(room + 100):
        reservoir.add(a_trace(mark=mark))
    assert room - min(room // 8, 12) - 6 < len(reservoir) <= room - min(room // 8, 12)


def test_heavier_traces_are_more_likely_to_stay(tmp_path: Path) -> None:
    reservoir = Reservoir(tmp_path / "r", limit_bytes=60_000, seed=1)
    for mark in range(600):
        reservoir.add(a_trace(mark=mark % 2), weight=1.0 if mark % 2 else 0.1)
    marks = Counter(int(t.token_ids_T[0]) for _ in range(300) if (t := reservoir.sample()))
    assert marks[1] > 5 * marks[0]


def test_a_reservoir_is_reopened_without_its_damaged_traces(tmp_path: Path) -> None:
    first = Reservoir(tmp_path / "r", limit_bytes=1 << 20, seed=0)
    for mark in range(6):
        first.add(a_trace(domain=f"d{mark % 2}", mark=mark))
    files = sorted((tmp_path / "r").iterdir())
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}
    files[0].write_bytes(b"damaged")
    (tmp_path / "r" / "0000000009-0x1p-1.trace.tmp").write_bytes(b"half written")
    again = Reservoir(tmp_path / "r", limit_bytes=1 << 20, seed=0)
    assert (len(again), again.domains) == (5, {"d1": 3, "d0": 2})
    assert again.num_bytes == sum(path.stat().st_size for path in (tmp_path / "r").iterdir())
    assert again.add(a_trace(mark=7))
    assert len(again) == 6
    for path in (tmp_path / "r").iterdir():
        path.write_bytes(b"damaged later")
    assert again.sample() is None


def test_a_trace_that_is_too_large_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trace of 20 positions takes 17 of a batch, since 17 are trained on, one of 60 takes 57; after a restart too."""
    reservoir = Reservoir(tmp_path / "r", limit_bytes=1 << 20, seed=0)
    for mark, length in enumerate([20, 60, 20, 60]):
        reservoir.add(a_trace(length=length, mark=mark))
    for each in (reservoir, Reservoir(tmp_path / "r", limit_bytes=1 << 20, seed=1)):
        read: list[int] = []
        with monkeypatch.context() as patched:
            patched.setattr(reservoir_module, "from_bytes", lambda data: read.append(1) or from_bytes(data))  # noqa: B023
            found = [each.sample(largest=56) for _ in range(100)]
        marks = [int(trace.token_ids_T[0]) for trace in found if trace is not None]
        assert set(marks) == {0, 2}
        assert 25 < len(marks) == len(read) < 75, "as likely as without the limit"
        assert {int(t.token_ids_T[0]) for _ in range(100) if (t := each.sample(largest=57))} == {0, 1, 2, 3}


def test_a_trace_of_a_client_that_has_no_room_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its client and size are known, after a restart too."""
    reservoir = Reservoir(tmp_path / "r", limit_bytes=1 << 20, seed=0)
    for mark, client in enumerate(["ann", "bob"]):
        reservoir.add(a_trace(client=client, mark=mark))
    for each in (reservoir, Reservoir(tmp_path / "r", limit_bytes=1 << 20, seed=1)):
        asked: list[tuple[str, int]] = []
        read: list[int] = []

        def is_anns(client: str, size: int) -> bool:
            asked.append((client, size))  # noqa: B023
            return client == "ann"

        with monkeypatch.context() as patched:
            patched.setattr(reservoir_module, "from_bytes", lambda data: read.append(1) or from_bytes(data))  # noqa: B023
            found = [each.sample(allows=is_anns) for _ in range(40)]
        assert {int(trace.token_ids_T[0]) for trace in found if trace is not None} == {0}
        assert set(asked) == {("ann", 17), ("bob", 17)}
        assert len(read) == asked.count(("ann", 17)) < 40


def test_where_there_is_room_for_one_trace_it_is_by_chance_a_new_one_or_the_old_one(tmp_path: Path) -> None:
    reservoir = Reservoir(tmp_path / "r", limit_bytes=len(to_bytes(a_trace())) + a_trace().num_bytes - 1, seed=0)
    held = []
    for mark in range(30):
        reservoir.add(a_trace(mark=mark))
        assert reservoir.domains == {"a": 1}
        trace = reservoir.sample()
        assert trace is not None
        held.append(int(trace.token_ids_T[0]))
    assert held[0] == 0
    assert 2 <= len(set(held)) < 15
