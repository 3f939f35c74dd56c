"""The adaptive draft vocabulary: which tokens enter and leave; rows, optimiser moments, states, traces and serving."""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.learner_harness import LearnerHarness
from support.live_traces import asked_again, make_controller, online_module, serve, some_requests
from support.replay_harness import make_replay
from support.tiny_models import VOCAB, draft_config, make_engine, random_draft, request, run, save_model
from support.trace_examples import keep_in

from aurora_lit.drafts.checkpoint import load_draft, save_draft
from aurora_lit.learn.data.labelled_trace import label_trace
from aurora_lit.learn.data.online_batch import collate_online
from aurora_lit.learn.data.target_head import TargetHead
from aurora_lit.learn.data.training_state import from_bytes, to_bytes
from aurora_lit.learn.data.vocabulary import FEWEST_USES, USES_A_TRACE, VocabularyUse, change_vocabulary
from aurora_lit.learn.online.gate import HeldOut, score_requests
from aurora_lit.learn.online.learner import Learner
from aurora_lit.models.target import Target
from aurora_lit.modules.draft.eagle3 import Eagle3Draft
from aurora_lit.modules.losses.batch import OnlineBatch
from aurora_lit.modules.losses.policy import accept_probabilities, draft_index, usable_rounds
from aurora_lit.serve.engine.trace_recorder import TraceRecorder
from aurora_lit.traces.record import Trace

SMALL = 32
"""Tokens of a draft vocabulary that lacks half of what traffic uses."""


@pytest.fixture(scope="module")
def traffic(target: Target) -> list[Trace]:
    asked = [replace(r, request_id=f"{n}-{r.request_id}") for n in range(6) for r in some_requests(10)]
    return serve(target, random_draft(target), asked, explore_share=0.5, explore_temperature=1.0, explore_seed=1)


def small_draft(target: Target) -> Eagle3Draft:
    return random_draft(target, draft_vocab_size=SMALL)


def answered(tokens: Sequence[int], *, domain: str = "", number: int = 0) -> Trace:
    """A trace whose answer is these tokens."""
    ids = torch.tensor([1, *tokens], dtype=torch.int32)
    none = torch.zeros(len(ids), 64, dtype=torch.bfloat16)
    return Trace(
        request_id=f"r{number}",
        domain=domain,
        verify="greedy",
        answer_start=1,
        token_ids_T=ids,
        aux_T3H=torch.cat([none] * 3, -1),
        last_TH=none,
    )


def after(target_head: TargetHead, *answers: Sequence[int], times: int = 1, domain: str = "") -> VocabularyUse:
    use = VocabularyUse(target_head)
    for _ in range(times):
        for answer in answers:
            use.add(answered(answer, domain=domain))
    return use


def entered(use: VocabularyUse, ids: Sequence[int]) -> tuple[set[int], set[int]]:
    """Which tokens come and which go."""
    found = use.better_ids(torch.tensor(ids))
    if found is None:
        return set(), set()
    assert found.tolist() == sorted(set(found.tolist()))
    assert len(found) == len(ids)
    return set(found.tolist()) - set(ids), set(ids) - set(found.tolist())


# -- who enters ----------------------------------------------------------------------------------------------------


def test_a_token_that_several_answers_use_enters_for_an_unused_one_of_high_id(target_head: TargetHead) -> None:
    ids = list(range(2, 34))
    enough = -(-FEWEST_USES // USES_A_TRACE)
    assert entered(after(target_head, [40] * 30, times=enough - 1), ids) == (set(), set()), (
        "however often in one answer"
    )
    come, gone = entered(after(target_head, [40] * 30, times=enough), ids)
    assert come >= {40}
    assert gone <= set(range(30, 34))
    # Only so many at once, the most used first.
    come, _ = entered(after(target_head, [50] * 30, [50, 51], [50, 51], [50, 51, 52, 53], times=enough), ids)
    assert len(come) == SMALL // 16
    assert 50 in come


def test_tokens_of_similar_use_do_not_alternate(target_head: TargetHead) -> None:
    ids = list(range(0, 32))
    use = after(target_head, [*range(0, 32), *range(40, 44)], times=20)
    assert entered(use, ids) == (set(), set()), "all are used alike"
    for _ in range(25):
        use.add(answered(range(40, 44)))
    now = ids
    turns = 0
    while (found := use.better_ids(torch.tensor(now))) is not None:
        now, turns = found.tolist(), turns + 1
        assert turns < 9, "it does not come to rest"
    assert set(range(40, 44)) <= set(now)


def test_the_tokens_that_end_answers_are_counted(target_head: TargetHead) -> None:
    trace = answered([7, 8, 9])
    last_H = target_head.head_VH[60].to(torch.bfloat16)
    trace.last_TH[-1] = 50 * last_H
    following = int(target_head.evaluate(trace.last_TH[-1:], temperature=0.0).top_N)
    use = VocabularyUse(target_head)
    use.add(trace)
    assert float(use.uses_V[following]) == 1
    assert float(use.uses_V.sum()) == 4
    use.add(replace(trace, answer_start=4))
    assert float(use.uses_V.sum()) == 4, "a prompt without an answer"


def test_a_domain_without_traffic_keeps_its_tokens(target_head: TargetHead, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aurora_lit.learn.data.vocabulary._MEMORY_USES", 200)
    use = after(target_head, [20, 21, 22], times=20, domain="code")
    for n in range(300):
        use.add(answered([40 + n % 20, 2, 3], domain="chat"))
    ids = list(range(2, 34))
    assert use.uses_V[20] == 20, "traffic of other domains does not discount it"
    assert use.uses_V[2] < 150, "its own does"
    _, gone = entered(use, ids)
    assert gone
    assert not gone & {20, 21, 22}
    again = VocabularyUse(target_head)
    again.load_state_dict(from_bytes(to_bytes(use.state_dict())))
    assert torch.equal(again.uses_V, use.uses_V)
    assert again.coverage(torch.tensor(ids)) == use.coverage(torch.tensor(ids)) < 1
    assert VocabularyUse(target_head).coverage(torch.tensor(ids)) == 1


# -- rows ----------------------------------------------------------------------------------------------------------


def swapped_ids(draft: Eagle3Draft) -> torch.Tensor:
    """Three new ids, 0, 5 and 60, in place of the second id, one in the middle and the last."""
    ids = draft.draft_token_ids
    kept = ids[[i for i in range(len(ids)) if i not in (1, 17, len(ids) - 1)]]
    return torch.cat([torch.tensor([0, 5, 60]), kept]).sort().values


def test_rows_move_with_their_tokens_and_new_ones_are_mapped_from_the_targets(
    target: Target, target_head: TargetHead, tmp_path: Path
) -> None:
    # With more rows than columns and an exact linear map, the new rows are predicted exactly.
    generator = torch.Generator().manual_seed(1)
    wide_VH = torch.randn(VOCAB, 16, generator=generator)
    map_HH = torch.randn(16, target.hidden_size, generator=generator)
    draft = small_draft(target)
    with torch.no_grad():
        draft.lm_head.weight.copy_(wide_VH[draft.draft_token_ids] @ map_HH)
    ids = swapped_ids(draft)
    moments = [torch.arange(SMALL)[:, None].expand(SMALL, target.hidden_size).float().clone() for _ in range(2)]
    before = copy.deepcopy(draft)
    assert change_vocabulary(draft, ids, wide_VH, per_row=moments) == 3
    had = before.draft_token_ids.tolist()
    for place, token in enumerate(ids.tolist()):
        if token in had:
            assert torch.equal(draft.lm_head.weight[place], before.lm_head.weight[had.index(token)])
            assert [float(m[place, 0]) for m in moments] == [had.index(token)] * 2
        else:
            torch.testing.assert_close(draft.lm_head.weight[place], wide_VH[token] @ map_HH, rtol=0.05, atol=0.1)
            assert not any(m[place].any() for m in moments)
    assert torch.equal(draft.draft_token_ids, ids)
    save_draft(draft, tmp_path / "draft", dtype=torch.float32)
    stored = load_draft(tmp_path / "draft", target_head).state_dict()
    assert all(torch.equal(tensor, stored[name]) for name, tensor in draft.state_dict().items())


def batch_of(traffic: Sequence[Trace], target_head: TargetHead) -> OnlineBatch:
    return collate_online([label_trace(trace, target_head) for trace in traffic[:8]], [], oldest_fresh=0)


def a_learner(target: Target, target_head: TargetHead, folder: Path, **changes: Any) -> Learner:
    fields = {"version": "start", "vocabulary_use": VocabularyUse(target_head), **changes}
    return Learner(
        online_module(target, small_draft(target)),
        make_controller(),
        folder / "state",
        target_head=target_head,
        **fields,
    )


def test_a_learner_adapts_with_its_optimisers_and_the_frozen_head(
    target: Target, target_head: TargetHead, traffic: list[Trace], tmp_path: Path
) -> None:
    learner = a_learner(target, target_head, tmp_path)
    assert learner.adapt_vocabulary() == 0, "nothing is known of traffic"
    batch = batch_of(traffic, target_head)
    learner.update(batch)
    assert learner.vocabulary_use is not None
    for trace in traffic:
        learner.vocabulary_use.add(trace)
    had = learner.draft.draft_token_ids
    weight = learner.draft.lm_head.weight
    (moment,) = (state["exp_avg"] for o in learner.optimizers if (state := o.optimizer.state.get(weight)))
    rows = dict(zip(had.tolist(), moment.clone(), strict=True))
    assert learner.adapt_vocabulary() == SMALL // 16
    ids = learner.draft.draft_token_ids
    new = set(ids.tolist()) - set(had.tolist())
    assert len(new) == SMALL // 16
    for place, token in enumerate(ids.tolist()):
        assert torch.equal(moment[place], rows[token] if token not in new else torch.zeros_like(moment[0]))
    assert torch.equal(learner.module.module.head_VdH, target_head.head_VH[ids])
    with learner.averaged() as module:
        assert torch.equal(module.draft.draft_token_ids, ids), "what is tried has the same vocabulary"
    before = weight.detach().clone()
    assert learner.update(batch) is not None
    moved_D = (weight.detach() - before).abs().sum(-1)
    assert all(float(moved_D[ids.tolist().index(token)]) > 0 for token in new)
    fixed = a_learner(target, target_head, tmp_path, vocabulary_use=None)
    assert fixed.adapt_vocabulary() == 0


def test_the_loss_after_a_change_is_that_of_a_learner_made_with_that_draft(
    target: Target, target_head: TargetHead, traffic: list[Trace], tmp_path: Path
) -> None:
    learner = a_learner(target, target_head, tmp_path)
    assert learner.vocabulary_use is not None
    for trace in traffic:
        learner.vocabulary_use.add(trace)
    assert learner.adapt_vocabulary()
    made = Learner(
        online_module(target, copy.deepcopy(learner.draft)),
        make_controller(),
        tmp_path / "x",
        target_head=target_head,
        version="start",
    )
    batch = batch_of(traffic, target_head)
    one, other = learner.update(batch), made.update(batch)
    assert one is not None
    assert other is not None
    torch.testing.assert_close(one.loss, other.loss)


# -- what was proposed before --------------------------------------------------------------------------------------


def test_rounds_of_an_older_vocabulary_are_used_unless_a_proposal_left_it(
    target: Target, target_head: TargetHead, traffic: list[Trace]
) -> None:
    draft = random_draft(target)
    batch = batch_of(traffic, target_head)
    usable = usable_rounds(batch.rounds, draft)
    assert len(usable.row_Q) > 20
    proposed = set(usable.proposal_QK[usable.proposal_QK >= 0].tolist())
    ids = draft.draft_token_ids
    gone = sorted(proposed)[len(proposed) // 2]
    changed = copy.deepcopy(draft)
    new_ids = torch.cat([torch.tensor([0]), ids[ids != gone]])
    change_vocabulary(changed, new_ids, target_head.head_VH, per_row=[])
    now = usable_rounds(batch.rounds, changed)
    without_Q = ~(usable.proposal_QK == gone).any(-1)
    assert 0 < len(now.row_Q) == int(without_Q.sum()) < len(usable.row_Q)
    assert torch.equal(now.root_Q, usable.root_Q[without_Q])
    assert torch.equal(now.behaviour_logprob_QK.nan_to_num(1), usable.behaviour_logprob_QK[without_Q].nan_to_num(1))
    before = accept_probabilities(usable, draft, target_head.head_VH[ids], target_head.logit_transform)
    again = accept_probabilities(now, changed, target_head.head_VH[new_ids], target_head.logit_transform)
    torch.testing.assert_close(again, before[without_Q])
    inside = now.proposal_QK >= 0
    assert torch.equal(new_ids[draft_index(now.proposal_QK, changed)][inside], now.proposal_QK[inside])


# -- states --------------------------------------------------------------------------------------------------------


def test_a_heads_bias_follows_the_vocabulary(tmp_path: Path) -> None:
    phi = Target.load(save_model("phi", tmp_path, num_hidden_layers=4), precision="fp32")
    target_head, draft = TargetHead(phi), small_draft(phi)
    module = online_module(phi, draft)
    change_vocabulary(draft, swapped_ids(draft), target_head.head_VH, per_row=[])
    target_head.install_head(module)
    assert target_head.logit_transform.bias_V is not None
    assert module.logit_transform.bias_V is not None
    assert torch.equal(module.logit_transform.bias_V, target_head.logit_transform.bias_V[draft.draft_token_ids])


@pytest.mark.parametrize("count", [3, 32, 70])
def test_uses_are_counted_in_answers_and_of_the_tokens_that_end_them(
    target_head: TargetHead, traffic: list[Trace], count: int
) -> None:
    use, expected = VocabularyUse(target_head), torch.zeros(VOCAB)
    for trace in (traffic * 40)[:count]:
        use.add(trace)
        for token, times in Counter(trace.token_ids_T[trace.answer_start :].tolist()).items():
            expected[token] += min(times, USES_A_TRACE)
        expected[int(target_head.evaluate(trace.last_TH[-1:], temperature=0.0).top_N)] += 1
    assert torch.equal(use.uses_V, expected)
    again = VocabularyUse(target_head)
    again.load_state_dict(use.state_dict())
    assert torch.equal(again.uses_V, expected)


def test_a_state_with_a_changed_vocabulary_is_resumed_and_one_of_another_deployment_is_not(
    target: Target, target_head: TargetHead, traffic: list[Trace], tmp_path: Path
) -> None:
    learner = a_learner(target, target_head, tmp_path)
    batch = batch_of(traffic, target_head)
    learner.update(batch)
    assert learner.vocabulary_use is not None
    for trace in traffic:
        learner.vocabulary_use.add(trace)
    assert learner.adapt_vocabulary()
    learner.save()
    again = a_learner(target, target_head, tmp_path)
    assert again.resume()
    assert torch.equal(again.draft.draft_token_ids, learner.draft.draft_token_ids)
    assert torch.equal(again.module.module.head_VdH, learner.module.module.head_VdH)
    for each in (learner, again):
        assert each.adapt_vocabulary() > 0, "uses are counted further"
        each.update(batch)
    for name, tensor in learner.draft.state_dict().items():
        torch.testing.assert_close(tensor, again.draft.state_dict()[name], msg=name)
    # Published versions may have come to another vocabulary: what counts is what the deployment began with.
    published = online_module(target, copy.deepcopy(learner.draft))
    later = Learner(
        published,
        make_controller(),
        tmp_path / "state",
        target_head=target_head,
        version="draft-000001",
        starting_ids=small_draft(target).draft_token_ids,
    )
    assert later.resume(), "with adapting off, too"
    other = Learner(published, make_controller(), tmp_path / "state", target_head=target_head, version="start")
    assert not other.resume()


# -- all together --------------------------------------------------------------------------------------------------


def test_the_loop_publishes_drafts_that_propose_the_tokens_of_traffic(
    target: Target, target_head: TargetHead, traffic: list[Trace], tmp_path: Path
) -> None:
    found = {}
    for adapts in (True, False):
        harness = LearnerHarness(
            target, tmp_path / str(adapts), draft=small_draft(target), adapt_vocabulary=adapts, publish_every_steps=5
        )
        harness.ring.records.extend(asked_again(traffic, 8))
        enough = 45 if adapts else 10
        harness.tick_until(lambda harness=harness, enough=enough: harness.learner.steps >= enough)  # type: ignore[misc]
        page = harness.page.read()
        assert page.published >= 1
        served = harness.served_draft(harness.store.current())
        found[adapts] = served
        assert len(served.draft_token_ids) == SMALL
        assert torch.equal(harness.loop._champion.head_VdH, target_head.head_VH[served.draft_token_ids])
        assert bool(page.tokens_entered) == adapts
        assert page.tokens_entered == 0 or 0.5 < page.vocabulary_coverage < 1
        # The champion that the gate scores is the draft that serves, vocabulary and all.
        requests = [r for r in harness.loop.held_out if r.champion_score is not None]
        with harness.learner.fabric.autocast():
            scores = list(score_requests(online_module(target, served), requests, batch_positions=512))
        assert [score for _, score in scores] == [r.champion_score for r in requests]
    had = small_draft(target).t2d
    assert torch.equal(found[False].t2d, had)
    # Tokens that the first vocabulary lacks are proposed now, and accepted; they are half of the answers' tokens.
    for draft, fewest in ((found[True], 15), (found[False], 0)):
        traces = serve(target, draft, some_requests(10))
        accepted = torch.cat(
            [
                row[:count].long()
                for trace in traces
                for row, count in zip(trace.proposal_RK, trace.num_accepted_R.tolist(), strict=True)
            ]
        )
        news = int((~had[accepted]).sum())
        assert news >= fewest, (news, len(accepted))
        assert fewest or not news

    # After a rollback the learner has the vocabulary of the version it continues from.
    learner = harness.learner
    learner.restart_from(found[True], version="draft-000001")
    ids = found[True].draft_token_ids
    assert torch.equal(learner.draft.draft_token_ids, ids)
    assert torch.equal(learner.module.module.head_VdH, target_head.head_VH[ids])


def test_a_replay_serves_and_scores_with_the_published_vocabulary(
    target: Target, target_head: TargetHead, traffic: list[Trace], tmp_path: Path
) -> None:
    replay = make_replay(target, small_draft(target), tmp_path, publish_every_steps=5)
    for start in range(0, len(traffic), 20):
        replay.process_block(traffic[start : start + 20])
    assert replay.version != "start"
    ids = replay.served.draft_token_ids
    assert not torch.equal(ids, small_draft(target).draft_token_ids)
    for module in (replay._champion, replay._scorers[1].module):
        assert torch.equal(module.head_VdH, target_head.head_VH[ids])


def test_serving_swaps_to_another_vocabulary_between_rounds_and_output_stays_exact(
    target: Target, target_head: TargetHead
) -> None:
    draft = small_draft(target)
    changed = copy.deepcopy(draft)
    change_vocabulary(changed, swapped_ids(draft), target_head.head_VH, per_row=[])
    prompts = [(3, 14, 15), (9, 26, 5, 35)]
    plain = run(make_engine(target), [request(str(i), p, max_tokens=40) for i, p in enumerate(prompts)])
    traces: list[Trace] = []
    recorder = TraceRecorder(keep_in(traces), hidden_size=target.hidden_size)
    engine = make_engine(
        target,
        copy.deepcopy(draft),
        max_draft_tokens=3,
        observer=recorder,
        explore_share=1.0,
        explore_temperature=4.0,
        explore_seed=1,
    )
    for i, prompt in enumerate(prompts):
        engine.submit(request(str(i), prompt, max_tokens=40))
    answers: dict[str, list[int]] = {"0": [], "1": []}
    rounds = 0
    while engine.has_work:
        if rounds == 8:
            engine.swap_draft(copy.deepcopy(changed), version="draft-000001")
        for output in engine.round():
            answers[output.request_id] += output.token_ids
        rounds += 1
    assert {name: tuple(ids) for name, ids in answers.items()} == {n: tuple(o.token_ids) for n, o in plain.items()}
    seen: dict[int, set[int]] = {0: set(), 1: set()}
    for trace in traces:
        for version, row in zip(trace.round_version_R.tolist(), trace.proposal_RK.tolist(), strict=True):
            if version >= 0:
                seen[version] |= {token for token in row if token >= 0}
    assert seen[0] <= set(draft.draft_token_ids.tolist())
    assert seen[1] <= set(changed.draft_token_ids.tolist())
    assert seen[1] & {0, 5, 60}, "it proposes what is new"
    # Each proposal's logged probability is that under the vocabulary it was drawn from: a learner with that draft
    # finds a ratio of about 1, whichever of the two vocabularies it was.
    batch = collate_online([label_trace(trace, target_head) for trace in traces], [], oldest_fresh=1)
    module = online_module(target, changed)
    report = module.training_step(batch)
    assert report.policy.num_rounds > 5
    assert float(report.policy.mean_ratio) == pytest.approx(1.0, abs=0.1)


def test_held_out_requests_do_not_count_as_use(target: Target, traffic: list[Trace], tmp_path: Path) -> None:
    harness = LearnerHarness(target, tmp_path)
    held = [trace for trace in traffic if HeldOut.is_held_out(trace.request_id)]
    assert held
    harness.ring.records.extend(held)
    harness.loop.tick()
    use = harness.learner.vocabulary_use
    assert use is not None
    assert float(use.uses_V.sum()) == 0
    assert draft_config(target).draft_vocab_size == VOCAB - 3
    assert json.dumps(harness.page.read().tokens_entered) == "0"
