"""How long `aurora-lit serve` takes from its command to its first answer, and what its processes hold in memory.

    python benchmarks/start.py --starts 5 -- learn.enabled=false
    python benchmarks/start.py --starts 5 --against ../before -- learn.enabled=false     # another checkout, in turn

A start ends with the last byte of the answer to the first chat request, which is sent over and over from the start on.
Memory is the proportional set size (Pss, Linux): memory that processes share is divided among them. It is read after
--requests further requests.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
_PATIENCE_S = 300.0


def ask(port: int, text: str, *, max_tokens: int) -> bool:
    """Send one chat request; False if the server does not answer yet."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": max_tokens, "temperature": 0}
    try:
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        response.read()
        return response.status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def role(process: psutil.Process, main_pid: int) -> str:
    """Which of a server's processes this is."""
    command = " ".join(process.cmdline())
    if process.pid == main_pid:
        return "main"
    if " learn " in command:
        return "learner"
    if "resource_tracker" in command:
        return "resource tracker"
    if "spawn_main" in command:
        return "engine worker"
    return "HTTP" if any(c.status == psutil.CONN_LISTEN for c in process.net_connections("tcp")) else "queue manager"


def memory_mb(main_pid: int) -> dict[str, float]:
    """Pss of each process of a server, MB."""
    found: dict[str, float] = {}
    for process in [psutil.Process(main_pid), *psutil.Process(main_pid).children(recursive=True)]:
        name = role(process, main_pid)
        found[name] = found.get(name, 0.0) + process.memory_full_info().pss / 1e6
    return found


def start(checkout: Path, port: int, settings: list[str], *, num_requests: int) -> dict[str, Any]:
    """One start: {"listening": s, "answer": s, "memory": {process: MB}}."""
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    with tempfile.TemporaryDirectory() as scratch, open(Path(scratch) / "log", "w+") as log:
        command = [sys.executable, "-m", "aurora_lit", "serve", f"server.port={port}", f"checkpoint.dir={scratch}"]
        began = time.perf_counter()
        server = subprocess.Popen([*command, *settings], cwd=scratch, env=environment, stdout=log, stderr=log)
        try:
            while not ask(port, "What is a river?", max_tokens=8):
                if server.poll() is not None or time.perf_counter() - began > _PATIENCE_S:
                    log.seek(0)
                    raise SystemExit(f"the server did not start: {log.read()}")
                time.sleep(0.01)
            answer_s = time.perf_counter() - began
            for number in range(num_requests):
                ask(port, f"Write {number + 2} sentences about the number {number}.", max_tokens=64)
            return {"answer": answer_s, "memory": memory_mb(server.pid)}
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(30)


def main() -> None:
    """Start the server several times and print medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=5, help="starts of each checkout")
    parser.add_argument("--requests", type=int, default=0, help="requests before memory is read")
    parser.add_argument("--against", type=Path, help="another checkout, started in turn with this one")
    parser.add_argument("--port", type=int, default=18080)
    parser.add_argument("settings", nargs="*", help="key=value")
    arguments = parser.parse_args()
    checkouts = [ROOT] if arguments.against is None else [arguments.against.resolve(), ROOT]
    runs: dict[Path, list[dict[str, Any]]] = {checkout: [] for checkout in checkouts}
    for _ in range(arguments.starts):
        for checkout in checkouts:
            run = start(checkout, arguments.port, arguments.settings, num_requests=arguments.requests)
            runs[checkout].append(run)
            print(f"{checkout.name}: {run['answer']:.2f} s", file=sys.stderr, flush=True)
    for checkout in checkouts:
        answers = [run["answer"] for run in runs[checkout]]
        print(f"{checkout.name}: first answer {statistics.median(answers):.2f} s", end=" ")
        print(f"({min(answers):.2f} to {max(answers):.2f}, {len(answers)} starts)")
        roles = dict.fromkeys(name for run in runs[checkout] for name in run["memory"])
        for name in roles:
            values = [run["memory"].get(name, 0.0) for run in runs[checkout]]
            print(f"  {name:18} {statistics.median(values):7.0f} MB")
        print(f"  {'together':18} {statistics.median(sum(run['memory'].values()) for run in runs[checkout]):7.0f} MB")


if __name__ == "__main__":
    main()
