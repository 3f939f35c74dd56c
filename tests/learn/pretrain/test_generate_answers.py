"""Answers are recorded with what the target computed."""

from __future__ import annotations

import pytest
import torch
from support.live_traces import check_trace
from support.tiny_models import (
    VOCAB,
    make_engine,
    random_draft,
    request,
    run,
)
from support.trace_examples import keep_in

from aurora_lit.learn.pretrain.generate_answers import PromptToAnswer, generate_answers
from aurora_lit.models.interface import Target
from aurora_lit.request import SamplingParams
from aurora_lit.serve.engine.prefix_cache import Prefix, PrefixCache
from aurora_lit.serve.engine.trace_recorder import TraceRecorder
from aurora_lit.traces.record import Trace


def test_answers_are_recorded_with_the_targets_states(target: Target) -> None:
    gen = torch.Generator().manual_seed(0)
    prompts = [tuple(torch.randint(0, VOCAB, (n,), generator=gen).tolist()) for n in (3, 17, 1, 30, 58, 9)]
    questions = [
        PromptToAnswer(
            domain=f"d{i}", prompt_ids=prompt, params=SamplingParams(temperature=0.8 if i == 1 else 0.0, seed=i)
        )
        for i, prompt in enumerate(prompts)
    ]
    options = {"eos_token_ids": frozenset({7}), "max_answer_tokens": 12, "max_batch_size": 3, "max_seq_len": 64}
    traces = {trace.domain: trace for trace in generate_answers(target, questions, **options)}
    assert traces.keys() == {"d0", "d1", "d2", "d3", "d5"}, "d4 leaves no room for an answer"
    engine = make_engine(target, eos_token_ids=frozenset({7}))
    for i, prompt in enumerate(prompts):
        if i == 4:
            continue
        trace = traces[f"d{i}"]
        assert trace.answer_start == len(prompt)
        assert tuple(trace.token_ids_T[: len(prompt)].tolist()) == prompt
        check_trace(target, trace, has_prompt=True)  # prompts are learned from too
        asked = request("a", prompt, max_tokens=12, temperature=0.8 if i == 1 else 0.0, seed=i)
        answer = run(engine, [asked])["a"].token_ids
        assert trace.token_ids_T[len(prompt) :].tolist() == answer[:-1]


@pytest.mark.parametrize("drafted", [False, True])
def test_a_beginning_that_is_copied_from_another_prompt_has_its_states(
    drafted: bool, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied: list[int] = []
    copy = PrefixCache.copy

    def noted(self: PrefixCache, prefix: Prefix, *, slot: int, start: int) -> None:
        copied.append(prefix.length)
        copy(self, prefix, slot=slot, start=start)

    monkeypatch.setattr(PrefixCache, "copy", noted)
    traces: list[Trace] = []
    recorder = TraceRecorder(keep_in(traces), hidden_size=target.hidden_size, keeps_prompts=True)
    engine = make_engine(target, random_draft(target) if drafted else None, observer=recorder, max_batch_size=2)
    prompt = torch.randint(0, VOCAB, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    engine.submit(request("running", prompt, max_tokens=20))
    while not engine.round():
        pass
    engine.submit(request("begins alike", [*prompt, 1, 2, 3], max_tokens=4))
    while engine.has_work:
        engine.round()
    assert copied
    assert copied[0] >= 32
    assert {trace.request_id for trace in traces} == {"running", "begins alike"}
    for trace in traces:
        check_trace(target, trace, has_prompt=True)
