"""`aurora-lit bench acceptance`: accepted length and acceptance rate by position, for each domain, greedy and sampled.

So that different drafts can be compared, on a busy machine too, each round proposes as many tokens as it may:
engine.max_draft_tokens (engine.adaptive and engine.lookup are off), and the draft reads a new prompt at once. Accepted
length is the number of tokens emitted per round, the target's own token included. A request's last round is not
counted, since the end of the answer cuts it short, and neither are rounds without proposals.

Leaves out speed (bench/throughput.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.table import Table

from aurora_lit.bench.prompts import (
    REPEATED_GRAM_TOKENS,
    Answer,
    BenchPrompt,
    answer_prompts,
    load_prompts,
    params_for,
    repeated_share,
)
from aurora_lit.bench.reporting import report_console, write_report
from aurora_lit.config import AuroraConfig
from aurora_lit.errors import ConfigError
from aurora_lit.models.sampling_defaults import default_sampling
from aurora_lit.progress import Progress
from aurora_lit.request import SamplingParams
from aurora_lit.serve.engine.engine import Engine
from aurora_lit.serve.worker.build import build_engine

_LONGEST_ROUND_S = 60.0
"""Enough for the draft to read a prompt at once."""
_SHOWN_POSITIONS = 5
"""Positions that fit in a terminal; acceptance.json has all."""


@dataclass(frozen=True, kw_only=True)
class Acceptance:
    """Acceptance on the answers of one domain."""

    temperature: float
    domain: str
    """"all": all domains together."""
    prompts: int
    rounds: int
    accepted_length: float
    """Tokens emitted per round."""
    rate_by_position: list[float]
    """Of the rounds with a proposal at this position: the share that accepted it and all before it."""
    conditional_rate_by_position: list[float]
    """Of the rounds that accepted all proposals before this position: the share that accepted it too."""
    repeated_share: float
    """Share of the answers' n-grams that are repeats."""


def run(
    config: AuroraConfig,
    *,
    prompts: Sequence[Path],
    limit: int | None = None,
    max_tokens: int = 128,
    temperature: float | None = None,
    out: Path = Path("bench-results"),
) -> list[Acceptance]:
    """Measure at temperature 0 and at `temperature`; print a table and write acceptance.json to `out`.

    temperature: as in `params_for`.
    """
    config = with_full_proposals(config)
    engine, tokenizer = build_engine(config, max_round_s=_LONGEST_ROUND_S)
    loaded = load_prompts(
        prompts, limit=limit, tokenizer=tokenizer, max_prompt_tokens=config.engine.max_seq_len - max_tokens
    )
    console = report_console()
    params = params_for(temperature, max_tokens=max_tokens, defaults=default_sampling(config))
    temperatures = sorted({0.0, params.temperature})
    results: list[Acceptance] = []
    for each in temperatures:
        with Progress(f"temperature {each:g}", len(loaded), "prompts") as progress:
            results += measure(engine, loaded, replace(params, temperature=each), on_answer=progress.advance)
    console.print(table(results))
    path = out / "acceptance.json"
    write_report(
        path,
        config=config,
        draft_version=engine.draft_version,
        results={"max_tokens": max_tokens, "acceptance": [asdict(result) for result in results]},
    )
    console.print(f"written to {path}", markup=False)
    return results


def with_full_proposals(config: AuroraConfig) -> AuroraConfig:
    """The settings with which the draft proposes as much as it may in every round, and nothing is copied."""
    if config.draft.checkpoint is None:
        raise ConfigError("draft.checkpoint=null: there is no draft to measure; name a checkpoint folder")
    full = replace(config.engine, speculate=True, adaptive=False, lookup=False)
    return replace(config, engine=full, memory=replace(config.memory, capacity_mb=0))


def measure(
    engine: Engine,
    prompts: Sequence[BenchPrompt],
    params: SamplingParams,
    *,
    on_answer: Callable[[], None] = lambda: None,
) -> list[Acceptance]:
    """One record for each domain, in order of appearance, and one for all together."""
    answers = answer_prompts(engine, prompts, params, on_answer=on_answer).answers
    domains = list(dict.fromkeys(answer.domain for answer in answers))
    groups = [(domain, [a for a in answers if a.domain == domain]) for domain in domains]
    return [
        summarise(group, domain=name, temperature=params.temperature) for name, group in [*groups, ("all", answers)]
    ]


def summarise(answers: Sequence[Answer], *, domain: str, temperature: float) -> Acceptance:
    """Acceptance over the rounds of these answers."""
    rounds = [r for answer in answers for r in answer.rounds if r.num_proposed and r.finish_reason is None]
    longest = max((r.num_proposed for r in rounds), default=0)
    rates, conditional = [], []
    for position in range(1, longest + 1):
        tried = [r for r in rounds if r.num_proposed >= position]
        passed = sum(r.num_accepted >= position for r in tried)
        reached = sum(r.num_accepted >= position - 1 for r in tried)
        rates.append(passed / len(tried))
        conditional.append(passed / reached if reached else 0.0)
    return Acceptance(
        temperature=temperature,
        domain=domain,
        prompts=len(answers),
        rounds=len(rounds),
        accepted_length=sum(len(r.token_ids) for r in rounds) / len(rounds) if rounds else 1.0,
        rate_by_position=rates,
        conditional_rate_by_position=conditional,
        repeated_share=repeated_share([answer.token_ids for answer in answers]),
    )


def table(results: Sequence[Acceptance]) -> Table:
    """One row for each record."""
    shown = Table(title="Acceptance (share of rounds that accepted position 1, 2, …)")
    longest = min(_SHOWN_POSITIONS, max(len(result.rate_by_position) for result in results))
    for name in ("temperature", "domain"):
        shown.add_column(name)
    for name in ("prompts", "rounds", "accepted length", *map(str, range(1, longest + 1))):
        shown.add_column(name, justify="right")
    shown.add_column(f"repeated {REPEATED_GRAM_TOKENS}-grams", justify="right")
    for result in results:
        rates = [f"{rate:.2f}" for rate in result.rate_by_position[:longest]]
        shown.add_row(
            f"{result.temperature:g}",
            result.domain,
            str(result.prompts),
            str(result.rounds),
            f"{result.accepted_length:.2f}",
            *rates,
            *[""] * (longest - len(rates)),
            f"{result.repeated_share:.1%}",
            end_section=result.domain == "all",
        )
    return shown
