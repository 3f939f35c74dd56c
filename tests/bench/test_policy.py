"""bench policy: a toy whose best policy is known, the planner's flags, what promises may know, recorded proposals."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.tiny_models import VOCAB, make_engine, request, run, save_model, trained_draft

from aurora_lit.bench.policy.choices import BanditPolicy, ChoosingPolicy, FixedPolicy, accepted_by_shape, draft_shapes
from aurora_lit.bench.policy.predictor import explained, promises
from aurora_lit.bench.policy.record import record_answers, start_or_resume, time_rounds
from aurora_lit.bench.policy.recording import RecordedAnswer, Recording, TimedRound, TimedRounds
from aurora_lit.bench.policy.simulator import PlainPolicy, PlannerPolicy, Replay, Table, replay
from aurora_lit.bench.policy.world import World
from aurora_lit.bench.prompts import BenchPrompt
from aurora_lit.errors import ConfigError
from aurora_lit.kernels import native
from aurora_lit.kernels.suffix_index import NO_COPIES
from aurora_lit.models.target import Target
from aurora_lit.serve.speculation.costs import DraftShape
from aurora_lit.serve.speculation.planner import NO_DRAFT

LENGTH, LEVELS, SIZES = 60, 4, [3, 7]
PASS_S, COLUMN_S, LEVEL_S = 4.0, 0.25, 0.5
"""A pass takes PASS_S + COLUMN_S a column, a level of the draft LEVEL_S: that is all."""


def toy(right: list[bool], *, hidden: torch.Tensor | None = None, requests: int = 12, copied: int = 0) -> Recording:
    """Requests of LENGTH tokens; the draft proposes the next tokens where `right`, and else never what comes.

    Tokens never repeat, so that nothing can be copied. A tree is the chain of its levels.
    """
    answers = [
        RecordedAnswer(
            domain="right" if right[r * LENGTH] else "wrong",
            prompt_ids=[1 + r],
            token_ids=[1000 * (r + 1) + i for i in range(LENGTH)],
            first=r * LENGTH,
            noise_key=r,
        )
        for r in range(requests)
    ]
    N = requests * LENGTH
    flat = [token for answer in answers for token in answer.token_ids]
    chain_NJ = torch.tensor(
        [[flat[n + j] if right[n] and n + j < N else 7 for j in range(LEVELS)] for n in range(N)], dtype=torch.int32
    )
    tree_NGJK = torch.full((N, len(SIZES), LEVELS, max(SIZES)), -1, dtype=torch.int32)
    parent_NGJK = torch.zeros(tree_NGJK.shape, dtype=torch.int8)
    for (g, nodes), j in itertools.product(enumerate(SIZES), range(LEVELS)):
        count = min(nodes, j + 1)
        tree_NGJK[:, g, j, :count] = chain_NJ[:, :count]
        parent_NGJK[:, g, j, :count] = torch.arange(count, dtype=torch.int8)
    certain = torch.tensor(right, dtype=torch.float32)[:, None]
    return Recording(
        answers=answers,
        temperature=0.0,
        max_tokens=LENGTH,
        tree_sizes=SIZES,
        draft_tokens=LEVELS,
        copied_tokens=copied,
        chain_NJ=chain_NJ,
        chain_outcome_NJ=(4 * certain).expand(-1, LEVELS).contiguous(),
        tree_NGJK=tree_NGJK,
        parent_NGJK=parent_NGJK,
        tree_outcome_NGJ=certain[:, None].expand(-1, len(SIZES), LEVELS).contiguous(),
        hidden_NH=torch.zeros(N, 1).half() if hidden is None else hidden.half(),
    )


def timed(batch_size: int, *, own: float = 1.0) -> TimedRounds:
    """Rounds of exactly these costs, and calibrations of them; the planner's own took `own` times as long."""
    found = TimedRounds(batch_size=batch_size)
    shapes = [NO_DRAFT, *(DraftShape(n) for n in range(1, 5)), *(DraftShape(n, k) for k in SIZES for n in (2, 3, 4))]
    for columns, shape in itertools.product(range(batch_size, 10 * batch_size), shapes):
        for drafting, turn in itertools.product({0: [0]}.get(shape.levels, range(1, batch_size + 1)), (0, 1)):
            draft_s, scale = shape.levels * LEVEL_S, 1.0 if turn else own
            found.rounds.append(
                TimedRound(
                    columns=columns,
                    drafting=drafting,
                    shape=tuple(shape),
                    uncached=0,
                    draft_s=scale * draft_s,
                    proposing_s=scale * draft_s,
                    seconds=scale * (draft_s + PASS_S + COLUMN_S * columns),
                    tokens=batch_size,
                    turn=turn,
                )
            )
    found.initial = {
        "target": [(batch_size, q, PASS_S + COLUMN_S * batch_size * q) for q in range(1, 10)],
        "chain": [(n, levels, levels * LEVEL_S) for n in range(1, batch_size + 1) for levels in range(1, 5)],
        "tree": [(n, levels, levels * LEVEL_S) for n in range(1, batch_size + 1) for levels in range(1, 5)],
    }
    return found


def play(recording: Recording, make: Any, *, clients: int = 1, **how: Any) -> Replay:
    table = Table(recording, World(timed(clients)), memory_bytes=0, max_catch_up_s=1e9)
    return replay(table, make(table, **how))


def every_other(requests: int = 12) -> list[bool]:
    return [bool(r % 2) for r in range(requests) for _ in range(LENGTH)]


def test_the_oracle_is_as_fast_as_the_best_policy_by_hand() -> None:
    recording = toy(every_other())
    accepted_NS = accepted_by_shape(recording)
    chain = draft_shapes(recording).index(DraftShape(4))
    assert accepted_NS[0, chain] == 0
    assert accepted_NS[LENGTH, chain] == 4
    oracle = play(recording, ChoosingPolicy, promise_NS=accepted_NS, knows_answer=True)
    # Where the draft is right: 12 rounds of 5 tokens by chains of 4; elsewhere 60 plain rounds.
    right_s, wrong_s = 12 * (PASS_S + 5 * COLUMN_S + 4 * LEVEL_S), 60 * (PASS_S + COLUMN_S)
    assert oracle.by_domain["right"] == pytest.approx([6 * 60, 6 * right_s], rel=1e-3)
    assert oracle.by_domain["wrong"] == pytest.approx([6 * 60, 6 * wrong_s], rel=1e-3)


def test_policies_stand_in_the_known_order() -> None:
    recording = toy(every_other())
    accepted_NS = accepted_by_shape(recording)
    oracle = play(recording, ChoosingPolicy, promise_NS=accepted_NS, knows_answer=True).speed
    plain = play(recording, lambda _table: PlainPolicy()).speed
    fixed = play(recording, FixedPolicy, arm=(DraftShape(4), None)).speed
    planner, bandit = play(recording, PlannerPolicy).speed, play(recording, BanditPolicy).speed
    assert plain == pytest.approx(1 / (PASS_S + COLUMN_S))
    assert fixed == pytest.approx(120 / (60 * (PASS_S + 5 * COLUMN_S + 4 * LEVEL_S) * 1.2), rel=0.01)
    assert max(plain, fixed) < planner < oracle
    assert bandit < oracle


def test_the_choice_for_several_rows_is_the_best_of_all() -> None:
    recording = toy(every_other())
    rng = np.random.default_rng(0)
    shapes = draft_shapes(recording)
    world = World(timed(3))
    for _ in range(20):
        promise_NS = rng.uniform(0, 3, (len(recording.chain_NJ), len(shapes)))
        table = Table(recording, world, memory_bytes=0, max_catch_up_s=1e9)
        policy = ChoosingPolicy(table, promise_NS, knows_answer=False)
        sequences = [table.begin(slot, recording.answers[slot]) for slot in range(3)]
        expected = 3 - policy.speed * world.pass_s(3)
        for s, shape in enumerate(shapes):
            gains = [promise_NS[recording.answers[slot].first, s] for slot in range(3)]
            for drafting in itertools.product((0, 1), repeat=3):
                options = [policy.draft_options(q, NO_COPIES, s)[0] for q in sequences]
                columns = 3 + sum(d * option.columns for d, option in zip(drafting, options, strict=True))
                seconds = world.pass_s(columns) + world.draft_s(sum(drafting), shape, 0)
                expected = max(expected, 3 + float(np.dot(drafting, gains)) - policy.speed * seconds)
        assert policy.best(sequences).worth == pytest.approx(expected)


@pytest.mark.parametrize("flag", [{"floor": False}, {"tries": False}, {"known_rate_N": "true"}, {"known_costs": True}])
def test_each_flag_of_the_planner_changes_what_it_does(flag: dict[str, Any]) -> None:
    # All right: the floor times plain rounds now and then. By request: what is known needs not be found out.
    right = [True] * (12 * LENGTH) if "floor" in flag else every_other()
    recording = toy(right)
    if "known_rate_N" in flag:
        flag = {"known_rate_N": [0.98 * each for each in right]}
    rounds = timed(1)
    if "known_costs" in flag:  # the calibration had said that drafting costs nearly nothing
        rounds.initial["chain"] = [(n, levels, s / 100) for n, levels, s in rounds.initial["chain"]]
    results = []
    for how in ({}, flag):
        table = Table(recording, World(rounds), memory_bytes=0, max_catch_up_s=1e9)
        results.append(replay(table, PlannerPolicy(table, **how)))
    without, with_flag = results
    assert with_flag.seconds != pytest.approx(without.seconds, rel=1e-4)
    if "known_rate_N" in flag:
        assert with_flag.speed > 1.02 * without.speed


def test_the_memory_lets_later_requests_copy() -> None:
    recording = toy([False] * (12 * LENGTH), copied=15)
    same = recording.answers[0].token_ids
    answers = [RecordedAnswer(**{**vars(answer), "token_ids": same}) for answer in recording.answers]
    recording = Recording(**{**vars(recording), "answers": answers})
    speeds = []
    for memory_bytes in (0, 1 << 20):
        table = Table(recording, World(timed(1)), memory_bytes=memory_bytes, max_catch_up_s=1e9)
        speeds.append(replay(table, PlannerPolicy(table)).speed)
    assert speeds[1] > 1.5 * speeds[0]


def test_the_error_is_what_the_planners_own_rounds_took_beyond_the_expected() -> None:
    assert World(timed(4)).error() == pytest.approx(0.0, abs=1e-3)
    assert World(timed(4, own=1.25)).error() == pytest.approx(-0.2, abs=1e-3)
    assert World(timed(4)).draft_s(3, DraftShape(3, 7), 0) == pytest.approx(3 * LEVEL_S, rel=1e-3)


def test_promises_know_what_was_observed_and_nothing_else() -> None:
    gen = torch.Generator().manual_seed(0)
    coin_N = torch.rand(40 * LENGTH, generator=gen) < 0.5
    told = toy(coin_N.tolist(), requests=40, hidden=coin_N[:, None].float())
    untold = toy(coin_N.tolist(), requests=40, hidden=torch.rand(len(coin_N), 1, generator=gen))
    accepted_NS = accepted_by_shape(told)
    assert explained(promises(told, accepted_NS, sees_draft=False), accepted_NS) > 0.6
    assert explained(promises(untold, accepted_NS, sees_draft=False), accepted_NS) < 0.05
    assert explained(promises(untold, accepted_NS, sees_draft=True), accepted_NS) > 0.6


def test_one_folder_holds_what_was_recorded_in_one_way(tmp_path: Path) -> None:
    how = {"settings": {"target": {"precision": "int4"}}, "prompts": ("a.jsonl",), "temperature": 0.0}
    for _ in range(2):
        start_or_resume(tmp_path / "out", how)
    for changed in ({"temperature": 1.0}, {"settings": {"target": {"precision": "bf16"}}}):
        with pytest.raises(ConfigError, match="--out .*name another folder"):
            start_or_resume(tmp_path / "out", {**how, **changed})
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "answers.safetensors").touch()
    with pytest.raises(ConfigError, match="--out .*name another folder"):  # recorded with settings that nobody knows
        start_or_resume(tmp_path / "old", how)


@pytest.mark.skipif(native.library() is None, reason="no C++ compiler, or AURORA_LIT_NATIVE=0")
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_recorded_proposals_are_those_of_the_engine(temperature: float, tmp_path: Path) -> None:
    target = Target.load(save_model("llama", tmp_path / "llama", num_hidden_layers=4), precision="bf16")
    gen = torch.Generator().manual_seed(3)
    ids = [torch.randint(1, VOCAB, (length,), generator=gen).tolist() for length in (5, 17)]
    draft = trained_draft(target, torch.tensor([(each * 8)[:40] for each in ids]), steps=20)
    prompts = [BenchPrompt(domain="d", token_ids=tuple(each)) for each in ids]

    def engine(**changes: Any) -> Any:
        return make_engine(target, draft, tree_tokens=7, max_draft_tokens=3, lookup=False, **changes)

    made = record_answers(engine(), prompts, temperature=temperature, max_tokens=12)
    made.save(tmp_path)
    recording = Recording.load(tmp_path)
    always = engine(adaptive=False)  # the deepest and largest tree in every round
    params = {"max_tokens": 12, "temperature": temperature}
    requests = [request(str(i), p, **params) for i, p in enumerate(ids)]
    requests = [type(each)(**{**vars(each), "noise_key": i}) for i, each in enumerate(requests)]
    found = run(always, requests)
    for i, answer in enumerate(recording.answers):
        assert answer.token_ids == found[str(i)].token_ids
    table = Table(recording, World(timed(1)), memory_bytes=0, max_catch_up_s=1e9)
    alone = replay(table, FixedPolicy(table, (DraftShape(3, 7), None)))
    rounds = sum(len(found[str(i)].rounds) for i in range(2))
    assert alone.rounds == rounds
    rounds_of_2 = TimedRounds(batch_size=2)
    time_rounds(engine(adaptive=True), prompts * 20, rounds_of_2, temperature=temperature, max_tokens=12)
    assert {each.drawn for each in rounds_of_2.rounds} == {True, False}
    assert {each.drafting for each in rounds_of_2.rounds if each.shape[0]} <= {1, 2}
    assert 0 < rounds_of_2.prompt_share < 1
