"""Engine on tiny models: greedy output is that of transformers, with any draft and beside any other requests."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

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
from aurora_lit.models.interface import Target
from aurora_lit.models.loading import load_target
from aurora_lit.modules.draft.eagle3 import Eagle3Draft
from aurora_lit.request import Request, Source
from aurora_lit.serve.engine.engine import Engine
from aurora_lit.serve.engine.round_plan import ProposedRound, RoundPlan
from aurora_lit.serve.engine.target_runner import TargetRunner
from aurora_lit.serve.engine.thread_budget import ThreadBudget
from aurora_lit.serve.speculation.floor import Allowed, RoundKind
from aurora_lit.serve.speculation.sources.drafter import Drafter, DraftInputs
from aurora_lit.serve.speculation.weigh import Weigher

LENGTHS = (1, 2, 5, 9, 16, 17, 30, 41)
NEW = 24


@dataclass(frozen=True, kw_only=True)
class TinyModels:
    """A target, drafts by kind ("none", "random", "trained" on the answers), prompts, and transformers' answers."""

    folder: Path
    target: Target
    drafts: dict[str, Eagle3Draft | None]
    prompts: list[list[int]]
    answers: list[list[int]]

    def draft(self, kind: str) -> Eagle3Draft | None:
        """A copy: an engine packs its draft's weights in place."""
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
def models(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    folder = save_model("llama", tmp_path_factory.mktemp("llama"), num_hidden_layers=4)
    gen = torch.Generator().manual_seed(3)
    prompts = [torch.randint(0, VOCAB, (length,), generator=gen).tolist() for length in LENGTHS]
    answers = generate(folder, prompts, NEW)
    target = load_target(folder, precision="fp32")
    width = max(LENGTHS) + NEW
    texts = [(p + a + [0] * width)[:width] for p, a in zip(prompts, answers, strict=True)]
    trained = trained_draft(target, torch.tensor(texts))
    drafts = {"none": None, "random": random_draft(target), "trained": trained}
    return TinyModels(folder=folder, target=target, drafts=drafts, prompts=prompts, answers=answers)


@pytest.fixture
def drafted(monkeypatch: pytest.MonkeyPatch) -> list[DraftInputs]:
    """The inputs of every call of `Drafter.propose`, in order."""
    calls: list[DraftInputs] = []
    original = Drafter.propose

    def propose(self: Drafter, inputs: DraftInputs, **options: object) -> object:
        calls.append(inputs)
        return original(self, inputs, **options)  # type: ignore[arg-type]

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
        *(pytest.param("trained", k, 8, marks=pytest.mark.slow) for k in (2, 3, 5)),
        ("trained", 4, 8),
        ("trained", 6, 8),
        ("none", 0, 1),
        ("trained", 4, 1),
    ],
)
def test_greedy_output_is_that_of_transformers(
    models: TinyModels, kind: str, k: int, batch: int, adaptive: bool
) -> None:
    engine = models.engine(kind, k=k, adaptive=adaptive, max_batch_size=batch)
    some = range(8) if batch > 1 else (0, 3, 6)
    answers = run(engine, [models.request(i) for i in some])
    for i in some:
        assert answers[str(i)].token_ids == models.answers[i], f"prompt {i}"
        assert answers[str(i)].finish_reason == "length"
    stats = engine.counters
    assert stats.generated_tokens == len(some) * NEW
    assert stats.prompt_tokens == sum(LENGTHS[i] for i in some)
    assert (
        stats.accepted
        == sum(stats.accepted_by_position)
        == sum(output.num_accepted for answer in answers.values() for output in answer.rounds)
    )
    if kind == "none" or k == 0:
        assert stats.drafts == stats.proposed == 0
    elif kind == "trained" and not adaptive:
        assert stats.accepted > 0.2 * len(some) * NEW, "the test needs a draft that is often accepted"


@pytest.mark.parametrize("kernels", ["native", "torch"])
def test_requests_come_and_go_at_any_time(models: TinyModels, kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three slots, eight requests of all lengths, prompts in chunks of 6 tokens."""
    if kernels == "torch":
        monkeypatch.setattr(native, "library", lambda: None)
    target = load_target(models.folder, precision="fp32")
    engine = make_engine(target, models.draft("trained"), max_batch_size=3, prefill_chunk_tokens=6, max_draft_tokens=3)
    new = [24, 1, 7, 13, 2, 24, 3, 20]
    requests = [models.request(i, max_tokens=new[i]) for i in range(8)]
    answers = run(engine, requests, arrivals=[2, 0, 0, 1, 5, 5, 20, 21])
    assert [answers[str(i)].token_ids for i in range(8)] == [models.answers[i][: new[i]] for i in range(8)]
    assert engine.num_running == engine.num_waiting == 0


def test_a_long_prompt_does_not_delay_decoding_sequences(models: TinyModels) -> None:
    engine = models.engine("none", prefill_chunk_tokens=8)
    engine.submit(models.request(0))
    engine.round()
    engine.submit(models.request(7))
    for _ in range(5):  # 40 prompt tokens, 8 a round
        assert [output.request_id for output in engine.round()] == ["0"]
    assert {output.request_id for output in engine.round()} == {"0", "7"}


def test_a_new_request_beside_one_at_max_seq_len(models: TinyModels) -> None:
    """One pass prefills the draft cache of both, and the longer sequence has room for few positions."""
    engine = models.engine("trained", k=2, max_seq_len=48, prefill_chunk_tokens=128)
    answers = run(engine, [models.request(7), models.request(6)], arrivals=[0, 2])
    assert answers["7"].token_ids == models.answers[7][: 48 - 41]
    assert answers["6"].token_ids == models.answers[6][: 48 - 30]


# -- where an answer ends ------------------------------------------------------------------------------------------


def inside_an_accepted_run(answers: dict[str, Answer]) -> tuple[int, int]:
    """A request, and the place in its answer of an accepted token, not the last of its round, that is new there."""
    for name, answer in answers.items():
        place = 0
        for output in answer.rounds:
            for i in range(min(output.num_accepted, len(output.token_ids) - 1)):
                if i and output.token_ids[i] not in answer.token_ids[: place + i]:
                    return int(name), place + i
            place += len(output.token_ids)
    raise AssertionError("no such place: the test needs a draft that is often accepted")


@pytest.mark.parametrize("how", ["eos", "stop_token_ids"])
def test_an_end_token_inside_an_accepted_run_ends_the_answer_there(models: TinyModels, how: str) -> None:
    i, place = inside_an_accepted_run(run(models.engine(k=6), [models.request(i) for i in range(8)]))
    end = models.answers[i][place]
    engine = models.engine(k=6, eos_token_ids=frozenset({end} if how == "eos" else ()))
    stop = () if how == "eos" else (end,)
    answer = run(engine, [models.request(i, stop_token_ids=stop)])[str(i)]
    assert answer.token_ids == models.answers[i][: place + 1]
    assert answer.finish_reason == "stop"
    if how == "eos":
        assert run(engine, [models.request(i, ignore_eos=True)])[str(i)].token_ids == models.answers[i]


def test_an_end_token_as_the_last_allowed_token_is_a_stop(models: TinyModels) -> None:
    place = next(p for p in range(2, NEW) if models.answers[3][p] not in models.answers[3][:p])
    last = models.request(3, max_tokens=place + 1, stop_token_ids=(models.answers[3][place],))
    assert run(models.engine(), [last])["3"].finish_reason == "stop"


@pytest.mark.parametrize("k", [0, 4])
def test_max_seq_len_ends_an_answer(models: TinyModels, k: int) -> None:
    answers = run(models.engine(k=k, max_seq_len=21), [models.request(i) for i in (4, 5)])
    assert [answers[name].token_ids for name in "45"] == [models.answers[4][:5], models.answers[5][:4]]
    assert answers["4"].finish_reason == answers["5"].finish_reason == "length"


def test_all_positions_of_a_learned_position_table_can_be_used(tmp_path: Path) -> None:
    folder = save_model("gpt2", tmp_path, n_positions=24, n_layer=3)
    target = load_target(folder, precision="fp32")
    engine = make_engine(target, random_draft(target), max_seq_len=24, max_draft_tokens=4)
    answers = run(engine, [request("a", (1, 2, 3, 4), max_tokens=50)])
    assert answers["a"].token_ids == generate(folder, [[1, 2, 3, 4]], 20)[0]


def test_requests_that_do_not_fit_are_refused(models: TinyModels) -> None:
    engine = models.engine(max_seq_len=20)
    with pytest.raises(RequestError, match="20 tokens, this model's maximum context length is 20 tokens") as refused:
        engine.submit(request("a", [1] * 20))
    assert (refused.value.param, refused.value.code) == ("prompt", "context_length_exceeded")
    with pytest.raises(RequestError, match="no tokens"):
        engine.submit(request("a", ()))
    with pytest.raises(RequestError, match=f"the target has no token {VOCAB}; leave it out"):
        engine.submit(request("a", [1, VOCAB, 2]))
    assert not engine.has_work
    assert len(run(engine, [request("a", [1] * 19, max_tokens=5)])["a"].token_ids) == 1


# -- cancelling ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["none", "trained"])
def test_cancelling_frees_the_slot_and_affects_no_other_request(models: TinyModels, kind: str) -> None:
    engine = models.engine(kind, max_batch_size=3, prefill_chunk_tokens=8, k=3)
    answers = {str(i): list[int]() for i in range(8)}

    def rounds(count: int) -> None:
        for output in [o for _ in range(count) for o in engine.round()]:
            answers[output.request_id] += output.token_ids

    for i in (3, 4, 7, 5, 2):
        engine.submit(models.request(i))
    rounds(3)
    assert (engine.num_running, engine.num_waiting) == (3, 2)
    assert answers["3"]
    assert not answers["7"], "still prefilling"
    engine.cancel("3")  # decoding
    engine.cancel("7")  # prefilling
    engine.cancel("5")  # waiting
    engine.cancel("unknown")
    assert (engine.num_running, engine.num_waiting) == (1, 1)
    cut = {name: len(answers[name]) for name in "357"}
    engine.submit(models.request(6))
    while engine.has_work:
        rounds(1)
    assert all(answers[str(i)] == models.answers[i] for i in (2, 4, 6))
    assert cut == {name: len(answers[name]) for name in "357"}, "there is no output after a cancellation"


def test_a_request_id_may_come_again_with_other_options(models: TinyModels) -> None:
    engine = models.engine()
    run(engine, [models.request(2)])
    biased = run(engine, [models.request(2, logit_bias={7: 100.0})])["2"]
    assert biased.token_ids == [7] * NEW


# -- without a draft -----------------------------------------------------------------------------------------------


def test_the_draft_does_not_run_for_requests_that_do_not_speculate(
    models: TinyModels, drafted: list[DraftInputs]
) -> None:
    engine = models.engine()
    plain = [models.request(i, speculate=False) for i in range(8)]
    answers = run(engine, plain)
    assert [answers[str(i)].token_ids for i in range(8)] == models.answers
    assert drafted == []
    assert engine.counters.drafts == 0


def test_requests_with_and_without_speculation_share_a_batch(models: TinyModels, drafted: list[DraftInputs]) -> None:
    engine = models.engine(prefill_chunk_tokens=256)
    answers = run(engine, [models.request(i, speculate=i % 2 == 0) for i in range(8)])
    assert [answers[str(i)].token_ids for i in range(8)] == models.answers
    assert max(len(inputs.lengths) for inputs in drafted) == 4
    for i in range(8):
        assert (sum(output.num_proposed for output in answers[str(i)].rounds) > 0) == (i % 2 == 0)


@pytest.mark.parametrize("speed", [0.0, 1e12])
def test_drafted_tokens_are_proposed_if_they_repay_their_time(
    models: TinyModels, monkeypatch: pytest.MonkeyPatch, speed: float
) -> None:
    engine = models.engine(adaptive=True, branches=True)
    engine.floor = None
    monkeypatch.setattr(Weigher, "speed", lambda *_: speed)
    monkeypatch.setattr(engine.costs, "round_s", lambda size, counts: 0.001 * (size + sum(counts)))
    outputs = run(engine, [request("a", models.prompts[3], max_tokens=NEW)])["a"].rounds
    assert any(output.num_proposed for output in outputs) == (speed == 0.0)
    assert [t for output in outputs for t in output.token_ids] == models.answers[3]


@pytest.mark.parametrize("is_cancelled", [False, True])
def test_rounds_compute_on_the_threads_of_their_budget_until_no_request_is_left(
    models: TinyModels, monkeypatch: pytest.MonkeyPatch, is_cancelled: bool
) -> None:
    """Here as beside a learner that has the other core; the target's passes are timed, and nothing else."""
    steps: list[tuple[str, int]] = []
    run_target = TargetRunner.run

    def told(name: str) -> None:
        steps.append((name, torch.get_num_threads()))

    def run_and_tell(runner: TargetRunner, plan: RoundPlan) -> Any:
        told("pass")
        return run_target(runner, plan)

    monkeypatch.setattr(ThreadBudget, "begin_pass", lambda _: told("begin"))
    monkeypatch.setattr(TargetRunner, "run", run_and_tell)
    monkeypatch.setattr(ThreadBudget, "end_pass", lambda _: told("end"))
    engine = models.engine(threads=ThreadBudget(threads=2, cores=2, busy_cores=lambda: 1))
    num_threads = torch.get_num_threads()
    try:
        if is_cancelled:
            engine.submit(models.request(3))
            engine.round()
            assert torch.get_num_threads() == 1
            engine.cancel("3")
        else:
            assert run(engine, [models.request(3)])["3"].token_ids == models.answers[3]
        assert steps[:3] == [("begin", 1), ("pass", 1), ("end", 1)]
        assert steps == steps[:3] * (len(steps) // 3)
        assert not engine._updates_costs, "such rounds are not compared with those on all threads"
        assert torch.get_num_threads() == 2, "for what else this process does"
    finally:
        torch.set_num_threads(num_threads)


@pytest.mark.parametrize("draft", [lambda target: random_draft(target), lambda target: None])
def test_bf16_without_kernels(
    models: TinyModels, draft: Callable[[Target], Eagle3Draft | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not exact, because torch's sums depend on shapes; but it runs."""
    monkeypatch.setattr(native, "library", lambda: None)
    target = load_target(models.folder, precision="bf16")
    engine = make_engine(target, draft(target), max_draft_tokens=3)
    answers = run(engine, [models.request(3), models.request(6, temperature=1.0)])
    assert [len(answer.token_ids) for answer in answers.values()] == [NEW, NEW]


def test_rounds_that_carry_prompts_do_not_speculate(models: TinyModels, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = models.engine(adaptive=True, prefill_chunk_tokens=4)
    assert engine.floor is not None
    monkeypatch.setattr(engine.floor, "allows", lambda kind, **_: Allowed(copies=True, drafts=True))
    monkeypatch.setattr(Weigher, "speed", lambda *_: 0.0)
    engine.submit(models.request(0, max_tokens=24))
    proposed: dict[bool, list[int]] = {False: [], True: []}
    for number in range(12):
        if number == 5:
            engine.submit(models.request(7, max_tokens=4))
        waits = number == 5 or bool(engine._prefill.sequences)
        proposed[waits] += [output.num_proposed for output in engine.round()]
    assert len(proposed[True]) >= 3
    assert set(proposed[True]) == {0}
    assert max(proposed[False]) == 4


def test_rests_end_though_rounds_with_forced_tokens_are_untimed(
    models: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = models.engine(adaptive=True)
    assert engine.floor is not None
    passed = list[RoundKind]()
    monkeypatch.setattr(engine.floor, "pass_untimed", passed.append)
    propose = engine.proposer.propose

    def forced(*args: Any, **kwargs: Any) -> ProposedRound:
        proposed = propose(*args, **kwargs)
        proposals = [replace(proposal, source=Source.GRAMMAR) for proposal in proposed.proposals]
        return replace(proposed, proposals=proposals)

    monkeypatch.setattr(engine.proposer, "propose", forced)
    rounds = len(run(engine, [models.request(0, max_tokens=6)])["0"].rounds)
    assert passed == [RoundKind(1, sampled=False, threads=torch.get_num_threads())] * rounds
    assert not engine.floor.compared_s


def test_rounds_with_fewer_threads_are_judged_among_themselves(
    models: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = models.engine(adaptive=True)
    assert engine.floor is not None
    observed, observe = list[RoundKind](), engine.floor.observe

    def note(kind: RoundKind, **outcome: Any) -> None:
        observed.append(kind)
        observe(kind, **outcome)

    monkeypatch.setattr(engine.floor, "observe", note)
    for threads in (3, 1):  # a learner takes some of many, other work all but one
        observed.clear()
        monkeypatch.setattr(torch, "get_num_threads", lambda count=threads: count)
        rounds = len(run(engine, [models.request(0, max_tokens=6)])["0"].rounds)
        assert observed == [RoundKind(1, sampled=False, threads=threads)] * rounds


def test_what_the_end_of_a_request_takes_is_not_a_rounds_time(
    models: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is proposed for a last token, so plain rounds, by which speculation is judged, end most requests."""
    engine, observed, slow_s = models.engine(adaptive=True), list[float](), 0.1
    assert engine.floor is not None
    free = engine._allocator.free

    def free_slowly(slot: int) -> None:
        time.sleep(slow_s)
        free(slot)

    monkeypatch.setattr(engine.floor, "observe", lambda kind, *, seconds, **_: observed.append(seconds))
    monkeypatch.setattr(engine._allocator, "free", free_slowly)
    monkeypatch.setattr(engine.costs, "observe_round", lambda size, counts, seconds: observed.append(seconds))
    for number in range(3):
        run(engine, [models.request(number, max_tokens=2)])
    assert len(observed) >= 6
    assert min(sorted(observed)[-3:]) < slow_s


def test_where_rows_are_padded_a_rounds_time_is_that_of_its_longest_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = load_target(save_model("gpt2", tmp_path, n_layer=3), precision="fp32")
    engine, computed, booked = make_engine(target, random_draft(target)), list[int](), list[float]()
    assert not target.has_native_decoder
    forward = target.forward

    def noted(ids_BT: torch.Tensor, **how: Any) -> Any:
        computed.append(ids_BT.shape[1])
        return forward(ids_BT, **how)

    monkeypatch.setattr(target, "forward", noted)
    monkeypatch.setattr(engine.costs.target, "update", lambda size, length, seconds: booked.append(length))
    run(engine, [request("a", (1,), max_tokens=9), request("b", (2,), max_tokens=9, speculate=False)])
    assert booked == computed
    assert 5 in booked, "four proposals for one of the two"


def test_requests_without_speculation_end_no_rest(models: TinyModels, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = models.engine(adaptive=True)
    assert engine.floor is not None
    unasked = list[float]()
    monkeypatch.setattr(engine.floor, "observe_unasked", lambda kind, *, seconds: unasked.append(seconds))
    monkeypatch.setattr(engine.floor, "observe", lambda *_, **__: pytest.fail("nobody asked"))
    rounds = len(run(engine, [models.request(0, max_tokens=6, speculate=False)])["0"].rounds)
    assert len(unasked) == rounds
    asked = list[RoundKind]()
    monkeypatch.setattr(engine.floor, "observe", lambda kind, **_: asked.append(kind))
    run(engine, [models.request(0, max_tokens=6, speculate=False), models.request(1, max_tokens=6)])
    assert asked, "one of the two wants it"


def test_another_draft_ends_the_rest_that_the_last_one_has_caused(models: TinyModels) -> None:
    engine = models.engine(adaptive=True)
    kind = RoundKind(1, sampled=False, threads=torch.get_num_threads())
    assert engine.floor is not None
    for speculated, seconds in ((False, 0.01), (True, 0.1)):
        for _ in range(12):
            engine.floor.observe(kind, seconds=seconds, tokens=1, proposed=speculated, proposing=ProposedRound())
    assert not engine.floor.allows(kind).copies
    engine.swap_draft(copy.deepcopy(models.draft("random")), version="another")
    assert engine.floor.allows(kind).copies


def test_a_round_with_a_copied_prefix_is_no_measure_of_decoding(
    models: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = models.engine(adaptive=True)
    assert engine.floor is not None
    timed = list[int]()
    monkeypatch.setattr(engine.costs, "observe_round", lambda size, counts, seconds: timed.append(size))
    engine.submit(models.request(7, max_tokens=30))
    for _ in range(8):
        engine.round()
    timed.clear()
    engine.submit(replace(models.request(7, max_tokens=2), request_id="again"))
    cached = engine.counters.cached_tokens
    engine.round()
    assert engine.counters.cached_tokens > cached
    assert timed == []
    engine.round()
    assert timed == [2]
