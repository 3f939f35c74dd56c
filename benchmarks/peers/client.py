"""Concurrent clients: each sends its next request when it has read its last answer to the end.

Leaves out sending, and servers (aurora_lit/bench/load.py), and the report (report.py).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from aurora_lit.bench.load import Answer, ask, chat, get, send_all
from aurora_lit.errors import AuroraError


@dataclass(frozen=True, kw_only=True)
class Load:
    """What concurrent clients observed together."""

    tokens_per_s: float
    """From the first request to the end of the last answer, so the reading of prompts is included."""
    first_token_s: float
    """From the request to the first piece of text, median."""
    token_s: float
    """Time per token from the first piece to the last; median over answers."""
    pause_p50_s: float
    """Between one piece of text and the next, median."""
    pause_p99_s: float
    tokens: int
    texts: list[str]
    """In the prompts' order."""


def run_load(
    url: str,
    prompts: Sequence[str],
    *,
    clients: int,
    max_tokens: int,
    temperature: float = 0.0,
    on_answer: Callable[[], object] = lambda: None,
) -> Load:
    """Send every prompt from `clients` concurrent clients; at temperature 0 greedily."""
    model = served_model(url)

    def send(prompt: str) -> Answer:
        answer = ask(url, chat(prompt, model=model, max_tokens=max_tokens, temperature=temperature, stream=True))
        on_answer()
        return answer

    return summarise(send_all(send, prompts, clients=clients))


def served_model(url: str) -> str:
    """The name of the server's model."""
    return str(get(url, "/v1/models")["data"][0]["id"])


def summarise(answers: Sequence[Answer]) -> Load:
    """The report on answers that were requested together."""
    if not all(answer.pieces_s for answer in answers):
        raise AuroraError("an answer without text in its stream")
    pauses = [pause for answer in answers for pause in answer.pauses_s]
    if not pauses:
        raise AuroraError("no answer arrived in several pieces, so there is nothing to time; raise --max-tokens")
    cuts = statistics.quantiles(pauses, n=100, method="inclusive") if len(pauses) > 1 else pauses * 99
    tokens = sum(answer.tokens for answer in answers)
    return Load(
        tokens_per_s=tokens / (max(a.ended_s for a in answers) - min(a.sent_s for a in answers)),
        first_token_s=statistics.median(a.first_token_s for a in answers),
        token_s=statistics.median((a.pieces_s[-1] - a.pieces_s[0]) / max(1, a.tokens - 1) for a in answers),
        pause_p50_s=cuts[49],
        pause_p99_s=cuts[98],
        tokens=tokens,
        texts=[answer.text for answer in answers],
    )
