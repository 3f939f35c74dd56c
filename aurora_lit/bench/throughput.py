"""`aurora-lit bench throughput`: tokens per second with and without a draft, on the same prompts.

The *arms* that are compared are plain decoding, decoding with the draft and, on request, transformers' generate; each
has an engine of its own in this process. Every group of as many prompts as the batch size is answered by one arm after
the other, in an order that rotates from group to group, so that other work on the machine affects all arms alike. One
repeat over all groups gives one ratio of speeds; the report has the median and the quartiles of these ratios.

Leaves out acceptance by position (bench/acceptance.py) and the plot (bench/plots.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from aurora_lit.bench.prompts import (
    REPEATED_GRAM_TOKENS,
    Answer,
    BenchPrompt,
    PromptRun,
    answer_prompts,
    load_prompts,
    params_for,
    repeated_share,
)
from aurora_lit.bench.reference import load_reference
from aurora_lit.bench.reporting import Spread, report_console, write_report
from aurora_lit.config import AuroraConfig
from aurora_lit.errors import ConfigError
from aurora_lit.models.sampling_defaults import default_sampling
from aurora_lit.progress import Progress
from aurora_lit.request import SamplingParams
from aurora_lit.serve.engine.engine import Engine
from aurora_lit.serve.worker.build import build_engine

Arm = Callable[[Sequence[BenchPrompt]], PromptRun]
"""Answers prompts together, as one batch."""

TRANSFORMERS, PLAIN, DRAFT = "transformers", "plain", "draft"
RATIOS = ((PLAIN, TRANSFORMERS), (DRAFT, PLAIN), (DRAFT, TRANSFORMERS))


@dataclass(kw_only=True)
class ArmTotals:
    """What one arm did; each list has one entry for each repeat."""

    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    decode_seconds: list[float] = field(default_factory=list)
    decode_tokens: list[int] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    """The answers of the last repeat."""

    @property
    def speeds(self) -> list[float]:
        """Tokens per second, prefill included."""
        return [tokens / seconds for tokens, seconds in zip(self.tokens, self.seconds, strict=True)]

    @property
    def decode_speeds(self) -> list[float]:
        """Tokens per second after the prefill of all prompts of a group."""
        return [n / max(s, 1e-9) for n, s in zip(self.decode_tokens, self.decode_seconds, strict=True)]


@dataclass(frozen=True, kw_only=True)
class BatchResult:
    """The results of all arms at one batch size."""

    batch_size: int
    tokens_per_s: dict[str, Spread]
    decode_tokens_per_s: dict[str, Spread]
    ratios: dict[str, Spread]
    """Ratios of tokens per second, prefill included, by names such as "draft / plain"."""
    decode_ratios: dict[str, Spread]
    repeated_share: dict[str, float]
    accepted_length: float
    """Tokens per request and round of the draft arm, including rounds without proposals."""
    same_as_plain: float
    """The share of prompts whose answer with the draft equals that of plain decoding. Only meaningful for greedy
    decoding; 1 in fp32."""


def run(
    config: AuroraConfig,
    *,
    batch_sizes: Sequence[int],
    prompts: Sequence[Path],
    limit: int | None = None,
    repeats: int = 3,
    max_tokens: int = 128,
    temperature: float | None = None,
    out: Path = Path("bench-results"),
    against_transformers: bool = False,
) -> list[BatchResult]:
    """Measure each batch size; print a table, and write throughput.json and throughput.png to `out`.

    temperature: as in `params_for`. Raises ConfigError without a draft, and for a batch size that engine or prompts do
    not fill.
    """
    if config.draft.checkpoint is None:
        raise ConfigError("draft.checkpoint=null: there is no draft to compare with; name a checkpoint folder")
    if max(batch_sizes) > config.engine.max_batch_size:
        raise ConfigError(
            f"engine.max_batch_size={config.engine.max_batch_size} is below --batch {max(batch_sizes)}; raise it"
        )
    # Repeats use the same prompts: with the prefix cache only the first one would have a prefill, and with the traffic
    # memory the others would copy its answer.
    engine, memory = replace(config.engine, prefix_cache_mb=0), replace(config.memory, capacity_mb=0)
    config = replace(config, memory=memory)
    drafting, tokenizer = build_engine(replace(config, engine=replace(engine, speculate=True)))
    plain, _ = build_engine(replace(config, engine=replace(engine, speculate=False)), target=drafting.target)
    loaded = load_prompts(
        prompts,
        limit=limit,
        tokenizer=tokenizer,
        max_prompt_tokens=config.engine.max_seq_len - max_tokens,
    )
    if max(batch_sizes) > len(loaded):
        raise ConfigError(
            f"--batch {max(batch_sizes)} is more than the {len(loaded)} prompts; name more, raise --limit, or lower it"
        )
    params = params_for(temperature, max_tokens=max_tokens, defaults=default_sampling(config))
    arms = {PLAIN: engine_arm(plain, params), DRAFT: engine_arm(drafting, params)}
    if against_transformers:
        arms = {TRANSFORMERS: load_reference(config, drafting.eos_token_ids, params), **arms}
    console = report_console()
    results = []
    for batch_size in batch_sizes:
        total = repeats * len(arms) * len(group(loaded, batch_size))
        with Progress(f"batch {batch_size}", total, "groups") as progress:
            totals = interleave(arms, group(loaded, batch_size), repeats=repeats, on_group=progress.advance)
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
            "temperature": params.temperature,
            "throughput": [asdict(result) for result in results],
        },
    )
    written = [out / "throughput.json"]
    speeds = {result.batch_size: result.tokens_per_s for result in results}
    against_plain = {result.batch_size: _ratios_to(result, PLAIN) for result in results}
    if save_throughput_plot(speeds, against_plain, out / "throughput.png"):
        written.append(out / "throughput.png")
    else:
        console.print("no plot: matplotlib is not installed (pip install 'aurora-lit\\[bench]')")
    console.print(f"written to {', '.join(map(str, written))}", markup=False)
    return results


def engine_arm(engine: Engine, params: SamplingParams) -> Arm:
    """An arm that answers with `engine`."""
    return lambda prompts: answer_prompts(engine, prompts, params)


def group(prompts: Sequence[BenchPrompt], batch_size: int) -> list[Sequence[BenchPrompt]]:
    """Groups of exactly `batch_size` prompts, without the remainder."""
    whole = len(prompts) - len(prompts) % batch_size
    return [prompts[i : i + batch_size] for i in range(0, whole, batch_size)]


@torch.no_grad()
def interleave(
    arms: Mapping[str, Arm],
    groups: Sequence[Sequence[BenchPrompt]],
    *,
    repeats: int,
    on_group: Callable[[], None] = lambda: None,
) -> dict[str, ArmTotals]:
    """Let each arm answer each group `repeats` times, alternating between arms; one group before is for warm-up."""
    for arm in arms.values():
        arm(groups[0])
    totals = {name: ArmTotals() for name in arms}
    names = list(arms)
    for repeat in range(repeats):
        for total in totals.values():
            total.answers = []
            total.seconds.append(0.0)
            total.decode_seconds.append(0.0)
            total.tokens.append(0)
            total.decode_tokens.append(0)
        for number, prompts in enumerate(groups):
            first = (repeat + number) % len(names)
            for name in names[first:] + names[:first]:
                run, total = arms[name](prompts), totals[name]
                total.seconds[-1] += run.seconds
                total.tokens[-1] += run.num_tokens
                total.decode_seconds[-1] += run.decode_seconds
                total.decode_tokens[-1] += run.decode_tokens
                total.answers += run.answers
                on_group()
    return totals


def summarise(totals: Mapping[str, ArmTotals], *, batch_size: int) -> BatchResult:
    """Medians and quartiles over the repeats."""

    def ratios(speeds: Mapping[str, list[float]]) -> dict[str, Spread]:
        return {
            f"{a} / {b}": Spread.of([x / y for x, y in zip(speeds[a], speeds[b], strict=True)])
            for a, b in RATIOS
            if a in speeds and b in speeds
        }

    speeds = {name: total.speeds for name, total in totals.items()}
    decode = {name: total.decode_speeds for name, total in totals.items()}
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
    """One row for each batch size and arm."""
    shown = Table(title="Throughput: median (quartiles) over repeats; in brackets without prefill")
    shown.add_column("batch", justify="right")
    shown.add_column("arm")
    for name in (
        "tokens/s",
        "vs. plain",
        "vs. transformers",
        f"repeated {REPEATED_GRAM_TOKENS}-grams",
        "accepted length",
        "same as plain",
    ):
        shown.add_column(name, justify="right")
    for result in results:
        for name, speed in result.tokens_per_s.items():
            is_draft = name == DRAFT
            shown.add_row(
                str(result.batch_size),
                name,
                f"{speed.median:.1f} \\[{result.decode_tokens_per_s[name].median:.1f}]",
                *(_ratio(result, f"{name} / {other}") for other in (PLAIN, TRANSFORMERS)),
                f"{result.repeated_share[name]:.1%}",
                f"{result.accepted_length:.2f}" if is_draft else "",
                f"{result.same_as_plain:.0%}" if is_draft else "",
                end_section=is_draft,
            )
    return shown


def save_throughput_plot(
    speeds: Mapping[int, Mapping[str, Spread]], ratios: Mapping[int, Mapping[str, Spread]], path: Path
) -> bool:
    """Bars of tokens per second by batch size and arm, with quartiles, and the arm's ratio if it has one.

    False, and no file, without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    arms = list(next(iter(speeds.values())))
    width = 0.8 / len(arms)
    for i, arm in enumerate(arms):
        spreads = [by_arm[arm] for by_arm in speeds.values()]
        positions = [position + (i - (len(arms) - 1) / 2) * width for position in range(len(speeds))]
        medians = [spread.median for spread in spreads]
        errors = [[s.median - s.low for s in spreads], [s.high - s.median for s in spreads]]
        bars = axes.bar(positions, medians, width * 0.92, yerr=errors, capsize=3, label=arm)
        labels = [f"×{by_arm[arm].median:.2f}" if arm in by_arm else "" for by_arm in ratios.values()]
        axes.bar_label(bars, labels, padding=3)
    axes.set_xticks(range(len(speeds)), [str(batch_size) for batch_size in speeds])
    axes.set_xlabel("batch size")
    axes.set_ylabel("tokens per second")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return True


def _ratios_to(result: BatchResult, other: str) -> dict[str, Spread]:
    """Each arm's ratio to the arm `other`."""
    return {name.removesuffix(f" / {other}"): r for name, r in result.ratios.items() if name.endswith(f" / {other}")}


def _ratio(result: BatchResult, name: str) -> str:
    ratio: Any = result.ratios.get(name)
    return "" if ratio is None else f"{ratio} \\[{result.decode_ratios[name].median:.2f}]"
