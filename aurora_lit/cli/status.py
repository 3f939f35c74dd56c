"""`aurora-lit status`: shows what a running server and its learner are doing.

Leaves out where the numbers come from (ipc/, serve/http/status.py).
"""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from aurora_lit.errors import AuroraError
from aurora_lit.ipc.engine_status import HEARTBEAT_STALE_S, STATUS_NAME, EngineStatusPage
from aurora_lit.ipc.learner_status import LEARNER_STATUS_NAME, LearnerStatusPage
from aurora_lit.ipc.run_folder import live_folders
from aurora_lit.serve.http.status import engine_json, learner_json, ranks_json, ring_counters

Json = dict[str, Any]


def show(*, url: str | None, api_key: str | None, run_folder: Path | None, as_json: bool) -> None:
    """Print the status of the server at `url`, or of one on this machine by its run folder (None: the newest)."""
    report = ask(url, api_key) if url is not None else read(find_run_folder(run_folder))
    if as_json:
        print(json.dumps(report, indent=2))
        return
    table = Table("", "", show_header=False, box=None)
    for name, value in _lines(report):
        table.add_row(f"[bold]{name}[/]", escape(value))  # clients' labels may look like markup
    Console(highlight=False).print(table)


def find_run_folder(given: Path | None) -> Path:
    """The run folder of a running server: `given`, or the newest on this machine. AuroraError if there is none."""
    if given is not None:
        if not (given / STATUS_NAME).exists():
            raise AuroraError(f"--run-folder {given} belongs to no running server; leave it out to take the newest one")
        return given
    folders = live_folders()
    if not folders:
        raise AuroraError("no server of this user runs on this machine; start `aurora-lit serve`")
    return folders[0]


def read(run_folder: Path) -> Json:
    """The report, from the status pages in the run folder."""
    try:
        status = EngineStatusPage.open(run_folder / STATUS_NAME).read()
        learner = LearnerStatusPage.open(run_folder / LEARNER_STATUS_NAME).read()
    except (OSError, ValueError) as error:
        raise AuroraError(f"{run_folder} cannot be read: {error}") from error
    return {
        "run_folder": str(run_folder),
        **engine_json(status, ring_counters(run_folder)),
        "ranks": ranks_json(run_folder),
        "learner": learner_json(learner),
    }


def ask(url: str, api_key: str | None) -> Json:
    """The report, over HTTP."""
    if not url.lower().startswith(("http://", "https://")):
        raise AuroraError(f"--url {url} does not begin with http:// or https://; write it as http://127.0.0.1:8000")
    address = f"{url.rstrip('/').removesuffix('/v1')}/v1/aurora/status"
    # Headers are bytes, which urllib takes as Latin-1.
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}".encode().decode("latin-1")}
    try:
        # A proxy that the environment names has another loopback.
        is_local = urllib.parse.urlsplit(address).hostname in ("127.0.0.1", "localhost", "::1")
        opener = urllib.request.build_opener(*([urllib.request.ProxyHandler({})] if is_local else []))
        with opener.open(urllib.request.Request(address, headers=headers), timeout=10) as response:
            report: Any = json.load(response)
    except urllib.error.HTTPError as error:
        remedy = "; add 'server.api_key=${oc.env:AURORA_LIT_API_KEY}'" if error.code == 401 else ""
        raise AuroraError(f"{address} answered {error.code} {error.reason}{remedy}") from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise AuroraError(f"{address} cannot be reached: {error}; is the server running?") from error
    if not isinstance(report, dict) or "worker" not in report:
        raise AuroraError(f"{address} is no aurora-lit server; name the address that `aurora-lit serve` printed")
    return report


def _lines(report: Json) -> list[tuple[str, str]]:
    worker, queue, draft, learner = (report[key] for key in ("worker", "queue", "draft", "learner"))
    speculation, ring, gate = report["speculation"], report["traces"]["ring"], learner["gate"]
    lines = [
        ("server", f"{_state(worker)}, up {_seconds(worker['uptime_s'])}, pid {worker['pid']}"),
        ("requests", f"{queue['running']} running, {queue['waiting']} waiting"),
        ("tokens", f"{report['tokens']['prompt']} read, {report['tokens']['generated']} generated"),
        ("accepted length", f"{_number(speculation['mean_accepted_length'])} over {speculation['drafts']} rounds"),
        ("draft", f"{draft['version']}, {draft['swaps']} swaps, {draft['rollbacks']} rollbacks"),
    ]
    if rounds := speculation["rounds"]:
        shares = [f"{100 * count / rounds:.0f} % {plan}" for plan, count in speculation["rounds_by_plan"].items()]
        lines.insert(3, ("rounds", ", ".join(shares)))
    if draft["gain"]:
        lines.append(("last swap", draft["gain"]))
    memory = report["memory"]
    if memory["capacity_tokens"]:
        filled = f"{memory['answers']} answers, {100 * memory['tokens'] / memory['capacity_tokens']:.0f} % full"
        lines.append(("memory", f"{filled}, {memory['accepted']} of {memory['proposed']} proposed tokens accepted"))
    lines += [
        (name.replace("_", " "), f"{draft[name]['version']}: {draft[name]['reason']}")
        for name in ("refused", "rolled_back", "alarm")
        if draft[name]
    ]
    if served := report["domains"]["served"]:
        lines.append(("served domains", _served_domains(served)))
    if report["domains"]["refused"]:
        lines.append(("refused domains", report["domains"]["refused"]))
    if ring is not None:
        dropped = sum(ring["dropped"].values())
        lines.append(("traces", f"{ring['pushed']} recorded, {ring['queued']} waiting, {dropped} dropped"))
    if worker["error"]:
        lines.append(("server's error", worker["error"]))
    lines += [(f"rank {rank['rank']}", _rank(rank)) for rank in report["ranks"]]
    is_alive = learner["state"] in ("running", "stalled")
    activity = f": {learner['activity']}" if learner["activity"] and is_alive else ""
    lines.append(("learner", f"{learner['state']}{activity}"))
    if learner["error"]:
        lines.append(("learner's error", learner["error"]))
    if learner["domains"]["now"]:
        lines.append(("domains", learner["domains"]["now"]))
    left_out = {
        "looping answers": learner["traces"]["looping"],
        "labels": learner["traces"]["labels_dropped"],
        "waits of clients over their share": learner["traces"]["over_client_share"],
    }
    if any(left_out.values()):
        lines.append(("left out", ", ".join(f"{number} {what}" for what, number in left_out.items() if number)))
    if learner["steps"] or learner["traces"]["read"]:
        share = learner["compute_share"]
        of_compute = "" if share is None else f", {100 * share:.1f} % of compute"
        lines += [
            ("learned", f"{learner['steps']} steps, {learner['positions']} positions{of_compute}"),
            (
                "gate",
                f"{gate['published']} published, {gate['refused']} held back, last "
                f"{_number(gate['challenger'])} against {_number(gate['champion'])}",
            ),
        ]
    return lines


def _state(worker: Json) -> str:
    """Of the engine worker: what it wrote, unless it hangs or was killed since."""
    age_s = worker["heartbeat_age_s"]
    is_silent = worker["state"] == "ready" and age_s > HEARTBEAT_STALE_S
    return f"no sign of life for {age_s:.0f} s" if is_silent else str(worker["state"])


def _rank(rank: Json) -> str:
    if rank["error"] or not rank["pid"]:
        return rank["error"] or "starting"
    return f"pid {rank['pid']}, last sign of life {rank['heartbeat_age_s']:.0f} s ago"


def _served_domains(served: Json) -> str:
    """Each domain's share of the generated tokens and its mean accepted length, the largest share first."""
    total = max(1, sum(domain["generated_tokens"] for domain in served.values()))
    by_share = sorted(served.items(), key=lambda item: -int(item[1]["generated_tokens"]))
    return ", ".join(
        f"{name} {100 * domain['generated_tokens'] / total:.0f} % (accepted length "
        f"{_number(domain['mean_accepted_length'])})"
        for name, domain in by_share
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    minutes, seconds = divmod(int(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
