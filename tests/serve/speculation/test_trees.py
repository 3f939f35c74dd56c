"""Rounds whose proposals branch: each node has the bits of a plain pass over its path; so have outputs and traces."""

from __future__ import annotations

import copy
import itertools
import random
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from support.tiny_models import VOCAB, Answer, make_engine, random_draft, request, run, save_model, trained_draft

from aurora_lit.kernels import native
from aurora_lit.kernels.draft_steps import Weighing
from aurora_lit.models.interface import Target
from aurora_lit.models.kv_cache import KVCache, keys_by_position, values_by_position
from aurora_lit.models.loading import load_target
from aurora_lit.modules.draft.eagle3 import Eagle3Draft
from aurora_lit.request import Request, Source
from aurora_lit.serve.engine.engine import Engine
from aurora_lit.serve.engine.trace_recorder import TraceRecorder
from aurora_lit.serve.speculation.floor import Allowed
from aurora_lit.serve.speculation.weigh import Weigher
from aurora_lit.traces.record import Trace, check

pytestmark = pytest.mark.skipif(native.library() is None, reason="no C++ compiler, or AURORA_LIT_NATIVE=0")

PRECISIONS = ("fp32", "bf16", "int4")
LENGTHS = (1, 2, 17, 30, 41)
NEW = 24


@dataclass(frozen=True, kw_only=True)
class TinyModels:
    """Targets by precision, drafts by kind ("random", or "trained" on the target's outputs), and prompts."""

    targets: dict[str, Target]
    drafts: dict[str, Eagle3Draft]
    prompts: list[list[int]]

    def engine(self, kind: str = "trained", *, precision: str = "bf16", **changes: Any) -> Engine:
        return make_engine(self.targets[precision], copy.deepcopy(self.drafts[kind]), **{"branches": True, **changes})

    def requests(self, **params: Any) -> list[Request]:
        return [request(str(i), p, **{"max_tokens": NEW, **params}) for i, p in enumerate(self.prompts)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    folder = save_model("llama", tmp_path_factory.mktemp("llama"), num_hidden_layers=4)
    targets = {precision: load_target(folder, precision=precision) for precision in PRECISIONS}
    gen = torch.Generator().manual_seed(3)
    prompts = [torch.randint(0, VOCAB, (length,), generator=gen).tolist() for length in LENGTHS]
    plain = run(make_engine(targets["fp32"]), [request(str(i), p, max_tokens=NEW) for i, p in enumerate(prompts)])
    width = max(LENGTHS) + NEW
    texts = [(p + plain[str(i)].token_ids + [0] * width)[:width] for i, p in enumerate(prompts)]
    drafts = {
        "random": random_draft(targets["fp32"]),
        "trained": trained_draft(targets["fp32"], torch.tensor(texts), steps=16),
    }
    return TinyModels(targets=targets, drafts=drafts, prompts=prompts)


def tokens(answers: dict[str, Answer]) -> list[list[int]]:
    return [answers[name].token_ids for name in sorted(answers)]


# -- passes --------------------------------------------------------------------------------------------------------


def path_of(parents: list[int], column: int) -> list[int]:
    path = [column]
    while parents[path[0]] >= 0:
        path.insert(0, parents[path[0]])
    return path


@pytest.mark.parametrize("columns", [2, 5, 16, 23])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_node_is_a_plain_pass_over_its_path_bit_for_bit(models: TinyModels, precision: str, columns: int) -> None:
    target, rng = models.targets[precision], random.Random(columns)
    ids_BL = torch.randint(VOCAB, (2, 90), generator=torch.Generator().manual_seed(columns))
    starts, slots_B = [37, 61], torch.tensor([2, 0])
    parents = [[-1, *(rng.randrange(max(0, c - 6), c) for c in range(1, columns))] for _ in starts]

    def prefilled(num_slots: int) -> Any:
        slots = target.make_kv_cache(num_slots=num_slots, capacity=90)
        for slot, (ids_L, start) in zip(slots_B.tolist(), zip(ids_BL, starts, strict=True), strict=True):
            target.forward(
                ids_L[None, :start], kv_cache=slots, slots_B=torch.tensor([slot]), starts_B=torch.tensor([0])
            )
        return slots

    slots, starts_B = prefilled(3), torch.tensor(starts)
    tree_BT = torch.stack([ids_L[start : start + columns] for ids_L, start in zip(ids_BL, starts, strict=True)])
    aux, last = target.forward(
        tree_BT, kv_cache=slots, slots_B=slots_B, starts_B=starts_B, parents_BT=torch.tensor(parents)
    )
    plain = prefilled(3)
    for b, start in enumerate(starts):
        one = {"slots_B": slots_B[b : b + 1], "starts_B": starts_B[b : b + 1]}
        for column in range(columns):
            path = path_of(parents[b], column)
            aux_1, last_1 = target.forward(tree_BT[b : b + 1, path], kv_cache=plain, **one)
            assert torch.equal(aux_1[0, -1], aux[b, column])
            assert torch.equal(last_1[0, -1], last[b, column])
        # The deepest path is committed; the slot then holds what the plain pass wrote there.
        path = max((path_of(parents[b], c) for c in range(columns)), key=len)
        target.forward(tree_BT[b : b + 1, path], kv_cache=plain, **one)
        end, slot = start + len(path), int(slots_B[b])
        froms = [start + column for column in path]
        target.commit_tree_path(kv_cache=slots, slot=slot, froms=froms, tos=range(start, end))
        for mine, other in zip(slots.keys_SGCQPE, plain.keys_SGCQPE, strict=True):
            assert torch.equal(*(keys_by_position(keys)[slot, ..., :end] for keys in (mine, other)))
        for mine, other in zip(slots.values_SGMDE, plain.values_SGMDE, strict=True):
            assert torch.equal(*(values_by_position(values)[slot, :, :end] for values in (mine, other)))


@pytest.mark.parametrize("branching", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_different_query_lengths_give_the_bits_of_equal_ones(
    models: TinyModels, precision: str, branching: bool
) -> None:
    target, widths, T = models.targets[precision], [3, 1, 17, 2], 17
    gen = torch.Generator().manual_seed(5)
    ids_BT = torch.randint(0, VOCAB, (len(widths), T), generator=gen)
    parents_BT = torch.tensor([[-1, *(random.Random(b).randrange(t) for t in range(1, T))] for b in range(len(widths))])
    branches = {"parents_BT": parents_BT} if branching else {}
    slots_B, starts_B = torch.tensor([2, 0, 3, 1]), torch.tensor([5, 0, 1, 9])

    def prepared() -> KVCache:
        slots = target.make_kv_cache(num_slots=4, capacity=40)
        read = torch.randint(0, VOCAB, (4, 9), generator=torch.Generator().manual_seed(6))
        target(read, kv_cache=slots, slots_B=slots_B, starts_B=torch.zeros(4, dtype=torch.int64))
        return slots

    wide, ragged = prepared(), prepared()
    expected = target(ids_BT, kv_cache=wide, slots_B=slots_B, starts_B=starts_B, **branches)
    ids_N = torch.cat([row[:width] for row, width in zip(ids_BT, widths, strict=True)])
    found = target.forward_ragged(ids_N, widths=widths, kv_cache=ragged, slots_B=slots_B, starts_B=starts_B, **branches)
    for equal, ragged_N in zip(expected, found, strict=True):
        assert torch.equal(torch.cat([row[:width] for row, width in zip(equal, widths, strict=True)]), ragged_N)
    for keys, other in zip(wide.keys_SGCQPE, ragged.keys_SGCQPE, strict=True):
        for slot, start, width in zip(slots_B.tolist(), starts_B.tolist(), widths, strict=True):
            one, two = (keys_by_position(k[slot][None])[..., : start + width] for k in (keys, other))
            assert torch.equal(one, two)


def test_layers_that_are_not_fused_propose_chains(models: TinyModels) -> None:
    native = models.targets["fp32"]
    models.targets["fp32"] = native.in_torch
    try:
        assert not models.targets["fp32"].has_native_decoder
        assert models.engine(precision="fp32", adaptive=True).proposer.weigher.limits.sibling_tokens == 0
        engine = models.engine(precision="fp32", branches=False)
        assert {o.num_proposed for a in run(engine, models.requests()).values() for o in a.rounds[:-1]} == {4}
    finally:
        models.targets["fp32"] = native


# -- engines -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize(
    ("kind", "k", "batch"),
    [
        ("random", 4, 8),
        ("random", 2, 1),
        ("trained", 4, 8),
        ("trained", 4, 1),
        ("trained", 3, 3),
        ("trained", 8, 2),
        ("trained", 1, 8),
        ("trained", 0, 8),
    ],
)
def test_output_is_that_of_plain_decoding(models: TinyModels, kind: str, k: int, batch: int, adaptive: bool) -> None:
    """In bf16, where only equal bits give equal tokens. Greedy and sampled requests, at any batch size."""
    requests = models.requests()
    requests += [request(f"u{i}", p, max_tokens=NEW, temperature=0.6) for i, p in enumerate(models.prompts)]
    requests += [request(f"s{i}", p, max_tokens=NEW, temperature=0.8, seed=i) for i, p in enumerate(models.prompts)]
    expected = run(make_engine(models.targets["bf16"]), requests)
    engine = models.engine(kind, max_draft_tokens=k, max_batch_size=batch, adaptive=adaptive)
    answers = run(engine, requests, arrivals=[0, 1, 2, 0, 5, 3, 9, 2, 1, 0])
    assert tokens(answers) == tokens(expected)
    assert engine.counters.accepted == sum(engine.counters.accepted_by_position)
    rounds = [output for answer in answers.values() for output in answer.rounds]
    assert all(len(o.token_ids) == o.num_accepted + 1 for o in rounds if o.finish_reason is None)
    if not adaptive:
        assert max(o.num_proposed for o in rounds) == 2 * k
        assert all(o.chain_accepted <= min(o.num_accepted, o.chain_proposed) <= k for o in rounds)
        if (kind, k) == ("trained", 4):
            assert sum(o.num_accepted for o in rounds) > sum(o.chain_accepted for o in rounds)


def weighing_engine(models: TinyModels, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> tuple[Engine, list[int]]:
    """An engine that weighs what it drafts in every round, at one price after the other; and its numbers of rounds."""
    engine = models.engine(**changes, adaptive=True)
    weigher, speeds, counted = engine.proposer.weigher, itertools.cycle([1e-9, 200.0, 50.0, 1e-9, 1e9]), [0]

    def draft_weighing(*args: Any, **how: Any) -> Weighing:
        counted[0] += 1
        return Weigher.draft_weighing(weigher, *args, **how)._replace(speed=next(speeds))

    monkeypatch.setattr(weigher, "draft_weighing", draft_weighing)
    monkeypatch.setattr(engine.floor, "allows", lambda *_, **__: Allowed(copies=True, drafts=True))
    monkeypatch.setattr(weigher.costs, "round_s", lambda size, counts: 0.001 * (size + 0.5 * sum(counts)))
    monkeypatch.setattr(weigher.costs, "draft_s", lambda size, length: 0.0001 * length)
    return engine, counted


def test_passes_of_as_many_columns_as_are_weighed_are_timed_at_the_start(models: TinyModels) -> None:
    """Beyond the longest that is timed, columns would seem to be free."""
    engine = models.engine(adaptive=True)
    assert max(length for size, length, _ in engine.costs.target.all_initial if size == 1) == 9


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_output_with_weighed_proposals_is_that_of_plain_decoding(
    models: TinyModels, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounds that propose nothing of what was drafted, chains, and chains with siblings; greedy and sampled."""
    requests = models.requests()
    requests += [request(f"s{i}", p, max_tokens=NEW, temperature=0.8, seed=i) for i, p in enumerate(models.prompts)]
    expected = run(make_engine(models.targets["bf16"]), requests)
    engine, counted = weighing_engine(models, monkeypatch, max_batch_size=batch)
    answers = run(engine, requests, arrivals=[0, 1, 2, 0, 5, 3, 9, 2, 1, 0])
    assert counted[0] > NEW
    assert tokens(answers) == tokens(expected)
    rounds = [output for answer in answers.values() for output in answer.rounds]
    assert {0, 8} < {output.num_proposed for output in rounds} <= set(range(9))
    assert sum(o.num_accepted for o in rounds) > sum(o.chain_accepted for o in rounds), "siblings are accepted too"


def test_what_is_not_proposed_of_a_weighed_chain_counts_as_far_as_the_answer_tells(
    models: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every outcome is one that the answer shows: as long as the chain agrees with it, and the first difference."""
    engine, _ = weighing_engine(models, monkeypatch)
    seen: list[tuple[list[bool], int]] = []
    rates = engine.proposer.draft.rates
    observe, added = rates.observe, rates._add_share

    def observed(sequence: Any, proposal: Any, **outcome: Any) -> None:
        if proposal.weighed is not None:
            told: list[bool] = []
            monkeypatch.setattr(
                rates,
                "_add_share",
                lambda share, accepted, **of: (told.append(accepted), added(share, accepted, **of)),
            )
            observe(sequence, proposal, **outcome)
            agreeing = list(itertools.takewhile(bool, map(int.__eq__, proposal.weighed.tokens, outcome["tokens"])))
            known = min(len(proposal.weighed.tokens), len(outcome["tokens"]))
            committed_L = engine._tokens_SL[sequence.slot, : sequence.length]
            assert list(outcome["tokens"]) == committed_L[-len(outcome["tokens"]) :].tolist()
            assert len(outcome["tokens"]) == len(outcome["path"]) or outcome["finished"]
            assert proposal.source == (Source.DRAFT if proposal.tokens else Source.TARGET)
            assert told == [True] * len(agreeing) + [False] * (len(agreeing) < known)
            seen.append((told, len(proposal.tokens)))

    monkeypatch.setattr(rates, "observe", observed)
    answers = run(engine, models.requests())
    found = [output.tested_choices for answer in answers.values() for output in answer.rounds]
    assert sorted(each for each in found if each) == sorted((len(told), sum(told)) for told, _ in seen)
    assert any(told == [True] and not proposed for told, proposed in seen), "it was right, and not proposed"
    assert any(told[-1:] == [False] and proposed for told, proposed in seen)


@pytest.mark.parametrize(
    "params",
    [
        {"repetition_penalty": 1.3},
        {"presence_penalty": 0.7, "temperature": 0.9, "seed": 5},
        {"logit_bias": {7: 3.0}},
        {"logprobs": 3},
        {"temperature": 0.7, "seed": 1, "top_p": 0.8, "logprobs": 1},
    ],
)
def test_options_hold_on_every_path(models: TinyModels, params: dict[str, Any]) -> None:
    requests = models.requests(**params)
    expected = run(make_engine(models.targets["bf16"]), requests)
    answers = run(models.engine(), requests)
    assert tokens(answers) == tokens(expected)
    for name in answers:
        assert answers[name].logprobs == expected[name].logprobs
    assert max(o.num_proposed for a in answers.values() for o in a.rounds) == 8


def test_a_sampled_request_shares_a_round_of_trees_with_a_greedy_one(models: TinyModels) -> None:
    greedy, other = models.requests()[3:]
    requests = [greedy, request("sampled", other.prompt_ids, max_tokens=6, temperature=1.0)]
    answers = run(models.engine(prefill_chunk_tokens=128), requests)
    for answer in answers.values():
        assert {output.num_proposed for output in answer.rounds[:-1]} == {8}
    assert tokens(answers) == tokens(run(make_engine(models.targets["bf16"]), requests))


def test_lookup_and_trees_share_a_round(models: TinyModels) -> None:
    prompts = [[7, 8, 9, 10, 11] * 4, models.prompts[3]]
    requests = [request(str(i), p, max_tokens=NEW) for i, p in enumerate(prompts)]
    requests.append(request("plain", models.prompts[2], max_tokens=NEW, speculate=False))
    answers = run(models.engine(copied_tokens=15, prefill_chunk_tokens=64), requests)
    assert tokens(answers) == tokens(run(make_engine(models.targets["bf16"]), requests))
    assert any(o.only_copied and o.num_proposed for o in answers["0"].rounds)
    assert {o.num_proposed for o in answers["1"].rounds if o.num_proposed and not o.only_copied} == {8}


@pytest.mark.parametrize("limits", [{"max_seq_len": 44}, {"max_seq_len": 43, "max_batch_size": 1}])
def test_requests_end_inside_a_path(models: TinyModels, limits: dict[str, Any]) -> None:
    expected = tokens(run(make_engine(models.targets["bf16"], **limits), models.requests()))
    assert tokens(run(models.engine(**limits), models.requests())) == expected
    for new in (1, 2, 3):
        short = tokens(run(models.engine(), models.requests(max_tokens=new)))
        assert short == [(w + [-1])[:new] for w in expected[:4]] + [short[4]]
    whole = tokens(run(make_engine(models.targets["bf16"]), models.requests()))[2]
    end = next(t for i, t in enumerate(whole) if i > 2 and t not in whole[:i])
    cut = run(models.engine(), [models.requests(stop_token_ids=(end,))[2]])["2"]
    assert (cut.token_ids, cut.finish_reason) == (whole[: whole.index(end) + 1], "stop")


def test_the_draft_is_swapped_while_requests_run(models: TinyModels) -> None:
    engine = models.engine("random")
    answers = {r.request_id: Answer() for r in models.requests()}
    for each in models.requests():
        engine.submit(each)
    number = 0
    while engine.has_work:
        if number in (3, 7, 9):
            kind = "trained" if number != 7 else "random"
            engine.swap_draft(copy.deepcopy(models.drafts[kind]), version=str(number), recompute=number == 9)
        for output in engine.round():
            answers[output.request_id].add(output)
        number += 1
    assert tokens(answers) == tokens(run(make_engine(models.targets["bf16"]), models.requests()))


@pytest.mark.parametrize("weighs", [False, True])
def test_a_draft_without_native_steps_may_be_swapped_in(
    models: TinyModels, weighs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another form of checkpoint, of the same sizes: its layers do not run in native steps."""
    engine = weighing_engine(models, monkeypatch, kind="random")[0] if weighs else models.engine("random")
    assert engine.proposer.weigher.limits.sibling_tokens
    answers = {r.request_id: Answer() for r in models.requests()}
    for each in models.requests():
        engine.submit(each)
    number = 0
    while engine.has_work:
        if number == 3:
            other = copy.deepcopy(models.drafts["trained"])
            other.config = replace(other.config, norm_before_residual=True)
            assert not other.config.is_plain
            engine.swap_draft(other, version="other", recompute=False)
        for output in engine.round():
            answers[output.request_id].add(output)
        number += 1
    assert number > 4
    assert tokens(answers) == tokens(run(make_engine(models.targets["bf16"]), models.requests()))


# -- traces --------------------------------------------------------------------------------------------------------


def plain_pass(target: Target, ids: list[int], *, prompt_length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states [T, 3H] and [T, H], computed as in the engine: a prompt's last token is decoded."""
    kv_cache, at, states = target.make_kv_cache(num_slots=1, capacity=96), 0, []
    for end, num_prompts in ((prompt_length - 1, 1), (len(ids), 0)):
        if end == at:
            continue
        where = {"slots_B": torch.tensor([0]), "starts_B": torch.tensor([at])}
        states.append(target.forward(torch.tensor([ids[at:end]]), kv_cache=kv_cache, num_prompts=num_prompts, **where))
        at = end
    aux, last = (torch.cat(parts, dim=1)[0] for parts in zip(*states, strict=True))
    return aux, last


def test_traces_record_the_first_choices_that_the_answer_tells_about_and_the_states_of_the_accepted_path(
    models: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At prices at which none of them, some and all are proposed."""
    target = models.targets["bf16"]
    traces: list[Trace] = []
    recorder = TraceRecorder(lambda trace: traces.append(trace.copy()), hidden_size=target.hidden_size)
    answers = run(weighing_engine(models, monkeypatch, observer=recorder)[0], models.requests())
    assert len(traces) == len(answers)
    further, unproposed = 0, [0, 0]
    for trace in traces:
        check(trace)
        answer = answers[trace.request_id]
        prompt_length = len(models.prompts[int(trace.request_id)])
        ids = [*models.prompts[int(trace.request_id)], *answer.token_ids][:-1]
        assert trace.token_ids_T.tolist() == ids
        aux_T3H, last_TH = plain_pass(target, ids, prompt_length=prompt_length)
        assert torch.equal(trace.aux_T3H, aux_T3H.bfloat16())
        assert torch.equal(trace.last_TH[prompt_length - 1 :], last_TH[prompt_length - 1 :].bfloat16())
        for r, output in enumerate(answer.rounds):
            tested, right = int(trace.num_proposed_R[r]), int(trace.num_accepted_R[r])
            assert (tested, right) == (output.tested_choices or (0, 0))
            assert tested - right <= 1, "the first wrong choice is the last one that is tested"
            assert trace.source_R[r] == (Source.DRAFT if tested else Source.TARGET)
            further += output.num_accepted > right
            if tested and not output.num_proposed:
                unproposed[right] += 1
    assert further, "siblings were accepted"
    assert min(unproposed) > 0, "of rounds that proposed nothing some were right, some were wrong"
