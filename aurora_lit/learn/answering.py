"""Stage two of pretraining: the target answers prompts, batched on our own engine, and every position is kept.

What is left out: reading text (learn/reading.py) and learning (learn/fitting.py).
Shapes: S slots, L capacity, B rows, T positions, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from aurora_lit.models.target import Target
from aurora_lit.request import Request, SamplingParams
from aurora_lit.serve.engine import Engine
from aurora_lit.serve.rows import Row
from aurora_lit.trace_log import Trace


@dataclass(frozen=True, kw_only=True)
class Question:
    """A prompt to be answered."""

    domain: str
    prompt_ids: tuple[int, ...]
    temperature: float
    """0 for the greedy answer."""


class AnswerRecorder:
    """Keeps the target's hidden states by slot while the engine runs, and makes a trace of each finished request."""

    def __init__(self, target: Target, *, num_slots: int, capacity: int) -> None:
        self._target = target
        size = target.hidden_size
        self._aux_SLF = torch.zeros(num_slots, capacity, 3 * size, dtype=torch.bfloat16)
        self._last_SLH = torch.zeros(num_slots, capacity, size, dtype=torch.bfloat16)
        self.domains: dict[str, str] = {}
        """Request id -> domain; filled by the caller."""
        self.finished: list[Trace] = []

    def on_pass(
        self, *, slots_B: torch.Tensor, starts_B: torch.Tensor, aux_BT3H: torch.Tensor, last_BTH: torch.Tensor
    ) -> None:
        """Store what the pass computed; positions rejected later are simply stored again."""
        index = (slots_B[:, None], starts_B[:, None] + torch.arange(aux_BT3H.shape[1]))
        self._aux_SLF[index] = aux_BT3H.to("cpu", torch.bfloat16)
        self._last_SLH[index] = last_BTH.to("cpu", torch.bfloat16)

    def on_finish(self, row: Row, token_ids_T: torch.Tensor) -> None:
        """Turn the slot into a trace; its last token, which the target has not run, is left out.

        An answer of one token leaves nothing of itself, and no trace.
        """
        domain = self.domains.pop(row.request.request_id)
        length = len(token_ids_T) - 1
        if length <= row.prompt_length:
            return
        last_TH = self._last_SLH[row.slot, :length].clone()
        self.finished.append(
            Trace(
                token_ids_T=token_ids_T[:length].to("cpu", torch.int32, copy=True),
                aux_T3H=self._aux_SLF[row.slot, :length].clone(),
                last_TH=last_TH,
                lse_T=self._target.logsumexp(last_TH.to(self._target.model.dtype)).cpu(),
                domain=domain,
                answer_start=row.prompt_length,
            )
        )


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
    recorder = AnswerRecorder(target, num_slots=max_batch_size, capacity=max_seq_len + 1)
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
        request_id = str(number)
        recorder.domains[request_id] = question.domain
        params = SamplingParams(max_tokens=max_answer_tokens, temperature=question.temperature)
        engine.submit(Request(request_id=request_id, prompt_ids=question.prompt_ids, params=params))
    while engine.has_work:
        engine.round()
        yield from recorder.finished
        recorder.finished.clear()
