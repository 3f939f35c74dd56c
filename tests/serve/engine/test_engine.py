"""The engine's promise on tiny models: greedy output is transformers' own, whatever drafts, whoever else is served."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from support.tiny_models import (
    VOCAB,
    Answer,
    make_engine,
    random_draft,
    reference_model,
    request,
    run,
    save_model,
    trained_draft,
)

from aurora_lit.errors import RequestError
from aurora_lit.kernels import native
from aurora_lit.models.target import Target
from aurora_lit.modules.draft.eagle3 import Draft
from aurora_lit.request import Output, Request
from aurora_lit.serve.engine.engine import Engine
from aurora_lit.serve.speculation.costs import CostTable
from aurora_lit.serve.speculation.drafter import Drafter, DraftInputs

LENGTHS = (1, 2, 5, 9, 16, 17, 30, 41)
NEW = 24


@dataclass(frozen=True, kw_only=True)
class World:
    """A target, drafts of two kinds, prompts, and what transformers answers."""

    folder: Path
    target: Target
    drafts: dict[str, Draft | None]
    prompts: list[list[int]]
    answers: list[list[int]]

    def draft(self, kind: str) -> Draft | None:
        """A copy, since an engine packs the draft it is given."""
        return copy.deepcopy(self.drafts[kind])

    def engine(self, kind: str = "trained", *, k: int = 4, **changes: object) -> Engine:
        return make_engine(self.target, self.draft(kind), max_draft_tokens=k, **changes)

    def request(self, i: int, **params: object) -> Request:
        return request(str(i), self.prompts[i], **{"max_tokens": NEW, **params})


def generate(folder: Path, prompts: list[list[int]], new: int) -> list[list[int]]:
    model = reference_model(folder)
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
        answers.append(out[0, len(prompt) :].tolist())
    return answers


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = save_model("llama", tmp_path_factory.mktemp("llama"), num_hidden_layers=4)
    gen = torch.Generator().manual_seed(3)
    prompts = [torch.randint(0, VOCAB, (length,), generator=gen).tolist() for length in LENGTHS]
    answers = generate(folder, prompts, NEW)
    target = Target.load(folder, precision="fp32")
    width = max(LENGTHS) + NEW
    learnt = [(p + a + [0] * width)[:width] for p, a in zip(prompts, answers, strict=True)]
    trained = trained_draft(target, torch.tensor(learnt))
    drafts = {"none": None, "random": random_draft(target), "trained": trained}
    return World(folder=folder, target=target, drafts=drafts, prompts=prompts, answers=answers)


@pytest.fixture
def drafted(monkeypatch: pytest.MonkeyPatch) -> list[DraftInputs]:
    """Every call for proposals, as they come."""
    calls: list[DraftInputs] = []
    original = Drafter.propose

    def propose(self: Drafter, rows: DraftInputs, **options: object) -> object:
        calls.append(rows)
        return original(self, rows, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Drafter, "propose", propose)
    return calls


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize(
    ("kind", "k", "batch"),
    [
        ("none", 4, 8),
        ("random", 1, 8),
        ("random", 4, 8),
        ("trained", 0, 8),
        ("trained", 1, 8),
        ("trained", 2, 8),
        ("trained", 3, 8),
        ("trained", 4, 8),
        ("trained", 5, 8),
        ("trained", 6, 8),
        ("none", 0, 1),
        ("trained", 4, 1),
    ],
)
def test_greedy_output_is_that_of_transformers(world: World, kind: str, k: int, batch: int, adaptive: bool) -> None:
    engine = world.engine(kind, k=k, adaptive=adaptive, max_batch_size=batch)
    some = range(8) if batch > 1 else (0, 3, 6)
    given = run(engine, [world.request(i) for i in some])
    for i in some:
        assert given[str(i)].token_ids == world.answers[i], f"prompt {i}"
        assert given[str(i)].finish_reason == "length"
    stats = engine.stats
    assert stats.generated_tokens == len(some) * NEW
    assert stats.prompt_tokens == sum(LENGTHS[i] for i in some)
    assert (
        stats.accepted
        == sum(stats.accepted_by_position)
        == sum(output.num_accepted for answer in given.values() for output in answer.rounds)
    )
    if kind == "none" or k == 0:
        assert stats.drafts == stats.proposed == 0
    elif kind == "trained" and not adaptive:
        assert stats.accepted > 0.2 * len(some) * NEW, "the test needs a draft that is often right"


@pytest.mark.parametrize("kernels", ["native", "torch"])
def test_requests_come_and_go_at_any_time(world: World, kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three slots for eight requests of all lengths, prompts in chunks of 6 (one and a half beside running rows)."""
    if kernels == "torch":
        monkeypatch.setattr(native, "library", lambda: None)
    target = Target.load(world.folder, precision="fp32")
    engine = make_engine(target, world.draft("trained"), max_batch_size=3, prefill_chunk_tokens=6, max_draft_tokens=3)
    new = [24, 1, 7, 13, 2, 24, 3, 20]
    requests = [world.request(i, max_tokens=new[i]) for i in range(8)]
    given = run(engine, requests, arrivals=[2, 0, 0, 1, 5, 5, 20, 21])
    assert [given[str(i)].token_ids for i in range(8)] == [world.answers[i][: new[i]] for i in range(8)]
    assert engine.num_running == engine.num_waiting == 0


def test_a_long_prompt_does_not_stop_those_who_are_being_answered(world: World) -> None:
    engine = world.engine("none", prefill_chunk_tokens=8)
    engine.submit(world.request(0))
    engine.round()
    engine.submit(world.request(7))
    for _ in range(10):  # 40 prompt tokens, 2 a round
        assert [output.request_id for output in engine.round()] == ["0"]


def test_a_newcomer_beside_a_request_at_its_limit(world: World) -> None:
    """Their drafts catch up in one pass, of which the longer row needs little and has no room for much."""
    engine = world.engine("trained", k=2, max_seq_len=48, prefill_chunk_tokens=128)
    given = run(engine, [world.request(7), world.request(6)], arrivals=[0, 2])
    assert given["7"].token_ids == world.answers[7][: 48 - 41]
    assert given["6"].token_ids == world.answers[6][: 48 - 30]


# -- where an answer ends ------------------------------------------------------------------------------------------


def inside_an_accepted_run(given: dict[str, Answer]) -> tuple[int, int]:
    """A request and a place in its answer: an accepted token, not the round's last, that came here first."""
    for name, answer in given.items():
        place = 0
        for output in answer.rounds:
            for i in range(min(output.num_accepted, len(output.token_ids) - 1)):
                if i and output.token_ids[i] not in answer.token_ids[: place + i]:
                    return int(name), place + i
            place += len(output.token_ids)
    raise AssertionError("no such place; the test needs a draft that is often right")


@pytest.mark.parametrize("how", ["eos", "stop_token_ids"])
def test_an_end_token_inside_an_accepted_run_ends_the_answer_there(world: World, how: str) -> None:
    i, place = inside_an_accepted_run(run(world.engine(k=6), [world.request(i) for i in range(8)]))
    end = world.answers[i][place]
    engine = world.engine(k=6, eos_token_ids=frozenset({end} if how == "eos" else ()))
    stop = () if how == "eos" else (end,)
    given = run(engine, [world.request(i, stop_token_ids=stop)])[str(i)]
    assert given.token_ids == world.answers[i][: place + 1]
    assert given.finish_reason == "stop"
    if how == "eos":
        assert run(engine, [world.request(i, ignore_eos=True)])[str(i)].token_ids == world.answers[i]


def test_an_end_token_as_the_last_allowed_token_is_a_stop(world: World) -> None:
    place = next(p for p in range(2, NEW) if world.answers[3][p] not in world.answers[3][:p])
    last = world.request(3, max_tokens=place + 1, stop_token_ids=(world.answers[3][place],))
    assert run(world.engine(), [last])["3"].finish_reason == "stop"


@pytest.mark.parametrize("k", [0, 4])
def test_max_seq_len_ends_an_answer(world: World, k: int) -> None:
    given = run(world.engine(k=k, max_seq_len=21), [world.request(i) for i in (4, 5)])
    assert [given[name].token_ids for name in "45"] == [world.answers[4][:5], world.answers[5][:4]]
    assert given["4"].finish_reason == given["5"].finish_reason == "length"


def test_a_learned_position_table_may_be_used_to_its_end(tmp_path: Path) -> None:
    folder = save_model("gpt2", tmp_path, n_positions=24, n_layer=3)
    target = Target.load(folder, precision="fp32")
    engine = make_engine(target, random_draft(target), max_seq_len=24, max_draft_tokens=4)
    given = run(engine, [request("a", (1, 2, 3, 4), max_tokens=50)])
    assert given["a"].token_ids == generate(folder, [[1, 2, 3, 4]], 20)[0]


def test_what_cannot_fit_is_refused(world: World) -> None:
    engine = world.engine(max_seq_len=20)
    with pytest.raises(RequestError, match="20 tokens and engine.max_seq_len is 20") as refused:
        engine.submit(request("a", [1] * 20))
    assert (refused.value.param, refused.value.code) == ("prompt", "context_length_exceeded")
    with pytest.raises(RequestError, match="no tokens"):
        engine.submit(request("a", ()))
    assert not engine.has_work
    assert len(run(engine, [request("a", [1] * 19, max_tokens=5)])["a"].token_ids) == 1


# -- cancelling ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["none", "trained"])
def test_cancelling_frees_the_slot_and_touches_nobody_else(world: World, kind: str) -> None:
    engine = world.engine(kind, max_batch_size=3, prefill_chunk_tokens=8, k=3)
    given = {str(i): list[int]() for i in range(8)}

    def rounds(count: int) -> None:
        for output in [o for _ in range(count) for o in engine.round()]:
            given[output.request_id] += output.token_ids

    for i in (3, 4, 7, 5, 2):
        engine.submit(world.request(i))
    rounds(3)
    assert (engine.num_running, engine.num_waiting) == (3, 2)
    assert given["3"]
    assert not given["7"], "still reading its prompt"
    engine.cancel("3")  # decoding
    engine.cancel("7")  # prefilling
    engine.cancel("5")  # waiting
    engine.cancel("nobody")
    assert (engine.num_running, engine.num_waiting) == (1, 1)
    cut = {name: len(given[name]) for name in "357"}
    engine.submit(world.request(6))
    while engine.has_work:
        rounds(1)
    assert all(given[str(i)] == world.answers[i] for i in (2, 4, 6))
    assert cut == {name: len(given[name]) for name in "357"}, "nothing is given after a cancellation"


def test_a_request_id_may_come_again_with_other_options(world: World) -> None:
    engine = world.engine()
    run(engine, [world.request(2)])
    biased = run(engine, [world.request(2, logit_bias={7: 100.0})])["2"]
    assert biased.token_ids == [7] * NEW


# -- without a draft -----------------------------------------------------------------------------------------------


def test_no_draft_pass_runs_for_requests_that_do_not_speculate(world: World, drafted: list[DraftInputs]) -> None:
    engine = world.engine()
    plain = [world.request(i, speculate=False) for i in range(8)]
    given = run(engine, plain)
    assert [given[str(i)].token_ids for i in range(8)] == world.answers
    assert drafted == []
    assert engine.stats.drafts == 0


def test_requests_with_and_without_speculation_share_a_batch(world: World, drafted: list[DraftInputs]) -> None:
    engine = world.engine(prefill_chunk_tokens=256)
    given = run(engine, [world.request(i, speculate=i % 2 == 0) for i in range(8)])
    assert [given[str(i)].token_ids for i in range(8)] == world.answers
    assert max(len(rows.lengths) for rows in drafted) == 4
    for i in range(8):
        assert (sum(output.num_proposed for output in given[str(i)].rounds) > 0) == (i % 2 == 0)


def test_no_draft_pass_runs_when_it_does_not_pay_but_for_a_probe(world: World, drafted: list[DraftInputs]) -> None:
    engine = world.engine(adaptive=True, max_seq_len=160)
    engine.policy.first_step_cost = CostTable()
    engine.policy.first_step_cost.update(1, 1, 60.0)
    drafted.clear()  # the calibration's
    engine.submit(request("a", world.prompts[3], max_tokens=135))
    outputs: list[Output] = []
    while engine.has_work:
        outputs += engine.round()
    assert len(drafted) == 1
    assert [output.num_proposed for output in outputs].index(1) == 127
    assert [t for output in outputs for t in output.token_ids][:NEW] == world.answers[3]


def test_a_probe_drafts_for_the_row_alone_that_has_least_to_catch_up_with(
    world: World, drafted: list[DraftInputs]
) -> None:
    engine = world.engine(adaptive=True, max_seq_len=200)
    engine.policy.first_step_cost = CostTable()
    engine.policy.first_step_cost.update(4, 1, 60.0)
    drafted.clear()  # the calibration's
    prompts = [world.prompts[3] * 3, world.prompts[3], world.prompts[3] * 2]
    for i, prompt in enumerate(prompts):
        engine.submit(request(str(i), prompt, max_tokens=140))
    while engine.has_work:
        engine.round()
    assert len(drafted) == 1
    (length,) = drafted[0].lengths
    assert len(prompts[1]) + 120 < length < len(prompts[2]) + 120


@pytest.mark.parametrize(("max_tokens", "pays"), [(8, False), (NEW, True)])
def test_a_prompt_is_not_drafted_for_when_little_is_to_come(
    world: World, drafted: list[DraftInputs], max_tokens: int, pays: bool
) -> None:
    """Reading the prompt through the draft would take longer than its proposals save."""
    engine = world.engine(adaptive=True)
    engine.policy.position_cost, engine.policy.target_cost = 1.0, CostTable()
    engine.policy.target_cost.begin_with(1, 1, 1.0)
    engine.policy.times_count = False
    drafted.clear()  # the calibration's
    run(engine, [request("a", world.prompts[3][:9], max_tokens=max_tokens)])
    assert bool(drafted) == pays


@pytest.mark.parametrize("draft", [lambda target: random_draft(target), lambda target: None])
def test_bf16_without_kernels(
    world: World, draft: Callable[[Target], Draft | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not exact there, since torch's sums depend on the shape; but it runs."""
    monkeypatch.setattr(native, "library", lambda: None)
    target = Target.load(world.folder, precision="bf16")
    engine = make_engine(target, draft(target), max_draft_tokens=3)
    given = run(engine, [world.request(3), world.request(6, temperature=1.0)])
    assert [len(answer.token_ids) for answer in given.values()] == [NEW, NEW]
