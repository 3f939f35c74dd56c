"""The domain of a request is known when its prompt has been read, by the mean that the learner takes of its trace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from support.tiny_models import VOCAB, Answer, make_engine, random_draft, request, run, save_model
from support.trace_examples import keep_in
from torch import Tensor

from aurora_lit.models.interface import Target
from aurora_lit.models.loading import load_target
from aurora_lit.modules.domains.centroids import Centroids, DomainAssigner
from aurora_lit.modules.domains.detector import prompt_embedding
from aurora_lit.request import Request
from aurora_lit.serve.engine.engine import Engine
from aurora_lit.serve.engine.trace_recorder import TraceRecorder
from aurora_lit.traces.record import Trace


class RecordingAssigner(DomainAssigner):
    """Names domains auto-0, auto-1, … in the order of requests, and keeps what it was given."""

    def __init__(self, size: int) -> None:
        super().__init__(
            Centroids(
                names=("auto-0",),
                centroid_DE=torch.ones(1, size),
                mean_E=torch.zeros(size),
                variance_E=torch.ones(size),
                common=0.0,
                novelty_threshold=0.7,
            ),
            version=1,
        )
        self.given: list[Tensor] = []

    def assign(self, x_E: Tensor) -> str:
        self.given.append(x_E.clone())
        return f"auto-{len(self.given) - 1}"


@pytest.fixture(scope="module")
def small_target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    return load_target(
        save_model("llama", tmp_path_factory.mktemp("llama"), seed=3, max_position_embeddings=512), precision="fp32"
    )


def some_requests(lengths: Sequence[int], *, domain: str = "") -> list[Request]:
    gen = torch.Generator().manual_seed(1)
    prompts = [torch.randint(7, VOCAB, (length,), generator=gen).tolist() for length in lengths]
    return [replace(request(f"r{n}", prompt, max_tokens=6), domain=domain) for n, prompt in enumerate(prompts)]


def engine_of(target: Target, *, with_draft: bool = True, traces: list[Trace] | None = None) -> Engine:
    recorder = None if traces is None else TraceRecorder(keep_in(traces), hidden_size=target.hidden_size)
    draft = random_draft(target, max_position_embeddings=512) if with_draft else None
    return make_engine(target, draft, observer=recorder, max_seq_len=320)


def domains_of(answer: Answer) -> set[str]:
    return {output.domain for output in answer.rounds}


def test_a_prompt_is_assigned_once_by_the_states_that_the_learner_reads_in_its_trace(small_target: Target) -> None:
    traces: list[Trace] = []
    engine = engine_of(small_target, traces=traces)
    engine.assigner = assigner = RecordingAssigner(3 * small_target.hidden_size)
    requests = some_requests([3, 20, 70, 300])
    answers = run(engine, requests, arrivals=[0, 0, 1, 4])
    assert len(assigner.given) == len(requests), "once each"
    assert len(traces) == len(requests)
    for trace in traces:
        (domain,) = domains_of(answers[trace.request_id])
        assert (trace.served_domain, trace.domain) == (domain, ""), "the detector takes `domain` for a client's label"
        learned_E = prompt_embedding(trace)
        assert learned_E is not None
        served_E = assigner.given[int(domain.removeprefix("auto-"))]
        torch.testing.assert_close(served_E, learned_E, atol=5e-3, rtol=2**-7)


def test_a_copied_prompt_is_assigned_by_the_copied_states(small_target: Target) -> None:
    engine = engine_of(small_target)
    engine.assigner = assigner = RecordingAssigner(3 * small_target.hidden_size)
    (first,) = some_requests([80])
    run(engine, [first])
    run(engine, [replace(first, request_id="again")])
    assert engine.counters.cached_tokens > 60
    torch.testing.assert_close(assigner.given[0], assigner.given[1], atol=0, rtol=0)


def test_a_label_wins_unless_its_prefix_is_reserved(small_target: Target) -> None:
    engine = engine_of(small_target)
    engine.assigner = assigner = RecordingAssigner(3 * small_target.hidden_size)
    (labelled,) = run(engine, some_requests([9], domain="code")).values()
    assert (domains_of(labelled), assigner.given) == ({"code"}, [])
    (reserved,) = run(engine, some_requests([9], domain="auto-7")).values()
    assert domains_of(reserved) == {"auto-0"}


def test_without_domains_a_drafter_or_a_prompt_to_read_there_is_none(small_target: Target) -> None:
    without_domains, without_draft = engine_of(small_target), engine_of(small_target, with_draft=False)
    without_draft.assigner = RecordingAssigner(3 * small_target.hidden_size)
    for engine in (without_domains, without_draft):
        (answer,) = run(engine, some_requests([9])).values()
        assert domains_of(answer) == {""}
    engine = engine_of(small_target)
    engine.assigner = assigner = RecordingAssigner(3 * small_target.hidden_size)
    answers = run(engine, some_requests([1, 2]))
    assert [domains_of(answer) for answer in answers.values()] == [{""}, {""}]
    assert assigner.given == []


def test_new_domains_are_for_prompts_that_are_read_from_then_on(small_target: Target) -> None:
    engine = engine_of(small_target)
    engine.assigner = RecordingAssigner(3 * small_target.hidden_size)
    old, new = some_requests([9, 10])
    engine.submit(old)
    outputs = engine.round() + engine.round()
    engine.assigner = None
    engine.submit(new)
    while engine.has_work:
        outputs += engine.round()
    assert {output.domain for output in outputs if output.request_id == "r0"} == {"auto-0"}
    assert {output.domain for output in outputs if output.request_id == "r1"} == {""}


def test_answers_do_not_depend_on_domains(small_target: Target) -> None:
    plain, assigning = engine_of(small_target), engine_of(small_target)
    assigning.assigner = RecordingAssigner(3 * small_target.hidden_size)
    requests = some_requests([5, 40, 90])
    expected, found = run(plain, requests), run(assigning, requests)
    assert {key: answer.token_ids for key, answer in found.items()} == {
        key: answer.token_ids for key, answer in expected.items()
    }
