"""Answers prompts with an engine in this process, and records every round.

Leaves out what is measured with it (bench/acceptance.py, bench/throughput.py).
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from transformers import PreTrainedTokenizerBase

from aurora_lit.errors import AuroraError
from aurora_lit.learn.pretrain.prompts import encode_prompt, read_prompts
from aurora_lit.request import Output, Request, SamplingParams
from aurora_lit.serve.engine.engine import Engine

REPEATED_GRAM_TOKENS = 4
"""Length of the n-grams that `repeated_share` counts."""


@dataclass(frozen=True, kw_only=True)
class BenchPrompt:
    """A prompt as token ids."""

    domain: str
    token_ids: tuple[int, ...]


@dataclass(kw_only=True)
class Answer:
    """The answer to one prompt."""

    domain: str
    token_ids: list[int]
    rounds: list[Output]


@dataclass(frozen=True, kw_only=True)
class PromptRun:
    """Prompts that were answered together."""

    answers: list[Answer]
    """In the order of the prompts."""
    seconds: float
    """From the first submission to the last token, prefill included."""
    decode_tokens: int
    """Tokens generated after every answer had its first one."""
    decode_seconds: float
    """The time for these; 0 if an answer ended before another began."""

    @property
    def num_tokens(self) -> int:
        """Tokens of all answers."""
        return sum(len(answer.token_ids) for answer in self.answers)


def load_prompts(
    paths: Sequence[Path], *, limit: int | None, tokenizer: PreTrainedTokenizerBase, max_prompt_tokens: int
) -> list[BenchPrompt]:
    """The first `limit` prompts of each file with at most `max_prompt_tokens`, one from each file in turn."""
    files = []
    for path in paths:
        encoded = (
            BenchPrompt(domain=prompt.domain, token_ids=tuple(encode_prompt(tokenizer, prompt)))
            for prompt in read_prompts(path)
        )
        files.append(list(itertools.islice((p for p in encoded if len(p.token_ids) <= max_prompt_tokens), limit)))
    mixed = [p for group in itertools.zip_longest(*files) for p in group if p is not None]
    if not mixed:
        raise AuroraError(
            f"no prompt of {', '.join(map(str, paths))} has at most {max_prompt_tokens} tokens; lower --max-tokens or "
            "raise engine.max_seq_len"
        )
    return mixed


def answer_prompts(
    engine: Engine,
    prompts: Sequence[BenchPrompt],
    params: SamplingParams,
    *,
    on_answer: Callable[[], None] = lambda: None,
) -> PromptRun:
    """Submit all prompts at once and run rounds until all are answered; `on_answer` is called after each answer."""
    answers = {str(i): Answer(domain=p.domain, token_ids=[], rounds=[]) for i, p in enumerate(prompts)}
    all_begun_at, tokens_by_then, num_begun = 0.0, 0, 0
    started = time.perf_counter()
    for name, prompt in zip(answers, prompts, strict=True):
        engine.submit(Request(request_id=name, prompt_ids=prompt.token_ids, params=params))
    while engine.has_work:
        for output in engine.round():
            answer = answers[output.request_id]
            if output.error is not None:
                raise AuroraError(f"the engine failed on a prompt of domain {answer.domain}: {output.error}")
            num_begun += not answer.token_ids
            answer.token_ids += output.token_ids
            answer.rounds.append(output)
            if output.finish_reason is not None:
                on_answer()
        if num_begun == len(answers) and not all_begun_at:
            all_begun_at = time.perf_counter()
            tokens_by_then = sum(len(answer.token_ids) for answer in answers.values())
    ended = time.perf_counter()
    return PromptRun(
        answers=list(answers.values()),
        seconds=ended - started,
        decode_tokens=sum(len(answer.token_ids) for answer in answers.values()) - tokens_by_then,
        decode_seconds=ended - all_begun_at,
    )


def params_for(
    temperature: float | None, *, max_tokens: int, defaults: Mapping[str, Any] = MappingProxyType({})
) -> SamplingParams:
    """Sampling parameters of a command: a temperature, and what else the model has as defaults.

    temperature: None: the model's own; greedy if it has none. defaults: see models/sampling_defaults.py.
    """
    chosen = {"temperature": 0.0, **defaults} | ({} if temperature is None else {"temperature": temperature})
    return SamplingParams(max_tokens=max_tokens, **chosen)


def repeated_share(answers: Sequence[Sequence[int]], *, gram_tokens: int = REPEATED_GRAM_TOKENS) -> float:
    """The share of n-grams that occurred before in the same answer; repetitive answers are easy to draft."""
    total = distinct = 0
    for token_ids in answers:
        grams = [tuple(token_ids[i : i + gram_tokens]) for i in range(len(token_ids) - gram_tokens + 1)]
        total += len(grams)
        distinct += len(set(grams))
    return 1 - distinct / total if total else 0.0
