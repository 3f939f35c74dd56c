"""The learner: steps on bad batches, averaged weights, saving and resuming."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.live_traces import make_controller, online_module
from support.tiny_models import random_draft

from aurora_lit.drafts.initial import initial_draft
from aurora_lit.errors import AuroraError
from aurora_lit.learn.data.collate import collate_online
from aurora_lit.learn.data.target_head import TargetHead
from aurora_lit.learn.data.trace_parts import first_trained_position
from aurora_lit.learn.data.training_state import write_state
from aurora_lit.learn.online.learner import PATIENCE_TRIALS, STARTING_VERSION, Learner, weights_digest
from aurora_lit.models.interface import Target
from aurora_lit.modules.domains.detector import DomainDetector
from aurora_lit.modules.draft.eagle3 import Eagle3Draft
from aurora_lit.modules.losses.batch import OnlineBatch
from aurora_lit.modules.losses.draft_module import clip_gradients
from aurora_lit.modules.losses.objective import OnlineWeights
from aurora_lit.traces.record import Trace

MakeLearner = Callable[..., Learner]


@pytest.fixture
def make(target: Target, tmp_path: Path) -> MakeLearner:
    """A learner that begins with a draft, and whose state is in a file that all share."""

    def make(draft: Eagle3Draft | None = None, **options: Any) -> Learner:
        module = online_module(target, copy.deepcopy(draft or random_draft(target)))
        fields = {"controller": make_controller(), "version": "start", **options}
        return Learner(module, state_path=tmp_path / "state", target_head=TargetHead(target), **fields)

    return make


@pytest.fixture
def batch(target_head: TargetHead, traffic: list[Trace]) -> OnlineBatch:
    return collate_online(traffic[:6], [])


def test_a_batch_with_a_loss_that_is_not_finite_changes_nothing(
    make: MakeLearner, target_head: TargetHead, traffic: list[Trace]
) -> None:
    learner = make()
    aux_T3H = traffic[0].aux_T3H.clone()
    aux_T3H[4, 0] = float("nan")
    before = copy.deepcopy(learner.draft.state_dict())
    assert learner.update(collate_online([replace(traffic[0], aux_T3H=aux_T3H)], [])) is None
    assert (learner.num_nonfinite, learner.steps) == (1, 0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in learner.draft.state_dict().items())
    assert learner.update(collate_online([traffic[0]], [])) is not None
    assert any(not torch.equal(tensor, before[name]) for name, tensor in learner.draft.state_dict().items())


class TwoEqualProcesses:
    """A fabric whose other process computes what this one does."""

    world_size = 2

    def __init__(self, fabric: Any) -> None:
        self._fabric = fabric

    def __getattr__(self, name: str) -> Any:
        return getattr(self._fabric, name)

    def all_reduce(self, numbers: torch.Tensor, reduce_op: str) -> torch.Tensor:
        assert reduce_op == "sum"
        return 2 * numbers


def test_the_logged_losses_of_several_processes_are_those_of_the_whole_batch(
    make: MakeLearner, batch: OnlineBatch
) -> None:
    """Of each term every process computes a part of a sum."""
    learner = make()
    learner.fabric = TwoEqualProcesses(learner.fabric)  # type: ignore[assignment]
    report = learner.update(batch)
    assert report is not None
    for name, part in (("loss", report.loss), ("value_loss", report.value_loss)):
        assert learner.mean(name) == pytest.approx(2 * float(part.detach())) != 0


def test_the_averaged_draft_has_the_running_average_of_the_weights(
    make: MakeLearner, target: Target, batch: OnlineBatch
) -> None:
    start = random_draft(target)
    learner = make(start, ema_decay=0.8)

    def averaged() -> dict[str, torch.Tensor]:
        with learner.averaged() as module:
            assert module.draft is learner.draft
            return copy.deepcopy(module.draft.state_dict())

    expected = {name: tensor.clone() for name, tensor in start.state_dict().items()}
    for _ in range(4):
        learner.update(batch)
        for name, tensor in learner.draft.state_dict().items():
            if tensor.is_floating_point():
                expected[name].mul_(0.8).add_(tensor, alpha=0.2)
    for name, tensor in averaged().items():
        torch.testing.assert_close(tensor, expected[name], msg=name)
    with learner.averaged():
        pass
    assert not torch.equal(learner.draft.lm_head.weight, expected["lm_head.weight"]), "learning has its own weights"
    learner.restart_from(start, version="start")
    assert all(torch.equal(tensor, start.state_dict()[name]) for name, tensor in averaged().items())


@pytest.mark.parametrize("longer", ["draft", "average"])
def test_the_average_takes_positions_that_only_one_of_both_was_given(
    make: MakeLearner, batch: OnlineBatch, longer: str
) -> None:
    """A trial may see a longer trace than a batch did, or the other way round."""
    learner = make(ema_decay=0.9)
    with learner.averaged() as trial:
        grown = trial.draft if longer == "average" else None
    (grown or learner.draft).extend_positions(4096)
    assert learner.update(batch) is not None
    with learner.averaged() as trial:
        assert len(trial.draft.cos_LD) == 4096
    assert len(learner.draft.cos_LD) == 4096


def test_a_resumed_learner_continues_as_if_it_had_not_stopped(
    make: MakeLearner,
    target: Target,
    traffic: list[Trace],
    batch: OnlineBatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def a_learner(seed: int) -> Learner:
        controller = make_controller(detector=DomainDetector(max_domains=4, novelty_threshold=0.7), min_lr_factor=0.1)
        return make(random_draft(target, seed=seed), controller=controller, ema_decay=0.9)

    first = a_learner(0)
    assert not first.resume(), "there is nothing yet"
    assert "is not used" not in caplog.text
    for trace in traffic[:6]:
        first.controller.assign_domain(trace)
    for _ in range(3):
        first.update(batch)
    first.version = "draft-000004"
    first.save()
    again = a_learner(5)
    assert again.resume()
    assert (again.version, again.steps, again.positions) == ("draft-000004", 3, first.positions)
    assert again.controller.describe() == first.controller.describe()
    assert 0 < again.controller.heat == first.controller.heat < 0.9
    for learner in (first, again):
        learner.update(batch)
    with first.averaged(), again.averaged():
        averages = [copy.deepcopy(learner.draft.state_dict()) for learner in (first, again)]
    for mine, its in [(first.draft.state_dict(), again.draft.state_dict()), averages]:
        for name, tensor in mine.items():
            torch.testing.assert_close(tensor, its[name], msg=name)

    whole = (tmp_path / "state").read_bytes()
    (tmp_path / "state").write_bytes(whole[: len(whole) // 2])
    caplog.clear()
    assert not a_learner(5).resume(), "a file cut short is no state"
    assert f"the state in {tmp_path / 'state'} is not used: not the state of a training" in caplog.text
    (tmp_path / "state").write_bytes(whole)
    assert not make(random_draft(target, intermediate_size=96)).resume()


@pytest.mark.parametrize("before", [0.0, 0.9])
def test_a_state_is_continued_with_and_without_an_average(
    make: MakeLearner, target: Target, batch: OnlineBatch, before: float
) -> None:
    """An average begins with the weights that are continued; one that is not wanted any more is left."""
    first, again = make(ema_decay=before), make(random_draft(target, seed=1), ema_decay=0.9 - before)
    first.update(batch)
    first.save()
    assert again.resume()
    with again.averaged() as module:
        for name, tensor in module.draft.state_dict().items():
            torch.testing.assert_close(tensor, first.draft.state_dict()[name], msg=name)
    assert again.update(batch) is not None


def test_a_state_of_another_version_is_set_aside(make: MakeLearner, tmp_path: Path) -> None:
    """And learning begins from the draft, instead of ending again and again."""
    path, aside = tmp_path / "state", tmp_path / "state.unread"
    learner = make()
    state = learner.state_dict()
    write_state(path, state | {"format": 99})
    assert not make().resume()
    assert (path.exists(), aside.exists()) == (False, True)
    for spoiled in (state | {"schedules": 5}, {"format": state["format"]}):
        write_state(path, spoiled)
        with pytest.raises(AuroraError, match=r"cannot be read .* is set aside as .*state.unread"):
            make().resume()
        assert not make().resume()


def test_a_resumed_learner_goes_on_counting_refusals(make: MakeLearner, target: Target, tmp_path: Path) -> None:
    draft = random_draft(target)

    def refused(learner: Learner) -> bool:
        return learner.apply_gate_decision(passed=False, champion=draft, version="start")

    first = make()
    assert not any(refused(first) for _ in range(PATIENCE_TRIALS - 1))
    first.save()
    again = make()
    assert again.resume()
    assert refused(again), "learning restarts"
    state = first.state_dict()
    del state["refused"], state["lineage"]
    write_state(tmp_path / "state", state)
    earlier = make()
    assert earlier.resume(), "a state of an earlier version"
    assert not refused(earlier)


def test_a_state_of_another_starting_draft_is_not_used(make: MakeLearner, target: Target) -> None:
    def learner(draft: Eagle3Draft, version: str = STARTING_VERSION) -> Learner:
        return make(draft, version=version, starting_digest=weights_digest(draft))

    first, second = random_draft(target, seed=1), random_draft(target, seed=2)
    learner(first).save()
    assert learner(first).resume()
    assert not learner(second).resume(), "draft.checkpoint names another one of the same vocabulary"
    learner(first, version="draft-000001").save()
    assert learner(second).resume(), "the served draft is not the starting one"


def test_learning_by_ppo_at_rest_saves_what_lk_saves_and_begins_anew_after_a_restart(
    make: MakeLearner, traffic: list[Trace]
) -> None:
    """So each goes on from the other's state; of the rest that a kill ended nothing is kept."""
    learner, rest = make(), collate_online([], traffic[:5])
    names = learner.state_dict()["module"].keys()
    learner.module.module.online = OnlineWeights(ppo=True)
    for stops in (False, True):
        report = learner.update(rest)
        assert report is not None
        assert bool(report.stats.stopped_R2[:, 0].sum() > 0) == stops
    assert learner.state_dict()["module"].keys() == names
    learner.save()
    other = make()
    assert other.resume()
    learner.restart_from(random_draft_of(learner), version="start")
    report = learner.update(rest)
    assert report is not None
    assert report.stats.stopped_R2[:, 0].sum() == 0


def random_draft_of(learner: Learner) -> Eagle3Draft:
    """A copy of its draft with another head."""
    draft = copy.deepcopy(learner.draft)
    torch.nn.init.normal_(draft.lm_head.weight, generator=torch.Generator().manual_seed(1))
    return draft


def test_positions_are_those_that_a_step_has_trained_on(
    make: MakeLearner, target_head: TargetHead, traffic: list[Trace]
) -> None:
    learner = make()
    batch = collate_online(traffic[:3], traffic[3:5])
    assert learner.update(batch) is not None
    assert learner.positions == sum(len(each.token_ids_T) - first_trained_position(each) for each in traffic[:5])


def test_a_state_of_another_vocabulary_is_not_used(make: MakeLearner, target: Target) -> None:
    def learner(ids: torch.Tensor) -> Learner:
        return make(initial_draft(target.in_torch, ids), version="draft-000003")

    learner(torch.arange(40)).save()
    assert learner(torch.arange(40)).resume()
    assert not learner(torch.arange(1, 41)).resume(), "as many tokens, but others"


def test_gradients_are_clipped_together_and_sparse_ones_have_each_row_once() -> None:
    dense, table = (torch.nn.Parameter(torch.zeros(size)) for size in ((2,), (5, 2)))
    dense.grad = torch.tensor([3.0, 0.0])
    rows = torch.tensor([[1, 3, 1]])
    table.grad = torch.sparse_coo_tensor(
        rows, torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 2.0]]), (5, 2), check_invariants=True
    )
    norm = clip_gradients([dense, table], max_norm=1.0)
    assert float(norm) == pytest.approx(math.sqrt(9 + 4 + 4 + 4))
    together = torch.cat([dense.grad, table.grad.to_dense().flatten()])
    assert float(together.norm()) == pytest.approx(1.0, abs=1e-4)
    assert together[0] == pytest.approx(3 / float(norm), abs=1e-4)
    dense.grad, table.grad = torch.tensor([0.3, 0.4]), None
    clip_gradients([dense, table], max_norm=1.0)
    assert dense.grad.tolist() == pytest.approx([0.3, 0.4]), "short ones stay"
