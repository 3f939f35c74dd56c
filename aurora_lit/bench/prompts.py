"""Runs prompts through an engine and notes what every round gave; the ground of both benchmarks.

Leaves out what is reported (bench/acceptance.py, bench/throughput.py).
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedTokenizerBase

from aurora_lit.config import AuroraConfig
from aurora_lit.errors import AuroraError
from aurora_lit.learn.pretrain.label_text import encode_prompt, read_prompts
from aurora_lit.request import Output, Request, SamplingParams
from aurora_lit.serve.engine.engine import Engine

REPEATED_GRAM_TOKENS = 4


@dataclass(frozen=True, kw_only=True)
class BenchPrompt:
    """One prompt, ready to be answered."""

    domain: str
    token_ids: tuple[int, ...]


@dataclass(kw_only=True)
class Answer:
    """What one prompt got."""

    domain: str
    token_ids: list[int]
    rounds: list[Output]


@dataclass(frozen=True, kw_only=True)
class Run:
    """Prompts answered together."""

    answers: list[Answer]
    """In the prompts' order."""
    seconds: float
    """From the first submission to the last token, prompts read included."""
    decode_tokens: int
    """Tokens that came after every prompt had its first one."""
    decode_seconds: float
    """The time those took: 0 when one answer had ended before another began."""

    @property
    def num_tokens(self) -> int:
        """Over all answers."""
        return sum(len(answer.token_ids) for answer in self.answers)


def load_prompts(
    paths: Sequence[Path], *, limit: int | None, tokenizer: PreTrainedTokenizerBase, max_prompt_tokens: int
) -> list[BenchPrompt]:
    """The first `limit` prompts of each file that have room to be answered, one of every file in turn."""
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
            f"no prompt of {', '.join(map(str, paths))} fits: none has at most {max_prompt_tokens} tokens; lower "
            "--max-tokens or raise engine.max_seq_len"
        )
    return mixed


def drive(
    engine: Engine,
    prompts: Sequence[BenchPrompt],
    params: SamplingParams,
    *,
    on_answer: Callable[[], None] = lambda: None,
) -> Run:
    """Submit all prompts at once and run rounds until each is answered; `on_answer` is called at the end of each."""
    answers = {str(i): Answer(domain=p.domain, token_ids=[], rounds=[]) for i, p in enumerate(prompts)}
    all_began, tokens_then, num_begun = 0.0, 0, 0
    started = time.perf_counter()
    for name, prompt in zip(answers, prompts, strict=True):
        engine.submit(Request(request_id=name, prompt_ids=prompt.token_ids, params=params))
    while engine.has_work:
        for output in engine.round():
            answer = answers[output.request_id]
            if output.error is not None:
                raise AuroraError(f"the engine gave up on a {answer.domain} prompt: {output.error}")
            num_begun += not answer.token_ids
            answer.token_ids += output.token_ids
            answer.rounds.append(output)
            if output.finish_reason is not None:
                on_answer()
        if num_begun == len(answers) and not all_began:
            all_began = time.perf_counter()
            tokens_then = sum(len(answer.token_ids) for answer in answers.values())
    ended = time.perf_counter()
    done = list(answers.values())
    return Run(
        answers=done,
        seconds=ended - started,
        decode_tokens=sum(len(answer.token_ids) for answer in done) - tokens_then,
        decode_seconds=ended - all_began,
    )


def params_for(temperature: float, *, max_tokens: int, speculate: bool = True) -> SamplingParams:
    """How benchmark prompts are decoded: nothing but a temperature."""
    return SamplingParams(max_tokens=max_tokens, temperature=temperature, logit_bias={}, speculate=speculate)


def repeated_share(answers: Sequence[Sequence[int]], *, gram_tokens: int = REPEATED_GRAM_TOKENS) -> float:
    """The share of n-grams that their own answer already contained: looping answers are easy to draft."""
    total = distinct = 0
    for token_ids in answers:
        grams = [tuple(token_ids[i : i + gram_tokens]) for i in range(len(token_ids) - gram_tokens + 1)]
        total += len(grams)
        distinct += len(set(grams))
    return 1 - distinct / total if total else 0.0


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Some measurements: their median and how far they scatter."""

    median: float
    low: float
    """Lower quartile; the lowest of fewer than four."""
    high: float
    """Upper quartile; the highest of fewer than four."""

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        """At least one value."""
        quartiles = (min(values), statistics.median(values), max(values))
        if len(values) >= 4:
            low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
            quartiles = (low, middle, high)
        return Spread(median=quartiles[1], low=quartiles[0], high=quartiles[2])

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}–{self.high:.2f})"


def report_console() -> Console:
    """A console wide enough for the tables, also where there is no terminal to tell its width."""
    console = Console()
    return console if console.is_terminal else Console(width=140)


def progress_bar(console: Console) -> Progress:
    """A bar that counts answers."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True)


def write_report(path: Path, *, config: AuroraConfig, draft_version: str, results: dict[str, Any]) -> None:
    """Results as JSON, with what they were measured on."""
    machine = {
        "processor": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    report = {"machine": machine, "draft_version": draft_version, "config": _public(config), **results}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _public(config: AuroraConfig) -> dict[str, Any]:
    """The settings without the server's, which hold the key."""
    return {name: section for name, section in asdict(config).items() if name != "server"}
