"""The learner's parts: its budget, its memory, what it makes of traces, and the gate."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.live_traces import online_module, serve, some_requests
from support.tiny_models import random_draft, save_model, trained_draft

from aurora_lit.learn.data.feed import MAX_PASSES, Feed, informativeness
from aurora_lit.learn.data.labelled_trace import crop, first_taught, fits, for_gate, online_batch, read_lesson
from aurora_lit.learn.data.reservoir import Reservoir
from aurora_lit.learn.data.target_head import TargetHead
from aurora_lit.learn.online.budget import Budget, Load
from aurora_lit.learn.online.gate import HeldOut, HeldOutRequest, judge, score_requests
from aurora_lit.models.target import Target
from aurora_lit.modules.draft.eagle3 import Draft
from aurora_lit.traces.record import Trace, check


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    folder = save_model("llama", tmp_path_factory.mktemp("llama"), num_hidden_layers=4)
    return Target.load(folder, precision="fp32")


@pytest.fixture(scope="module")
def ends(target: Target) -> TargetHead:
    return TargetHead(target)


@pytest.fixture(scope="module")
def good_draft(target: Target) -> Draft:
    """A draft that has seen the answers it is asked for, so that some proposals are accepted and some are not."""
    traces = serve(target, None, some_requests(12))
    ids_BT = torch.stack([trace.token_ids_T.long() for trace in traces])
    return trained_draft(target, ids_BT, steps=40)


def a_trace(*, domain: str = "a", length: int = 20, request_id: str = "r", mark: int = 0) -> Trace:
    """A greedy trace without rounds; `mark` can be found again in its tokens."""
    return Trace(
        request_id=request_id,
        domain=domain,
        verify="greedy",
        answer_start=4,
        token_ids_T=torch.full((length,), mark, dtype=torch.int32),
        aux_T3H=torch.zeros(length, 12, dtype=torch.bfloat16),
        last_TH=torch.zeros(length, 4, dtype=torch.bfloat16),
    )


# -- budget --------------------------------------------------------------------------------------------------------


class FakeMachine:
    """Wall and processor time, moved by hand."""

    def __init__(self) -> None:
        self.wall = self.cpu = 100.0

    def work(self, cpu_s: float, *, slowdown: float = 1.0) -> None:
        self.cpu += cpu_s
        self.wall += cpu_s * slowdown

    def sleep(self, seconds: float) -> None:
        self.wall += seconds


def a_budget(machine: FakeMachine, **changes: Any) -> Budget:
    fields = {"full_load_share": 0.0, "minimum_duty": 0.0, "cpus": 2, **changes}
    return Budget(**fields, wall_s=lambda: machine.wall, cpu_s=lambda: machine.cpu)


@pytest.mark.parametrize(("share", "step_s", "slowdown"), [(0.04, 2.0, 1.0), (0.04, 0.05, 3.0), (0.3, 0.5, 1.5)])
@pytest.mark.parametrize(("load", "most"), [(Load.SPARE, 1.0), (Load.FULL, 0.03), (Load.QUEUEING, 0.01)])
def test_the_budget_holds_its_share_within_a_fifth(
    share: float, step_s: float, slowdown: float, load: Load, most: float
) -> None:
    machine = FakeMachine()
    budget = a_budget(machine, share=share, full_load_share=0.03, minimum_duty=0.01)
    machine.sleep(30)  # nothing to do at first: only a little of that is kept
    began_wall, began_cpu = machine.wall, machine.cpu
    while machine.wall < began_wall + 3600:
        if wait_s := budget.wait_s(load):
            machine.sleep(min(wait_s, 0.2))
        else:
            machine.work(step_s, slowdown=slowdown)
    used = (machine.cpu - began_cpu) / (2 * (machine.wall - began_wall))
    assert used == pytest.approx(min(share, most), rel=0.2)


def test_a_long_idle_time_is_not_made_up_for() -> None:
    machine = FakeMachine()
    budget = a_budget(machine, share=0.04)
    machine.sleep(3600)
    began = machine.cpu
    while budget.wait_s(Load.SPARE) == 0:
        machine.work(0.05)
    assert machine.cpu - began < 1.0


def test_the_measured_share_is_that_of_the_last_minute() -> None:
    machine = FakeMachine()
    budget = a_budget(machine, share=0.5)
    machine.work(60)
    assert budget.wait_s(Load.SPARE) == 0
    assert budget.measured_share == pytest.approx(0.5)
    for _ in range(100):
        machine.sleep(1)
        budget.wait_s(Load.SPARE)
    assert budget.measured_share == pytest.approx(0)


def test_without_a_minimum_duty_a_busy_server_is_left_alone() -> None:
    machine = FakeMachine()
    budget = a_budget(machine, share=0.5, cpus=1)
    machine.work(1)
    assert budget.wait_s(Load.QUEUEING) == float("inf")
    assert budget.wait_s(Load.SPARE) == pytest.approx(2.0), "what was worked while requests queued earned nothing"


# -- reservoir -----------------------------------------------------------------------------------------------------


def test_the_reservoir_keeps_a_fair_sample_within_its_bytes_and_spares_rare_domains(tmp_path: Path) -> None:
    size = a_trace().num_bytes
    reservoir = Reservoir(tmp_path / "r", limit_bytes=40 * (size + 1500), seed=0)
    for mark in range(5):
        reservoir.add(a_trace(domain="rare", mark=mark))
    for mark in range(1000):
        reservoir.add(a_trace(domain="busy", mark=mark))
        assert sum(path.stat().st_size for path in (tmp_path / "r").iterdir()) <= 40 * (size + 1500)
    assert reservoir.domains["rare"] == 5
    assert 25 <= reservoir.domains["busy"] <= 50
    found = [reservoir.sample() for _ in range(400)]
    domains = Counter(trace.domain for trace in found if trace)
    assert 140 < domains["rare"] < 260, "each domain is as likely"
    marks = {int(trace.token_ids_T[0]) for trace in found if trace and trace.domain == "busy"}
    assert 300 < sum(marks) / len(marks) < 700, "old and new alike"


def test_heavier_traces_stay_likelier(tmp_path: Path) -> None:
    reservoir = Reservoir(tmp_path / "r", limit_bytes=60_000, seed=1)
    for mark in range(600):
        reservoir.add(a_trace(mark=mark % 2), weight=1.0 if mark % 2 else 0.1)
    marks = Counter(int(t.token_ids_T[0]) for _ in range(300) if (t := reservoir.sample()))
    assert marks[1] > 5 * marks[0]


def test_a_reservoir_is_found_again_and_what_is_damaged_in_it_is_not_used(tmp_path: Path) -> None:
    first = Reservoir(tmp_path / "r", limit_bytes=1 << 20, seed=0)
    for mark in range(6):
        first.add(a_trace(domain=f"d{mark % 2}", mark=mark))
    files = sorted((tmp_path / "r").iterdir())
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}
    files[0].write_bytes(b"damaged")
    (tmp_path / "r" / "0000000009-0x1p-1.trace.tmp").write_bytes(b"half written")
    again = Reservoir(tmp_path / "r", limit_bytes=1 << 20, seed=0)
    assert (len(again), again.domains) == (5, {"d1": 3, "d0": 2})
    assert again.num_bytes == sum(path.stat().st_size for path in (tmp_path / "r").iterdir())
    assert again.add(a_trace(mark=7))
    assert len(again) == 6
    for path in (tmp_path / "r").iterdir():
        path.write_bytes(b"damaged later")
    assert again.sample() is None


# -- rounds --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(target: Target, good_draft: Draft) -> list[Trace]:
    """Greedy, seeded and free requests, some rounds exploring."""
    requests = [
        *some_requests(4, seed=1),
        *some_requests(3, seed=2, temperature=0.8, domain="free"),
        *some_requests(3, seed=3, temperature=0.7, domain="seeded"),
    ]
    requests = [replace(r, params=replace(r.params, seed=5)) if r.domain == "seeded" else r for r in requests]
    return serve(target, good_draft, requests, explore_share=0.3, explore_temperature=1.3, explore_seed=4)


def test_each_proposal_is_judged_by_what_the_target_says_after_the_proposals_before_it(
    target: Target, ends: TargetHead, served: list[Trace]
) -> None:
    lessons = [read_lesson(trace, ends) for trace in served]
    batch = online_batch(lessons, [], oldest_fresh=0)
    assert len(batch.row_Q) > 60
    rejected = 0
    for q in range(len(batch.row_Q)):
        trace = served[int(batch.row_Q[q])]
        root, proposals = int(batch.root_Q[q]), batch.proposal_QK[q]
        count = int(batch.num_proposed_Q[q])
        ids = torch.cat([trace.token_ids_T[: root + 1].long(), proposals[: count - 1]])
        with torch.no_grad():
            last_TH = target.read(ids[None])[1][0, root:]
            logits = target.logits(last_TH)
        free = float(batch.temperature_Q[q]) or 1.0
        torch.testing.assert_close(batch.path_last_QKH[q, :count].float(), last_TH, atol=2e-2, rtol=2e-2)
        torch.testing.assert_close(batch.path_lse_QK[q, :count], (logits / free).logsumexp(-1), atol=0.05, rtol=0)
        clear = logits.topk(2).values.diff().abs()[:, 0] > 0.1
        assert torch.equal(batch.path_top_QK[q, :count][clear], logits.argmax(-1)[clear])
        assert (batch.path_top_QK[q, count:] == -1).all()
        assert (proposals[count:] == -1).all()
        rejected += count - 1 - int(batch.num_accepted_Q[q]) > 0
    assert rejected > 5, "or the rejected paths were not looked at"


def test_only_drawn_proposals_have_a_behaviour_and_only_recent_ones_are_fresh(
    ends: TargetHead, served: list[Trace]
) -> None:
    batch = online_batch([read_lesson(trace, ends) for trace in served], [], oldest_fresh=0)
    modes = [served[int(row)].verify for row in batch.row_Q]
    explored = torch.cat([t.explored_R[(t.num_proposed_R > 0) & (t.round_root_R > 0)] for t in served])
    assert 0 < int(explored.sum()) < len(explored)
    for q, mode in enumerate(modes):
        drawn = bool(explored[q]) or mode == "free"
        assert bool(batch.behaviour_logprob_QK[q, 0].isfinite()) == drawn
        assert bool(batch.greedy_verify_Q[q]) == (mode != "free")
    assert batch.fresh_Q.all()
    assert not online_batch([read_lesson(served[0], ends)], [], oldest_fresh=1).fresh_Q.any()


def test_replay_is_marked_and_brings_no_rounds(ends: TargetHead, served: list[Trace]) -> None:
    lessons = [read_lesson(trace, ends) for trace in served[:4]]
    batch = online_batch(lessons[:2], [lesson.trace for lesson in lessons[2:]], oldest_fresh=0)
    assert batch.live_B.tolist() == [True, True, False, False]
    assert set(batch.row_Q.tolist()) == {0, 1}
    replay_only = online_batch([], [lessons[0].trace], oldest_fresh=0)
    assert (len(replay_only.row_Q), replay_only.live_B.tolist()) == (0, [False])


def test_a_cropped_trace_is_a_whole_trace_of_its_end(ends: TargetHead, served: list[Trace]) -> None:
    trace = max(served, key=lambda t: int(t.num_rejected_R.sum()))
    short = crop(trace, 15)
    check(short)
    start = len(trace.token_ids_T) - 15
    assert (short.first_position, short.answer_start) == (trace.first_position + start, 0)
    assert crop(trace, 1000) is trace
    whole, part = (online_batch([read_lesson(t, ends)], [], oldest_fresh=0) for t in (trace, short))
    kept = whole.root_Q > start
    assert 0 < int(kept.sum()) < len(kept)
    assert torch.equal(part.root_Q, whole.root_Q[kept] - start)
    for name in ("proposal_QK", "path_last_QKH", "path_top_QK", "path_lse_QK"):
        assert torch.equal(getattr(part, name), getattr(whole, name)[kept]), name


def test_what_teaches_begins_where_the_answers_first_token_is_foretold(served: list[Trace]) -> None:
    assert first_taught(served[0]) == 2, "prompts have three tokens"
    length = len(served[0].token_ids_T)
    assert first_taught(replace(served[0], answer_start=length)) == length
    assert first_taught(replace(served[0], answer_start=length, verify="read")) == 0


def test_a_trace_of_another_target_does_not_fit(ends: TargetHead, served: list[Trace]) -> None:
    trace = served[0]
    assert fits(trace, ends)
    assert not fits(replace(trace, last_TH=trace.last_TH[:, :8]), ends)
    tokens_T = trace.token_ids_T.clone()
    tokens_T[1] = ends.vocab_size
    assert not fits(replace(trace, token_ids_T=tokens_T), ends)
    proposals = trace.proposal_RK.clone()
    proposals[0, 0] = ends.vocab_size
    assert not fits(replace(trace, proposal_RK=proposals), ends)


# -- feed ----------------------------------------------------------------------------------------------------------


def a_feed(ends: TargetHead, folder: Path, **changes: float) -> Feed:
    fields = {"batch_positions": 128, "replay_share": 0.5, "live_bytes": 1 << 24, **changes}
    return Feed(ends, Reservoir(folder / "r", limit_bytes=1 << 24, seed=0), **fields)  # type: ignore[arg-type]


def test_batches_mix_live_and_remembered_and_stay_within_their_size(
    ends: TargetHead, served: list[Trace], tmp_path: Path
) -> None:
    feed = a_feed(ends, tmp_path)
    assert feed.next_batch(oldest_fresh=0) is None
    for trace in served:
        feed.add(trace)
    batches = []
    while batch := feed.next_batch(oldest_fresh=0):
        batches.append(batch)
    assert all(batch.traces.token_ids_BT.numel() <= 128 for batch in batches)
    assert sum(int(batch.live_B.sum()) for batch in batches) == len(served), "each is live once"
    assert any(batch.live_B.any() and not batch.live_B.all() for batch in batches)
    assert feed.positions_out == pytest.approx(MAX_PASSES * feed.positions_in, abs=128)
    assert (feed.num_stale, len(feed.reservoir)) == (0, len(served))


def test_a_uniform_choice_looks_at_no_rejections(ends: TargetHead, served: list[Trace], tmp_path: Path) -> None:
    worth = {trace.request_id: informativeness(trace) for trace in served}
    order = []
    for seed, choice in ((0, "informative"), (0, "uniform"), (1, "uniform")):
        feed = Feed(
            ends,
            Reservoir(tmp_path / f"{choice}-{seed}", limit_bytes=1 << 24, seed=0),
            batch_positions=40,
            replay_share=0.0,
            live_bytes=1 << 24,
            choice=choice,
            seed=seed,
        )
        for trace in served:
            feed.add(replace(trace, domain=trace.request_id))
        taken: list[str] = []
        while len(taken) < len(served):
            batch = feed.next_batch(oldest_fresh=0)
            assert batch is not None
            taken += batch.traces.domains
        order.append(taken)
    assert len({tuple(taken) for taken in order}) == 3
    assert all(sorted(taken) == sorted(worth) for taken in order)
    by_worth = [[worth[name] for name in taken] for taken in order]
    assert sum(by_worth[0][:8]) > sum(by_worth[1][:8])


def test_the_most_informative_come_first_and_the_oldest_make_room(
    ends: TargetHead, served: list[Trace], tmp_path: Path
) -> None:
    feed = a_feed(ends, tmp_path, replay_share=0.0, batch_positions=60)
    for trace in served:
        feed.add(trace)
    batch = feed.next_batch(oldest_fresh=9)
    assert batch is not None
    best = max(map(informativeness, served))
    ids_T = batch.traces.token_ids_BT[0]
    first = next(t for t in served if torch.equal(t.token_ids_T.long(), ids_T[: len(t.token_ids_T)]))
    assert informativeness(first) == best
    assert feed.num_stale == len(batch.live_B)
    small = a_feed(ends, tmp_path / "..", live_bytes=served[-1].num_bytes + 10)
    small.reservoir.add(served[0])
    for trace in served:
        small.add(trace)
    assert len(small.reservoir) == len(served), "all but the newest were let go to the reservoir"


# -- gate ----------------------------------------------------------------------------------------------------------


def held(trace: Trace, ends: TargetHead) -> HeldOutRequest:
    read = partial(for_gate, ends=ends)
    return HeldOutRequest(request_id=trace.request_id, domain=trace.domain, read=read, traces=[trace])


def test_the_score_of_a_greedy_request_is_what_the_engine_accepts(
    target: Target, ends: TargetHead, good_draft: Draft
) -> None:
    """Two neighbouring roots at a time, the engine's own acceptance from each, cut off where the piece ends."""
    requests = [*some_requests(4), *some_requests(2, seed=8)]  # known ones and new ones
    module = online_module(target, good_draft)
    same = kinds = 0
    for trace in serve(target, good_draft, requests):
        tokens = trace.token_ids_T.tolist()
        accepted = {}
        for root in range(2, len(tokens) - 1):
            again = replace(some_requests(1)[0], request_id="x", prompt_ids=tuple(tokens[: root + 1]))
            served = serve(target, good_draft, [replace(again, params=replace(again.params, max_tokens=5))])[0]
            accepted[root] = int(served.num_accepted_R[0])
        kinds += len(set(accepted.values()))
        for root in range(2, len(tokens) - 3):
            cut = root + 4
            piece = replace(
                trace,
                answer_start=root + 1,
                token_ids_T=trace.token_ids_T[:cut],
                aux_T3H=trace.aux_T3H[:cut],
                last_TH=trace.last_TH[:cut],
                lse_T=None,
            )
            ((_, score),) = score_requests(module, [held(piece, ends)], batch_positions=64)
            wanted = [min(accepted[r], cut - 1 - r) for r in (root, root + 1, root + 2)]
            same += score == pytest.approx(1 + sum(wanted) / 3)
    # A trace is bf16: two nearly equal first choices may change places.
    assert same >= 0.95 * 6 * 21, same
    assert kinds > 12, "or hardly anything is accepted here"


def test_the_score_of_a_free_request_is_the_overlap_of_the_two_distributions(
    target: Target, ends: TargetHead, good_draft: Draft
) -> None:
    traces = serve(target, good_draft, some_requests(2, seed=9, temperature=0.6))
    module = online_module(target, good_draft, num_steps=1)
    for trace in traces:
        ((_, score),) = score_requests(module, [held(trace, ends)], batch_positions=64)
        ids_BT = trace.token_ids_T.long()[None]
        with torch.no_grad():
            aux, last = target.read(ids_BT)
            embeds = torch.nn.functional.embedding(ids_BT, module.embedding_VH)
            places = torch.arange(ids_BT.shape[1] - 1)[None]
            chain = good_draft.project(embeds[:, 1:], good_draft.fuse(aux)[:, :-1], places)
            query, key, value = (x[0] for x in chain)
            key, value = (x.repeat_interleave(query.shape[0] // x.shape[0], dim=0) for x in (key, value))
            attended = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
            hidden = good_draft.finish(attended.transpose(0, 1).flatten(1)[None], good_draft.fuse(aux)[:, :-1])
            q_TD = (good_draft.logits(hidden)[0] / 0.6).softmax(-1)
            p_TV = (target.logits(last)[0] / 0.6).softmax(-1)
        alpha_T = torch.minimum(p_TV[1:, good_draft.draft_token_ids], q_TD).sum(-1)
        assert score == pytest.approx(1 + float(alpha_T[1:-1].mean()), abs=0.02)


def test_a_segmented_request_counts_once(ends: TargetHead, target: Target, served: list[Trace]) -> None:
    held_out = HeldOut(num_newest=3, seed=0, read=partial(for_gate, ends=ends))
    for trace in [*served[:5], served[4]]:
        held_out.add(trace)
    assert [len(request.lessons) for request in held_out.newest] == [1, 1, 2]
    assert len(list(held_out)) == 5, "the oldest two are remembered by domain"


def test_older_requests_are_kept_by_domain_within_bounds(ends: TargetHead, served: list[Trace]) -> None:
    held_out = HeldOut(num_newest=2, seed=0, read=partial(for_gate, ends=ends))
    for i in range(300):
        held_out.add(replace(served[0], request_id=str(i), domain="rare" if i < 3 else f"busy{i % 3}"))
    assert len(held_out.old["rare"]) == 3
    assert sum(map(len, held_out.old.values())) <= 64
    assert {len(held_out.old[f"busy{i}"]) for i in range(3)} == {16}


def test_a_share_of_requests_is_held_out_with_all_its_segments() -> None:
    taken = [HeldOut.takes(f"cmpl-{i}") for i in range(3000)]
    assert 0.12 < sum(taken) / 3000 < 0.22
    assert taken == [HeldOut.takes(f"cmpl-{i}") for i in range(3000)]


@pytest.mark.parametrize(
    ("changes", "passed"),
    [
        ([0.1, 0.2, 0.0, 0.3, 0.1, 0.1], True),
        ([-0.1, -0.2, 0.0, -0.3, -0.1, -0.1], False),
        ([0.0] * 6, False),  # the same draft again
    ],
)
def test_the_gate_lets_only_a_better_draft_pass(changes: list[float], passed: bool) -> None:
    pairs = [(2.0, 2.0 + change) for change in changes]
    assert judge(pairs, {"chat": pairs}).passed is passed


def test_the_gate_refuses_what_one_domain_pays_for() -> None:
    better, worse = [(2.0, 2.4 + i / 50) for i in range(12)], [(2.0, 1.8 + i / 50) for i in range(8)]
    noisy = [(2.0, 1.0), (2.0, 2.9), (2.0, 1.5), (2.0, 2.4)]
    assert judge(better, {"new": better, "noisy": noisy}).passed
    verdict = judge(better, {"new": better, "old": worse})
    assert not verdict.passed
    assert "'old'" in verdict.reason


def test_drafts_as_good_are_rarely_refused_however_many_domains_and_few_requests_there_are() -> None:
    chance = torch.Generator().manual_seed(0)
    better = [(2.0, 2.4 + i / 50) for i in range(12)]

    def refused(shift: float, requests: int) -> float:
        changes = shift + torch.randn(1000, 8, requests, generator=chance)
        verdicts = [
            judge(better, {str(i): [(2.0, 2.0 + c) for c in row] for i, row in enumerate(table)})
            for table in changes.tolist()
        ]
        return sum(not verdict.passed for verdict in verdicts) / 1000

    assert 0.02 < refused(0.0, requests=3) < 0.08
    assert 0.02 < refused(0.0, requests=12) < 0.08
    assert refused(-1.0, requests=12) > 0.95


def test_drafts_as_good_pass_by_luck_once_in_four_and_better_ones_nearly_always() -> None:
    chance = torch.Generator().manual_seed(0)

    def passed(shift: float, requests: int) -> float:
        changes = shift + torch.randn(2000, requests, generator=chance)
        return sum(judge([(2.0, 2.0 + c) for c in row], {}).passed for row in changes.tolist()) / 2000

    assert 0.22 < passed(0.0, requests=6) < 0.28
    assert 0.22 < passed(0.0, requests=32) < 0.28
    assert passed(0.5, requests=32) > 0.95


def test_a_worse_draft_scores_worse(target: Target, ends: TargetHead, good_draft: Draft) -> None:
    scored = [held(trace, ends) for trace in serve(target, good_draft, some_requests(6))]
    good, bad = (
        dict(score_requests(online_module(target, draft), scored, batch_positions=64))
        for draft in (good_draft, random_draft(target, seed=3))
    )
    pairs = [(good[request], bad[request]) for request in scored]
    verdict = judge(pairs, {"chat": pairs})
    assert not verdict.passed
    assert verdict.champion > verdict.challenger + 0.2
