"""Published domains are read once, swapped in between rounds, and kept when the next file is bad."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from support.fake_engine import FAKE_SHAPE, FakeEngine, load_fake_domains

from aurora_lit.drafts.centroid_file import CENTROIDS_NAME, write_centroids
from aurora_lit.drafts.hot_reload import HotReloader
from aurora_lit.drafts.store import DraftStore
from aurora_lit.modules.domains.centroids import Centroids
from aurora_lit.serve.worker.domain_watch import DomainWatch
from aurora_lit.serve.worker.live_draft import LiveDraft


def publish(folder: Path, version: int, **changes: Any) -> Path:
    fields = {
        "names": ("code", "auto-1"),
        "centroid_DE": torch.eye(24)[:2],
        "mean_E": torch.zeros(24),
        "variance_E": torch.ones(24),
        "common": 0.0,
        "novelty_threshold": 0.7,
    }
    path = folder / CENTROIDS_NAME
    write_centroids(path, Centroids(**{**fields, **changes}), version=version, target=FAKE_SHAPE)
    return path


@pytest.fixture
def watch(tmp_path: Path) -> DomainWatch:
    return DomainWatch(tmp_path / CENTROIDS_NAME, load_fake_domains)


def test_each_publication_is_read_and_returned_once(watch: DomainWatch, tmp_path: Path) -> None:
    assert (watch.check(), watch.poll(), watch.version) == (False, None, 0)
    publish(tmp_path, 1)
    assert watch.check()
    assert not watch.check(), "it is not read again"
    assigner = watch.poll()
    assert assigner is not None
    assert (assigner.version, assigner.assign(torch.eye(24)[1]), watch.version) == (1, "auto-1", 1)
    assert watch.poll() is None
    publish(tmp_path, 2)
    publish(tmp_path, 3)
    assert watch.check()
    newest = watch.poll()
    assert newest is not None
    assert newest.version == 3


def test_a_bad_file_is_refused_and_the_last_good_one_kept(watch: DomainWatch, tmp_path: Path) -> None:
    path = publish(tmp_path, 1)
    watch.check()
    assert watch.poll() is not None
    publish(tmp_path, 2, mean_E=torch.full((24,), float("nan")))
    assert watch.check(), "there is something to report"
    assert (watch.poll(), watch.version) == (None, 1)
    assert "mean holds NaN" in watch.refused
    assert not watch.check()
    path.unlink()
    assert not watch.check()
    assert watch.version == 1
    publish(tmp_path, 3)
    assert watch.check()
    assert (watch.version, watch.refused) == (3, "")


def test_any_exception_while_reading_is_a_refusal(tmp_path: Path) -> None:
    watch = DomainWatch(publish(tmp_path, 1), lambda _: 1 / 0)  # type: ignore[arg-type,return-value]
    assert watch.check()
    assert watch.refused == "ZeroDivisionError: division by zero"


def test_an_engine_begins_with_what_is_published_and_gets_the_next_between_rounds(tmp_path: Path) -> None:
    publish(tmp_path, 1)
    engine, store = FakeEngine(), DraftStore(tmp_path, keep=3)
    watch = DomainWatch(tmp_path / CENTROIDS_NAME, load_fake_domains)
    live = LiveDraft(engine, HotReloader(store, str, also_check=watch.check), watch)
    assert engine.assigner is not None
    assert engine.assigner.version == 1
    woken = threading.Event()
    live.start(on_change=woken.set)
    try:
        publish(tmp_path, 2)
        assert woken.wait(10), "an idle loop reports it too"
        assert engine.assigner.version == 1
        live.before_round()
        assert engine.assigner.version == 2
        woken.clear()
        (tmp_path / "other").write_bytes(b"torn")
        os.replace(tmp_path / "other", tmp_path / CENTROIDS_NAME)
        assert woken.wait(10)
        live.before_round()
        assert engine.assigner.version == 2
    finally:
        live.close()
