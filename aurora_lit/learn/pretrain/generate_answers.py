"""Stage two of pretraining: the target answers prompts, batched on the serving engine, and every position is recorded.

Leaves out recording text (learn/pretrain/record_text.py) and training (learn/pretrain/trainer.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from aurora_lit.models.interface import Target
from aurora_lit.request import Request, SamplingParams
from aurora_lit.serve.engine.engine import Engine
from aurora_lit.serve.engine.thread_budget import thread_budget
from aurora_lit.serve.engine.trace_recorder import TraceRecorder
from aurora_lit.settings import EngineSettings
from aurora_lit.traces.record import Trace


@dataclass(frozen=True, kw_only=True)
class PromptToAnswer:
    """A tokenized prompt, and how it is answered."""

    domain: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    """How it is answered; `generate_answers` sets the length."""


def generate_answers(
    target: Target,
    prompts: Sequence[PromptToAnswer],
    *,
    eos_token_ids: frozenset[int],
    max_answer_tokens: int,
    max_batch_size: int = 32,
    max_seq_len: int = 1024,
) -> Iterator[Trace]:
    """Answer all prompts; yields a trace whenever an answer is complete.

    Prompts that leave no room for `max_answer_tokens` within `max_seq_len` are skipped.
    """
    finished: list[Trace] = []

    def keep(trace: Trace) -> None:
        finished.append(trace.copy())

    recorder = TraceRecorder(keep, hidden_size=target.hidden_size, segment_tokens=max_seq_len, keeps_prompts=True)
    settings = EngineSettings(
        speculate=False,
        max_batch_size=max_batch_size,
        max_seq_len=max_seq_len,
    )
    engine = Engine(
        target,
        None,
        settings,
        eos_token_ids=eos_token_ids,
        prefill_chunk_tokens=4 * max_seq_len,  # latency does not matter here, so free slots are filled at once
        max_round_s=3600.0,
        observer=recorder,
        threads=thread_budget(target.device),
    )
    for number, prompt in enumerate(prompts):
        if len(prompt.prompt_ids) + max_answer_tokens > max_seq_len:
            continue
        params = replace(prompt.params, max_tokens=max_answer_tokens)
        engine.submit(
            Request(request_id=str(number), prompt_ids=prompt.prompt_ids, params=params, domain=prompt.domain)
        )
    while engine.has_work:
        engine.round()
        yield from finished
        finished.clear()
