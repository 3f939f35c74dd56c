"""Drafts kept by domain: the best one, bounded, whole after any crash; learning goes on from it on a return."""

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
from support.learner_harness import Server, World
from support.live_traces import online_module, serve, some_requests
from support.tiny_models import random_draft, trained_draft

from aurora_lit.config import load_config
from aurora_lit.ipc.engine_status import STATUS_NAME, StatusBlock
from aurora_lit.ipc.run_folder import RING_NAME
from aurora_lit.learn.data.labelled_trace import for_gate
from aurora_lit.learn.data.target_head import TargetHead
from aurora_lit.learn.online.domain_drafts import DomainDrafts
from aurora_lit.learn.online.gate import HeldOut
from aurora_lit.learn.online.learner import PATIENCE_TRIALS, STARTING_VERSION
from aurora_lit.models.target import Target
from aurora_lit.modules.domains.detector import Shift
from aurora_lit.modules.draft.eagle3 import Draft
from aurora_lit.traces.record import Trace


@pytest.fixture(scope="module")
def ends(target: Target) -> TargetHead:
    return TargetHead(target)


@pytest.fixture(scope="module")
def traffic(target: Target) -> dict[str, list[Trace]]:
    """Two domains, a few prompts each."""
    return {
        domain: serve(target, None, some_requests(8, seed=seed, domain=domain))
        for seed, domain in enumerate(("chat", "code"))
    }


@pytest.fixture(scope="module")
def good_at(target: Target, traffic: dict[str, list[Trace]]) -> dict[str, Draft]:
    """A draft that has learned each."""
    return {
        domain: trained_draft(target, torch.stack([trace.token_ids_T.long() for trace in traces[:8]]), steps=60)
        for domain, traces in traffic.items()
    }


def held(traces: dict[str, list[Trace]], ends: TargetHead, *, newest: str) -> HeldOut:
    """Held-out requests of both domains; the newest are of one."""
    held_out = HeldOut(num_newest=8, seed=0, read=partial(for_gate, ends=ends))
    for domain in sorted(traces, key=lambda domain: domain == newest):
        for trace in traces[domain][:8]:
            held_out.add(trace)
    return held_out


def kept_in(path: Path, target: Target, ends: TargetHead, **changes: Any) -> DomainDrafts:
    scratch = online_module(target, random_draft(target, seed=9))
    return DomainDrafts(path, ends, scratch=scratch, **{"most": 4, "batch_positions": 512, **changes})


def same(left: Draft, right: Draft) -> bool:
    """Equal as far as a checkpoint keeps them."""
    other = right.state_dict()
    return all(torch.equal(tensor.bfloat16(), other[name].bfloat16()) for name, tensor in left.state_dict().items())


def loaded(kept: DomainDrafts, domain: str, held_out: HeldOut) -> Draft | None:
    requests = [request for request in held_out if request.domain == domain]
    return kept._scratch.draft if kept._score_kept(domain, requests) is not None else None


def test_the_better_draft_of_a_domain_is_kept_and_found_again(
    target: Target, ends: TargetHead, traffic: dict[str, list[Trace]], good_at: dict[str, Draft], tmp_path: Path
) -> None:
    kept, held_out = kept_in(tmp_path / "k", target, ends), held(traffic, ends, newest="chat")
    untrained = random_draft(target)
    for draft in (untrained, good_at["chat"], untrained, good_at["code"]):
        kept.offer(online_module(target, draft), held_out)
    assert kept.domains == ["chat"], "code is not what the newest requests are about"
    assert len(list((tmp_path / "k").iterdir())) == 1
    kept.offer(online_module(target, good_at["code"]), held(traffic, ends, newest="code"))
    again = kept_in(tmp_path / "k", target, ends)
    assert again.domains == ["chat", "code"]
    for domain, draft in good_at.items():
        found = loaded(again, domain, held_out)
        assert found is not None
        assert same(found, draft)
    record = json.loads(next((tmp_path / "k").glob("kept-*/record.json")).read_text())
    assert record["domain"] in good_at
    assert record["score"] > 1.5


def test_what_is_kept_is_bounded_and_what_is_damaged_is_let_go(
    target: Target, ends: TargetHead, traffic: dict[str, list[Trace]], tmp_path: Path
) -> None:
    kept = kept_in(tmp_path, target, ends, most=2)
    drafts = {name: random_draft(target, seed=n) for n, name in enumerate("abcb")}
    for name, draft in drafts.items():
        kept._keep(name, draft, {})
    kept._keep("b", drafts["a"], {})
    assert kept.domains == ["c", "b"]
    held_out = held(traffic, ends, newest="chat")
    for path in tmp_path.glob("kept-*"):
        (path / "model.safetensors").write_bytes(b"half")
    again = kept_in(tmp_path, target, ends, most=2)
    assert loaded(again, "b", held_out) is None
    assert again.domains == ["c"]
    assert len(list(tmp_path.iterdir())) == 1
    wider = kept_in(tmp_path, target, ends)
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
from aurora_lit.modules.draft.eagle3 import Draft, DraftConfig

torch.set_num_threads(1)
os.fsync = lambda _: None  # a killed process loses nothing that it has written; the disk is slow
config = DraftConfig(hidden_size=8, target_hidden_size=8, intermediate_size=8, num_attention_heads=1,
    num_key_value_heads=1, head_dim=8, vocab_size=11, draft_vocab_size=7, aux_layer_ids=(1, 2, 3))
target = SimpleNamespace(vocab_size=11, hidden_size=8, aux_layer_ids=(1, 2, 3))
folder = Path(sys.argv[1])
with torch.no_grad():
    drafts = [Draft(config) for _ in range(4)]
    for number, draft in enumerate(drafts):
        draft.lm_head.weight.fill_(number)

def opened():
    return DomainDrafts(folder, target, scratch=None, most=2, batch_positions=1)

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
    kept._keep("chat", drafts[3], {})  # and it goes on
    assert number_of(opened(), "chat") == 3
print(json.dumps({"steps": steps, "seen": sorted(seen)}))
"""


def test_a_domain_has_a_whole_draft_after_any_crash(tmp_path: Path) -> None:
    command = [sys.executable, "-c", CRASHES, str(tmp_path / "kept")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=TESTS, timeout=250)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["steps"] >= 12
    assert report["seen"] == [1, 2]


# -- going on ------------------------------------------------------------------------------------------------------


@pytest.fixture
def world(
    target: Target, ends: TargetHead, traffic: dict[str, list[Trace]], good_at: dict[str, Draft], tmp_path: Path
) -> World:
    """A learner that serves and has what is good at code, long after it kept what is good at chat."""
    world = World(target, tmp_path, draft=good_at["code"], min_steps=1000, adapt_vocabulary=False)
    kept = kept_in(tmp_path / "domains", target, ends)
    kept._keep("chat", good_at["chat"], {})
    world.loop._domain_drafts = kept
    world.loop.held_out = held({"chat": traffic["chat"]}, ends, newest="chat")
    return world


def back(domain: str, *, cause: str = "mix") -> Shift:
    return Shift(cause=cause, domain=domain, novelty=0.0)


def test_when_a_domain_returns_learning_goes_on_from_its_draft_which_is_tried_at_once(
    world: World, good_at: dict[str, Draft]
) -> None:
    world.loop.tick()
    assert world.loop.warm_starts == 0
    assert same(world.learner.draft, good_at["code"])
    world.learner.steering.last_shift = back("chat")
    world.loop.tick()
    assert same(world.learner.draft, good_at["chat"])
    page = world.page.read()
    assert (page.warm_starts, page.published, world.learner.steps) == (1, 1, 0), "the gate let it pass"
    assert same(world.served_draft(world.store.current()), good_at["chat"])
    assert page.challenger_score > page.champion_score + 0.2
    # Once a shift, whatever is learned later.
    world.learner.restart_from(good_at["code"], version=world.learner.version)
    world.loop.tick()
    assert world.loop.warm_starts == 1


@pytest.mark.parametrize("shift", [back("code"), back("never seen"), back("chat", cause="acceptance")])
def test_other_shifts_change_nothing(world: World, good_at: dict[str, Draft], shift: Shift) -> None:
    world.learner.steering.last_shift = shift
    world.loop.tick()
    assert world.loop.warm_starts == 0
    assert same(world.learner.draft, good_at["code"])


def test_a_kept_draft_that_is_no_better_now_is_left(world: World, good_at: dict[str, Draft]) -> None:
    kept = world.loop._domain_drafts
    assert kept is not None
    kept._keep("chat", good_at["code"], {})
    world.learner.restart_from(good_at["chat"], version=STARTING_VERSION)
    world.learner.steering.last_shift = back("chat")
    world.loop.tick()
    assert world.loop.warm_starts == 0
    assert same(world.learner.draft, good_at["chat"])


def test_a_warm_start_that_other_domains_would_pay_for_is_refused_and_at_last_given_up(
    world: World, ends: TargetHead, traffic: dict[str, list[Trace]], good_at: dict[str, Draft]
) -> None:
    world.loop.held_out = held(traffic, ends, newest="chat")
    for schedule in world.learner.schedules:
        schedule.base_lrs = [0.0]
    world.learner.steering.last_shift = back("chat")
    for trial in range(1, PATIENCE_TRIALS + 1):
        assert same(world.learner.draft, good_at["code" if trial == 1 else "chat"])
        world.loop.tick()
        assert world.loop.warm_starts == 1
        assert world.loop.refused_by_gate == trial
        assert world.loop.verdict is not None
        assert "worse in domain 'code'" in world.loop.verdict.reason
        world.loop._last_trial_steps = -10_000  # the next trial is due
    assert world.store.current() is None
    assert same(world.learner.draft, good_at["code"]), "the champion's"


def test_the_learner_keeps_drafts_where_the_setting_says_so(folder: Path, target: Target, tmp_path: Path) -> None:
    from aurora_lit.learn.online.build import build_loop

    server = Server(tmp_path, folder, random_draft(target))
    status = StatusBlock.open(server.run_folder / STATUS_NAME)
    for wanted in (True, False):
        config = load_config(None, [*server.overrides, f"learn.domain_drafts={wanted}"])
        with build_loop(config, server.run_folder, server.run_folder / RING_NAME, server.page, status) as loop:
            assert (loop._domain_drafts is not None) == wanted
            assert (server.store.folder / "domains").is_dir(), "beside the versions"
    assert server.store.versions() == []
    assert server.store.current() is None
