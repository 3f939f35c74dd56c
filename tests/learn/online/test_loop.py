"""What the loop tells on the status page, what fails beside it, and domains."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.learner_harness import MakeHarness
from support.live_traces import make_controller

from aurora_lit.drafts.centroid_file import CENTROIDS_NAME, read_centroids, write_centroids
from aurora_lit.errors import CheckpointError
from aurora_lit.learn.online import loop
from aurora_lit.learn.online.budget import ShareLimit
from aurora_lit.learn.online.learner import STARTING_VERSION
from aurora_lit.models.interface import Target
from aurora_lit.modules.domains.centroids import Centroids
from aurora_lit.modules.domains.detector import DomainDetector
from aurora_lit.traces.record import Trace, to_bytes


def test_counts_do_not_fall_behind_those_of_a_learner_that_was_killed(make: MakeHarness) -> None:
    harness = make(told_before={"steps": 5, "positions": 10**6})
    harness.ask(2)
    harness.tick_until(lambda: harness.learner.steps == 2)
    page = harness.page.read()
    assert (page.steps, page.positions) == (5 + 2, 10**6 + harness.learner.positions), "they do not stand still"


def test_the_page_says_what_the_servers_first_learner_began_with(make: MakeHarness) -> None:
    """What was learned since is the server's, whoever asks and when, and also after a restart of the learner."""
    harness = make()
    harness.ask(2)
    harness.tick_until(lambda: harness.learner.steps == 2)
    page = harness.page.read()
    assert (page.steps, page.steps_before, page.positions_before) == (2, 0, 0)
    harness.loop._save()

    next_server = make(resumes=True)
    page = next_server.page.read()
    assert page.steps == page.steps_before == 2
    assert page.positions == page.positions_before == harness.learner.positions

    told = {"steps": 9, "positions": 10**6, "steps_before": 1, "positions_before": 50, "rate_factor": 1}
    page = make(resumes=True, told_before=told).page.read()
    assert (page.steps, page.steps_before, page.positions, page.positions_before) == (9, 1, 10**6, 50)


def test_damaged_traces_and_those_without_finite_loss_are_counted_and_change_no_weight(
    make: MakeHarness, target: Target, traffic: list[Trace], caplog: pytest.LogCaptureFixture
) -> None:
    harness = make()
    huge = replace(traffic[0], request_id="a", aux_T3H=torch.full_like(traffic[0].aux_T3H, 3e38))
    other = traffic[1]
    foreign = replace(
        other,
        aux_T3H=torch.cat([other.aux_T3H] * 2, -1),
        last_TH=torch.cat([other.last_TH] * 2, -1),
    )
    bad = [b"", b"no trace", to_bytes(traffic[0])[:-7], to_bytes(traffic[0]).replace(b"aux", b"axu", 1)]
    harness.ring.records.extend([*bad, foreign, foreign, huge])
    before = copy.deepcopy(harness.learner.draft.state_dict())
    for _ in range(12):
        harness.loop.tick()
    assert harness.loop.skipped == len(bad) + 2
    assert harness.learner.num_nonfinite > 0
    assert harness.page.read().skipped == harness.loop.skipped + harness.learner.num_nonfinite
    assert caplog.text.count("a trace is not learned from: it is of another target;") == 1
    assert harness.learner.steps == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in harness.learner.draft.state_dict().items())
    harness.ring.records.extend(harness.traffic)
    harness.tick_until(lambda: harness.learner.steps >= 3)


def test_a_save_that_failed_is_tried_again_though_no_step_was_taken_since(
    make: MakeHarness, traffic: list[Trace], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "SAVE_EVERY_S", 0.0)
    harness = make(publish_every_s=3600.0)
    harness.loop._saving_limit = ShareLimit(1.0)
    harness.ring.records.extend(harness.traffic[:10])
    (tmp_path / ".learner.safetensors.tmp").mkdir()  # nothing can be written there
    harness.tick_until(lambda: "state could not be saved" in harness.page.read().error)
    monkeypatch.setattr(harness.loop, "_step", lambda: False)
    (tmp_path / ".learner.safetensors.tmp").rmdir()
    harness.loop.tick()
    assert harness.learner.resume()
    assert harness.page.read().error == ""
    (tmp_path / "learner.safetensors").unlink()
    harness.loop.tick()
    assert not harness.learner.resume(), "once is enough"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), CheckpointError("cannot be read")])
def test_a_full_disk_is_reported_and_learning_continues(
    make: MakeHarness, error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "SAVE_EVERY_S", 0.1)
    harness = make(publish_every_steps=2)
    (tmp_path / ".learner.safetensors.tmp").mkdir()  # nothing can be written there

    def full(*_: Any, **__: Any) -> str:
        raise error

    harness.trial.champion_score = 0.0
    harness.ask(4)
    failures = ("draft could not be published", "state could not be saved")
    with monkeypatch.context() as patched:
        patched.setattr(harness.store, "publish", full)
        harness.tick_until(lambda: all(failure in harness.page.read().error for failure in failures))
        steps = harness.learner.steps
        harness.tick_until(lambda: harness.learner.steps > steps)
        assert (harness.loop.published, harness.learner.version) == (0, STARTING_VERSION)
    (tmp_path / ".learner.safetensors.tmp").rmdir()
    harness.tick_until(lambda: failures[1] not in harness.page.read().error)
    harness.tick_until(lambda: harness.page.read().error == "", max_ticks=100)
    assert harness.loop.published == 1, "what failed once is not told for ever"


def test_that_a_draft_could_not_be_published_is_told_no_longer_once_another_did_not_pass(
    make: MakeHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = make(publish_every_steps=2)

    def full(*_: Any, **__: Any) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(harness.store, "publish", full)
    harness.trial.champion_score = 0.0
    harness.ask(4)
    harness.tick_until(lambda: "draft could not be published" in harness.page.read().error)
    harness.trial.champion_score = 100.0
    harness.tick_until(lambda: harness.loop.refused_by_gate > 0)
    assert harness.page.read().error == "", "nobody tries to publish any more"


def test_metrics_that_cannot_be_written_are_reported_and_learning_continues(
    make: MakeHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = make(publish_every_s=3600.0)
    calls: list[int] = []

    def full(values: dict[str, float], *, step: int) -> None:
        calls.append(step)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(harness.learner.fabric, "log_dict", full)
    harness.ask(4)
    harness.tick_until(lambda: "metrics are not logged" in harness.page.read().error)
    harness.tick_until(lambda: harness.learner.steps >= 17)
    assert calls == [8]
    assert harness.page.read().loss > 0, "also where the last step's metrics were logged"


def test_domains_set_the_learning_rate_and_are_reported(make: MakeHarness, traffic: list[Trace]) -> None:
    detector = DomainDetector(max_domains=4, novelty_threshold=0.7)
    controller = make_controller(detector=detector, warmup_steps=0, min_lr_factor=0.5, decay_tokens=600.0)
    harness = make(controller=controller, publish_every_s=3600.0, gate_requests=2)

    def learn(traces: Sequence[Trace]) -> float:
        """The learning rate after a step."""
        harness.ring.records.extend(traces)
        steps = harness.learner.steps
        harness.tick_until(lambda: harness.learner.steps == steps + 1)
        (rate,) = {group["lr"] for optimizer in harness.learner.optimizers for group in optimizer.param_groups}
        return float(rate)

    chat = [trace for trace in traffic if trace.domain == "chat"]
    for n in range(6):
        last = learn(chat[8 * n : 8 * n + 8])
    assert last == pytest.approx(0.5 * 4e-3, rel=0.1)
    page = harness.page.read()
    assert page.domains.startswith("chat 100% (heat 0.0")
    assert page.rate_factor == pytest.approx(0.5, abs=0.03)

    code = [replace(trace, domain="code", request_id=f"code{n}") for n, trace in enumerate(chat[:12])]
    rates = [learn(code[4 * n : 4 * n + 4]) for n in range(3)]
    assert max(rates) > 1.1 * last, "the new domain is learned faster"
    page = harness.page.read()
    assert "code" in page.domains
    assert set(harness.loop.batcher.reservoir.domains) == {"chat", "code"}


def test_domains_are_published_beside_the_drafts_and_a_full_disk_is_reported(
    make: MakeHarness, traffic: list[Trace], monkeypatch: pytest.MonkeyPatch
) -> None:
    detector = DomainDetector(max_domains=4, novelty_threshold=0.7)
    harness = make(controller=make_controller(detector=detector), publish_every_s=3600.0)
    path = harness.store.folder / CENTROIDS_NAME
    harness.ring.records.extend(harness.traffic)
    with monkeypatch.context() as patched:

        def full(*_: object, **__: object) -> None:
            raise OSError(28, "No space left on device")

        patched.setattr("aurora_lit.learn.online.centroid_publisher.write_centroids", full)
        harness.tick_until(lambda: "domains could not be published" in harness.page.read().error)
    harness.loop._centroid_publisher._last_s = -float("inf")  # the pause after a failure is over
    harness.tick_until(path.exists)
    assert harness.page.read().error == ""
    centroids, version = read_centroids(path, harness.target_head)
    assert (centroids.names, version) == (("chat",), 1), "the traffic's label"


def test_a_domain_has_no_number_that_a_killed_learner_had_used(
    make: MakeHarness, target: Target, traffic: list[Trace], tmp_path: Path
) -> None:
    size_E = 3 * target.hidden_size
    centroids = Centroids(
        names=("code", "auto-7"),
        centroid_DE=torch.eye(2, size_E),
        mean_E=torch.zeros(size_E),
        variance_E=torch.ones(size_E),
        common=1.0,
        novelty_threshold=0.7,
    )
    write_centroids(tmp_path / "live" / CENTROIDS_NAME, centroids, version=1, target=target)
    detector = DomainDetector(max_domains=4, novelty_threshold=0.7)
    harness = make(controller=make_controller(detector=detector))
    harness.ring.records.extend(replace(trace, domain="") for trace in traffic)
    harness.tick_until(lambda: bool(detector.domains))
    assert set(detector.domains) == {"auto-8"}


def test_the_status_page_says_how_far_the_learner_is_behind(make: MakeHarness) -> None:
    harness = make()
    harness.ask(4)
    harness.loop.tick()
    page = harness.page.read()
    assert (page.lag_records, page.lag_bytes) == (len(harness.ring.records), 1000 * len(harness.ring.records))
    assert page.lag_records > 0
