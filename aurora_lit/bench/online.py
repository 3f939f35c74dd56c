"""Real servers on real prompts over HTTP, in one order: a draft that learns, the same one that does not, and none.

    measure -> traffic, a window at a time -> measure again

The measured prompts are sent with `store: false`, so they teach nothing; their answers must be the same in every arm,
before and after. Arms that do not learn change nothing with time, so a part of the traffic tells all of them.
What is left out: the picture (bench/plot_online.py), the server itself.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from aurora_lit.bench.plot_online import save_plot
from aurora_lit.config import AuroraConfig, model_name, to_yaml
from aurora_lit.errors import AuroraError, ConfigError
from aurora_lit.ipc.process_lifetime import die_with_parent
from aurora_lit.learn.pretrain.label_text import Prompt, read_prompts

ARMS = ("plain", "static", "learning")
_START_S = 300.0


@dataclass(frozen=True, kw_only=True)
class Answered:
    """One request as the client saw it."""

    number: int
    started_s: float
    """Since the arm began."""
    seconds: float
    tokens: int
    rounds: int
    """In which something was proposed for it."""
    accepted: int
    draft_versions: tuple[str, ...]
    text: str
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class Window:
    """Neighbouring requests together."""

    requests: int
    ended_s: float
    """Since the arm began."""
    accepted_length: float
    """Tokens emitted by a round in which something was proposed, the bonus token included."""
    tokens_per_s: float
    failed: int


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
) -> dict[str, Any]:
    """Run the arms one after the other; returns what it writes to `out`/online.json, anew after every arm.

    static_requests: traffic of the arms that do not learn; None: all of it.
    """
    unknown = [arm for arm in arms if arm not in ARMS]
    if unknown:
        raise ConfigError(f"--arms {','.join(unknown)}: there is no such arm; use some of {','.join(ARMS)}")
    traffic = _in_turn(prompts, requests)
    measured = _in_turn(measure, measure_requests)
    out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {}
    texts: dict[str, list[str]] = {}
    report: dict[str, Any] = {}
    with Progress(console=Console(stderr=True)) as bar:
        for arm in arms:
            asked = traffic if arm == "learning" else traffic[:static_requests]
            task = bar.add_task(arm, total=len(asked) + 2 * len(measured))
            results[arm], texts[arm] = _run_arm(
                _arm_config(config, arm),
                asked,
                measured,
                concurrency,
                max_tokens,
                window,
                out / f"{arm}.log",
                lambda task=task: bar.advance(task),
            )
            report = {
                "prompts": [p.name for p in prompts],
                "requests": len(traffic),
                "concurrency": concurrency,
                "max_tokens": max_tokens,
                "arms": results,
                "outputs_equal": _outputs_equal(texts),
            }
            (out / "online.json").write_text(json.dumps(report, indent=2) + "\n")
    save_plot(results, out / "online.png")
    Console().print(_table(results, report["outputs_equal"]))
    return report


def _arm_config(config: AuroraConfig, arm: str) -> AuroraConfig:
    return dataclasses.replace(
        config,
        server=dataclasses.replace(config.server, port=free_port(), host="127.0.0.1", api_key=None),
        learn=dataclasses.replace(config.learn, enabled=arm == "learning"),
        engine=dataclasses.replace(config.engine, speculate=config.engine.speculate and arm != "plain"),
        checkpoint=dataclasses.replace(config.checkpoint, run=f"bench-{arm}-{os.getpid()}"),
    )


def free_port() -> int:
    """A port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _in_turn(paths: Sequence[Path], count: int) -> list[Prompt]:
    """The first `count` prompts, one of each file in turn."""
    files = [read_prompts(path) for path in paths]
    longest = max((len(file) for file in files), default=0)
    return [file[i] for i in range(longest) for file in files if i < len(file)][:count]


def _run_arm(
    config: AuroraConfig,
    traffic: list[Prompt],
    measured: list[Prompt],
    concurrency: int,
    max_tokens: int,
    window: int,
    log: Path,
    advance: Any,
) -> tuple[dict[str, Any], list[str]]:
    """What is reported of an arm, and the texts that were measured before and after."""
    with running_server(config, log) as url, ThreadPoolExecutor(concurrency) as pool:
        from openai import OpenAI

        client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600)
        begun, model = time.monotonic(), model_name(config)

        def send(numbered: tuple[int, Prompt], *, store: bool) -> Answered:
            answered = _ask(client, model, numbered[0], numbered[1], max_tokens=max_tokens, store=store, begun=begun)
            advance()
            return answered

        before = list(pool.map(lambda item: send(item, store=False), enumerate(measured)))
        traffic_began = time.monotonic() - begun
        windows, statuses, failed = [], [], []
        for start in range(0, len(traffic), window):
            part = list(enumerate(traffic))[start : start + window]
            done = list(pool.map(lambda item: send(item, store=True), part))
            windows.append(_window(done))
            failed += [answer.error for answer in done if answer.error]
            statuses.append(_status(url))
        after = list(pool.map(lambda item: send(item, store=False), enumerate(measured)))
        status = _status(url)
    return {
        "before": asdict(_window(before)) if before else None,
        "after": asdict(_window(after)) if after else None,
        "traffic_s": (windows[-1].ended_s - traffic_began) if windows else 0.0,
        "windows": [asdict(w) for w in windows],
        "statuses": statuses,
        "status": status,
        "errors": failed + [a.error for a in before + after if a.error],
    }, [a.text for a in before] + [a.text for a in after]


def _ask(
    client: Any, model: str, number: int, prompt: Prompt, *, max_tokens: int, store: bool, begun: float
) -> Answered:
    started = time.monotonic()
    fields: dict[str, Any] = {"number": number, "started_s": started - begun}
    try:
        response = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": prompt.messages[0]}],
            max_tokens=max_tokens,
            temperature=0.0,
            store=store,
        )
    except Exception as error:  # whatever goes wrong is a finding of the benchmark
        return Answered(
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
    return Answered(
        **fields,
        seconds=time.monotonic() - started,
        tokens=response.usage.completion_tokens,
        rounds=speculation["num_spec_steps"],
        accepted=speculation["num_accepted_draft_tokens"],
        draft_versions=tuple(speculation.get("draft_versions", ())),
        text=response.choices[0].message.content or "",
    )


def _window(answers: Sequence[Answered]) -> Window:
    rounds = sum(answer.rounds for answer in answers)
    began = min(answer.started_s for answer in answers)
    ended = max(answer.started_s + answer.seconds for answer in answers)
    return Window(
        requests=len(answers),
        ended_s=ended,
        accepted_length=1 + sum(answer.accepted for answer in answers) / rounds if rounds else 1.0,
        tokens_per_s=sum(answer.tokens for answer in answers) / (ended - began),
        failed=sum(bool(answer.error) for answer in answers),
    )


@contextmanager
def running_server(config: AuroraConfig, log: Path) -> Iterator[str]:
    """A server in a process of its own, ended as a service manager would."""
    url = f"http://127.0.0.1:{config.server.port}"
    with tempfile.TemporaryDirectory() as scratch, log.open("w") as output:
        path = Path(scratch) / "arm.yaml"
        path.write_text(to_yaml(config))
        server = _start([sys.executable, "-m", "aurora_lit", "serve", "--config", str(path)], output)
        try:
            wait_until_ready(f"{url}/ready", server, log, within_s=_START_S)
            yield url
        finally:
            server.send_signal(signal.SIGTERM)
            try:
                server.wait(60)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def _start(command: Sequence[str], output: IO[str]) -> subprocess.Popen[bytes]:
    """A process that is told to end when we do, however we do."""
    me = os.getpid()
    follow = functools.partial(die_with_parent, me, by=signal.SIGTERM)  # SIGTERM, so that it tidies up
    return subprocess.Popen(command, stdout=output, stderr=output, preexec_fn=follow)


def wait_until_ready(url: str, server: subprocess.Popen[bytes], log: Path, *, within_s: float) -> None:
    """Return when the URL answers 200. Raises AuroraError when the server ends before, or takes too long."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise AuroraError(f"the server ended at its start; {log} says why")
        try:
            with urllib.request.urlopen(url, timeout=5) as response:
                if response.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise AuroraError(f"the server was not ready after {within_s:.0f} s; {log} says why")


def _status(url: str) -> dict[str, Any]:
    with urllib.request.urlopen(f"{url}/v1/aurora/status", timeout=30) as response:
        status: dict[str, Any] = json.load(response)
    return status


def _outputs_equal(texts: dict[str, list[str]]) -> bool:
    """Whether every measured prompt was answered the same in all arms, before and after learning."""
    halves = []
    for both in texts.values():
        halves += [both[: len(both) // 2], both[len(both) // 2 :]]
    return all(half == halves[0] for half in halves)


def _table(results: dict[str, Any], outputs_equal: bool) -> Table:
    table = Table(title=f"measured outputs {'equal' if outputs_equal else 'DIFFER'} in all arms, before and after")
    for column in ("arm", "measured before", "measured after", "first window", "last window", "tokens/s", "failed"):
        table.add_column(column, justify="left" if column == "arm" else "right")
    for arm, result in results.items():
        windows = result["windows"]
        speeds = sorted(window["tokens_per_s"] for window in windows)
        table.add_row(
            arm,
            *(f"{result[when]['accepted_length']:.3f}" if result[when] else "-" for when in ("before", "after")),
            f"{windows[0]['accepted_length']:.3f}" if windows else "-",
            f"{windows[-1]['accepted_length']:.3f}" if windows else "-",
            f"{speeds[len(speeds) // 2]:.1f}" if speeds else "-",
            str(len(result["errors"])),
        )
    return table
