"""`aurora-lit generate`: one answer in this process, its tokens coloured by where they came from.

Accepted draft tokens and corrected tokens (what the target itself says after the last accepted one) differ in colour.
Then the numbers: accepted length, tokens a second, and the speed of plain decoding of the same prompt.

Leaves out the server and everything about HTTP.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from aurora_lit.config import AuroraConfig
from aurora_lit.errors import AuroraError
from aurora_lit.learn.pretrain.label_text import Prompt, encode_prompt
from aurora_lit.request import Output, Request, SamplingParams
from aurora_lit.serve.engine.engine import Engine
from aurora_lit.serve.sequences.detokenizer import TextStream
from aurora_lit.serve.worker.build import build_engine

ACCEPTED, CORRECTED, PLAIN = "green", "yellow", ""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """How fast one answer was."""

    num_tokens: int
    seconds: float
    """From submission to the last token."""
    accepted_length: float
    """Tokens a round."""
    num_drafted_rounds: int
    """Rounds with proposals."""

    @property
    def tokens_per_s(self) -> float:
        """The prompt's reading included."""
        return self.num_tokens / self.seconds


def generate(config: AuroraConfig, *, prompt: str, max_tokens: int, temperature: float, compare_plain: bool) -> None:
    """Answer `prompt`, streaming it to the terminal, and print the numbers."""
    engine, tokenizer = build_engine(config)
    request = Request(
        request_id="answer",
        prompt_ids=tuple(encode_prompt(tokenizer, Prompt(domain="", messages=(prompt,)))),
        params=SamplingParams(max_tokens=max_tokens, temperature=temperature, logit_bias={}),
    )
    warm_up(engine, request)
    console = Console(highlight=False)
    timing = stream(engine, tokenizer, request, console)
    plain = None
    if compare_plain and timing.num_drafted_rounds:
        plain = stream(engine, tokenizer, plainly(request), None)
    console.print(summary(timing, plain))


def plainly(request: Request) -> Request:
    """The same without the draft."""
    return replace(request, request_id=f"{request.request_id}-plain", params=replace(request.params, speculate=False))


def warm_up(engine: Engine, request: Request) -> None:
    """Answer a little, with and without the draft, so that what is done once is not timed."""
    short = replace(request, request_id="warm-up", params=replace(request.params, max_tokens=8))
    for each in (short, plainly(short)):
        for _ in rounds(engine, each):
            pass


def rounds(engine: Engine, request: Request) -> Iterator[Output]:
    """Submit a request and run rounds until it has ended."""
    engine.submit(request)
    while engine.has_work:
        for output in engine.round():
            if output.error is not None:
                raise AuroraError(f"the engine gave up: {output.error}")
            yield output


def stream(engine: Engine, tokenizer: PreTrainedTokenizerBase, request: Request, console: Console | None) -> Timing:
    """Answer one request; with a console, print each round's text as it comes."""
    text = TextStream(tokenizer)
    num_tokens = num_rounds = num_drafted = 0
    started = time.perf_counter()
    for output in rounds(engine, request):
        num_tokens += len(output.token_ids)
        num_rounds += 1
        num_drafted += output.num_proposed > 0
        if console is not None:
            console.print(coloured(text, output), end="", soft_wrap=True)
    seconds = time.perf_counter() - started
    if console is not None:
        console.print(text.finish())
    return Timing(
        num_tokens=num_tokens,
        seconds=seconds,
        accepted_length=num_tokens / max(1, num_rounds),
        num_drafted_rounds=num_drafted,
    )


def coloured(text: TextStream, output: Output) -> Text:
    """A round's text; a character made of several tokens has the colour of the one that completes it."""
    shown = Text()
    for place, token_id in enumerate(output.token_ids):
        colour = PLAIN if not output.num_proposed else ACCEPTED if place < output.num_accepted else CORRECTED
        shown.append(text.push([token_id]), style=colour)
    return shown


def summary(timing: Timing, plain: Timing | None) -> Text:
    """The numbers below an answer."""
    line = Text(f"\n{timing.num_tokens} tokens, {timing.tokens_per_s:.1f} tokens/s")
    if not timing.num_drafted_rounds:
        return line.append(", without a draft")
    line.append(f", accepted length {timing.accepted_length:.2f} (")
    line.append("accepted", style=ACCEPTED).append(", ").append("corrected", style=CORRECTED).append(")")
    if plain is not None:
        ratio = timing.tokens_per_s / plain.tokens_per_s
        line.append(f"\nplain decoding: {plain.tokens_per_s:.1f} tokens/s; the draft makes it ×{ratio:.2f}")
    return line
