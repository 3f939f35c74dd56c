"""`aurora-lit bench throughput`: tokens a second, plain decoding against the draft, on the same prompts, interleaved.

Each *arm* (transformers' generate if asked for, our plain decoding, our decoding with the draft) is an engine of its
own in this process. Groups of as many prompts as the batch size are answered by one arm after the other, in an order
that turns round with every group, so that what else happens on the machine hits all arms alike. One repeat over all
groups gives one ratio; reported are the median and the quartiles of the ratios.

Leaves out acceptance by position (bench/acceptance.py) and the picture (bench/plot_throughput.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from aurora_lit.bench.plot_throughput import save_plot
from aurora_lit.bench.prompts import (
    REPEATED_GRAM_TOKENS,
    Answer,
    BenchPrompt,
    Run,
    Spread,
    drive,
    load_prompts,
    params_for,
    progress_bar,
    repeated_share,
    report_console,
    write_report,
)
from aurora_lit.bench.reference import load_reference
from aurora_lit.config import AuroraConfig
from aurora_lit.errors import ConfigError
from aurora_lit.serve.engine.engine import Engine
from aurora_lit.serve.worker.build import build_engine

Arm = Callable[[Sequence[BenchPrompt]], Run]
"""Answers prompts together."""

TRANSFORMERS, PLAIN, DRAFT = "transformers", "plain", "draft"
RATIOS = ((PLAIN, TRANSFORMERS), (DRAFT, PLAIN), (DRAFT, TRANSFORMERS))
PROMPTS_A_FILE = 8
"""When --limit does not say."""


@dataclass(kw_only=True)
class ArmTotals:
    """What one arm did in each repeat; lists have an entry a repeat."""

    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    decode_seconds: list[float] = field(default_factory=list)
    decode_tokens: list[int] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    """Of the last repeat."""

    @property
    def speeds(self) -> list[float]:
        """Tokens a second, prompts read included."""
        return [tokens / seconds for tokens, seconds in zip(self.tokens, self.seconds, strict=True)]

    @property
    def decode_speeds(self) -> list[float]:
        """Tokens a second once all prompts of a group were read."""
        return [n / max(s, 1e-9) for n, s in zip(self.decode_tokens, self.decode_seconds, strict=True)]


@dataclass(frozen=True, kw_only=True)
class BatchResult:
    """All arms at one batch size."""

    batch_size: int
    tokens_per_s: dict[str, Spread]
    decode_tokens_per_s: dict[str, Spread]
    ratios: dict[str, Spread]
    """"draft / plain" and the like, by tokens a second, prompts read included."""
    decode_ratios: dict[str, Spread]
    repeated_share: dict[str, float]
    accepted_length: float
    """Tokens a request and round of the draft arm, rounds without proposals included."""
    same_as_plain: float
    """The share of prompts whose answer with the draft is plain decoding's, token for token; means something only when
    greedy, and is 1 in fp32."""


def run(
    config: AuroraConfig,
    *,
    batch_sizes: Sequence[int],
    prompts: Sequence[Path],
    limit: int | None = None,
    repeats: int = 3,
    max_tokens: int = 128,
    temperature: float = 0.0,
    out: Path = Path("bench-results"),
    against_transformers: bool = False,
) -> list[BatchResult]:
    """Measure every batch size; print a table, write `out`/throughput.json and `out`/throughput.png."""
    if config.draft.checkpoint is None:
        raise ConfigError("draft.checkpoint=null: there is no draft to compare with; name a checkpoint folder")
    if max(batch_sizes) > config.engine.max_batch_size:
        raise ConfigError(
            f"engine.max_batch_size={config.engine.max_batch_size} is below --batch {max(batch_sizes)}; raise it"
        )
    # Every repeat asks the same prompts: held from the last one, they would be read for nothing.
    engine = replace(config.engine, prefix_cache=False)
    drafting, tokenizer = build_engine(replace(config, engine=replace(engine, speculate=True)))
    plain, _ = build_engine(replace(config, engine=replace(engine, speculate=False)))
    loaded = load_prompts(
        prompts,
        limit=limit or PROMPTS_A_FILE,
        tokenizer=tokenizer,
        max_prompt_tokens=config.engine.max_seq_len - max_tokens,
    )
    arms = {
        PLAIN: engine_arm(plain, max_tokens=max_tokens, temperature=temperature),
        DRAFT: engine_arm(drafting, max_tokens=max_tokens, temperature=temperature),
    }
    if against_transformers:
        eos = drafting.eos_token_ids
        arms = {TRANSFORMERS: load_reference(config, eos, max_tokens=max_tokens, temperature=temperature), **arms}
    console = report_console()
    results = []
    with progress_bar(console) as progress:
        for batch_size in batch_sizes:
            total = repeats * len(arms) * len(group(loaded, batch_size))
            task = progress.add_task(f"batch {batch_size}", total=total)
            totals = interleave(
                arms, group(loaded, batch_size), repeats=repeats, on_group=partial(progress.advance, task)
            )
            results.append(summarise(totals, batch_size=batch_size))
    console.print(table(results))
    write_report(
        out / "throughput.json",
        config=config,
        draft_version=drafting.draft_version,
        results={
            "prompts": len(loaded),
            "repeats": repeats,
            "max_tokens": max_tokens,
            "temperature": temperature,
            "throughput": [asdict(result) for result in results],
        },
    )
    written = [out / "throughput.json"]
    speeds = {result.batch_size: result.tokens_per_s for result in results}
    against_plain = {result.batch_size: _against(result, PLAIN) for result in results}
    if save_plot(speeds, against_plain, out / "throughput.png"):
        written.append(out / "throughput.png")
    else:
        console.print("no picture: matplotlib is missing (pip install 'aurora-lit\\[bench]')")
    console.print(f"written to {', '.join(map(str, written))}")
    return results


def engine_arm(engine: Engine, *, max_tokens: int, temperature: float) -> Arm:
    """An engine as an arm."""
    params = params_for(temperature, max_tokens=max_tokens)
    return lambda prompts: drive(engine, prompts, params)


def group(prompts: Sequence[BenchPrompt], batch_size: int) -> list[Sequence[BenchPrompt]]:
    """Groups of exactly the batch size; what is left over makes one more only if there is no other."""
    whole = len(prompts) - len(prompts) % batch_size
    return [prompts[i : i + batch_size] for i in range(0, whole, batch_size)] or [prompts]


@torch.no_grad()
def interleave(
    arms: Mapping[str, Arm],
    groups: Sequence[Sequence[BenchPrompt]],
    *,
    repeats: int,
    on_group: Callable[[], None] = lambda: None,
) -> dict[str, ArmTotals]:
    """Every arm answers every group `repeats` times, one arm after the other; one group before that does not count."""
    for arm in arms.values():
        arm(groups[0])
    totals = {name: ArmTotals() for name in arms}
    names = list(arms)
    for repeat in range(repeats):
        for of_arm in totals.values():
            of_arm.answers = []
            of_arm.seconds.append(0.0)
            of_arm.decode_seconds.append(0.0)
            of_arm.tokens.append(0)
            of_arm.decode_tokens.append(0)
        for number, prompts in enumerate(groups):
            turn = (repeat + number) % len(names)
            for name in names[turn:] + names[:turn]:
                done, of_arm = arms[name](prompts), totals[name]
                of_arm.seconds[-1] += done.seconds
                of_arm.tokens[-1] += done.num_tokens
                of_arm.decode_seconds[-1] += done.decode_seconds
                of_arm.decode_tokens[-1] += done.decode_tokens
                of_arm.answers += done.answers
                on_group()
    return totals


def summarise(totals: Mapping[str, ArmTotals], *, batch_size: int) -> BatchResult:
    """Medians and spreads."""

    def ratios(speeds: Mapping[str, list[float]]) -> dict[str, Spread]:
        return {
            f"{a} / {b}": Spread.of([x / y for x, y in zip(speeds[a], speeds[b], strict=True)])
            for a, b in RATIOS
            if a in speeds and b in speeds
        }

    speeds = {name: of_arm.speeds for name, of_arm in totals.items()}
    decode = {name: of_arm.decode_speeds for name, of_arm in totals.items()}
    drafted, plain = totals[DRAFT].answers, totals[PLAIN].answers
    rounds = [r for answer in drafted for r in answer.rounds]
    return BatchResult(
        batch_size=batch_size,
        tokens_per_s={name: Spread.of(values) for name, values in speeds.items()},
        decode_tokens_per_s={name: Spread.of(values) for name, values in decode.items()},
        ratios=ratios(speeds),
        decode_ratios=ratios(decode),
        repeated_share={name: repeated_share([a.token_ids for a in t.answers]) for name, t in totals.items()},
        accepted_length=sum(len(r.token_ids) for r in rounds) / len(rounds),
        same_as_plain=sum(a.token_ids == b.token_ids for a, b in zip(drafted, plain, strict=True)) / len(plain),
    )


def table(results: Sequence[BatchResult]) -> Table:
    """One row an arm and batch size."""
    shown = Table(title="Throughput: median (quartiles) over repeats; in brackets once prompts are read")
    shown.add_column("batch", justify="right")
    shown.add_column("arm")
    for name in (
        "tokens/s",
        "against plain",
        "against transformers",
        f"repeated {REPEATED_GRAM_TOKENS}-grams",
        "accepted length",
        "as plain",
    ):
        shown.add_column(name, justify="right")
    for result in results:
        for name, speed in result.tokens_per_s.items():
            last = name == DRAFT
            shown.add_row(
                str(result.batch_size),
                name,
                f"{speed.median:.1f} \\[{result.decode_tokens_per_s[name].median:.1f}]",
                *(_ratio(result, f"{name} / {other}") for other in (PLAIN, TRANSFORMERS)),
                f"{result.repeated_share[name]:.1%}",
                f"{result.accepted_length:.2f}" if last else "",
                f"{result.same_as_plain:.0%}" if last else "",
                end_section=last,
            )
    return shown


def _against(result: BatchResult, other: str) -> dict[str, Spread]:
    """The ratios to one arm, by arm."""
    return {name.removesuffix(f" / {other}"): r for name, r in result.ratios.items() if name.endswith(f" / {other}")}


def _ratio(result: BatchResult, name: str) -> str:
    ratio: Any = result.ratios.get(name)
    return "" if ratio is None else f"{ratio} \\[{result.decode_ratios[name].median:.2f}]"
