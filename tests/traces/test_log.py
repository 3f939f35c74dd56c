"""Trace logs on disk: what is written is read again, also after a crash, and within the size limit."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from support.trace_examples import HIDDEN, numbered_trace, same_trace, trace_with_rounds, write_log

from aurora_lit.traces import log as trace_log
from aurora_lit.traces.log import INDEX_NAME, TraceLogWriter, read_index, read_shard
from aurora_lit.traces.record import Trace, check


def same(left: Trace, right: Trace) -> bool:
    tensors = ("token_ids_T", "aux_T3H", "last_TH", "lse_T")
    return (left.domain, left.answer_start) == (right.domain, right.answer_start) and all(
        torch.equal(getattr(left, name), getattr(right, name)) for name in tensors
    )


def read(folder: Path) -> list[Trace]:
    return [trace for shard in read_index(folder) for trace in read_shard(folder / shard.name)]


def test_what_is_written_is_read_in_shards_of_the_size_asked_for(tmp_path: Path) -> None:
    texts = [numbered_trace(9, first=i, domain=f"d{i}") for i in range(5)]
    write_log(tmp_path, texts, shard_positions=20)
    write_log(tmp_path, [numbered_trace(8, answer_start=3)], kind="answer")
    assert [(s.name, s.num_positions, s.num_sequences, s.kind) for s in read_index(tmp_path)] == [
        ("text-00000.safetensors", 27, 3, "text"),
        ("text-00001.safetensors", 18, 2, "text"),
        ("answer-00002.safetensors", 8, 1, "answer"),
    ]
    wanted = [*texts, numbered_trace(8, answer_start=3)]
    assert all(same(a, b) for a, b in zip(read(tmp_path), wanted, strict=True))
    assert TraceLogWriter(tmp_path, kind="text").num_positions == 45


def test_only_the_owner_can_read_a_log(tmp_path: Path) -> None:
    folder = tmp_path / "log"
    before = os.umask(0o022)
    try:
        write_log(folder, [numbered_trace(9)])
        writer = TraceLogWriter(folder, kind="text", max_bytes=(folder / "text-00000.safetensors").stat().st_size)
        writer.append(numbered_trace(9))
        writer.flush()
    finally:
        os.umask(before)
    assert [info.name for info in read_index(folder)] == ["text-00001.safetensors"], "the index was rewritten"
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}
    assert folder.stat().st_mode & 0o777 == 0o700


def test_one_writer_at_a_time_has_the_folder(tmp_path: Path) -> None:
    writer = TraceLogWriter(tmp_path, kind="live")
    with pytest.raises(BlockingIOError, match="another process writes there") as raised:
        TraceLogWriter(tmp_path, kind="text")
    assert raised.value.filename == str(tmp_path)
    writer.append(numbered_trace(9))
    writer.close()
    write_log(tmp_path, [numbered_trace(9, first=50)])
    assert [int(trace.token_ids_T[0]) for trace in read(tmp_path)] == [0, 50]


def test_an_error_of_a_file_system_without_locks_names_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(OSError, match="Function not implemented") as raised:
        TraceLogWriter(tmp_path, kind="live")
    assert raised.value.filename == str(tmp_path)


def test_what_a_killed_writer_left_is_deleted(tmp_path: Path) -> None:
    mine = {"notes.tmp", ".hidden", ".tmp-folder", ".tmp-of-mine", ".vimrc.tmp"}
    for name in (".tmpAb12Cd", ".live-00001.safetensors.tmp", ".index.jsonl.tmp", *mine - {".tmp-folder"}):
        (tmp_path / name).touch()
    (tmp_path / ".tmp-folder").mkdir()
    TraceLogWriter(tmp_path, kind="live").close()
    assert {path.name for path in tmp_path.iterdir()} == {*mine, ".lock"}


@pytest.mark.parametrize("fault", ["save_file", "replace", "fsync"])
def test_a_crash_while_writing_a_shard_leaves_a_readable_log(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_log(tmp_path, [numbered_trace(9)])

    def crash(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(trace_log if fault == "save_file" else os, fault, crash)
    with pytest.raises(KeyboardInterrupt):
        write_log(tmp_path, [numbered_trace(9, first=50)])
    monkeypatch.undo()
    assert [same(trace, numbered_trace(9)) for trace in read(tmp_path)] == [True]
    write_log(tmp_path, [numbered_trace(9, first=70)])
    assert [int(trace.token_ids_T[0]) for trace in read(tmp_path)] == [0, 70]


def test_a_full_disk_is_an_error_with_the_file_s_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(*_: object, **__: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(trace_log, "save_file", fill)
    with pytest.raises(OSError, match="cannot be written: .*No space left") as raised:
        write_log(tmp_path, [numbered_trace(9)])
    assert str(raised.value.filename).startswith(str(tmp_path))


@pytest.mark.parametrize("cut", [1, 30, 200])
def test_an_index_line_cut_short_costs_that_shard_only(cut: int, tmp_path: Path) -> None:
    for first in (0, 10, 20):
        write_log(tmp_path, [numbered_trace(9, first=first)])
    index = tmp_path / INDEX_NAME
    text = index.read_text()
    last_line = len(text.splitlines()[-1]) + 1
    index.write_text(text[: -min(cut, last_line - 3)])
    kept = [0, 10, 20] if cut == 1 else [0, 10]
    assert [int(trace.token_ids_T[0]) for trace in read(tmp_path)] == kept
    for first in (30, 40):
        write_log(tmp_path, [numbered_trace(9, first=first)])
    assert [int(trace.token_ids_T[0]) for trace in read(tmp_path)] == [*kept, 30, 40]


def test_files_outside_of_the_log_are_no_shards_of_it(tmp_path: Path) -> None:
    foreign, folder = tmp_path / "live-00000.safetensors", tmp_path / "log"
    write_log(folder, [numbered_trace(9)])
    foreign.write_bytes((folder / "text-00000.safetensors").read_bytes())
    (folder / "notes.safetensors").write_bytes(b"the user's own")
    (known,) = read_index(folder)
    index = folder / INDEX_NAME
    names = [f"../{foreign.name}", str(foreign), "notes.safetensors", 5]
    index.write_text("".join(json.dumps({**known.__dict__, "name": name}) + "\n" for name in [*names, known.name]))
    assert read_index(folder) == [known]
    writer = TraceLogWriter(folder, kind="live", max_bytes=foreign.stat().st_size + 1)
    writer.append(numbered_trace(9))
    writer.close()
    assert foreign.exists()
    assert (folder / "notes.safetensors").exists()


def test_a_shard_that_was_deleted_does_not_make_another_be_overwritten(tmp_path: Path) -> None:
    for first in (0, 10):
        write_log(tmp_path, [numbered_trace(9, first=first)])
    (tmp_path / read_index(tmp_path)[0].name).unlink()
    write_log(tmp_path, [numbered_trace(9, first=20)])
    assert [int(trace.token_ids_T[0]) for trace in read(tmp_path)] == [10, 20]


def test_live_traces_come_back_with_their_rounds(tmp_path: Path) -> None:
    live = [
        trace_with_rounds([(1, 4, 1), (3, 3, 3), (7, 0, 0), (8, 1, 0)], request_id="a"),
        trace_with_rounds([], verify="greedy", temperature=0.0, domain=""),
        trace_with_rounds([(2, 2, 0), (5, 2, 2)], lse_T=torch.arange(12) / 3, first_position=70),
        trace_with_rounds([(2, 0, 0)]),
    ]
    write_log(tmp_path, live, kind="live")
    got = read(tmp_path)
    assert all(same_trace(a, b) for a, b in zip(got, live, strict=True))
    for trace in got:
        check(trace)


def test_a_log_whose_traces_had_more_is_still_read(tmp_path: Path) -> None:
    """Before, rounds had the probabilities that proposals were drawn with, and the states of rejected ones."""
    wanted = [trace_with_rounds([(1, 3, 1), (3, 4, 3)]), trace_with_rounds([(2, 2, 0)])]
    write_log(tmp_path, wanted, kind="live")
    path = tmp_path / "live-00000.safetensors"
    with safe_open(path, framework="pt") as shard:
        tensors = {key: shard.get_tensor(key) for key in shard.keys()}  # noqa: SIM118  (not a dict)
        metadata = shard.metadata()
    gone = {
        "explored_R": torch.zeros(3, dtype=torch.bool),
        "draft_temperature_R": torch.ones(3),
        "behaviour_logprob_RK": torch.full((3, 4), float("nan")),
        "rejected": torch.zeros(2, HIDDEN, dtype=torch.bfloat16),
        "num_rejected": torch.tensor([1, 1], dtype=torch.int32),
    }
    save_file({**tensors, **gone}, path, metadata=metadata)
    assert all(same_trace(a, b) for a, b in zip(read(tmp_path), wanted, strict=True))


def test_a_bounded_log_deletes_its_oldest_shards(tmp_path: Path) -> None:
    writer = TraceLogWriter(tmp_path, kind="live", max_bytes=40_000)
    (tmp_path / "live-00099.safetensors").write_bytes(bytes(30_000))  # a crash left it out of the index
    foreign = tmp_path.parent / "model.safetensors"
    foreign.write_bytes(bytes(30_000))
    (tmp_path / "model.safetensors").symlink_to(foreign)  # the user's own, which the limit does not count
    for first in range(60):
        writer.append(trace_with_rounds([(1, 3, 1)], first_position=first))
        writer.flush()
        size = sum(path.stat().st_size for path in tmp_path.glob("live-*.safetensors"))
        assert size <= 40_000
    kept = [trace.first_position for trace in read(tmp_path)]
    assert kept == list(range(60 - len(kept), 60))
    assert size > 30_000
    assert len((tmp_path / INDEX_NAME).read_text().splitlines()) == len(kept)
    writer.append(trace_with_rounds([], length=20_000, token_ids_T=torch.zeros(20_000, dtype=torch.int32)))
    with pytest.raises(OSError, match="larger"):
        writer.flush()
    assert [trace.first_position for trace in read(tmp_path)] == kept
    assert (tmp_path / "model.safetensors").exists()
