"""Proves the Grafana dashboard and the alert rules against a live server, with Prometheus itself.

    apt-get install prometheus
    python -m benchmarks.prove_dashboard

1. promtool checks the rules and runs their tests (docs/grafana/alerts_test.yml).
2. A server and a Prometheus with docs/grafana/prometheus.yml are started, and requests are sent. Every expression of
   every panel is evaluated until the learner has learned and all of them have a number, or --seconds are over.
3. Faults are made: the learner is stopped, a draft with NaN and one whose vocabulary is shuffled are published, more
   requests are sent than run, and more than may wait, the learner is killed three times, the engine worker is stopped,
   then killed. Each must raise its alert, and those of stopped processes must end when they go on. For this step
   Prometheus' clock is ten times faster: every duration in the rules is divided by ten.

Leaves out what Grafana draws. Exits with code 1 if an expression has no number or an alert does not fire.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import torch
import yaml
from rich.console import Console
from rich.table import Table

from aurora_lit.bench.server_process import free_port, running_server
from aurora_lit.config import draft_folder, load_config, versions_folder
from aurora_lit.drafts.checkpoint import load_draft, read_config
from aurora_lit.drafts.store import DraftStore
from aurora_lit.modules.draft.eagle3 import Eagle3Draft

ROOT = Path(__file__).resolve().parents[1]
GRAFANA = ROOT / "docs" / "grafana"
KEY = "key-of-this-run"
FASTER = 10
"""By how much durations in the alert rules are divided."""
_UNIT_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_RANGE_S = 30
"""What stands for Grafana's $__rate_interval."""


def expressions(dashboard: Path) -> Iterator[tuple[str, str]]:
    """(panel's title, expression) of a dashboard, with Grafana's variables replaced."""
    for panel in json.loads(dashboard.read_text())["panels"]:
        for target in panel.get("targets", ()):
            expression = target["expr"].replace("$__rate_interval", f"{_RANGE_S}s")
            yield panel["title"], re.sub(r"(=~?)\"\$\w+\"", '=~".*"', expression)


def faster(rules: str) -> str:
    """Alert rules whose `for` and ranges are shorter by FASTER; at least a second."""

    def shorter(found: re.Match[str]) -> str:
        return f"{max(1, int(found[2]) * _UNIT_S[found[3]] // FASTER)}s"

    return re.sub(r"(?<=(\[| ))(\d+)([smhd])(?=\]|\n| |\))", shorter, rules)


class Prometheus:
    """A running Prometheus; `url` is its address."""

    def __init__(self, url: str) -> None:
        self._client = httpx.Client(base_url=url, trust_env=False)

    def numbers(self, expression: str) -> list[float]:
        """The finite samples of an instant query. Raises httpx.HTTPStatusError for an expression that is wrong."""
        answer = self._client.get("/api/v1/query", params={"query": expression}).raise_for_status()
        values = [float(each["value"][1]) for each in answer.json()["data"]["result"]]
        return [value for value in values if math.isfinite(value)]

    def firing(self) -> set[str]:
        """Names of the alerts that fire."""
        alerts = self._client.get("/api/v1/alerts").raise_for_status().json()["data"]["alerts"]
        return {each["labels"]["alertname"] for each in alerts if each["state"] == "firing"}

    def is_ready(self) -> bool:
        """True once it answers queries."""
        try:
            return self._client.get("/-/ready").status_code == 200
        except httpx.HTTPError:
            return False


@contextmanager
def running_prometheus(folder: Path, target: str) -> Iterator[Prometheus]:
    """A Prometheus that scrapes `target` (host:port) and evaluates the alerts each second."""
    (folder / "key").write_text(KEY)
    (folder / "alerts.yml").write_text(faster((GRAFANA / "alerts.yml").read_text()))
    config = yaml.safe_load((GRAFANA / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(folder / "alerts.yml")]
    (scrape,) = config["scrape_configs"]
    scrape["authorization"] = {"credentials_file": str(folder / "key")}
    scrape["static_configs"] = [{"targets": [target]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    port = free_port()
    command = ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    with (folder / "prometheus.log").open("w") as log:
        process = subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log)
        try:
            prometheus = Prometheus(f"http://127.0.0.1:{port}")
            wait(prometheus.is_ready, within_s=30)
            yield prometheus
        finally:
            process.terminate()
            process.wait(30)


class Traffic:
    """Clients that send requests, one after the other each, until `stop`."""

    def __init__(self, url: str) -> None:
        self._client = httpx.Client(base_url=url, headers={"Authorization": f"Bearer {KEY}"}, timeout=120)
        self._is_over = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self, clients: int) -> None:
        """Add clients."""
        for number in range(clients):
            self._threads.append(threading.Thread(target=self._run, args=(number,), daemon=True))
            self._threads[-1].start()

    def stop(self) -> None:
        """End all clients after their present request."""
        self._is_over.set()
        for thread in self._threads:
            thread.join(150)

    def status(self) -> dict[str, Any]:
        """GET /v1/aurora/status."""
        return dict(self._client.get("/v1/aurora/status").raise_for_status().json())

    def _run(self, number: int) -> None:
        while not self._is_over.is_set():
            number += 7
            text = f"Write an SQL query that counts the orders of customer {number % 50} in each month."
            body: dict[str, Any] = {"messages": [{"role": "user", "content": text}], "max_tokens": 64}
            body |= {"temperature": number % 2, "metadata": {"aurora_domain": "sql" if number % 3 else "orders"}}
            if number % 10 == 0:
                body["temperature"] = -1  # refused
            try:
                is_refused = self._client.post("/v1/chat/completions", json=body).status_code == 429
            except httpx.HTTPError:  # the server is killed at the end
                is_refused = True
            if is_refused:
                time.sleep(0.5)


def wait(condition: Callable[[], object], *, within_s: float) -> float | None:
    """Poll until `condition()` is true; the seconds it took, or None if it was not in time."""
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > within_s:
            return None
        time.sleep(0.2)
    return time.monotonic() - began


def prove_panels(prometheus: Prometheus, dashboards: list[Path], *, within_s: float, console: Console) -> bool:
    """Print what each expression gives. True if all give a number."""
    asked = [(path.stem, *pair) for path in dashboards for pair in expressions(path)]

    def missing() -> list[str]:
        return [expression for _, _, expression in asked if not prometheus.numbers(expression)]

    def has_learned() -> bool:
        return bool(prometheus.numbers("aurora_learner_positions_total > 0"))

    took_s = wait(lambda: has_learned() and not missing(), within_s=within_s)
    table = Table("dashboard", "panel", "series", "first value")
    for name, title, expression in asked:
        found = prometheus.numbers(expression)
        table.add_row(name, title, str(len(found)), f"{found[0]:.4g}" if found else "[red]none[/red]")
    console.print(table)
    console.print(f"{len(asked) - len(missing())} of {len(asked)} expressions have a number")
    for expression in missing():
        console.print(f"none: {expression}", markup=False)
    if not has_learned():
        console.print("the learner has learned nothing yet; give it more --seconds")
    return took_s is not None


def publish(versions: Path, change: Callable[[Eagle3Draft], object]) -> None:
    """Publish the shipped draft, changed, as if a learner had."""
    checkpoint = draft_folder(load_config(None, []))
    assert checkpoint is not None
    draft = load_draft(checkpoint, read_config(checkpoint))
    with torch.no_grad():
        change(draft)
    DraftStore(versions, keep=5).publish(draft, record={})


def spoil(draft: Eagle3Draft) -> None:
    """So that it cannot be served."""
    draft.fc.weight[0] = torch.nan


def shuffle(draft: Eagle3Draft) -> None:
    """So that it proposes nonsense."""
    draft.lm_head.weight.copy_(draft.lm_head.weight[torch.randperm(len(draft.lm_head.weight))])


def prove_alerts(prometheus: Prometheus, traffic: Traffic, url: str, versions: Path, *, console: Console) -> bool:
    """Make faults and print what fires. True if all did that should. `versions`: where drafts are published."""
    flood = Traffic(url)

    def learner_pid() -> int:
        return int(traffic.status()["learner"]["pid"] or 0)

    results: list[float | None] = []

    def expect(alert: str, after: str, *, within_s: float = 120, ends: bool = False) -> None:
        took_s = wait(lambda: (alert in prometheus.firing()) != ends, within_s=within_s)
        what = "in time" if took_s is not None else "NOT in time"
        console.print(f"{after}: {alert} {'ends' if ends else 'fires'} {what} ({took_s or within_s:.0f} s)")
        results.append(took_s)

    before = prometheus.firing()
    console.print(f"before the faults these fire: {sorted(before) or 'none'}")
    results.append(None if before & {"AuroraServerDown", "AuroraLearnerDown", "AuroraQueueLong"} else 0.0)
    stopped = learner_pid()
    os.kill(stopped, signal.SIGSTOP)
    publish(versions, spoil)
    expect("AuroraDraftRefused", "a draft with NaN published")
    publish(versions, shuffle)
    expect("AuroraDraftRolledBack", "a draft that proposes nonsense published")
    expect("AuroraLearnerDown", "learner stopped")
    os.kill(stopped, signal.SIGCONT)
    expect("AuroraLearnerDown", "learner continued", ends=True)
    flood.start(80)
    expect("AuroraQueueLong", "82 clients")
    expect("AuroraRequestsRefused", "82 clients, 64 of which may wait or run")
    flood.stop()
    for _ in range(3):
        wait(lambda: traffic.status()["learner"]["state"] == "running", within_s=90)
        os.kill(learner_pid(), signal.SIGKILL)
        time.sleep(2)
    expect("AuroraLearnerRestarts", "learner killed three times")
    worker = int(traffic.status()["worker"]["pid"])
    os.kill(worker, signal.SIGSTOP)
    expect("AuroraWorkerNotReady", "engine worker stopped")
    os.kill(worker, signal.SIGCONT)
    expect("AuroraWorkerNotReady", "engine worker continued", ends=True)
    os.kill(worker, signal.SIGKILL)
    expect("AuroraServerDown", "engine worker killed")
    return None not in results


def main() -> None:
    """See the file's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--dashboard", type=Path, action="append", help="Also these, such as vLLM's. Repeatable.", default=[]
    )
    parser.add_argument("--seconds", type=float, default=180, help="How long panels may wait for their first number.")
    parser.add_argument("settings", nargs="*", help="Settings of the server, as key=value.")
    options = parser.parse_args()
    console = Console(width=120)
    for tool in ("prometheus", "promtool"):
        if shutil.which(tool) is None:
            sys.exit(f"{tool} is not installed; on Debian: apt-get install prometheus")
    for arguments in (["check", "rules", "alerts.yml"], ["test", "rules", "alerts_test.yml"]):
        subprocess.run(["promtool", *arguments], cwd=GRAFANA, check=True)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        port = free_port()
        settings = [f"server.port={port}", f"server.api_key={KEY}", f"checkpoint.dir={folder / 'drafts'}"]
        settings += [f"learn.logs={folder / 'logs'}", "learn.compute_share=0.5", "learn.batch_positions=256"]
        config = load_config(None, [*settings, *options.settings])
        with (
            running_server(config, folder / "server.log") as url,
            running_prometheus(folder, f"127.0.0.1:{port}") as prometheus,
        ):
            traffic = Traffic(url)
            traffic.start(2)
            dashboards = [GRAFANA / "aurora-lit.json", *options.dashboard]
            panels = prove_panels(prometheus, dashboards, within_s=options.seconds, console=console)
            alerts = prove_alerts(prometheus, traffic, url, versions_folder(config), console=console)
            traffic.stop()
    sys.exit(0 if panels and alerts else 1)


if __name__ == "__main__":
    main()
