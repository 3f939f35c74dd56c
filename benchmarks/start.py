"""How long `aurora-lit serve` takes from its command to its first answer, and what its processes hold in memory.

    python -m benchmarks.start --starts 5 -- learn.enabled=false
    python -m benchmarks.start --starts 5 --against ../before -- learn.enabled=false     # another checkout, in turn
    python -m benchmarks.start --config qwen2.5-coder-0.5b --fresh -- target.source=FILE.gguf target.sha256=null

A start ends with the last byte of the answer to the first chat request, which is sent over and over from the start on.
Memory is the proportional set size (Pss, Linux): memory that processes share is divided among them. It is read after
--requests further requests, and its peak is the largest of readings every 0.2 s from the start on. With --fresh each
start begins with a cache that holds only the compiled kernels: a first start after the download, if the source is a
file. Then the space that the cache takes is printed too.
"""

from __future__ import annotations

import argparse
import http.client
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from aurora_lit.bench.load import ask, chat
from aurora_lit.bench.servers import Server, started_aurora
from aurora_lit.errors import AuroraError
from aurora_lit.models.source import cache_root

ROOT = Path(__file__).resolve().parents[1]
_PATIENCE_S = 300.0


def memory_mb(server: Server) -> dict[str, float]:
    """Pss of each process of a server, MB."""
    found: dict[str, float] = {}
    for member in server.members():
        name = server.role(member)
        found[name] = found.get(name, 0.0) + member.memory_full_info().pss / 1e6
    return found


@contextmanager
def fresh_cache(wanted: bool) -> Iterator[Path | None]:
    """Inside, the cache holds the compiled kernels and nothing else; None: it is the usual one."""
    if not wanted:
        yield None
        return
    usual = cache_root()
    with tempfile.TemporaryDirectory(dir=usual) as folder:
        if (usual / "kernels").exists():
            shutil.copytree(usual / "kernels", Path(folder) / "kernels")
        os.environ["AURORA_LIT_CACHE"] = folder
        try:
            yield Path(folder)
        finally:
            os.environ["AURORA_LIT_CACHE"] = str(usual)


@contextmanager
def sampled_peak(server: Server) -> Iterator[list[float]]:
    """Readings of a server's memory every 0.2 s, MB."""
    over, readings = threading.Event(), list[float]()

    def sample() -> None:
        while not over.wait(0.2):
            with suppress(psutil.Error):
                readings.append(server.memory_mb())

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield readings
    finally:
        over.set()
        thread.join()


def start(checkout: Path, port: int, words: list[str], *, num_requests: int, is_fresh: bool) -> dict[str, Any]:
    """One start: {"answer": s, "memory": {process: MB}, "peak": MB, "disk": MB}."""
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory() as scratch, fresh_cache(is_fresh) as cache:
        arguments = [*words, f"server.port={port}", f"checkpoint.dir={scratch}"]
        log = Path(scratch) / "log"
        with started_aurora(arguments, log, code=checkout) as server, sampled_peak(server) as readings:
            while True:
                server.check_runs()
                with suppress(OSError, http.client.HTTPException, AuroraError):
                    ask(url, chat("What is a river?", max_tokens=8, temperature=0))
                    break
                if server.age_s() > _PATIENCE_S:
                    raise SystemExit("the server did not start")
                time.sleep(0.01)
            answer_s = server.age_s()
            for number in range(num_requests):
                text = f"Write {number + 2} sentences about the number {number}."
                ask(url, chat(text, max_tokens=64, temperature=0))
            files = [] if cache is None else [path for path in cache.rglob("*") if path.is_file()]
            disk = sum(path.lstat().st_size for path in files if "kernels" not in path.parts) / 1e6
            return {"answer": answer_s, "memory": memory_mb(server), "peak": max(readings), "disk": disk}


def main() -> None:
    """Start the server several times and print medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=5, help="starts of each checkout")
    parser.add_argument("--requests", type=int, default=0, help="requests before memory is read")
    parser.add_argument("--against", type=Path, help="another checkout, started in turn with this one")
    parser.add_argument("--config", help="file or name of the deployment")
    parser.add_argument("--fresh", action="store_true", help="begin each start with an empty cache")
    parser.add_argument("--port", type=int, default=18080)
    parser.add_argument("settings", nargs="*", help="key=value")
    arguments = parser.parse_args()
    checkouts = [ROOT] if arguments.against is None else [arguments.against.resolve(), ROOT]
    words = [*(["--config", arguments.config] if arguments.config else []), *arguments.settings]
    runs: dict[Path, list[dict[str, Any]]] = {checkout: [] for checkout in checkouts}
    for _ in range(arguments.starts):
        for checkout in checkouts:
            run = start(checkout, arguments.port, words, num_requests=arguments.requests, is_fresh=arguments.fresh)
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
        print(f"  {'peak':18} {statistics.median(run['peak'] for run in runs[checkout]):7.0f} MB")
        if arguments.fresh:
            print(f"  {'cache on disk':18} {statistics.median(run['disk'] for run in runs[checkout]):7.0f} MB")


if __name__ == "__main__":
    main()
