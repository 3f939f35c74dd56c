"""The learner publishes its domains when one was founded, and now and then while they drift."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from support.domain_prompts import PromptMaker

from aurora_lit import durable
from aurora_lit.drafts.centroid_file import read_centroids
from aurora_lit.learn.online.centroid_publisher import (
    DRIFTED_EVERY_S,
    DRIFTED_REQUESTS,
    FOUNDED_EVERY_S,
    CentroidPublisher,
)
from aurora_lit.modules.domains.detector import DomainDetector

TARGET = SimpleNamespace(vocab_size=11, hidden_size=32, aux_layer_ids=(1, 2, 3))


class Publishing:
    """A detector, a clock, and a publisher that is called after every request."""

    def __init__(self, path: Path) -> None:
        self.now_s = 0.0
        self.path = path
        self.prompts = PromptMaker()
        self.detector = DomainDetector(max_domains=8, novelty_threshold=0.7)
        self.publisher = CentroidPublisher(path, TARGET, monotonic_s=lambda: self.now_s)

    def request(self, *kinds: str, after_s: float = 0.1) -> int:
        """Requests of these kinds, one after the other; how often was published."""
        before = self.publisher.version
        for kind in kinds:
            self.now_s += after_s
            self.detector.assign(self.prompts.trace(kind))
            self.publisher.publish_when_due(self.detector)
        return self.publisher.version - before

    @property
    def published(self) -> tuple[tuple[str, ...], int]:
        centroids, version = read_centroids(self.path, TARGET)
        return centroids.names, version


@pytest.fixture
def publishing(tmp_path: Path) -> Publishing:
    return Publishing(tmp_path / "live" / "domains.safetensors")


def test_nothing_is_published_while_there_are_no_domains(publishing: Publishing) -> None:
    assert publishing.request(*["code"] * 30) == 0
    assert not publishing.path.exists()


def test_a_founded_domain_is_published_within_a_second(publishing: Publishing) -> None:
    publishing.request(*["code", "chat"] * 40, after_s=2.0)
    names, version = publishing.published
    assert names == tuple(publishing.detector.domains)
    assert version >= 1
    founded = publishing.detector.num_founded
    publishing.request(*["sql"] * 4, after_s=FOUNDED_EVERY_S / 2)
    assert publishing.detector.num_founded == founded + 1
    publishing.now_s += FOUNDED_EVERY_S
    assert publishing.publisher.publish_when_due(publishing.detector) or publishing.published[1] > version
    assert set(publishing.published[0]) - set(names), "the new one is among them"


def test_drift_is_published_after_enough_requests_and_time(publishing: Publishing) -> None:
    publishing.request(*["code", "chat"] * 40, after_s=2.0)
    while not publishing.request("code", after_s=DRIFTED_EVERY_S):
        pass
    founded = publishing.detector.num_founded
    assert publishing.request(*["code"] * (2 * DRIFTED_REQUESTS), after_s=0.01) == 0, "too soon"
    publishing.now_s += DRIFTED_EVERY_S
    assert publishing.request("code") == 1
    assert publishing.request(*["code"] * (DRIFTED_REQUESTS - 1), after_s=DRIFTED_EVERY_S) == 0, "too few requests"
    assert publishing.request("code") == 1
    assert publishing.detector.num_founded == founded


def test_a_new_learner_publishes_at_once_and_continues_the_numbers(publishing: Publishing) -> None:
    publishing.request(*["code", "chat"] * 40, after_s=2.0)
    version = publishing.published[1]
    unfinished = publishing.path.with_name(f".{publishing.path.name}.tmp")
    unfinished.write_bytes(b"of a learner that was killed")
    again = CentroidPublisher(publishing.path, TARGET, monotonic_s=lambda: 0.0)
    resumed = DomainDetector(max_domains=8, novelty_threshold=0.7)
    resumed.load_state_dict(publishing.detector.state_dict())
    assert again.publish_when_due(resumed)
    assert not unfinished.exists()
    assert publishing.published == (tuple(publishing.detector.domains), version + 1)


def test_after_a_full_disk_it_is_tried_again(publishing: Publishing, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(durable, "sync", full)
    with pytest.raises(OSError, match="No space"):
        publishing.request(*["code", "chat"] * 40, after_s=2.0)
    assert not publishing.publisher.publish_when_due(publishing.detector), "not at once"
    monkeypatch.undo()
    publishing.now_s += FOUNDED_EVERY_S
    assert publishing.publisher.publish_when_due(publishing.detector)
    assert publishing.published[1] == 1
