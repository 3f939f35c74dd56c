"""The version that CURRENT names is loaded while serving, a bad one is refused, a rollback returns to an older one."""

from __future__ import annotations

import fcntl
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from support.fake_drafts import SMALL_SHAPE

from aurora_lit.drafts import hot_reload
from aurora_lit.drafts.hot_reload import MOST_RETRY_S, RECORD_EVERY_S, RETRY_S, HotReloader, ReadyDraft
from aurora_lit.drafts.store import DraftStore
from aurora_lit.errors import CheckpointError
from aurora_lit.kernels import native
from aurora_lit.modules.draft.eagle3 import Eagle3Config, Eagle3Draft

QUIET_S = 0.1
"""How long nothing may come, where CURRENT is looked at `often`."""


class Loader:
    """Gives a folder's name for its draft; refuses those in `bad`, and waits while `held`."""

    def __init__(self) -> None:
        self.bad: set[str] = set()
        self.loaded: list[str] = []
        self.begun, self.held = threading.Event(), threading.Event()
        self.held.set()

    def __call__(self, folder: Path | None) -> str:
        self.begun.set()
        assert self.held.wait(10)
        name = "start" if folder is None else folder.name
        self.loaded.append(name)
        if name in self.bad:
            raise CheckpointError(f"{name} is no good")
        return f"draft of {name}"


@pytest.fixture
def store(tmp_path: Path) -> DraftStore:
    return DraftStore(tmp_path / "live", keep=9)


@pytest.fixture
def loader() -> Loader:
    return Loader()


@pytest.fixture
def reloader(store: DraftStore, loader: Loader) -> Iterator[HotReloader]:
    reloader = HotReloader(store, loader)
    yield reloader
    reloader.close()


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """CURRENT is looked at ten times in QUIET_S."""
    monkeypatch.setattr(hot_reload, "WATCH_S", QUIET_S / 10)


def publish(store: DraftStore, count: int = 1) -> None:
    for _ in range(count):
        store.publish(Eagle3Draft(Eagle3Config(**SMALL_SHAPE)), record={})


def soon(reading: Callable[[], Any], timeout_s: float = 10) -> Any:
    """The first reading that is not None or False."""
    until = time.monotonic() + timeout_s
    while not (value := reading()):
        assert time.monotonic() < until, "nothing came"
        time.sleep(0.005)
    return value


def test_a_published_version_becomes_ready_once_and_the_loop_is_woken(store, loader, reloader, often):
    assert reloader.first() is None
    woken = threading.Event()
    reloader.start(on_change=woken.set)
    assert reloader.poll() is None
    publish(store)
    assert woken.wait(10)
    ready = reloader.poll()
    assert ready == ReadyDraft(draft="draft of draft-000001", version="draft-000001", trusted=False)
    time.sleep(QUIET_S)
    assert reloader.poll() is None
    assert loader.loaded == ["draft-000001"], "it looks, but it loads only what is new"


def test_serving_begins_with_the_current_version_or_the_newest_that_can_be_served(store, loader, reloader, often):
    publish(store, 2)
    ready = reloader.first()
    assert (ready.version, loader.loaded) == ("draft-000002", ["draft-000002"])
    reloader.start(on_change=lambda: None)
    time.sleep(QUIET_S)
    assert reloader.poll() is None
    publish(store, 2)
    soon(reloader.poll)
    store.roll_back(bad="draft-000002", reason="slow")
    loader.bad = {"draft-000004", "draft-000003"}
    reloader = HotReloader(store, loader)
    assert reloader.first().version == "draft-000001"
    assert (reloader.num_refused, reloader.refused.version) == (2, "draft-000003")
    loader.bad.add("draft-000001")
    assert HotReloader(store, loader).first() is None
    assert store.current() == "draft-000004", "a refused version stays current: another server may be able to serve it"


def test_of_many_versions_published_while_one_loads_only_the_last_is_loaded(store, loader, reloader):
    loader.held.clear()
    reloader.start(on_change=lambda: None)
    publish(store)
    assert loader.begun.wait(10)
    publish(store, 4)
    assert reloader.poll() is None, "serving does not wait for a load"
    loader.held.set()
    soon(lambda: loader.loaded[-1:] == ["draft-000005"])
    soon(lambda: len(loader.loaded) == 2)
    time.sleep(0.05)
    assert soon(reloader.poll).version == "draft-000005", "one that was never asked for is passed over"


def test_a_refused_version_leaves_the_serving_one_and_is_reported_with_its_reason(store, loader, reloader):
    publish(store)
    reloader.first()
    loader.bad = {"draft-000002"}
    woken = threading.Event()
    reloader.start(on_change=woken.set)
    publish(store)
    assert woken.wait(10)
    assert reloader.poll() is None
    assert (reloader.refused.version, reloader.refused.reason) == ("draft-000002", "draft-000002 is no good")
    assert store.history()[-1]["event"] == "refused"
    publish(store)
    assert soon(reloader.poll).version == "draft-000003", "and the next one is taken"
    assert loader.loaded.count("draft-000002") == 1


def test_any_exception_while_loading_is_a_refusal(store, reloader, loader, monkeypatch):
    monkeypatch.setattr(reloader, "_load", lambda _: 1 / 0)
    reloader.start(on_change=lambda: None)
    publish(store)
    assert soon(lambda: reloader.refused).reason == "ZeroDivisionError: division by zero"
    monkeypatch.setattr(reloader, "_load", loader)
    publish(store)
    assert soon(reloader.poll).version == "draft-000002"


def test_a_garbled_current_is_refused_and_the_next_version_is_served(store, loader, reloader):
    publish(store)
    reloader.first()
    reloader.start(on_change=lambda: None)
    (store.folder / "elsewhere").write_text("../../etc\n")
    os.replace(store.folder / "elsewhere", store.folder / "CURRENT")
    refused = soon(lambda: reloader.refused)
    assert refused.version == "CURRENT"
    assert "not a version" in refused.reason
    publish(store)
    assert soon(reloader.poll).version == "draft-000002"


def test_a_rollback_goes_to_the_version_before_and_trusts_it(store, loader, reloader, often):
    publish(store)
    reloader.first()
    reloader.start(on_change=lambda: None)
    publish(store)
    assert not soon(reloader.poll).trusted
    reloader.roll_back(bad="draft-000002", reason="slow")
    ready = soon(reloader.poll)
    assert (ready.version, ready.trusted) == ("draft-000001", True)
    assert (store.current(), store.versions()[1].retired) == ("draft-000001", "slow")
    reloader.roll_back(bad="draft-000001", reason="slow too")
    ready = soon(reloader.poll)
    assert (ready.version, ready.draft, ready.trusted) == (None, "draft of start", True)
    time.sleep(QUIET_S)
    assert reloader.poll() is None


def test_a_rollback_leaves_a_newer_version_its_own_trial(store, loader, reloader, often):
    publish(store, 2)
    reloader.first()
    loader.held.clear()
    loader.begun.clear()
    reloader.start(on_change=lambda: None)
    publish(store)
    assert loader.begun.wait(10)
    reloader.roll_back(bad="draft-000002", reason="slow")
    loader.held.set()
    soon(lambda: store.versions()[1].retired)
    time.sleep(QUIET_S)
    assert reloader.poll().version == "draft-000003"
    assert reloader.poll() is None


def test_a_rollback_and_a_newer_version_at_once_serve_the_newer_one(store, loader, reloader, often):
    publish(store, 2)
    reloader.first()
    publish(store)
    reloader.roll_back(bad="draft-000002", reason="slow")
    reloader.start(on_change=lambda: None)
    assert soon(reloader.poll).version == "draft-000003"
    time.sleep(QUIET_S)
    assert reloader.poll() is None
    assert loader.loaded == ["draft-000002", "draft-000003"]


def test_a_rollback_skips_an_older_version_that_is_broken(store, loader, reloader):
    publish(store, 3)
    reloader.first()
    loader.bad = {"draft-000002"}
    reloader.start(on_change=lambda: None)
    reloader.roll_back(bad="draft-000003", reason="slow")
    assert soon(reloader.poll).version == "draft-000001"
    assert reloader.refused.version == "draft-000002"


def clocked(store: DraftStore, loader: Loader) -> tuple[HotReloader, Callable[[float], None]]:
    """A reloader without its thread, and what sets its clock and has it look once."""
    now = [0.0]
    reloader = HotReloader(store, loader, monotonic_s=lambda: now[0])

    def look_at(now_s: float) -> None:
        now[0] = now_s
        reloader._check()

    return reloader, look_at


def test_a_rollback_that_the_disk_refuses_is_recorded_later(store, loader, monkeypatch):
    publish(store, 3)
    reloader, look_at = clocked(store, loader)
    reloader.first()
    full = Mock(side_effect=OSError(28, "No space left on device"))
    monkeypatch.setattr(store, "roll_back", full)
    reloader.roll_back(bad="draft-000003", reason="slow")
    look_at(1.0)
    assert reloader.poll().version == "draft-000002"
    reloader.roll_back(bad="draft-000002", reason="slow too")
    look_at(1.0)
    assert reloader.poll().version == "draft-000001", "not the first bad one again, which CURRENT still names"
    assert [call.kwargs["bad"] for call in full.mock_calls] == ["draft-000003", "draft-000002"]
    look_at(1.0 + RECORD_EVERY_S)
    assert [call.kwargs["bad"] for call in full.mock_calls] == ["draft-000003", "draft-000002"] * 2
    monkeypatch.undo()
    look_at(1.0 + 1.5 * RECORD_EVERY_S)
    assert store.current() == "draft-000003", "not at once"
    look_at(1.0 + 2 * RECORD_EVERY_S)
    assert store.current() == "draft-000001"
    assert [version.retired for version in store.versions()] == [None, "slow too", "slow"]
    look_at(1.0 + 3 * RECORD_EVERY_S)
    assert reloader.poll() is None
    assert [each["event"] for each in store.history()].count("rolled_back") == 2


def test_a_rollback_waits_for_nobody_who_holds_the_folder(store, loader):
    publish(store, 2)
    reloader, look_at = clocked(store, loader)
    reloader.first()
    with (store.folder / ".lock").open() as held:  # as a learner that hangs while it publishes
        fcntl.flock(held, fcntl.LOCK_EX)
        reloader.roll_back(bad="draft-000002", reason="slow")
        ending = threading.Thread(target=look_at, args=(1.0,), daemon=True)
        ending.start()
        ending.join(10)
        assert reloader.poll().version == "draft-000001"
        assert store.current() == "draft-000002", "not recorded yet"
    look_at(1.1)
    assert store.current() == "draft-000001"
    assert store.versions()[-1].retired == "slow"


def test_a_rollback_that_was_not_recorded_is_at_the_end(store, loader):
    """Or the next start would serve the bad version."""
    publish(store, 2)
    reloader = HotReloader(store, loader)
    reloader.first()
    with (store.folder / ".lock").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        reloader.start(on_change=lambda: None)
        reloader.roll_back(bad="draft-000002", reason="slow")
        while reloader.poll() is None:
            time.sleep(0.01)
        reloader._ending = True
        fcntl.flock(held, fcntl.LOCK_UN)
    reloader.close()
    assert store.current() == "draft-000001"


def test_a_rollback_that_was_not_recorded_gives_way_to_a_promotion(store, loader, monkeypatch):
    publish(store, 2)
    reloader, look_at = clocked(store, loader)
    reloader.first()
    monkeypatch.setattr(store, "roll_back", Mock(side_effect=OSError(28, "No space left on device")))
    reloader.roll_back(bad="draft-000002", reason="slow")
    look_at(1.0)
    assert reloader.poll().version == "draft-000001"
    monkeypatch.undo()
    store.promote("draft-000002")
    look_at(1.0 + RECORD_EVERY_S)
    assert reloader.poll().version == "draft-000002"
    look_at(1.0 + 2 * RECORD_EVERY_S)
    assert store.current() == "draft-000002"


def test_a_version_that_was_refused_is_tried_again_and_told_once(store, loader):
    publish(store, 2)
    loader.bad = {"draft-000002"}
    reloader, look_at = clocked(store, loader)
    assert reloader.first().version == "draft-000001"
    tries = [RETRY_S, 3 * RETRY_S]  # twice as long after each
    for number, now_s in enumerate(tries, start=1):
        look_at(now_s - 1.0)
        assert loader.loaded.count("draft-000002") == number
        look_at(now_s)
        assert loader.loaded.count("draft-000002") == number + 1
    assert reloader.poll() is None
    assert reloader.num_refused == 1
    assert [each["event"] for each in store.history()].count("refused") == 1
    loader.bad = set()
    look_at(tries[-1] + MOST_RETRY_S)
    ready = reloader.poll()
    assert (ready.version, ready.trusted) == ("draft-000002", False)
    look_at(tries[-1] + 9 * MOST_RETRY_S)
    assert loader.loaded.count("draft-000002") == len(tries) + 2, "it serves"


def test_a_current_that_could_not_be_read_is_read_again(store, loader, monkeypatch):
    publish(store)
    reloader, look_at = clocked(store, loader)
    reloader.first()
    publish(store)
    monkeypatch.setattr(store, "current", Mock(side_effect=CheckpointError("Too many open files")))
    look_at(0.0)
    assert reloader.refused.reason == "Too many open files"
    monkeypatch.undo()
    look_at(RETRY_S)
    assert (reloader.poll().version, reloader.num_refused) == ("draft-000002", 1)


def test_a_current_that_cannot_be_read_does_not_stop_a_rollback(store, loader, reloader):
    publish(store, 2)
    reloader.first()
    (store.folder / "CURRENT").write_text("garbage")
    reloader.roll_back(bad="draft-000002", reason="slow")
    reloader.start(on_change=lambda: None)
    assert soon(reloader.poll).version == "draft-000001"


def test_a_folder_that_cannot_be_read_does_not_stop_a_rollback(store, loader, reloader, monkeypatch):
    publish(store, 2)
    reloader.first()
    monkeypatch.setattr(os, "scandir", Mock(side_effect=OSError(5, "Input/output error")))
    reloader.start(on_change=lambda: None)
    reloader.roll_back(bad="draft-000002", reason="slow")
    assert soon(reloader.poll).version is None, "the starting draft lies elsewhere"
    monkeypatch.undo()
    publish(store)
    assert soon(reloader.poll).version == "draft-000003"


def test_a_version_that_was_replaced_before_it_served_is_not_trusted(store, loader, reloader):
    publish(store)
    reloader.first()
    reloader.start(on_change=lambda: None)
    for name in ("draft-000002", "draft-000003"):  # the rounds ask for neither until both are prepared
        publish(store)
        soon(lambda name=name: name in loader.loaded)
    ready = soon(lambda: reloader._ready and reloader._ready[0].version == "draft-000003" and reloader.poll())
    assert not ready.trusted
    reloader.roll_back(bad="draft-000003", reason="slow")
    ready = soon(reloader.poll)
    assert (ready.version, ready.trusted) == ("draft-000002", False)


def test_the_thread_survives_a_folder_that_disappears_and_returns(store, loader, reloader, tmp_path):
    publish(store)
    reloader.first()
    reloader.start(on_change=lambda: None)
    store.folder.rename(tmp_path / "away")
    assert soon(reloader.poll).version is None, "no CURRENT: the starting draft"
    (tmp_path / "away").rename(store.folder)
    assert soon(reloader.poll).version == "draft-000001"


def test_promoting_an_older_version_serves_it_again(store, loader, reloader):
    publish(store)
    reloader.first()
    reloader.start(on_change=lambda: None)
    publish(store)
    soon(reloader.poll)
    store.promote("draft-000001")
    ready = soon(reloader.poll)
    assert (ready.version, ready.trusted) == ("draft-000001", True)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads as Linux lists them")
@pytest.mark.skipif(native.library() is None, reason="no C++ compiler, or AURORA_LIT_NATIVE=0")
def test_the_loaders_thread_computes_alone(store: DraftStore) -> None:
    """A second team of threads would have rounds wait without spinning, long after it has loaded."""
    numbers, started = list[int](), list[int]()

    def load(folder: Path | None) -> None:
        before = len(os.listdir("/proc/self/task"))
        torch.ones(1 << 22).isfinite().all()
        torch.randn(512, 512) @ torch.randn(512, 512)
        started.append(len(os.listdir("/proc/self/task")) - before)
        numbers.append(torch.get_num_threads())

    reloader = HotReloader(store, load)
    reloader.start(on_change=lambda: None)
    publish(store)
    deadline = time.monotonic() + 10
    while not numbers and time.monotonic() < deadline:
        time.sleep(0.01)
    reloader.close()
    assert started == [0], "no other thread helps"
    assert numbers == [1]
    assert torch.get_num_threads() == 2, "others compute as before"
