"""Trials: scores equal what an engine accepts, requests wait by turns of clients, and only a better draft passes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.live_traces import asked_again, online_module, serve, some_requests
from support.tiny_models import random_draft

from aurora_lit.learn.data.collate import collate
from aurora_lit.learn.online import scores as scores_module
from aurora_lit.learn.online import trial as trial_module
from aurora_lit.learn.online.scores import HeldOutRequest, score_requests
from aurora_lit.learn.online.trial import Scores, Trial, decide
from aurora_lit.models.interface import Target
from aurora_lit.modules.draft.eagle3 import Eagle3Draft
from aurora_lit.traces.record import Trace


def held(trace: Trace) -> HeldOutRequest:
    return HeldOutRequest(request_id=trace.request_id, domain=trace.domain, traces=[trace])


def test_the_score_of_a_greedy_request_is_what_the_engine_accepts(target: Target, taught_draft: Eagle3Draft) -> None:
    """Two neighbouring roots at a time, the engine's own acceptance from each, cut off where the piece ends."""
    requests = [*some_requests(4), *some_requests(2, seed=8)]  # known ones and new ones
    module = online_module(target, taught_draft)
    same = kinds = 0
    for trace in serve(target, taught_draft, requests):
        tokens = trace.token_ids_T.tolist()
        accepted = {}
        for root in range(2, len(tokens) - 1):
            again = replace(some_requests(1)[0], request_id="x", prompt_ids=tuple(tokens[: root + 1]))
            served = serve(target, taught_draft, [replace(again, params=replace(again.params, max_tokens=5))])[0]
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
            ((_, score),) = score_requests(module, [held(piece)], batch_positions=64)
            expected = [min(accepted[r], cut - 1 - r) for r in (root, root + 1, root + 2)]
            same += score == pytest.approx(1 + sum(expected) / 3)
    # A trace is bf16: two nearly equal first choices may change places.
    assert same >= 0.95 * 6 * 21, same
    assert kinds > 12, "or hardly anything is accepted here"


def test_the_score_of_a_sampled_request_is_the_overlap_of_the_two_distributions_within_the_draft_vocabulary(
    target: Target, taught_draft: Eagle3Draft
) -> None:
    traces = serve(target, taught_draft, some_requests(2, seed=9, temperature=0.6))
    module, num_unknown = online_module(target, taught_draft, num_steps=1), 0
    for trace in traces:
        ((_, score),) = score_requests(module, [held(trace)], batch_positions=64)
        ids_BT = trace.token_ids_T.long()[None]
        with torch.no_grad():
            aux, last = target.in_torch.forward_uncached(ids_BT)
            embeds = target.embedding(ids_BT)
            places = torch.arange(ids_BT.shape[1] - 1)[None]
            chain = taught_draft.project_qkv(embeds[:, 1:], taught_draft.combine_hidden_states(aux)[:, :-1], places)
            query, key, value = (x[0] for x in chain)
            key, value = (x.repeat_interleave(query.shape[0] // x.shape[0], dim=0) for x in (key, value))
            attended = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
            hidden = taught_draft.complete_layer(
                attended.transpose(0, 1).flatten(1)[None], taught_draft.combine_hidden_states(aux)[:, :-1]
            )
            q_TD = (taught_draft.compute_logits(hidden)[0] / 0.6).softmax(-1)
            p_TD = (target.logits(last)[0][:, taught_draft.draft_token_ids] / 0.6).softmax(-1)
        tokens_T = trace.token_ids_T.long()[2:]
        is_known_T = torch.isin(tokens_T, taught_draft.draft_token_ids)
        num_unknown += int((~is_known_T[1:]).sum())
        alpha_T = torch.minimum(p_TD[1:-1], q_TD[:-1]).sum(-1) * is_known_T
        assert score == pytest.approx(1 + float(alpha_T[1:].mean()), abs=0.02)
    assert num_unknown, "some tokens are not in the draft vocabulary"
    unknown_T = traces[0].token_ids_T.clone()
    unknown_T[traces[0].answer_start :] = 0
    assert 0 not in taught_draft.draft_token_ids
    assert (
        list(score_requests(module, [held(replace(traces[0], token_ids_T=unknown_T))], batch_positions=64))[0][1] == 1
    )


def test_a_score_does_not_depend_on_the_requests_beside_it(target: Target, taught_draft: Eagle3Draft) -> None:
    """Greedy ones, and sampled ones at two temperatures, which share products."""
    kinds = ({}, {"temperature": 0.6}, {"temperature": 1.0})
    traces = [
        trace for seed, kind in enumerate(kinds) for trace in serve(target, None, some_requests(3, seed=seed, **kind))
    ]
    module = online_module(target, taught_draft)
    requests = [held(replace(trace, request_id=str(n))) for n, trace in enumerate(traces)]
    together = {r.request_id: score for r, score in score_requests(module, requests, batch_positions=1024)}
    for request in requests:
        ((_, alone),) = score_requests(module, [request], batch_positions=1024)
        assert together[request.request_id] == pytest.approx(alone, abs=1e-4)
    assert len({round(score, 3) for score in together.values()}) > 4


def test_of_a_domain_that_seems_worse_some_more_older_requests_are_scored(
    served: list[Trace], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial_module, "_KEPT_EVERY", 1)
    trial, scored = Trial(seed=0), list[str]()
    for i in range(50):
        trial.add(replace(served[0], request_id=f"{i}", domain="past" if i < 25 else "other" if i < 38 else "new"))
        trial.release(12)

    def score(
        module: object, requests: Sequence[HeldOutRequest], **_: object
    ) -> Iterator[tuple[HeldOutRequest, float]]:
        for request in requests:
            if module == "challenger":
                scored.append(request.domain)
                yield request, {"new": 2.3, "other": 2.1, "past": 1.8}[request.domain] + int(request.request_id) / 1000
            else:
                yield request, 2.0

    monkeypatch.setattr(trial_module, "score_requests", score)
    drafts: Any = {"champion": "champion", "challenger": "challenger"}
    decision = trial.hold(**drafts)
    assert decision is not None
    assert decision.refused
    assert "'past'" in decision.reason
    assert {domain: scored.count(domain) for domain in trial.old} == {"past": 16, "other": 4}


def test_a_segmented_request_counts_once(served: list[Trace]) -> None:
    trial = Trial(seed=0)
    for trace in [*served[:3], served[2]]:
        trial.add(trace)
    assert [len(request.traces) for request in trial.newest] == [1, 1, 2]


def test_a_later_segment_of_an_older_request_is_no_request_of_its_own(served: list[Trace]) -> None:
    trial, name = Trial(seed=0), next(str(n) for n in range(1000) if Trial.is_kept(str(n)))
    trial.add(replace(served[0], request_id=name))
    trial.newest[0].was_tried, trial.newest[0].champion_score = True, 2.0
    trial.release(0)
    trial.add(replace(served[0], request_id=name, first_position=64))
    (request,) = trial
    assert (len(request.traces), request.was_tried, request.champion_score) == (2, True, None)
    assert not trial.untried


def test_requests_of_a_domain_that_went_into_another_are_of_that(served: list[Trace]) -> None:
    trial, names = Trial(seed=0), [str(n) for n in range(400) if Trial.is_kept(str(n))]
    for number, name in enumerate(names[:9]):
        trial.add(replace(served[0], request_id=name, domain="abc"[number % 3]))
    trial.release(3)
    trial.rename_domain("a", "b")
    trial.rename_domain("b", "d")
    assert {domain: len(requests) for domain, requests in trial.old.items()} == {"c": 2, "d": 4}
    assert [request.domain for request in trial.newest] == ["d", "d", "c"]
    assert {trace.domain for request in trial for trace in request.traces} == {"c", "d"}, "released as such"


def test_requests_of_merged_domains_are_kept_as_if_they_had_been_of_one(
    served: list[Trace], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the frequent one's 96, not as many as of the rare one's 12."""
    monkeypatch.setattr(trial_module, "_KEPT_EVERY", 1)
    rare = total = 0
    for seed in range(40):
        trial = Trial(seed=seed)
        for i in range(108):
            trial.add(replace(served[0], request_id=str(i), domain="rare" if i % 9 == 0 else "frequent"))
            trial.release(0)
        trial.rename_domain("rare", "frequent")
        total += len(trial.old["frequent"])
        rare += sum(int(request.request_id) % 9 == 0 for request in trial.old["frequent"])
    assert total > 10 * 40
    assert 0.07 < rare / total < 0.16, "a ninth"


def test_older_requests_are_kept_by_domain_within_bounds(served: list[Trace], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial_module, "_KEPT_EVERY", 1)
    trial = Trial(seed=0)
    for i in range(300):
        trial.add(replace(served[0], request_id=str(i), domain="rare" if i < 3 else f"busy{i % 3}"))
        assert trial.release(2) == []
    assert len(trial.old["rare"]) == 3
    assert sum(map(len, trial.old.values())) <= 64
    assert {len(trial.old[f"busy{i}"]) for i in range(3)} == {16}


def test_large_requests_wait_less_long_and_fewer_older_ones_are_kept(
    served: list[Trace], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trial, "is_kept", staticmethod(lambda name: int(name) % 2 == 0))
    size = HeldOutRequest(request_id="", domain="", traces=[served[0]]).num_bytes
    trial = Trial(seed=0, limit_bytes=2 * (10 * size))
    released = 0
    for i in range(80):
        trial.add(replace(served[0], request_id=str(i), domain="rare" if i == 0 else "busy"))
        released += len(trial.release(16))
        assert len(trial.newest) == min(i + 1, 10)
    assert released == 35
    assert {domain: len(requests) for domain, requests in trial.old.items()} == {"rare": 1, "busy": 9}
    for i in range(80, 100):
        trial.add(replace(served[0], request_id=str(i), domain="busy"))
        trial.add(replace(served[0], request_id=str(i), domain="busy", first_position=8))
        trial.release(16)
    assert len(trial.newest) == 8, "a trial needs six"


def test_older_requests_are_a_sample_of_all_times_and_sizes_also_where_memory_is_full(
    served: list[Trace], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial_module, "_KEPT_EVERY", 1)
    size = HeldOutRequest(request_id="", domain="", traces=[served[0]]).num_bytes
    kept: list[HeldOutRequest] = []
    for seed in range(40):
        trial = Trial(seed=seed, limit_bytes=2 * (16 * size))
        for i in range(400):
            for place in range(1 if i % 2 else 4):  # large ones and small ones in turn: 6.4 fit on average
                trial.add(replace(served[0], request_id=str(i), domain="d", first_position=place))
            trial.release(0)
        kept += trial.old["d"]
    assert 5 * 40 < len(kept) < 8 * 40
    assert 0.4 < sum(int(request.request_id) >= 200 for request in kept) / len(kept) < 0.6
    assert 0.35 < sum(len(request.traces) == 4 for request in kept) / len(kept) < 0.6


def test_requests_that_have_waited_are_learned_from_but_for_a_few(served: list[Trace]) -> None:
    trial = Trial(seed=0)
    released: list[str] = []
    for i in range(1000):
        for first_position in (0, 8):
            trial.add(replace(served[0], request_id=f"cmpl-{i}", domain="d", first_position=first_position))
        released += [trace.request_id for trace in trial.release(5)]
        assert [request.request_id for request in trial.newest] == [f"cmpl-{j}" for j in range(max(0, i - 4), i + 1)]
    assert released == [f"cmpl-{i}" for i in range(995) if not Trial.is_kept(f"cmpl-{i}") for _ in range(2)]
    assert 0.9 < len(released) / 2 / 995 < 0.97
    assert all(Trial.is_kept(request.request_id) for request in trial.old["d"])


@pytest.mark.parametrize(
    ("changes", "evidence", "passed", "refused"),
    [
        ([0.1, 0.2, 0.0, 0.3, 0.1, 0.1], 4.0, True, False),
        ([0.1, 0.2, 0.0, 0.3, 0.1, 0.1], 3.9, False, False),
        ([-0.1, -0.2, 0.0, -0.3, -0.1, -0.1], 9.0, False, True),  # its ancestors were better
        ([0.0] * 6, 9.0, False, False),  # a draft that accepts the same tells nothing about the learning rate
    ],
)
def test_a_draft_passes_with_enough_evidence_and_if_it_is_ahead_itself(
    changes: list[float], evidence: float, passed: bool, refused: bool
) -> None:
    pairs = [Scores(2.0, 2.0 + change) for change in changes]
    decision = decide(pairs, evidence=evidence)
    assert (decision.passed, decision.refused) == (passed, refused)


def test_the_gate_refuses_a_draft_that_is_worse_in_one_domain() -> None:
    better = [Scores(2.0, 2.4 + i / 50) for i in range(12)]
    worse = [Scores(2.0, 1.8 + i / 80, domain="old") for i in range(12)]
    noisy = [Scores(2.0, after, domain="noisy") for after in (1.0, 2.9, 1.5, 2.4)]
    assert decide(better, noisy, evidence=9.0).passed
    decision = decide(better, worse, evidence=9.0)
    assert not decision.passed
    assert decision.refused
    assert "'old'" in decision.reason


def test_equal_drafts_are_rarely_refused_for_a_domain_however_many_domains_there_are() -> None:
    chance = torch.Generator().manual_seed(0)
    better = [Scores(2.0, 2.4 + i / 50) for i in range(12)]

    def refused(shift: float, requests: int, *, domains: int = 8, step: float = 0.0) -> float:
        """step: scores are multiples of it; 0: of nothing."""
        changes = shift + torch.randn(500, domains, requests, generator=chance)
        changes = (changes / step).round() * step if step else changes
        decisions = [
            decide(
                better,
                [Scores(2.0, 2.0 + c, domain=str(i)) for i, row in enumerate(table) for c in row],
                evidence=9.0,
            )
            for table in changes.tolist()
        ]
        return sum(not decision.passed for decision in decisions) / 500

    for requests in (2, 12):
        assert refused(0.0, requests) < 0.02
        assert refused(0.0, requests, step=0.5) < 0.02, "short answers often change by as much"
    assert refused(-1.0, requests=16) > 0.95
    assert refused(-2.0, requests=2, domains=2) == 0, "two requests are too few, however alike they lose"


def test_one_short_answer_does_not_hide_what_a_domain_loses() -> None:
    """Its own score is a coarse one, those of the others are not."""
    better = [Scores(2.0, 2.4 + i / 50) for i in range(12)]
    changes = [*(-6 / 32, -7 / 32, -6 / 32, -5 / 32, -7 / 32, -6 / 32, -7 / 32) * 2, 0.0, 1.0]
    older = [each._replace(domain=str(i)) for i in range(7) for each in better]
    decision = decide(better, [*older, *(Scores(2.0, 2.0 + c, domain="chat") for c in changes)], evidence=9.0)
    assert decision.refused
    assert "'chat'" in decision.reason


def test_traces_longer_than_the_drafts_rotary_table_are_scored_as_with_a_longer_one(
    target: Target, served: list[Trace]
) -> None:
    """A draft made for a smaller engine.max_seq_len, which serves."""
    short = random_draft(target, max_position_embeddings=16)
    long = random_draft(target)
    assert len(short.cos_LD) == 16 < max(len(trace.token_ids_T) for trace in served)
    requests = [HeldOutRequest(request_id=str(n), domain="", traces=[trace]) for n, trace in enumerate(served)]
    scores = [
        [score for _, score in score_requests(online_module(target, draft), requests, batch_positions=512)]
        for draft in (short, long)
    ]
    assert scores[0] == scores[1]


def test_a_worse_draft_scores_worse(target: Target, taught_draft: Eagle3Draft) -> None:
    scored = [held(trace) for trace in serve(target, taught_draft, some_requests(6))]
    good, bad = (
        dict(score_requests(online_module(target, draft), scored, batch_positions=64))
        for draft in (taught_draft, random_draft(target, seed=3))
    )
    assert sum(good.values()) / 6 > sum(bad.values()) / 6 + 0.2


def test_older_requests_are_scored_only_if_the_challenger_passes_on_new_ones(
    target: Target, taught_draft: Eagle3Draft, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial_module, "_KEPT_EVERY", 1)
    traces = asked_again(serve(target, taught_draft, some_requests(3)), 6)  # which it was taught
    good, bad = (online_module(target, draft) for draft in (taught_draft, random_draft(target, seed=3)))
    for champion, challenger, passes, requests in ((good, bad, False, 6), (bad, good, True, 6 + 4)):
        trial = Trial(seed=0)
        for trace in traces:
            trial.add(trace)
        trial.release(6)
        assert sum(map(len, trial.old.values())) == 12
        decision = trial.hold(champion=champion, challenger=challenger, batch_positions=64)
        assert decision is not None
        assert decision.passed is passes
        assert decision.by_domain["chat"]["requests"] == requests, "the challenger is ahead on four older ones"


def test_a_long_segment_is_scored_at_some_of_its_positions(
    target: Target, taught_draft: Eagle3Draft, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = serve(target, taught_draft, some_requests(1))[0]
    module = online_module(target, taught_draft)
    num_roots = len(trace.token_ids_T) - 1 - (trace.answer_start - 1)
    by_root = []
    for root in range(num_roots):
        start = trace.answer_start - 1 + root
        accept = 0
        with torch.no_grad():
            hidden_KBTH = module.unroll(collate([trace], with_prompt=[True]))
        for step in range(3):
            place = start + step
            if place + 1 >= len(trace.token_ids_T):
                break
            choice = module.draft.compute_logits(hidden_KBTH[step, 0, place]).argmax()
            if int(module.draft.draft_token_ids[choice]) != int(trace.token_ids_T[place + 1]):
                break
            accept += 1
        by_root.append(accept)
    monkeypatch.setattr(scores_module, "_MAX_ROOTS", 8)
    ((_, score),) = score_requests(module, [held(trace)], batch_positions=64)
    stride = -(-num_roots // 8)
    chosen = by_root[::stride]
    assert 4 < len(chosen) <= 8 < num_roots
    assert score == pytest.approx(1 + sum(chosen) / len(chosen))


def test_a_trial_ends_as_soon_as_it_is_decided_and_tries_each_request_once_the_newest_first(
    target: Target, taught_draft: Eagle3Draft
) -> None:
    good, bad = (online_module(target, draft) for draft in (taught_draft, random_draft(target, seed=3)))
    traces = asked_again(serve(target, taught_draft, some_requests(3)), 9)[:26]  # which it was taught
    for champion, challenger, passes, tried in ((good, bad, False, 12), (bad, good, True, 6)):
        trial = Trial(seed=0)
        for trace in traces:
            trial.add(trace)
        newest_first = [trace.request_id for trace in reversed(traces)]
        for number in range(26 // tried):
            decision = trial.hold(champion=champion, challenger=challenger, batch_positions=64)
            assert decision is not None
            assert (decision.passed, decision.refused, decision.num_requests) == (passes, not passes, tried)
            assert [request.request_id for request in trial.untried] == newest_first[tried * (number + 1) :]
            trial.evidence.clear()
        rest = trial.untried
        assert trial.hold(champion=champion, challenger=challenger, batch_positions=64) is None
        assert trial.untried == rest, "they wait until there are enough"


def test_evidence_adds_up_over_trials_and_is_forgotten_with_the_champion(
    target: Target, taught_draft: Eagle3Draft
) -> None:
    trial = Trial(seed=0)
    good, bad = (online_module(target, draft) for draft in (taught_draft, random_draft(target, seed=3)))
    values = [1.0]
    for trace in serve(target, taught_draft, some_requests(12)):
        trial.add(trace)
        if len(trial.untried) == 6:
            decision = trial.hold(champion=good, challenger=bad, batch_positions=64)
            assert decision is not None
            values.append(decision.evidence)
    assert len(values) == 3
    assert values[2] < 0.9 * values[1] < 0.9 * 0.9
    for forget in (trial.clear_champion_scores, trial.crown_challenger):
        trial.evidence.add([0.5])
        forget()
        assert trial.evidence.value == 1.0


def test_a_client_with_many_requests_neither_displaces_others_nor_is_tried_more_often(served: list[Trace]) -> None:
    trial = Trial(seed=0)
    names = ["a", "b", *["flood"] * 20, "a", "b", *["flood"] * 20]
    for number, name in enumerate(names):
        trial.add(replace(served[0], request_id=str(number), client=name))
        trial.release(8)
    assert [request.client for request in trial.newest] == ["a", "b", "a", "b", *["flood"] * 4]
    untried = trial.untried
    assert sorted(request.client for request in untried[:6]) == ["a", "a", "b", "b", "flood", "flood"]
    assert [request.request_id for request in untried[:3]] == ["43", "23", "22"], "the newest first"
    for request in untried[:6]:
        request.was_tried = True
    for number in range(100, 106):
        trial.add(replace(served[0], request_id=str(number), client="flood"))
        trial.release(8)
    assert not any(request.was_tried for request in trial.newest), "or quiet clients' requests would fill it"


def test_a_challenger_must_be_ahead_in_the_mean_over_clients() -> None:
    pairs = [Scores(2.0, 2.3, "flood") for _ in range(10)] + [Scores(2.0, 1.8, name) for name in "ab"]
    decision = decide(pairs, evidence=9.0)
    assert not decision.passed
    assert decision.refused
    assert decision.challenger == pytest.approx((2.3 + 1.8 + 1.8) / 3)


def test_no_client_alone_has_a_challenger_refused_for_a_domain() -> None:
    better = [Scores(2.0, 2.4 + i / 50, "abc"[i % 3]) for i in range(12)]
    worse = [1.8 + i / 80 for i in range(16)]
    for names, refuses in (("h", False), ("ad", True)):
        of_domain = [Scores(2.0, score, names[i % len(names)], "own") for i, score in enumerate(worse)]
        decision = decide(better, of_domain, evidence=9.0)
        assert (decision.refused, decision.passed) == (refuses, not refuses)
