"""TraceRecorder in an engine: states and distributions are those of plain passes, rounds those of the outputs."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from support.tiny_models import VOCAB, Answer, make_engine, random_draft, request, run, save_model, trained_draft
from support.trace_examples import keep_in

from aurora_lit.kernels import native
from aurora_lit.models.interface import Target
from aurora_lit.models.loading import load_target
from aurora_lit.modules.draft.eagle3 import Eagle3Draft
from aurora_lit.request import Request, Source
from aurora_lit.serve.engine.engine import Engine
from aurora_lit.serve.engine.trace_recorder import TraceRecorder
from aurora_lit.serve.speculation.weigh import Weigher
from aurora_lit.traces.record import Trace, check, from_bytes, to_bytes

LENGTHS = (5, 1, 23, 9, 12, 7)
NEW = 30
KINDS: dict[str, dict[str, object]] = {
    "greedy": {"temperature": 0.0},
    "seeded": {"temperature": 0.8, "seed": 5},
    "free": {"temperature": 0.7},
    "cut": {"temperature": 0.9, "top_p": 0.8},
}


@dataclass(frozen=True, kw_only=True)
class TinyModels:
    """A target, a draft trained on its greedy outputs, and prompts."""

    target: Target
    draft: Eagle3Draft
    prompts: list[list[int]]
    answers: list[list[int]]
    """Greedy outputs."""

    def requests(self, kind: str = "greedy", **changes: object) -> list[Request]:
        params = {"max_tokens": NEW, **KINDS[kind]}
        made = [request(str(i), prompt, **params) for i, prompt in enumerate(self.prompts)]
        fixed = {"noise_key": 5, **changes}
        return [replace(r, domain=f"d{r.request_id}", **fixed) for r in made]  # type: ignore[arg-type]

    def engine(self, traces: list[Trace], *, segment_tokens: int = 500, overlap: int = 0, **changes: object) -> Engine:
        recorder = TraceRecorder(
            keep_in(traces), hidden_size=self.target.hidden_size, segment_tokens=segment_tokens, overlap_tokens=overlap
        )
        fields: dict[str, object] = {"max_batch_size": 4, "max_draft_tokens": 4, "observer": recorder, **changes}
        return make_engine(self.target, copy.deepcopy(self.draft), **fields)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    folder = save_model("llama", tmp_path_factory.mktemp("llama"), num_hidden_layers=4)
    target = load_target(folder, precision="fp32")
    gen = torch.Generator().manual_seed(3)
    prompts = [torch.randint(0, VOCAB, (length,), generator=gen).tolist() for length in LENGTHS]
    plain = run(make_engine(target), [request(str(i), p, max_tokens=NEW) for i, p in enumerate(prompts)])
    answers = [plain[str(i)].token_ids for i in range(len(prompts))]
    width = max(LENGTHS) + NEW
    texts = [(p + a + [0] * width)[:width] for p, a in zip(prompts, answers, strict=True)]
    draft = trained_draft(target, torch.tensor(texts), steps=40)
    return TinyModels(target=target, draft=draft, prompts=prompts, answers=answers)


def all_tokens(models: TinyModels, answer: Answer, request_id: str) -> list[int]:
    return [*models.prompts[int(request_id)], *answer.token_ids]


@torch.no_grad()
def check_states(models: TinyModels, trace: Trace, tokens: Sequence[int]) -> None:
    """Compare every state of a trace with plain passes, and the distribution that its last one gives."""
    target = models.target
    first, end = trace.first_position, trace.first_position + len(trace.token_ids_T)
    assert trace.token_ids_T.tolist() == list(tokens[first:end])
    rounding = {"atol": 1e-4, "rtol": 2**-8}
    aux_BT3H, last_BTH = target.in_torch.forward_uncached(torch.tensor([list(tokens)]))
    torch.testing.assert_close(trace.aux_T3H.float(), aux_BT3H[0, first:end], **rounding)
    unread = max(0, LENGTHS[int(trace.request_id)] - 1 - first)
    assert not trace.last_TH[:unread].any(), "of a prompt only the last state counts"
    torch.testing.assert_close(trace.last_TH[unread:].float(), last_BTH[0, first + unread : end], **rounding)
    p_V, expected_V = (
        target.logits(last_H[None].float()).softmax(-1) for last_H in (trace.last_TH[-1], last_BTH[0, end - 1])
    )
    assert (p_V - expected_V).abs().max() < 0.02


def check_rounds(traces: Sequence[Trace], answer: Answer) -> None:
    """Compare the rounds of a request's traces with its outputs."""
    rounds = [
        (trace.first_position + root, n, a, source)
        for trace in traces
        for root, n, a, source in zip(
            trace.round_root_R.tolist(),
            trace.num_proposed_R.tolist(),
            trace.num_accepted_R.tolist(),
            trace.source_R.tolist(),
            strict=True,
        )
    ]
    position = LENGTHS[int(traces[0].request_id)] - 1
    expected = []
    for output in answer.rounds:
        # Left out are proposals that the end of the request cut off, and of copies those after a rejection.
        accepted = output.chain_accepted
        count = output.chain_proposed if len(output.token_ids) > accepted else accepted
        if output.only_copied:
            count = min(count, accepted + 1)
        expected.append((position, count, accepted))
        position += len(output.token_ids)
    assert [(root, n, a) for root, n, a, _ in rounds] == expected
    assert all((source == Source.TARGET) == (n == 0) for _, n, _, source in rounds)


@pytest.mark.parametrize("lookup", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("segment_tokens", [500, 7])
def test_states_distributions_and_rounds(models: TinyModels, kind: str, lookup: bool, segment_tokens: int) -> None:
    traces: list[Trace] = []
    engine = models.engine(traces, segment_tokens=segment_tokens, overlap=3, copied_tokens=15 * lookup)
    answers = run(engine, models.requests(kind))
    by_request = defaultdict(list)
    for trace in traces:
        check(trace)
        by_request[trace.request_id].append(from_bytes(to_bytes(trace)))
        check_states(models, trace, all_tokens(models, answers[trace.request_id], trace.request_id))
        assert trace.verify == ("greedy" if kind == "greedy" else "sampled")
        assert trace.temperature == pytest.approx(KINDS[kind]["temperature"])
        assert trace.domain == f"d{trace.request_id}"
    assert by_request.keys() == answers.keys()
    for request_id, its in by_request.items():
        check_rounds(its, answers[request_id])
        assert (len(its) > 1) == (segment_tokens == 7)
    assert sum(int(t.num_accepted_R.sum()) for t in traces) == sum(
        output.chain_accepted for answer in answers.values() for output in answer.rounds
    )
    assert engine.counters.accepted > (50 if kind == "greedy" else 5)
    rejected = torch.cat([t.num_accepted_R < t.num_proposed_R for t in traces])
    assert int(rejected.sum()) > 10, "the test needs rejections"
    sources = torch.cat([t.source_R for t in traces])
    assert bool((sources == Source.DRAFT).any())
    if kind == "greedy" or not lookup:  # elsewhere repetitions depend on luck
        assert bool((sources == Source.NGRAM).any()) == lookup


def test_each_position_is_new_in_one_segment_and_segments_overlap(models: TinyModels) -> None:
    traces: list[Trace] = []
    answers = run(models.engine(traces, segment_tokens=7, overlap=3), models.requests())
    for request_id, answer in answers.items():
        segments = [t for t in traces if t.request_id == request_id]
        length = LENGTHS[int(request_id)]
        new: list[int] = []
        for trace in segments:
            start = trace.first_position + trace.answer_start
            new += range(start, trace.first_position + len(trace.token_ids_T))
            assert trace.answer_start == (length if trace is segments[0] else 3)
            assert trace is segments[-1] or 7 <= len(trace.token_ids_T) - trace.answer_start < 7 + 5
        assert segments[0].first_position == 0
        assert {trace.prompt_length for trace in segments} == {length}
        assert new == list(range(length, length + NEW - 1)), "all but the last token, which the target has not computed"
        assert len(answer.token_ids) == NEW


@pytest.mark.parametrize("drafted", [False, True])
def test_plain_decoding_is_recorded_too(models: TinyModels, drafted: bool) -> None:
    traces: list[Trace] = []
    engine = (
        models.engine(traces)
        if drafted
        else make_engine(models.target, observer=TraceRecorder(keep_in(traces), hidden_size=models.target.hidden_size))
    )
    answers = run(engine, [replace(r, params=replace(r.params, speculate=False)) for r in models.requests()])
    for trace in traces:
        check_states(models, trace, all_tokens(models, answers[trace.request_id], trace.request_id))
        assert set(trace.source_R.tolist()) == {Source.TARGET}
        assert trace.proposal_RK.shape == (NEW, 0)
        assert set(trace.round_version_R.tolist()) == {-1}


def test_a_request_that_may_not_be_stored_leaves_no_trace(models: TinyModels) -> None:
    traces: list[Trace] = []
    engine = models.engine(traces, segment_tokens=7)
    requests = [replace(r, store=int(r.request_id) % 2 == 0) for r in models.requests()]
    answers = run(engine, requests)
    assert {t.request_id for t in traces} == {"0", "2", "4"}
    for request_id, answer in answers.items():
        assert answer.token_ids == models.answers[int(request_id)]
    for trace in traces:
        check_states(models, trace, all_tokens(models, answers[trace.request_id], trace.request_id))


def test_no_state_is_kept_of_a_request_that_may_not_be_stored(models: TinyModels) -> None:
    recorder = TraceRecorder(lambda _: None, hidden_size=models.target.hidden_size)
    engine = make_engine(models.target, max_batch_size=2, observer=recorder)
    run(engine, [replace(r, store=r.request_id == "2") for r in models.requests()[2:4]])
    used_S = (recorder.last_SLH != 0).any(-1).any(-1).tolist()
    assert used_S == [True, False] or used_S == [False, True]


def test_proposals_that_the_end_cuts_off_are_not_recorded_as_rejected(models: TinyModels) -> None:
    cut = 0
    for place in range(3, 20):
        traces: list[Trace] = []
        stops = [
            replace(r, params=replace(r.params, stop_token_ids=(models.answers[i][place],)))
            for i, r in enumerate(models.requests())
        ]
        answers = run(models.engine(traces), stops)
        for trace in traces:
            check(trace)
            answer = answers[trace.request_id]
            check_rounds([trace], answer)
            check_states(models, trace, all_tokens(models, answer, trace.request_id))
            last = answer.rounds[-1]
            cut += last.num_proposed > last.num_accepted == len(last.token_ids)
    assert cut > 3, "the test needs ends among accepted proposals"


def test_an_output_of_one_token_leaves_no_trace(models: TinyModels) -> None:
    traces: list[Trace] = []
    requests = [replace(r, params=replace(r.params, max_tokens=1)) for r in models.requests()]
    run(models.engine(traces), requests)
    assert traces == []


def test_a_cancelled_request_leaves_a_trace_and_its_slot_starts_a_new_one(models: TinyModels) -> None:
    traces: list[Trace] = []
    engine = models.engine(traces, max_batch_size=1)
    requests = models.requests()
    engine.submit(requests[2])
    tokens: list[int] = []
    while len(tokens) < 8:
        tokens += [token for output in engine.round() for token in output.token_ids]
    engine.cancel("2")
    assert [t.request_id for t in traces] == ["2"]
    check_states(models, traces[0], [*models.prompts[2], *tokens])
    engine.submit(requests[3])
    engine.round()  # prefill of the next in the same slot
    engine.cancel("3")
    answers = run(engine, [requests[0]])
    assert {t.request_id for t in traces[1:]} <= {"0", "3"}
    check_states(models, traces[-1], all_tokens(models, answers["0"], "0"))
    check_rounds(traces[-1:], answers["0"])


def test_versions_are_recorded_across_a_swap(models: TinyModels) -> None:
    traces: list[Trace] = []
    engine = models.engine(traces, max_batch_size=1, draft_version="start")
    engine.submit(models.requests()[0])
    outputs = []
    while engine.has_work:
        if len(outputs) == 3:
            engine.swap_draft(random_draft(models.target, seed=9), version="draft-000042")
        outputs += engine.round()
    assert [token for output in outputs for token in output.token_ids] == models.answers[0]
    versions = traces[0].round_version_R.tolist()
    drafted = traces[0].source_R == Source.DRAFT
    assert versions[:3] == [0, 0, 0]
    assert set(traces[0].round_version_R[drafted].tolist()[3:]) == {42}
    assert outputs[-1].draft_versions == ("start", "draft-000042")
    assert outputs[1].draft_versions == ("start",)
    check_states(models, traces[0], [*models.prompts[0], *models.answers[0]])
    with pytest.raises(ValueError, match="without a draft"):
        make_engine(models.target).swap_draft(random_draft(models.target), version="x")


@pytest.mark.skipif(native.library() is None, reason="there is no memory without kernels")
def test_copies_that_continue_what_was_drafted_are_no_proposals_of_the_draft(
    models: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where columns cost nothing, the draft's chain goes on with what the memory holds of the same answer."""
    monkeypatch.setattr(Weigher, "copies", lambda self, survivals, rates, **_: [0] * len(rates))
    monkeypatch.setattr(Weigher, "speed", lambda *_: 0.0)
    traces: list[Trace] = []
    copying = {"copied_tokens": 15, "lookup": False, "memory_scope": "domain"}
    engine = models.engine(traces, adaptive=True, max_draft_tokens=3, **copying)
    engine.floor = None
    for _ in range(2):
        traces.clear()
        answers = run(engine, models.requests())
    rounds = [output for answer in answers.values() for output in answer.rounds if not output.only_copied]
    assert sum(output.num_accepted > output.chain_proposed for output in rounds) > 3
    assert all(output.chain_accepted <= output.chain_proposed <= 3 for output in rounds)
    for trace in traces:
        check(trace)
        answer = answers[trace.request_id]
        check_rounds([trace], answer)
        check_states(models, trace, all_tokens(models, answer, trace.request_id))


def test_the_states_of_a_bf16_target_are_recorded(models: TinyModels, tmp_path: Path) -> None:
    target = load_target(save_model("llama", tmp_path, num_hidden_layers=4), precision="bf16")
    traces: list[Trace] = []
    recorder = TraceRecorder(keep_in(traces), hidden_size=target.hidden_size)
    engine = make_engine(target, copy.deepcopy(models.draft), max_draft_tokens=3, observer=recorder)
    answers = run(engine, models.requests("free"))
    for trace in traces:
        tokens = torch.tensor([all_tokens(models, answers[trace.request_id], trace.request_id)])
        with torch.no_grad():
            aux_BT3H, last_BTH = target.in_torch.forward_uncached(tokens)
        T = len(trace.token_ids_T)
        # The engine's KV cache rounds keys and values, a plain pass does not.
        for got, expected, start in ((trace.last_TH, last_BTH, trace.answer_start - 1), (trace.aux_T3H, aux_BT3H, 0)):
            wrong = got[start:].float() - expected[0, start:T].float()
            assert wrong.abs().mean() < 0.02 * expected.abs().mean()
