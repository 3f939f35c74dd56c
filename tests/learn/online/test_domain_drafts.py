"""Drafts kept by domain: the best one, bounded, complete after any crash; learning continues from it on a return."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support import TESTS
from support.learner_harness import LearnerHarness, ServerStandIn
from support.live_traces import online_module, serve, some_requests
from support.tiny_models import random_draft, trained_draft

from aurora_lit.config import load_config
from aurora_lit.ipc.engine_status import STATUS_NAME, EngineStatusPage
from aurora_lit.ipc.run_folder import RING_NAME
from aurora_lit.learn.data.labelled_trace import label_for_gate
from aurora_lit.learn.data.target_head import TargetHead
from aurora_lit.learn.online.domain_drafts import DomainDrafts
from aurora_lit.learn.online.gate import HeldOut
from aurora_lit.learn.online.learner import PATIENCE_TRIALS, STARTING_VERSION
from aurora_lit.models.target import Target
from aurora_lit.modules.domains.detector import Shift
from aurora_lit.modules.draft.eagle3 import Eagle3Draft
from aurora_lit.traces.record import Trace


@pytest.fixture(scope="module")
def traffic(target: Target) -> dict[str, list[Trace]]:
    """Two domains, a few prompts each."""
    return {
        domain: serve(target, None, some_requests(8, seed=seed, domain=domain))
        for seed, domain in enumerate(("chat", "code"))
    }


@pytest.fixture(scope="module")
def good_at(target: Target, traffic: dict[str, list[Trace]]) -> dict[str, Eagle3Draft]:
    """A draft that has learned each."""
    return {
        domain: trained_draft(target, torch.stack([trace.token_ids_T.long() for trace in traces[:8]]), steps=60)
        for domain, traces in traffic.items()
    }


def held(traces: dict[str, list[Trace]], target_head: TargetHead, *, newest: str) -> HeldOut:
    """Held-out requests of both domains; the newest are of one."""
    held_out = HeldOut(num_newest=8, seed=0, label=partial(label_for_gate, target_head=target_head))
    for domain in sorted(traces, key=lambda domain: domain == newest):
        for trace in traces[domain][:8]:
            held_out.add(trace)
    return held_out


def kept_in(path: Path, target: Target, target_head: TargetHead, **changes: Any) -> DomainDrafts:
    scratch = online_module(target, random_draft(target, seed=9))
    return DomainDrafts(path, target_head, scratch=scratch, **{"max_domains": 4, "batch_positions": 512, **changes})


def same(left: Eagle3Draft, right: Eagle3Draft) -> bool:
    """Equal as far as a checkpoint keeps them."""
    other = right.state_dict()
    return all(torch.equal(tensor.bfloat16(), other[name].bfloat16()) for name, tensor in left.state_dict().items())


def loaded(kept: DomainDrafts, domain: str, held_out: HeldOut) -> Eagle3Draft | None:
    requests = [request for request in held_out if request.domain == domain]
    return kept._scratch.draft if kept._score_kept(domain, requests) is not None else None


def test_the_better_draft_of_a_domain_is_kept_and_found_again(
    target: Target,
    target_head: TargetHead,
    traffic: dict[str, list[Trace]],
    good_at: dict[str, Eagle3Draft],
    tmp_path: Path,
) -> None:
    kept, held_out = kept_in(tmp_path / "k", target, target_head), held(traffic, target_head, newest="chat")
    untrained = random_draft(target)
    for draft in (untrained, good_at["chat"], untrained, good_at["code"]):
        kept.keep_if_better(online_module(target, draft), held_out)
    assert kept.domains == ["chat"], "code is not what the newest requests are about"
    assert len(list((tmp_path / "k").iterdir())) == 1
    kept.keep_if_better(online_module(target, good_at["code"]), held(traffic, target_head, newest="code"))
    again = kept_in(tmp_path / "k", target, target_head)
    assert again.domains == ["chat", "code"]
    for domain, draft in good_at.items():
        found = loaded(again, domain, held_out)
        assert found is not None
        assert same(found, draft)
    record = json.loads(next((tmp_path / "k").glob("kept-*/record.json")).read_text())
    assert record["domain"] in good_at
    assert record["score"] > 1.5


def test_kept_drafts_are_bounded_and_damaged_ones_are_deleted(
    target: Target, target_head: TargetHead, traffic: dict[str, list[Trace]], tmp_path: Path
) -> None:
    kept = kept_in(tmp_path, target, target_head, max_domains=2)
    drafts = {name: random_draft(target, seed=n) for n, name in enumerate("abcb")}
    for name, draft in drafts.items():
        kept._keep(name, draft, {})
    kept._keep("b", drafts["a"], {})
    assert kept.domains == ["c", "b"]
    held_out = held(traffic, target_head, newest="chat")
    for path in tmp_path.glob("kept-*"):
        (path / "model.safetensors").write_bytes(b"half")
    again = kept_in(tmp_path, target, target_head, max_domains=2)
    assert loaded(again, "b", held_out) is None
    assert again.domains == ["c"]
    assert len(list(tmp_path.iterdir())) == 1
    wider = kept_in(tmp_path, target, target_head)
    wider._keep("c", random_draft(target, intermediate_size=96), {})
    assert loaded(wider, "c", held_out) is None, "of another shape"


CRASHES = """
import json, os, sys
from pathlib import Path
from types import SimpleNamespace
import torch
from support.crash_points import kill_at_every_step
from aurora_lit.drafts.checkpoint import load_draft
from aurora_lit.learn.online.domain_drafts import DomainDrafts
from aurora_lit.modules.draft.eagle3 import Eagle3Draft, Eagle3Config

torch.set_num_threads(1)
os.fsync = lambda _: None  # a killed process loses nothing that it has written; the disk is slow
config = Eagle3Config(hidden_size=8, target_hidden_size=8, intermediate_size=8, num_attention_heads=1,
    num_key_value_heads=1, head_dim=8, vocab_size=11, draft_vocab_size=7, aux_layer_ids=(1, 2, 3))
target = SimpleNamespace(vocab_size=11, hidden_size=8, aux_layer_ids=(1, 2, 3))
folder = Path(sys.argv[1])
with torch.no_grad():
    drafts = [Eagle3Draft(config) for _ in range(4)]
    for number, draft in enumerate(drafts):
        draft.lm_head.weight.fill_(number)

def opened():
    return DomainDrafts(folder, target, scratch=None, max_domains=2, batch_positions=1)

def number_of(kept, domain):
    return int(load_draft(kept._of_domain[domain], target).lm_head.weight[6, 7])

kept = opened()
kept._keep("code", drafts[0], {})
kept._keep("chat", drafts[1], {})
seen, steps = set(), 0
for step in kill_at_every_step(lambda: opened()._keep("chat", drafts[2], {}), folder=folder):
    steps += 1
    kept = opened()
    assert set(kept.domains) == {"chat", "code"}, step
    seen.add(number_of(kept, "chat"))
    assert number_of(kept, "code") == 0
    assert len(list(folder.iterdir())) == 2, "nothing half is left"
    kept._keep("chat", drafts[3], {})  # and the next one is kept
    assert number_of(opened(), "chat") == 3
print(json.dumps({"steps": steps, "seen": sorted(seen)}))
"""


def test_a_domain_has_a_complete_draft_after_any_crash(tmp_path: Path) -> None:
    command = [sys.executable, "-c", CRASHES, str(tmp_path / "kept")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=TESTS, timeout=250)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["steps"] >= 12
    assert report["seen"] == [1, 2]


# -- going on ------------------------------------------------------------------------------------------------------


@pytest.fixture
def harness(
    target: Target,
    target_head: TargetHead,
    traffic: dict[str, list[Trace]],
    good_at: dict[str, Eagle3Draft],
    tmp_path: Path,
) -> LearnerHarness:
    """A learner whose draft is good at code, as the served one, and which has kept one that is good at chat."""
    harness = LearnerHarness(target, tmp_path, draft=good_at["code"], publish_every_steps=1000)
    kept = kept_in(tmp_path / "domains", target, target_head)
    kept._keep("chat", good_at["chat"], {})
    harness.loop._domain_drafts = kept
    harness.loop.held_out = held({"chat": traffic["chat"]}, target_head, newest="chat")
    return harness


def back(domain: str, *, cause: str = "mix") -> Shift:
    return Shift(cause=cause, domain=domain, novelty=0.0)


def test_when_a_domain_returns_learning_continues_from_its_draft_and_a_trial_is_held(
    harness: LearnerHarness, good_at: dict[str, Eagle3Draft]
) -> None:
    harness.loop.tick()
    assert harness.loop.warm_starts == 0
    assert same(harness.learner.draft, good_at["code"])
    harness.learner.controller.last_shift = back("chat")
    harness.loop.tick()
    assert same(harness.learner.draft, good_at["chat"])
    page = harness.page.read()
    assert (page.warm_starts, page.published, harness.learner.steps) == (1, 1, 0), "the gate let it pass"
    assert same(harness.served_draft(harness.store.current()), good_at["chat"])
    assert page.challenger_score > page.champion_score + 0.2
    # Once a shift, whatever is learned later.
    harness.learner.restart_from(good_at["code"], version=harness.learner.version)
    harness.loop.tick()
    assert harness.loop.warm_starts == 1


@pytest.mark.parametrize("shift", [back("code"), back("never seen"), back("chat", cause="acceptance")])
def test_other_shifts_change_nothing(harness: LearnerHarness, good_at: dict[str, Eagle3Draft], shift: Shift) -> None:
    harness.learner.controller.last_shift = shift
    harness.loop.tick()
    assert harness.loop.warm_starts == 0
    assert same(harness.learner.draft, good_at["code"])


def test_a_kept_draft_that_is_not_better_now_is_not_used(
    harness: LearnerHarness, good_at: dict[str, Eagle3Draft]
) -> None:
    kept = harness.loop._domain_drafts
    assert kept is not None
    kept._keep("chat", good_at["code"], {})
    harness.learner.restart_from(good_at["chat"], version=STARTING_VERSION)
    harness.learner.controller.last_shift = back("chat")
    harness.loop.tick()
    assert harness.loop.warm_starts == 0
    assert same(harness.learner.draft, good_at["chat"])


def test_a_warm_start_that_is_worse_in_other_domains_is_refused_and_given_up_in_the_end(
    harness: LearnerHarness, target_head: TargetHead, traffic: dict[str, list[Trace]], good_at: dict[str, Eagle3Draft]
) -> None:
    held_out = harness.loop.held_out = held(traffic, target_head, newest="chat")
    for schedule in harness.learner.schedules:
        schedule.base_lrs = [0.0]
    harness.learner.controller.last_shift = back("chat")
    for trial in range(1, PATIENCE_TRIALS + 1):
        for request in held_out:
            request.was_tried = False
        assert same(harness.learner.draft, good_at["code" if trial == 1 else "chat"])
        harness.loop.tick()
        assert harness.loop.warm_starts == 1
        assert harness.loop.refused_by_gate == trial
        assert harness.loop.decision is not None
        assert "worse in domain 'code'" in harness.loop.decision.reason
        harness.loop._last_trial_steps = -10_000  # the next trial is due
    assert harness.store.current() is None
    assert same(harness.learner.draft, good_at["code"]), "the champion's"


def test_drafts_are_kept_only_with_the_setting(folder: Path, target: Target, tmp_path: Path) -> None:
    from aurora_lit.learn.online.build import build_loop

    server = ServerStandIn(tmp_path, folder, random_draft(target))
    status = EngineStatusPage.open(server.run_folder / STATUS_NAME)
    for enabled in (True, False):
        config = load_config(None, [*server.overrides, f"learn.domain_drafts={enabled}"])
        with build_loop(config, server.run_folder, server.run_folder / RING_NAME, server.page, status) as loop:
            assert (loop._domain_drafts is not None) == enabled
            assert (server.store.folder / "domains").is_dir(), "beside the versions"
    assert server.store.versions() == []
    assert server.store.current() is None
