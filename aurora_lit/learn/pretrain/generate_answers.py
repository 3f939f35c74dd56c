"""Stage two of pretraining: the target answers prompts, batched on our own engine, and every position is kept.

What is left out: reading text (learn/pretrain/label_text.py) and learning (learn/pretrain/trainer.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from aurora_lit.models.target import Target
from aurora_lit.request import Request, SamplingParams
from aurora_lit.serve.engine.engine import Engine
from aurora_lit.serve.engine.trace_recorder import TraceRecorder
from aurora_lit.traces.record import Trace


@dataclass(frozen=True, kw_only=True)
class Question:
    """A prompt to be answered."""

    domain: str
    prompt_ids: tuple[int, ...]
    temperature: float
    """0 for the greedy answer."""


def answer(
    target: Target,
    questions: Sequence[Question],
    *,
    eos_token_ids: frozenset[int],
    max_answer_tokens: int,
    max_batch_size: int = 32,
    max_seq_len: int = 1024,
) -> Iterator[Trace]:
    """Answer all questions, in order of admission as slots get free; yields a trace when an answer ends.

    Prompts that leave no room for an answer within `max_seq_len` are left out.
    """
    finished: list[Trace] = []

    def keep(trace: Trace) -> None:
        last_TH = trace.last_TH.to(target.model.device, target.model.dtype)
        finished.append(replace(trace.copy(), lse_T=target.logsumexp(last_TH).cpu()))

    recorder = TraceRecorder(keep, hidden_size=target.hidden_size, segment_tokens=max_seq_len)
    engine = Engine(
        target,
        None,
        eos_token_ids=eos_token_ids,
        max_batch_size=max_batch_size,
        max_seq_len=max_seq_len,
        prefill_chunk_tokens=4 * max_seq_len,  # nobody waits for a token here: fill free slots at once
        observer=recorder,
    )
    for number, question in enumerate(questions):
        if len(question.prompt_ids) + max_answer_tokens > max_seq_len:
            continue
        params = SamplingParams(max_tokens=max_answer_tokens, temperature=question.temperature)
        engine.submit(
            Request(request_id=str(number), prompt_ids=question.prompt_ids, params=params, domain=question.domain)
        )
    while engine.has_work:
        engine.round()
        yield from finished
        finished.clear()
