"""transformers' `generate` as an arm of the throughput benchmark, with the same weights, precision and prompts."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from aurora_lit.bench.prompts import Answer, BenchPrompt, PromptRun
from aurora_lit.config import AuroraConfig
from aurora_lit.models.loading import model_dtype, transformers_model
from aurora_lit.models.source import find_target
from aurora_lit.request import SamplingParams


def load_reference(
    config: AuroraConfig, eos_token_ids: frozenset[int], params: SamplingParams
) -> Callable[[Sequence[BenchPrompt]], PromptRun]:
    """Load the target with transformers; returns a function that answers prompts with it. Raises SourceError."""
    folder = find_target(config)
    dtype = model_dtype(config.target.precision)  # no int8 or int4 here
    model = transformers_model(folder, dtype=dtype)
    model.eval()
    return lambda prompts: generate(model, prompts, params, eos_token_ids=eos_token_ids)


def generate(
    model: Any, prompts: Sequence[BenchPrompt], params: SamplingParams, *, eos_token_ids: frozenset[int]
) -> PromptRun:
    """Answer prompts as one left-padded batch. An answer includes its first end-of-text token and ends there."""
    longest = max(len(prompt.token_ids) for prompt in prompts)
    ids_BT = torch.zeros(len(prompts), longest, dtype=torch.int64)
    mask_BT = torch.zeros_like(ids_BT)
    for row, prompt in enumerate(prompts):
        ids_BT[row, longest - len(prompt.token_ids) :] = torch.tensor(prompt.token_ids)
        mask_BT[row, longest - len(prompt.token_ids) :] = 1
    first_token = _FirstToken()
    started = time.perf_counter()
    out_BL = model.generate(
        ids_BT,
        attention_mask=mask_BT,
        max_new_tokens=params.max_tokens,
        eos_token_id=sorted(eos_token_ids),
        pad_token_id=min(eos_token_ids),
        stopping_criteria=[first_token],
        repetition_penalty=params.repetition_penalty,
        do_sample=bool(params.temperature),
        temperature=params.temperature or None,
        top_k=max(0, params.top_k) if params.temperature else None,
        top_p=params.top_p if params.temperature else None,
        min_p=(params.min_p or None) if params.temperature else None,
    )
    ended = time.perf_counter()
    answers = []
    for prompt, row in zip(prompts, out_BL[:, longest:].tolist(), strict=True):
        end = next((i + 1 for i, token in enumerate(row) if token in eos_token_ids), len(row))
        answers.append(Answer(domain=prompt.domain, token_ids=row[:end], rounds=[]))
    return PromptRun(
        answers=answers,
        seconds=ended - started,
        decode_tokens=sum(len(answer.token_ids) - 1 for answer in answers),
        decode_seconds=ended - (first_token.at or ended),
    )


class _FirstToken:
    """A stopping criterion that never stops; it records the time of the first token."""

    def __init__(self) -> None:
        self.at: float | None = None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.at = self.at or time.perf_counter()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
