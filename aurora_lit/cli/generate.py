"""`aurora-lit generate`: answers one prompt in this process, with accepted tokens and the target's own coloured.

The target's own token of a round follows the last accepted proposal. Below the answer it prints accepted length,
tokens per second, and the speed of plain decoding for the same prompt. An answer takes half a second, in which a
machine with other work can lose a third, so both are answered several times in turn. No server is involved.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from aurora_lit.bench.prompts import params_for
from aurora_lit.config import AuroraConfig
from aurora_lit.errors import AuroraError
from aurora_lit.learn.pretrain.prompts import Prompt, encode_prompt
from aurora_lit.models.sampling_defaults import default_sampling
from aurora_lit.request import Output, Request
from aurora_lit.serve.engine.engine import Engine
from aurora_lit.serve.http.detokenizer import TextStream
from aurora_lit.serve.worker.build import build_engine

ACCEPTED, OWN, PLAIN = "green", "yellow", ""
_PAIRS = 3
"""How often the prompt is answered with and without speculation; the first answer is the one that is shown."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Speed of one answer."""

    num_tokens: int
    seconds: float
    """From submission to the last token."""
    accepted_length: float
    """Tokens per round."""
    num_drafted_rounds: int
    """Number of rounds with proposals."""

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second, prefill included."""
        return self.num_tokens / self.seconds


def generate(
    config: AuroraConfig, *, prompt: str, max_tokens: int, temperature: float | None, compare_plain: bool
) -> None:
    """Answer `prompt`, stream the answer to the terminal, and print its speed. temperature: as in `params_for`."""
    engine, tokenizer = build_engine(config)
    request = Request(
        request_id="answer",
        prompt_ids=tuple(encode_prompt(tokenizer, Prompt(domain="", messages=(prompt,)))),
        store=False,  # or the second answer would be copied from the first
        params=params_for(temperature, max_tokens=max_tokens, defaults=default_sampling(config)),
    )
    warm_up(engine, request)
    console = Console(highlight=False)
    timing = stream(engine, tokenizer, request, console)
    pairs = []
    if compare_plain and timing.num_drafted_rounds:
        for pair in range(_PAIRS):
            again = stream(engine, tokenizer, request, None) if pair else timing
            pairs.append((again, stream(engine, tokenizer, without_speculation(request), None)))
    console.print(summary(timing, pairs))


def without_speculation(request: Request) -> Request:
    """The same request, for plain decoding."""
    return replace(request, request_id=f"{request.request_id}-plain", params=replace(request.params, speculate=False))


def warm_up(engine: Engine, request: Request) -> None:
    """Generate a few tokens, with and without speculation, so that one-time work is not timed."""
    short = replace(request, request_id="warm-up", params=replace(request.params, max_tokens=8))
    for each in (short, without_speculation(short)):
        for _ in rounds(engine, each):
            pass


def rounds(engine: Engine, request: Request) -> Iterator[Output]:
    """Submit a request and run rounds until it ends."""
    engine.submit(request)
    while engine.has_work:
        for output in engine.round():
            if output.error is not None:
                raise AuroraError(f"the engine failed: {output.error}")
            yield output


def stream(engine: Engine, tokenizer: PreTrainedTokenizerBase, request: Request, console: Console | None) -> Timing:
    """Answer one request; print each round's text to `console`, if there is one."""
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
    """A round's text; a character of several tokens has the colour of the last of them."""
    shown = Text()
    for index, token_id in enumerate(output.token_ids):
        colour = PLAIN if not output.num_proposed else ACCEPTED if index < output.num_accepted else OWN
        shown.append(text.push([token_id]), style=colour)
    return shown


def summary(timing: Timing, pairs: list[tuple[Timing, Timing]]) -> Text:
    """The lines below an answer. `pairs`: answers with and without speculation, one after the other."""
    line = Text(f"\n{timing.num_tokens} tokens, {timing.tokens_per_s:.1f} tokens/s")
    if not timing.num_drafted_rounds:
        return line.append(", plain decoding")
    line.append(f", accepted length {timing.accepted_length:.2f} (")
    line.append("accepted", style=ACCEPTED).append(", ").append("the target's own", style=OWN).append(")")
    if pairs:
        plain = statistics.median(plain.tokens_per_s for _, plain in pairs)
        ratio = statistics.median(speculated.tokens_per_s / plain.tokens_per_s for speculated, plain in pairs)
        line.append(f"\nplain decoding: {plain:.1f} tokens/s; speculation is {ratio:.2f}× as fast")
        line.append(f" (medians of {len(pairs)} pairs)")
    return line
