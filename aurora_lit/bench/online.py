"""`aurora-lit bench online`: compares servers over HTTP: a learning draft, the same draft without learning, and none.

Each of these *arms* is one server, and goes through the same steps, one arm after the other:

    measure -> a phase of traffic, one window at a time -> measure again -> the next phase -> ...

All traffic is one phase, or that of each prompt file is one. Measured prompts are sent with `store: false`, so they are
not learned from; their answers must be equal in all arms, before and after the traffic. Without the traffic memory arms
that do not learn do not change with time, so a part of the traffic suffices there.

Leaves out starting servers (bench/server_process.py) and the plot (bench/plots.py).
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from aurora_lit.bench.plots import save_online_plot
from aurora_lit.bench.server_process import LOOPBACK, free_port, running_server
from aurora_lit.config import AuroraConfig, model_name, resolved_memory_scope
from aurora_lit.errors import ConfigError
from aurora_lit.learn.pretrain.prompts import Prompt, read_prompts
from aurora_lit.models.source import find_target

ARMS = ("plain", "static", "learning")


@dataclass(frozen=True, kw_only=True)
class ClientAnswer:
    """One request, as the client saw it."""

    number: int
    domain: str
    """As the prompt file says."""
    started_s: float
    """Seconds since the arm began."""
    seconds: float
    tokens: int
    rounds: int
    """Rounds with proposals."""
    accepted: int
    """Accepted proposals."""
    draft_versions: tuple[str, ...]
    text: str
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class Window:
    """Consecutive requests together."""

    requests: int
    ended_s: float
    """Seconds since the arm began."""
    accepted_length: float
    """Tokens emitted per round with proposals, the target's own token included."""
    tokens_per_round: float
    """Tokens per round of a sequence, rounds without proposals included: the figure by which drafts are compared, since
    one that dares to propose in harder rounds has a lower accepted length."""
    tokens_per_s: float
    client_tokens_per_s: float
    """Tokens in a second of a request, as one client sees it."""
    failed: int


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A part of the traffic, after which the measured prompts are sent."""

    name: str
    prompts: list[Prompt]


def run(
    config: AuroraConfig,
    *,
    prompts: Sequence[Path],
    measure: Sequence[Path],
    requests: int,
    measure_requests: int,
    concurrency: int,
    arms: Sequence[str],
    max_tokens: int,
    window: int,
    out: Path,
    static_requests: int | None = None,
    measure_concurrency: int | None = None,
    phases: bool = False,
) -> dict[str, Any]:
    """Run the arms one after the other; returns the report, which is written to `out`/online.json after each arm.

    prompts: files of the traffic. measure: files of the measured prompts. window: requests in each window.
    static_requests: number of traffic requests for arms that do not learn; None: all. measure_concurrency: clients that
    send the measured prompts; None: as many as for traffic. phases: one file after the other, each with an equal part
    of the requests. Raises ConfigError if `static_requests` is given beside a traffic memory, or without openai.
    """
    unknown = [arm for arm in arms if arm not in ARMS]
    if unknown:
        raise ConfigError(f"--arms {','.join(unknown)}: there is no such arm; use some of {','.join(ARMS)}")
    if static_requests is not None and resolved_memory_scope(config) != "off":
        raise ConfigError(
            f"--static-requests {static_requests}: arms that do not learn remember what they serve, so that less "
            "traffic would be their loss; add memory.capacity_mb=0, or leave the option out"
        )
    if importlib.util.find_spec("openai") is None:
        raise ConfigError("bench online sends requests with the package openai; pip install 'aurora-lit[bench]'")
    traffic = _phases(prompts, requests) if phases else [Phase(name="all", prompts=_interleave(prompts, requests))]
    measured = _interleave(measure, measure_requests)
    find_target(config)  # a server that has to download it would not be ready in time
    out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {}
    texts: dict[str, list[list[str | None]]] = {}
    report: dict[str, Any] = {}
    with (
        tempfile.TemporaryDirectory(prefix="drafts-", dir=out) as drafts,
        Progress(console=Console(stderr=True)) as bar,
    ):
        for arm in arms:
            arm_traffic = traffic if arm == "learning" else _first(traffic, static_requests)
            total = sum(len(phase.prompts) + len(measured) for phase in arm_traffic) + len(measured)
            task = bar.add_task(arm, total=total)
            results[arm], texts[arm] = _run_arm(
                _arm_config(config, arm, drafts),
                traffic=arm_traffic,
                measured=measured,
                concurrency=concurrency,
                measure_concurrency=measure_concurrency or concurrency,
                max_tokens=max_tokens,
                window=window,
                log=out / f"{arm}.log",
                on_answer=functools.partial(bar.advance, task),
            )
            report = {
                "prompts": [p.name for p in prompts],
                "requests": sum(len(phase.prompts) for phase in traffic),
                "concurrency": concurrency,
                "measure_concurrency": measure_concurrency or concurrency,
                "max_tokens": max_tokens,
                "arms": results,
                "outputs_equal": _outputs_equal(texts) if measured else None,
            }
            (out / "online.json").write_text(json.dumps(report, indent=2) + "\n")
    save_online_plot(results, out / "online.png")
    Console().print(_table(results, report["outputs_equal"]))
    if measured:
        Console().print(_measured_table(results))
    return report


def _arm_config(config: AuroraConfig, arm: str, drafts: str) -> AuroraConfig:
    """The settings of one arm's server; `drafts` is a folder of this run alone, so that every arm begins alike."""
    return dataclasses.replace(
        config,
        server=dataclasses.replace(config.server, port=free_port(), host="127.0.0.1", api_key=None),
        learn=dataclasses.replace(config.learn, enabled=arm == "learning"),
        engine=dataclasses.replace(config.engine, speculate=config.engine.speculate and arm != "plain"),
        checkpoint=dataclasses.replace(config.checkpoint, dir=drafts, run=arm),
    )


def _interleave(paths: Sequence[Path], count: int) -> list[Prompt]:
    """The first `count` prompts, one from each file in turn."""
    files = [read_prompts(path) for path in paths]
    longest = max((len(file) for file in files), default=0)
    return [file[i] for i in range(longest) for file in files if i < len(file)][:count]


def _phases(paths: Sequence[Path], count: int) -> list[Phase]:
    """A phase for each file, of its first prompts; at least one of each."""
    return [Phase(name=path.stem, prompts=read_prompts(path)[: max(1, count // len(paths))]) for path in paths]


def _first(phases: Sequence[Phase], count: int | None) -> list[Phase]:
    """The same phases with the first `count` requests only, in equal parts of at least one; None: all of them."""
    each = None if count is None else max(1, count // len(phases))
    return [dataclasses.replace(phase, prompts=phase.prompts[:each]) for phase in phases]


def _run_arm(
    config: AuroraConfig,
    *,
    traffic: list[Phase],
    measured: list[Prompt],
    concurrency: int,
    measure_concurrency: int,
    max_tokens: int,
    window: int,
    log: Path,
    on_answer: Callable[[], None],
) -> tuple[dict[str, Any], list[list[str | None]]]:
    """The report of one arm, and the measured answers, each time that they were measured; None: it failed."""
    with (
        running_server(config, log) as url,
        _client(url) as client,
        ThreadPoolExecutor(concurrency) as pool,
        ThreadPoolExecutor(measure_concurrency) as measuring_pool,
    ):
        begun, model = time.monotonic(), model_name(config)

        def send(numbered: tuple[int, Prompt], *, store: bool) -> ClientAnswer:
            answer = _ask(client, model, numbered[0], numbered[1], max_tokens=max_tokens, store=store, begun=begun)
            on_answer()
            return answer

        def measure(after: str) -> None:
            answers = list(measuring_pool.map(lambda item: send(item, store=False), enumerate(measured)))
            found.append((after, answers))

        found: list[tuple[str, list[ClientAnswer]]] = []
        windows, statuses, errors, traffic_s = [], [], [], 0.0
        measure("")
        for phase in traffic:
            phase_began = time.monotonic() - begun
            for start in range(0, len(phase.prompts), window):
                part = list(enumerate(phase.prompts))[start : start + window]
                done = list(pool.map(lambda item: send(item, store=True), part))
                windows.append(_window(done))
                errors += [answer.error for answer in done if answer.error]
                statuses.append(_status(url))
            traffic_s += windows[-1].ended_s - phase_began if phase.prompts else 0.0
            measure(phase.name)
        status = _status(url)
    return {
        "before": asdict(_window(found[0][1])) if measured else None,
        "after": asdict(_window(found[-1][1])) if measured else None,
        "measured": [{"after": after, "by_domain": _by_domain(answers)} for after, answers in found],
        "traffic_s": traffic_s,
        "windows": [asdict(w) for w in windows],
        "statuses": statuses,
        "status": status,
        "errors": errors + [answer.error for _, answers in found for answer in answers if answer.error],
    }, [[answer.text if not answer.error else None for answer in answers] for _, answers in found]


def _client(url: str) -> Any:
    """OpenAI's client, which asks the server at `url` without a proxy that the environment names."""
    from openai import DefaultHttpxClient, OpenAI

    http_client = DefaultHttpxClient(trust_env=False)
    return OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600, http_client=http_client)


def _by_domain(answers: Sequence[ClientAnswer]) -> dict[str, dict[str, Any]]:
    domains = sorted({answer.domain for answer in answers})
    return {name: asdict(_window([answer for answer in answers if answer.domain == name])) for name in domains}


def _ask(
    client: Any, model: str, number: int, prompt: Prompt, *, max_tokens: int, store: bool, begun: float
) -> ClientAnswer:
    started = time.monotonic()
    fields: dict[str, Any] = {"number": number, "domain": prompt.domain, "started_s": started - begun}
    try:
        response = client.chat.completions.create(
            model=model,
            messages=prompt.chat,
            max_tokens=max_tokens,
            temperature=0.0,
            store=store,
        )
    except Exception as error:  # the report counts every kind of failure
        return ClientAnswer(
            **fields,
            seconds=time.monotonic() - started,
            tokens=0,
            rounds=0,
            accepted=0,
            draft_versions=(),
            text="",
            error=f"{type(error).__name__}: {error}",
        )
    speculation = response.model_extra["metrics"]["speculative_decoding"]
    return ClientAnswer(
        **fields,
        seconds=time.monotonic() - started,
        tokens=response.usage.completion_tokens,
        rounds=speculation["num_spec_steps"],
        accepted=speculation["num_accepted_draft_tokens"],
        draft_versions=tuple(speculation.get("draft_versions", ())),
        text=response.choices[0].message.content or "",
    )


def _window(answers: Sequence[ClientAnswer]) -> Window:
    rounds, accepted = sum(answer.rounds for answer in answers), sum(answer.accepted for answer in answers)
    tokens = sum(answer.tokens for answer in answers)
    began = min(answer.started_s for answer in answers)
    ended = max(answer.started_s + answer.seconds for answer in answers)
    return Window(
        requests=len(answers),
        ended_s=ended,
        accepted_length=1 + accepted / rounds if rounds else 1.0,
        # Every round has one token of the target's own.
        tokens_per_round=tokens / (tokens - accepted) if tokens > accepted else 1.0,
        tokens_per_s=tokens / (ended - began),
        client_tokens_per_s=tokens / sum(answer.seconds for answer in answers),
        failed=sum(bool(answer.error) for answer in answers),
    )


def _status(url: str) -> dict[str, Any]:
    with LOOPBACK.open(f"{url}/v1/aurora/status", timeout=30) as response:
        status: dict[str, Any] = json.load(response)
    return status


def _outputs_equal(texts: dict[str, list[list[str | None]]]) -> bool:
    """True if each measured prompt got the same answer in all arms, each time that it was measured; none failed."""
    measured = [each for of_arm in texts.values() for each in of_arm]
    return all(each == measured[0] and None not in each for each in measured)


def _table(results: dict[str, Any], outputs_equal: bool | None) -> Table:
    said = {None: "not compared", True: "equal in all arms, before and after", False: "DIFFER or are missing"}
    table = Table(title=f"accepted length, tokens a round; measured outputs {said[outputs_equal]}")
    for column in ("arm", "measured before", "measured after", "first window", "last window", "tokens/s", "failed"):
        table.add_column(column, justify="left" if column == "arm" else "right")
    for arm, result in results.items():
        windows = result["windows"]
        speeds = sorted(window["tokens_per_s"] for window in windows)
        table.add_row(
            arm,
            *(_lengths(result[when]) for when in ("before", "after")),
            *(_lengths(windows[place] if windows else None) for place in (0, -1)),
            f"{speeds[len(speeds) // 2]:.1f}" if speeds else "-",
            str(len(result["errors"])),
        )
    return table


def _lengths(window: dict[str, Any] | None) -> str:
    return f"{window['accepted_length']:.3f}, {window['tokens_per_round']:.3f}" if window else "-"


def _measured_table(results: dict[str, Any]) -> Table:
    table = Table(title="measured prompts: accepted length, tokens a round, and tokens/s of a client")
    for column in ("domain", "measured", *results):
        table.add_column(column, justify="left" if column in ("domain", "measured") else "right")
    points = next(iter(results.values()))["measured"]
    for domain in points[0]["by_domain"]:
        for number, point in enumerate(points):
            row = [result["measured"][number]["by_domain"][domain] for result in results.values()]
            table.add_row(
                domain,
                f"after {point['after']}" if point["after"] else "before",
                *(f"{_lengths(found)}, {found['client_tokens_per_s']:.1f}" for found in row),
            )
    return table
