"""What the traffic memory keeps on disk: it survives restarts, crashes and full disks, and holds nothing else."""

from __future__ import annotations

import errno
import os
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from support.asked import Asked, copies_for
from support.crash_points import kill_at_every_step

from aurora_lit.errors import ConfigError
from aurora_lit.ipc.engine_status import EngineCounters
from aurora_lit.kernels import native
from aurora_lit.kernels.suffix_index import Copies
from aurora_lit.request import Scope, SharedBy
from aurora_lit.serve.speculation.sources import kept_answers
from aurora_lit.serve.speculation.sources.kept_answers import (
    KeptAnswer,
    KeptAnswers,
    client_key,
    forget,
    model_digest,
)
from aurora_lit.serve.speculation.sources.memory import TrafficMemory
from aurora_lit.settings import MemorySettings

TARGET = b"t" * 32
SALT = "a secret salt of thirty characters"


@contextmanager
def serving(folder: Path, *, shared_by: SharedBy = "domain", max_bytes: int = 1 << 20) -> Iterator[TrafficMemory]:
    """A memory that has read what is kept in the folder; at the end, what it remembered is written."""
    memory = TrafficMemory(1 << 20, shared_by=shared_by, counters=EngineCounters())
    kept = KeptAnswers(folder, target=TARGET, max_bytes=max_bytes, write_every_s=0.001)
    memory.keep(kept)
    wait_until(lambda: kept.is_read)
    try:
        yield memory
    finally:
        kept.close()


def wait_until(happened: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.001)


def asked(
    answer: int, *, client: str = "", salt: str = "", domain: str = "", store: bool = True, length: int = 12
) -> Asked:
    """A request whose answer is `length` tokens from `answer` on, after the prompt 1, 2."""
    tokens = list(range(answer, answer + length))
    return Asked(client=client, salt=salt, domain=domain, store=store, prompt=[1, 2], answer=tokens)


def remember(memory: TrafficMemory, *requests: Asked) -> None:
    for each in requests:
        sequence = each.sequence()
        memory.open(sequence)
        memory.remember(sequence, torch.tensor(each.prompt + each.answer))


def proposals(memory: TrafficMemory, each: Asked, *, after: int = 3) -> Copies:
    """What is proposed after the first tokens of a request's answer."""
    sequence = each.sequence()
    memory.open(sequence)
    sequence.length = len(each.prompt) + after
    return copies_for(memory, sequence, (each.prompt + each.answer)[: sequence.length])


def content(folder: Path) -> bytes:
    return b"".join(path.name.encode() + path.read_bytes() for path in sorted(folder.iterdir()))


needs_kernels = pytest.mark.skipif(native.library() is None, reason="needs kernels")


@needs_kernels
def test_after_a_restart_the_same_is_proposed_each_domains_own_first(tmp_path: Path) -> None:
    requests = [asked(100), asked(100, domain="code", length=8), asked(300, domain="ünï"), asked(400, salt=SALT)]
    with serving(tmp_path) as memory:
        remember(memory, *requests, asked(104, domain="code"))
        before = [proposals(memory, each) for each in requests]
    with serving(tmp_path) as memory:
        assert [proposals(memory, each) for each in requests] == before
        assert all(each.tokens for each in before)
        remember(memory, asked(500))
    with serving(tmp_path) as memory:
        assert [proposals(memory, each) for each in requests] == before, "what is kept stays after a second restart"
        assert proposals(memory, asked(500)).tokens


@needs_kernels
def test_salts_and_clients_stay_apart_and_stand_in_no_file(tmp_path: Path) -> None:
    requests = [asked(100, salt=SALT, client="ann"), asked(200, salt=SALT[1:], client="ann"), asked(300, client="bob")]
    with serving(tmp_path, shared_by="client") as memory:
        remember(memory, *requests)
    with serving(tmp_path, shared_by="client") as memory:
        for one in requests:
            for other in requests:
                as_one = asked(other.answer[0], client=one.client, salt=one.salt)
                assert bool(proposals(memory, as_one).tokens) == (one == other)
    assert len(list(tmp_path.glob("*.answers"))) == 3
    assert SALT[1:].encode() not in content(tmp_path)
    with serving(tmp_path, shared_by="domain") as memory:
        assert not proposals(memory, requests[2]).tokens, "it was answered for one client"


@needs_kernels
def test_what_is_not_stored_is_never_on_disk(tmp_path: Path) -> None:
    with serving(tmp_path) as memory:
        remember(memory, asked(7000), asked(9000, store=False))
    assert array("i", range(7000, 7012)).tobytes() in content(tmp_path)
    assert array("i", range(9000, 9002)).tobytes() not in content(tmp_path)


def test_only_the_owner_can_read_and_one_server_at_a_time_has_the_folder(tmp_path: Path) -> None:
    folder, before = tmp_path / "made" / "memory", os.umask(0)
    try:
        one = KeptAnswers(folder, target=TARGET, max_bytes=6000)
        for number in range(100):  # so many that files are replaced
            keep(one, number)
            one._write()
            modes = {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()}
            assert set(modes.values()) == {0o600}
            assert len(modes) == 3, "key, lock and answers"
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o777 == 0o700
    with pytest.raises(BlockingIOError):
        KeptAnswers(folder, target=TARGET, max_bytes=1 << 20)
    with pytest.raises(ConfigError, match="a server uses it, which would go on with what it remembers; stop it first"):
        forget(str(folder))
    one.close()
    KeptAnswers(folder, target=TARGET, max_bytes=1 << 20).close()


def keep(kept: KeptAnswers, number: int, *, salt: str = "") -> None:
    """An answer of twenty tokens that begins with this one."""
    kept.add(Scope("", salt), domain="", tokens=range(number, number + 20), answer=20)


def held(folder: Path, *, target: bytes = TARGET) -> list[int]:
    """The first token of each answer, as a server reads them at its start."""
    kept = KeptAnswers(folder, target=target, max_bytes=1 << 20)
    found = list[KeptAnswer]()
    kept.start(found.append)
    wait_until(lambda: kept.is_read)
    kept.close()
    return [each.tokens[0] for each in found]


def test_a_torn_end_is_dropped_with_a_warning_and_what_comes_after_it_is_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept = KeptAnswers(tmp_path, target=TARGET, max_bytes=1 << 20)
    for number in (1, 2):
        keep(kept, number)
    kept._write()
    kept.close()
    (path,) = tmp_path.glob("*.answers")
    whole = path.read_bytes()
    record = (len(whole) - len(kept._header)) // 2
    for cut in (1, record - 1, record - 10):
        path.write_bytes(whole[:-cut])
        kept = KeptAnswers(tmp_path, target=TARGET, max_bytes=1 << 20)
        kept.start(lambda _: None)
        wait_until(lambda: kept.is_read)  # noqa: B023
        keep(kept, 3)
        kept.close()
        assert f"its last {record - cut} bytes are damaged and dropped" in caplog.text
        assert held(tmp_path) == [1, 3]
    path.write_bytes(whole[:-50] + b"?" + whole[-49:])
    assert held(tmp_path) == [1], "a changed byte"


@pytest.mark.parametrize("damage", [lambda whole: b"", lambda whole: whole[:30], lambda whole: b"?" + whole[1:]])
def test_a_file_that_cannot_be_used_is_set_aside_until_the_next_start(
    damage: Callable[[bytes], bytes], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept = KeptAnswers(tmp_path, target=TARGET, max_bytes=1 << 20)
    keep(kept, 1)
    keep(kept, 2, salt=SALT)
    kept._write()
    path = kept._path(kept.file(Scope("", SALT)))
    kept.close()
    path.write_bytes(damage(path.read_bytes()))
    assert held(tmp_path) == [1]
    assert f"{path} is damaged, or of another version; it is set aside and ignored" in caplog.text
    assert not path.exists()
    assert path.with_suffix(".set-aside").exists()
    assert held(tmp_path) == [1]
    assert not path.with_suffix(".set-aside").exists()


def test_another_targets_answers_are_not_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kept = KeptAnswers(tmp_path, target=TARGET, max_bytes=1 << 20)
    keep(kept, 1)
    kept._write()
    kept.close()
    assert held(tmp_path, target=b"u" * 32) == []
    assert "is of another target; it is set aside and ignored" in caplog.text


def test_models_are_told_apart_by_weights_and_tokenizer_wherever_they_are(tmp_path: Path) -> None:
    def digest(name: str, *, weights: bytes = b"w" * 200_000, tokenizer: bytes = b"{}") -> bytes:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(weights)
        (folder / "tokenizer.json").write_bytes(tokenizer)
        return model_digest(folder)

    first = digest("a")
    assert digest("b") == first
    assert len({first, digest("c", weights=b"w" * 199_999 + b"x"), digest("d", tokenizer=b"[]")}) == 3


def test_a_full_disk_costs_answers_and_one_warning_until_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kept = KeptAnswers(tmp_path, target=TARGET, max_bytes=1 << 20)
    keep(kept, 1)
    kept._write()

    def refuse(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(kept_answers.os, "fsync", refuse)
        for number in (2, 3):
            keep(kept, number)
            kept._write()
    (record,) = caplog.records
    assert "answers cannot be kept (" in record.message
    assert "serving continues without" in record.message
    keep(kept, 4)
    kept._write()
    kept.close()
    assert held(tmp_path) == [1, 4]


def test_the_folder_has_a_limit_and_the_newest_answers_stay(tmp_path: Path) -> None:
    """Files count too: clients may send any number of salts."""
    most = 60_000
    kept = KeptAnswers(tmp_path, target=TARGET, max_bytes=most)
    for number in range(2000):
        keep(kept, number)
        if number % 40 == 0:
            kept._write()
    keep(kept, 5000, salt=SALT)
    kept._write()
    for number in range(100):
        keep(kept, 6000 + number, salt=f"{number}")
        kept._write()
        files = list(tmp_path.glob("*.answers"))
        assert sum(4096 + path.stat().st_size for path in files) == kept.num_bytes <= 2 * most
    kept.close()
    found = held(tmp_path)
    assert found == sorted(found)
    assert found[-7:] == list(range(6093, 6100))


def test_what_was_kept_outlives_a_crash_at_any_moment(tmp_path: Path) -> None:
    folder = tmp_path / "memory"
    most = 9000
    kept = KeptAnswers(folder, target=TARGET, max_bytes=most)
    for number in range(40):
        keep(kept, number)
        kept._write()
    kept.close()

    def write_until_files_are_replaced() -> None:
        again = KeptAnswers(folder, target=TARGET, max_bytes=most)
        keep(again, 100, salt=SALT)
        again._write()
        for number in range(101, 170):
            keep(again, number)
        again._write()

    for step in kill_at_every_step(write_until_files_are_replaced, folder=folder):
        found = held(folder)
        assert found == sorted(found), step
        assert set(range(40)) <= set(found) or 169 in found, step
    assert 169 in held(folder)
    assert 0 not in held(folder), "files were replaced"


def test_clearing_forgets_everything_and_a_folder_without_memory_is_left_alone(tmp_path: Path) -> None:
    kept = KeptAnswers(tmp_path / "memory", target=TARGET, max_bytes=1 << 20)
    keep(kept, 1)
    keep(kept, 2, salt=SALT)
    kept._write()
    kept.close()
    (tmp_path / "memory" / "theirs.txt").touch()
    assert forget(str(tmp_path / "memory")) == 2
    assert {path.name for path in (tmp_path / "memory").iterdir()} == {"lock", "theirs.txt"}
    assert held(tmp_path / "memory") == []
    for keep_setting, reason in ((None, "nothing is kept on disk"), (str(tmp_path), "holds no memory")):
        with pytest.raises(ConfigError, match=reason):
            forget(keep_setting)
    assert {path.name for path in tmp_path.iterdir()} == {"memory"}


def test_pseudonyms_last_as_long_as_what_clients_were_answered(tmp_path: Path) -> None:
    kept = MemorySettings(scope="client", keep=str(tmp_path))
    assert client_key(kept) != client_key(kept), "there is no folder yet"
    KeptAnswers(tmp_path, target=TARGET, max_bytes=1 << 20).close()
    assert client_key(kept) == client_key(kept)
    assert (tmp_path / "key").read_bytes()[:16] != client_key(kept)
    shared = MemorySettings(scope="domain", keep=str(tmp_path))
    assert client_key(shared) != client_key(shared)
