"""Prefill: how many prompt tokens a round computes, beside what, and for whom; copied prefixes are waited for."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import VOCAB, Answer, make_engine, request, run, save_model, trained_draft

from aurora_lit.ipc.engine_status import EngineCounters
from aurora_lit.kernels import native
from aurora_lit.models.interface import Target
from aurora_lit.models.loading import load_target
from aurora_lit.modules.draft.eagle3 import Eagle3Draft
from aurora_lit.request import Request
from aurora_lit.serve.engine import prefill as prefill_module
from aurora_lit.serve.engine.engine import Engine
from aurora_lit.serve.engine.prefill import Prefill
from aurora_lit.serve.engine.round_plan import RoundPlan
from aurora_lit.serve.engine.sequence import RunningSequence
from aurora_lit.serve.engine.slot_allocator import SlotAllocator
from aurora_lit.serve.engine.target_runner import Columns, States, TargetRunner

LONG = torch.randint(VOCAB, (150,), generator=torch.Generator().manual_seed(9)).tolist()
CHUNK = 64


def make_prefill(num_prefilling: int, *, max_round_s: float = 0.050) -> Prefill:
    """Prompts of 600 different tokens, none of which is in any slot."""
    nothing: Any = None
    tokens_SL = torch.zeros(num_prefilling, 601, dtype=torch.int64)
    allocator = SlotAllocator(tokens_SL, prefix_cache=None, shared_by="domain", has_prompt_arithmetic=False)
    prefill = Prefill(
        nothing,
        nothing,
        allocator,
        prefix_cache=None,
        chunk_tokens=256,
        max_round_s=max_round_s,
        counters=EngineCounters(),
    )
    prefill.sequences.extend(
        RunningSequence(request=request(str(slot), [slot] * 600), slot=slot, prompt_length=600, length=600)
        for slot in range(num_prefilling)
    )
    return prefill


@pytest.mark.parametrize(
    ("num_decoding", "round_s", "token_s", "max_round_s", "tokens"),
    [
        (0, 0.0, 0.0003, 0.050, 256),  # nobody decodes: a whole chunk
        (0, 0.0, 0.0010, 0.050, 100),  # as much as takes 0.1 s
        (0, 0.0, 0.0100, 0.050, 64),  # but not less than this
        (0, 0.0, 0.0100, 3600.0, 256),  # latency does not matter
        (0, 0.0, 0.0, 0.050, 256),
        (4, 0.010, 0.0005, 0.050, 80),  # 40 ms are left
        (4, 0.010, 0.0005, 0.030, 40),  # as engine.max_round_ms says
        (4, 0.010, 0.001, 0.050, 40),
        (4, 0.020, 0.0005, 0.050, 60),
        (4, 0.040, 0.0005, 0.050, 100),  # 1.25 times the other columns' time at least, else slots wait for prompts
        (4, 0.200, 0.005, 0.050, 50),
        (4, 0.200, 0.050, 0.050, 16),  # never fewer, else prompts would wait for ever
        (4, 0.001, 0.0001, 0.050, 256),  # never more than a chunk
        (4, 0.010, 0.0, 0.050, 16),  # nothing was measured yet
    ],
)
def test_the_tokens_of_a_round_are_those_that_keep_it_short(
    num_decoding: int, round_s: float, token_s: float, max_round_s: float, tokens: int
) -> None:
    prefill = make_prefill(1, max_round_s=max_round_s)
    if token_s:
        prefill.observe(100, 100 * token_s)
    (row,) = prefill.plan(num_decoding=num_decoding, round_s=round_s)
    assert row.start == 0
    assert len(row.tokens) == pytest.approx(tokens, abs=1), "but for rounding"


def test_the_prompt_with_least_to_read_comes_first_and_the_last_token_is_left_to_decoding() -> None:
    prefill = make_prefill(3)
    prefill.sequences[1].prefilled = 500
    rows = prefill.plan(num_decoding=0, round_s=0.0)
    assert [(row.sequence.slot, row.start, len(row.tokens)) for row in rows] == [(1, 500, 99), (0, 0, 157)]


def test_the_oldest_prompt_comes_first_after_three_rounds_that_began_with_others() -> None:
    """Two long prompts, and a new short one in every round: the older one is read, then the other."""
    prefill = make_prefill(3)
    old, next_old, short = prefill.sequences
    first: list[RunningSequence] = []
    for _ in range(2 * 4 * (600 // 16 + 1)):
        short.prefilled = 590
        for row in prefill.plan(num_decoding=1, round_s=0.0, updates_costs=False)[:1]:
            first.append(row.sequence)
            row.sequence.prefilled += len(row.tokens)
        for ready in prefill.take_ready():
            if ready is short:
                prefill.sequences.append(short)
    assert first[:8] == [short, short, short, old] * 2
    assert list(prefill.sequences) == [short]
    assert max(number for number, each in enumerate(first) if each is old) < first.index(next_old)


def test_a_prompt_beside_the_oldest_one_takes_no_turn_from_it_and_waits_for_none() -> None:
    """The turns of the oldest are counted since it last came first."""
    prefill = make_prefill(2)
    old, short = prefill.sequences
    prefill.sequences.remove(short)
    for _ in range(7):
        assert [row.sequence for row in prefill.plan(num_decoding=0, round_s=0.0)] == [old]
    prefill.sequences.append(short)
    short.prefilled = 300
    first = [prefill.plan(num_decoding=0, round_s=0.0)[0].sequence for _ in range(5)]
    assert first == [short, short, short, old, short]


def test_the_time_of_a_prompt_token_is_learned_slowly_and_from_chunks_that_fill_a_tile() -> None:
    prefill = make_prefill(1)

    def budget() -> int:
        return len(prefill.plan(num_decoding=1, round_s=0.0)[0].tokens)

    prefill.observe(15, 9.0)
    assert budget() == 16, "a short chunk's time is not per token"
    prefill.observe(100, 0.05)
    assert budget() == 100
    prefill.observe(100, 5.0)
    assert 70 < budget() < 100, "an outlier changes it little"
    for _ in range(50):
        prefill.observe(100, 0.1)
    assert budget() == pytest.approx(50, abs=1)


def test_rounds_shorter_than_expected_without_prompts_do_not_keep_prompts_to_a_tile() -> None:
    """Prompt tokens that seem to take nothing were measured, and a later time is believed."""
    prefill = make_prefill(1)

    def budget() -> int:
        return len(prefill.plan(num_decoding=1, round_s=0.010)[0].tokens)

    assert budget() == 16
    prefill.observe(16, -0.002)
    assert budget() == 256
    prefill.observe(256, 0.256)
    assert budget() == 40


def test_in_one_of_many_rounds_prompts_are_left_out_so_that_costs_are_measured() -> None:
    prefill = make_prefill(1)

    def carries_prompts(num_decoding: int) -> bool:
        return bool(prefill.plan(num_decoding=num_decoding, round_s=0.010))

    assert all(carries_prompts(0) for _ in range(200)), "nobody decodes"
    carrying = [carries_prompts(1) for _ in range(195)]
    assert [number for number, carried in enumerate(carrying) if not carried] == [64, 129, 194]
    waiting = prefill.sequences.copy()
    prefill.sequences.clear()
    assert not carries_prompts(1)
    prefill.sequences.extend(waiting)
    assert all(carries_prompts(1) for _ in range(64)), "counted since a round without prompts"
    assert not carries_prompts(1)


# -- prompts inside the pass of other sequences --------------------------------------------------------------------


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    folder: Path = save_model("llama", tmp_path_factory.mktemp("llama"), num_hidden_layers=4)
    return load_target(folder, precision="bf16" if native.library() is not None else "fp32")


@pytest.fixture(scope="module")
def draft(target: Target) -> Eagle3Draft:
    ids_BT = torch.randint(0, VOCAB, (8, 40), generator=torch.Generator().manual_seed(5))
    return trained_draft(target, ids_BT, steps=20)


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[tuple[RoundPlan, Columns]]:
    """Every plan that was run, and what it computed."""
    found: list[tuple[RoundPlan, Columns]] = []
    original = TargetRunner.run

    def run_and_keep(self: TargetRunner, plan: RoundPlan) -> Columns:
        columns = original(self, plan)
        states = columns.states  # the next pass overwrites them
        kept = columns._replace(states=States(states.aux_NF.clone(), states.last_NH.clone()))
        found.append((plan, kept))
        return columns

    monkeypatch.setattr(TargetRunner, "run", run_and_keep)
    return found


def decoding_requests() -> list[Request]:
    prompts = [LONG[:5], LONG[20:22], LONG[40:49]]
    kinds: list[dict[str, Any]] = [{}, {"temperature": 0.9, "seed": 7}, {"temperature": 1.1}]
    kinds.append({"temperature": 0.7, "presence_penalty": 0.5, "top_p": 0.9, "logprobs": 2})
    return [request(f"d{i}", prompts[i % 3], max_tokens=60, **kind) for i, kind in enumerate(kinds)]


def make(target: Target, draft: Eagle3Draft | None, **changes: Any) -> Engine:
    fields: dict[str, Any] = {"max_seq_len": 220, "prefill_chunk_tokens": CHUNK, "prefix_cache_mb": 0}
    return make_engine(target, copy.deepcopy(draft), **{**fields, **changes})


PROPOSALS = [{"branches": False}, {"branches": True}, {"branches": True, "copied_tokens": 7}]


@pytest.fixture(scope="module")
def alone(target: Target) -> tuple[list[Request], dict[str, Answer]]:
    """Sequences that decode, and long prompts; each one's answer without the others."""
    requests = decoding_requests()
    requests += [request("p0", LONG, max_tokens=8), request("p1", LONG[3:120], max_tokens=8, temperature=0.8, seed=2)]
    requests += [request("p2", LONG[10:], max_tokens=4, prompt_logprobs=1)]
    return requests, {r.request_id: run(make(target, None), [r])[r.request_id] for r in requests}


@pytest.mark.skipif(native.library() is None, reason="torch's sums depend on what is computed together")
@pytest.mark.parametrize("max_round_s", [0.001, 0.02, 1.0])
@pytest.mark.parametrize("proposals", PROPOSALS, ids=["chains", "branches", "branches and lookup"])
def test_outputs_beside_prompts_are_those_alone(
    proposals: dict[str, int],
    max_round_s: float,
    target: Target,
    draft: Eagle3Draft,
    alone: tuple[list[Request], dict[str, Answer]],
    plans: list[tuple[RoundPlan, Columns]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Greedy and sampled rows decode while long prompts come; and these prompts' own outputs."""
    requests, expected = alone
    if max_round_s == 0.001:  # a prompt token takes longer than a round may, whatever the machine does meanwhile
        monkeypatch.setattr(Prefill, "observe", lambda self, num_tokens, seconds: setattr(self, "_token_s", 1.0))
    engine = make(target, draft, max_round_s=max_round_s, **proposals)
    answers = run(engine, requests, arrivals=[0, 0, 0, 1, 4, 6, 9])
    for name, answer in answers.items():
        assert answer.token_ids == expected[name].token_ids, name
        assert answer.logprobs == expected[name].logprobs, name
        assert answer.prompt_logprobs == expected[name].prompt_logprobs, name
    mixed = [plan for plan, _ in plans if plan.decoding and plan.prompts]
    assert len(mixed) > 5
    assert any(row.proposal.tokens for plan in mixed for row in plan.decoding), "speculation goes on beside prompts"
    if proposals["branches"]:
        assert any(row.proposal.parents for plan in mixed for row in plan.decoding)
    assert all(plan.num_prompt_tokens <= CHUNK for plan, _ in plans)
    if max_round_s == 0.001:
        assert {plan.num_prompt_tokens for plan in mixed} <= set(range(17)), "rounds that are too long in any case"


def test_longer_rounds_take_more_prompt_tokens(
    target: Target, draft: Eagle3Draft, plans: list[tuple[RoundPlan, Columns]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt token takes ten milliseconds here; the sequence that decodes takes a few of them."""
    monkeypatch.setattr(Prefill, "observe", lambda self, num_tokens, seconds: setattr(self, "_token_s", 0.01))
    most = {}
    for max_round_s in (0.001, 0.30, 0.45, 10.0):
        plans.clear()
        engine = make(target, draft, max_round_s=max_round_s)
        run(engine, [request("d", LONG[:4], max_tokens=60), request("p", LONG, max_tokens=2)], arrivals=[0, 3])
        most[max_round_s] = max(plan.num_prompt_tokens for plan, _ in plans if plan.decoding)
    assert (most[0.001], most[10.0]) == (16, CHUNK)
    assert 24 <= most[0.30] <= 30
    assert 39 <= most[0.45] <= 45


@pytest.mark.skipif(native.library() is None, reason="torch's sums depend on what is computed together")
@pytest.mark.parametrize("branches", [False, True])
def test_a_rows_bits_do_not_depend_on_the_prompt_tokens_beside_it(
    target: Target,
    draft: Eagle3Draft,
    branches: bool,
    plans: list[tuple[RoundPlan, Columns]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Beside 0, 17 and 40 prompt tokens."""
    states: dict[int, dict[tuple[int, int], torch.Tensor]] = {}
    for beside in (0, 17, 40):
        monkeypatch.setattr(prefill_module, "_LEAST_TOKENS", max(1, beside))
        plans.clear()
        engine = make(target, draft, max_round_s=1e-6, branches=branches)
        requests = [request("d", LONG[:4], max_tokens=24), request("p", LONG, max_tokens=1)]
        run(engine, requests[: 1 + (beside > 0)], arrivals=[0, 3])
        states[beside] = defaultdict(torch.Tensor)
        numbers = set()
        for plan, columns in plans:
            for index, row in enumerate(plan.decoding):
                if row.sequence.request.request_id == "d":
                    bits = torch.cat([columns.aux(index), columns.last(index)], dim=1)
                    states[beside][row.start, len(row.tokens)] = bits.clone()
                    numbers.add(plan.num_prompt_tokens)
        assert beside in numbers
    assert states[0].keys() == states[17].keys() == states[40].keys()
    for beside in (17, 40):
        assert all(torch.equal(bits, states[beside][place]) for place, bits in states[0].items())


def prompt_rows(plans: Sequence[tuple[RoundPlan, Columns]]) -> dict[str, list[tuple[int, int]]]:
    """Start and number of tokens of every chunk, by request."""
    rows = defaultdict(list)
    for plan, _ in plans:
        for row in plan.prompts:
            rows[row.sequence.request.request_id].append((row.start, len(row.tokens)))
    return dict(rows)


@pytest.mark.parametrize("decoding", [False, True])
def test_of_two_prompts_with_a_long_common_prefix_the_second_waits_and_copies_it(
    decoding: bool, target: Target, plans: list[tuple[RoundPlan, Columns]]
) -> None:
    """Submitted together; alone or beside a sequence that decodes."""
    engine = make(target, None, prefix_cache_mb=1, prefill_chunk_tokens=200, max_round_s=1000.0)
    if decoding:
        engine.submit(request("d", LONG[120:123], max_tokens=60))
        engine.round()
        engine.round()
    plans.clear()
    prompts = {"a": [*LONG[:100], 1, 2], "b": [*LONG[:100], 3, 4, 5]}
    for name, prompt in prompts.items():
        engine.submit(request(name, prompt, max_tokens=2))
    answers: dict[str, list[int]] = defaultdict(list)
    while engine.has_work:
        for output in engine.round():
            answers[output.request_id] += output.token_ids
    rows = prompt_rows(plans)
    assert sum(count for _, count in rows["a"]) == 101
    assert rows["b"] == [(100, 2)]
    assert [plan.copied_prefix for plan, _ in plans].count(True) == 1, "its time is no decoding round's"
    assert engine.counters.cached_tokens == 100
    if native.library() is not None:
        for name, prompt in prompts.items():
            alone = make(target, None)
            assert answers[name] == run(alone, [request(name, prompt, max_tokens=2)])[name].token_ids


@pytest.mark.parametrize("draft_too", [False, True])
def test_a_short_prompt_is_read_before_long_ones_and_all_answers_are_those_alone(
    draft_too: bool, target: Target, draft: Eagle3Draft, plans: list[tuple[RoundPlan, Columns]]
) -> None:
    engine = make(target, draft if draft_too else None, prefill_chunk_tokens=16)
    requests = [request(name, prompt, max_tokens=4) for name, prompt in (("a", LONG), ("b", LONG[::-1]))]
    requests.append(request("short", LONG[40:70], max_tokens=4))
    answers = run(engine, requests, arrivals=[0, 0, 1])
    order = [row.sequence.request.request_id for plan, _ in plans for row in plan.prompts[:1]]
    assert order[:4] == ["a", "short", "short", "a"]
    begun = [[row.sequence.request.request_id for row in plan.decoding] for plan, _ in plans]
    assert begun[:4] == [[], [], [], ["short"]], "two chunks, then its first token"
    if native.library() is not None:
        for each in requests:
            assert answers[each.request_id].token_ids == run(make(target, None), [each])[each.request_id].token_ids


def test_what_a_shorter_prompt_has_read_of_a_common_prefix_the_older_one_copies(
    target: Target, draft: Eagle3Draft, plans: list[tuple[RoundPlan, Columns]]
) -> None:
    """It goes on from what the older one has, which in its turn goes on from what it has: nothing is read twice."""
    engine = make(target, draft, prefix_cache_mb=1, prefill_chunk_tokens=16)
    requests = [request("a", LONG, max_tokens=4), request("b", [*LONG[:120], *[3] * 9], max_tokens=4)]
    answers = run(engine, requests, arrivals=[0, 2])
    rows = prompt_rows(plans)
    assert rows["b"] == [(32, 16), (48, 16), (64, 16), (96, 16), (112, 16)]
    assert rows["a"] == [(0, 16), (16, 16), (80, 16), (120, 16), (136, 13)], "its turn comes after three rounds"
    assert engine.counters.cached_tokens == 32 + (80 - 32) + (96 - 80) + (120 - 96)
    if native.library() is not None:
        for each in requests:
            assert answers[each.request_id].token_ids == run(make(target, None), [each])[each.request_id].token_ids


def test_a_prompt_of_which_much_was_read_for_another_comes_before_a_shorter_one(
    target: Target, plans: list[tuple[RoundPlan, Columns]]
) -> None:
    """When "a" has been read, little is left of "b"; before, "c" was the shorter one of the two."""
    engine = make(target, None, prefix_cache_mb=1, prefill_chunk_tokens=16)
    prompts = {"a": LONG, "b": [*LONG[:145], *[3] * 15], "c": LONG[:8:-1]}
    run(engine, [request(name, prompt, max_tokens=1) for name, prompt in prompts.items()], arrivals=[0, 1, 1])
    first = [plan.prompts[0].sequence.request.request_id for plan, _ in plans if plan.prompts]
    assert first == ["a"] * 10 + ["b"] + ["c"] * 8


def test_a_short_common_prefix_is_not_waited_for(target: Target, plans: list[tuple[RoundPlan, Columns]]) -> None:
    engine = make(target, None, prefix_cache_mb=1, prefill_chunk_tokens=200)
    run(engine, [request("a", [*LONG[:20], 1, 2], max_tokens=2), request("b", [*LONG[:20], 3, 4], max_tokens=2)])
    assert prompt_rows(plans[:1]) == {"a": [(0, 21)], "b": [(0, 21)]}


def test_a_common_prefix_is_not_waited_for_if_it_may_not_be_copied(
    target: Target, plans: list[tuple[RoundPlan, Columns]]
) -> None:
    """Waiting would tell a client with another salt what is being read."""
    engine = make(target, None, prefix_cache_mb=1, prefill_chunk_tokens=210)
    prompts = {"a": [*LONG[:100], 1, 2], "b": [*LONG[:100], 3, 4]}
    run(engine, [replace(request(name, prompt, max_tokens=2), cache_salt=name) for name, prompt in prompts.items()])
    assert prompt_rows(plans[:1]) == {"a": [(0, 101)], "b": [(0, 101)]}
    assert engine.counters.cached_tokens == 0
