"""Building a loop: an untrained draft, what is missing, and where metrics are logged."""

from __future__ import annotations

import errno
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.loggers import tensorboard
from support.learner_harness import ServerStandIn
from support.live_traces import make_controller, online_module
from support.tiny_models import random_draft

from aurora_lit.config import AuroraConfig, load_config
from aurora_lit.drafts.checkpoint import load_draft
from aurora_lit.errors import AuroraError
from aurora_lit.ipc.engine_status import EngineStatusPage
from aurora_lit.ipc.run_folder import RING_NAME
from aurora_lit.kernels import native
from aurora_lit.learn.data.target_head import TargetHead
from aurora_lit.learn.online.budget import LoadWatch, ServerLoad
from aurora_lit.learn.online.build import _loggers, load_head_and_draft
from aurora_lit.learn.online.learner import Learner
from aurora_lit.models import loading
from aurora_lit.models.interface import Target
from aurora_lit.settings import CheckpointSettings


@pytest.fixture
def server(folder: Path, target: Target, tmp_path: Path) -> ServerStandIn:
    return ServerStandIn(tmp_path, folder, random_draft(target))


def test_learning_from_scratch_publishes_an_untrained_draft_of_the_same_shape(
    server: ServerStandIn, target: Target
) -> None:
    with server.loop("learn.from_scratch=true") as loop:
        assert server.store.current() == loop.learner.version == "draft-000001"
        draft = load_draft(server.store.folder / "draft-000001", target)
    configured = load_draft(server.folder / "start", target)
    shapes = {name: tensor.shape for name, tensor in configured.state_dict().items()}
    assert {name: tensor.shape for name, tensor in draft.state_dict().items()} == shapes
    assert torch.equal(draft.draft_token_ids, configured.draft_token_ids)
    assert not torch.allclose(draft.lm_head.weight, configured.lm_head.weight, atol=0.01)


def test_the_loss_is_what_is_asked_for(server: ServerStandIn) -> None:
    for overrides, expected in (([], True), (["learn.ppo=false"], False)):
        with server.loop(*overrides) as loop:
            assert loop.learner.module.module.online.ppo == expected


def test_learning_begins_although_current_names_no_version(server: ServerStandIn) -> None:
    server.store.folder.mkdir(parents=True, exist_ok=True)
    (server.store.folder / "CURRENT").write_text("draft-1\r\n")
    with server.loop() as loop:
        assert loop.learner.version == "start"


def test_drafts_of_another_target_are_not_published_over(server: ServerStandIn, target: Target) -> None:
    """Each new version deletes the oldest, and the learner's state would be replaced."""
    server.store.publish(random_draft(target), record={})
    folder = server.store.folder / "draft-000001"
    of_another = json.loads((folder / "config.json").read_text()) | {"vocab_size": target.vocab_size + 1}
    (folder / "config.json").write_text(json.dumps(of_another))
    refused = pytest.raises(AuroraError, match="^checkpoint.run=.*draft-000001; set checkpoint.run=NAME")
    with refused, server.loop():
        pass
    assert [version.name for version in server.store.versions()] == ["draft-000001"]
    (folder / "config.json").write_text("damaged")
    with server.loop() as loop:
        assert loop.learner.version == "start"


def test_a_rollback_to_an_untrained_draft_is_not_undone_by_the_next_start(server: ServerStandIn) -> None:
    for is_again in (False, True):
        with server.loop("learn.from_scratch=true") as loop:
            norm = loop.learner.draft.norm.weight
            assert norm.min() < 2.0, "what was rolled back is not learned on"
            if not is_again:
                with torch.no_grad():
                    norm.fill_(2.0)
                loop.learner.steps = 7
                loop.learner.save()
                server.store.roll_back_to(None, reason="by hand")
    assert server.store.current() == "draft-000002"


@pytest.mark.parametrize(("saved", "published"), [(True, True), (True, False), (False, True)])
def test_a_killed_learner_goes_on_from_what_it_has_published_since_it_saved(
    saved: bool, published: bool, server: ServerStandIn
) -> None:
    with server.loop() as loop, torch.no_grad():
        loop.learner.draft.norm.weight.fill_(2.0)
        loop.learner.steps = 7
        if saved:
            loop.learner.save()
        if published:
            loop.learner.draft.norm.weight.fill_(3.0)
            server.store.publish(loop.learner.draft, record={"steps": 9, "positions": 900})
    with server.loop() as loop:
        assert loop.learner.version == ("draft-000001" if published else "start")
        assert set(loop.learner.draft.norm.weight.tolist()) == {3.0 if published else 2.0}
        assert loop.learner.steps == (9 if published else 7)
        assert loop.learner.positions == (900 if published else 0)
        with torch.no_grad():
            loop.learner.draft.norm.weight.fill_(4.0)
        loop.learner.save()
    with server.loop() as loop:
        assert set(loop.learner.draft.norm.weight.tolist()) == {4.0}, "what it has learned since is not lost"


def test_a_learner_that_has_learned_on_beside_another_draft_goes_on(server: ServerStandIn) -> None:
    """A version of fewer steps was promoted by hand; what was learned since is not lost with a restart."""
    for is_again in (False, True):
        with server.loop() as loop:
            if not is_again:
                server.store.publish(loop.learner.draft, record={"steps": 5})
                with torch.no_grad():
                    loop.learner.draft.norm.weight.fill_(2.0)
                loop.learner.steps = 7
                loop.learner.save()
            assert loop.learner.draft.norm.weight.tolist() == [2.0] * len(loop.learner.draft.norm.weight)
            assert loop.learner.steps == 7


def test_learner_and_champion_share_the_heads_rows(server: ServerStandIn) -> None:
    with server.loop() as loop:
        module, champion = loop.learner.module.module, loop._champion
        assert module.head_VdH.data_ptr() == champion.head_VdH.data_ptr()
        other = torch.roll(module.draft.draft_token_ids, 1)
        assert torch.equal(loop._target_head.rows(other), torch.roll(module.head_VdH, 1, 0))
        loop._target_head.install_head(champion)
        assert torch.equal(champion.head_VdH, module.head_VdH)


def test_errors_without_a_draft_or_a_server_name_the_remedy(server: ServerStandIn) -> None:
    with pytest.raises(AuroraError, match="learn.from_scratch=true"), server.loop("draft.checkpoint=null"):
        pass
    (server.run_folder / RING_NAME).unlink()
    with pytest.raises(AuroraError, match="is the server running"), server.loop():
        pass


@pytest.mark.skipif(native.library() is None, reason="no C++ compiler, or AURORA_LIT_NATIVE=0")
@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_a_learner_reads_the_same_head_from_the_packed_file(
    precision: str, server: ServerStandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = [*server.overrides, f"target.precision={precision}"]
    monkeypatch.setenv("AURORA_LIT_CACHE", str(tmp_path / "cache"))
    config = load_config(None, overrides)
    expected, _ = load_head_and_draft(config)
    monkeypatch.setattr(loading, "_SMALLEST_BYTES", 0)
    load_head_and_draft(config)  # writes the file
    monkeypatch.setattr(loading, "_load", None)
    found, _ = load_head_and_draft(config)
    every_V = torch.arange(found.vocab_size)
    assert torch.equal(found.embed(every_V), expected.embed(every_V))
    assert torch.equal(found.rows(every_V), expected.rows(every_V))


WRITERS = ("tensorboard", "tensorboardX")


needs_a_writer = pytest.mark.skipif(
    not any(map(importlib.util.find_spec, WRITERS)), reason="neither tensorboard nor tensorboardX is installed"
)


def log_one(folder: Path) -> Fabric:
    loggers = _loggers(AuroraConfig(checkpoint=CheckpointSettings(dir=str(folder / "drafts"))))
    fabric = Fabric(accelerator="cpu", devices=1, loggers=loggers)
    fabric.log_dict({"loss": 0.5}, step=3)
    for logger in loggers:
        logger.finalize("success")
    return fabric


def csv_lines(folder: Path) -> list[str]:
    (path,) = folder.rglob("metrics.csv")
    return path.read_text().split()


def test_without_tensorboard_metrics_are_in_the_csv_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorboard, "_TENSORBOARD_AVAILABLE", False)
    monkeypatch.setattr(tensorboard, "_TENSORBOARDX_AVAILABLE", False)
    assert len(log_one(tmp_path).loggers) == 1
    assert csv_lines(tmp_path) == ["loss,step", "0.5,3"]


@needs_a_writer
def test_with_tensorboard_metrics_are_in_both(tmp_path: Path) -> None:
    assert len(log_one(tmp_path).loggers) == 2
    assert csv_lines(tmp_path) == ["loss,step", "0.5,3"]
    (events,) = tmp_path.rglob("events.out.tfevents.*")
    assert b"loss" in events.read_bytes()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("writer", WRITERS)
def test_when_the_disk_fills_up_in_tensorboards_writer_only_logging_ends(
    writer: str, target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboardX")
    monkeypatch.setattr(tensorboard, "_TENSORBOARD_AVAILABLE", False)
    loggers = _loggers(AuroraConfig(checkpoint=CheckpointSettings(dir=str(tmp_path / "drafts"))))
    learner = Learner(
        online_module(target, random_draft(target)),
        make_controller(),
        tmp_path / "s",
        target_head=TargetHead(target),
        version="start",
        fabric=Fabric(accelerator="cpu", devices=1, loggers=loggers),
    )
    values = {f"alpha_{place}": 0.5 for place in range(40)}
    learner.log(values)
    assert learner.take_logging_error() == ""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    experiment = loggers[1].experiment
    if writer == "tensorboard":  # raises where it is called
        monkeypatch.setattr(experiment, "add_scalar", full)
        told = "No space left on device"
    else:  # ends a thread of its own, after which nothing empties its queue
        events = experiment.file_writer.event_writer
        monkeypatch.setattr(events._ev_writer, "write_event", full)
        learner.log(values)
        events._worker.join(10)
        told = "TensorBoard's writer has ended"
    learner.log(values)
    assert told in learner.take_logging_error()
    learner.log(values)
    assert learner.take_logging_error() == ""


def test_a_server_is_idle_if_it_has_no_request_and_has_served_none_since_the_last_look(tmp_path: Path) -> None:
    page = EngineStatusPage.create(tmp_path / "status")
    page.write(num_slots=4)
    look = LoadWatch(page)
    assert look() is ServerLoad.SPARE, "what was served before is not known"
    assert look() is ServerLoad.IDLE
    page.write(generated_tokens=9, prompt_tokens=30)  # a request came and went
    assert look() is ServerLoad.SPARE
    assert look() is ServerLoad.IDLE
    page.write(running=1)  # it has come, and its first round is not over
    assert look() is ServerLoad.SPARE
    page.write(running=4)
    assert look() is ServerLoad.FULL
    page.write(waiting=1)
    assert look() is ServerLoad.QUEUEING
