"""Answers are recorded with what the target computed."""

from __future__ import annotations

import torch
from support.live_traces import check_trace
from support.tiny_models import (
    VOCAB,
    make_engine,
    request,
    run,
)

from aurora_lit.learn.pretrain.generate_answers import PromptToAnswer, generate_answers
from aurora_lit.models.target import Target


def test_answers_are_recorded_with_the_targets_states(target: Target) -> None:
    gen = torch.Generator().manual_seed(0)
    prompts = [tuple(torch.randint(0, VOCAB, (n,), generator=gen).tolist()) for n in (3, 17, 1, 30, 58, 9)]
    questions = [
        PromptToAnswer(domain=f"d{i}", prompt_ids=prompt, temperature=0.8 if i == 1 else 0.0, seed=i)
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
        check_trace(target, trace)
        asked = request("a", prompt, max_tokens=12, temperature=0.8 if i == 1 else 0.0, seed=i)
        answer = run(engine, [asked])["a"].token_ids
        assert trace.token_ids_T[len(prompt) :].tolist() == answer[:-1]
