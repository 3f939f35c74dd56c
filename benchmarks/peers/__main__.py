"""Our server beside other engines, on the same prompts through the same HTTP client; in the repository's root:

    python -m benchmarks.peers --prompts chat.jsonl code.jsonl summarize.jsonl --out peers
    python -m benchmarks.peers --prompts ... --out peers --peers vllm llama.cpp-bf16 --clients 1 -- learn.enabled=true

For every repeat and peer, our server and then the peer's (the other way round in every second repeat) is started,
warmed up, asked by 1, 4 and 8 clients, and stopped; only one server runs at a time. Every number of clients has prompts
of its own, so that no server finds an answer's prompt in a cache. Environments are made under --work at first (about
2 GB and, for llama.cpp, some minutes of compiling). Every pair is appended to OUT/pairs.jsonl; a run that was stopped
goes on where it was. OUT/peers.json holds ratios and machine; OUT/logs what the servers printed. `python -m
benchmarks.peers --prepare` makes the environments and measures nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import itertools
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from aurora_lit.bench.online import free_port
from aurora_lit.bench.prompts import progress_bar, report_console
from aurora_lit.config import AuroraConfig, draft_folder, load_config, to_yaml
from aurora_lit.drafts.export import export
from aurora_lit.errors import AuroraError, ConfigError
from aurora_lit.learn.pretrain.label_text import encode_prompt, read_prompts
from aurora_lit.models.package_index import file_sha256
from aurora_lit.serve.worker.build import find_target, load_tokenizer

from . import environments, gguf_files
from .client import ask, run_load, served_model
from .engines import OURS, PEERS, SLOT_TOKENS, SLOTS, Engine
from .report import Pair, Visit, summarise, table
from .servers import running

_OVERRIDES = ("learn.enabled=false", f"engine.max_batch_size={SLOTS}", f"engine.max_seq_len={SLOT_TOKENS}")
"""Ours, before those of the command line: the peers do not learn either."""


def main() -> int:
    """Measure what has not been measured yet; 1 if an engine could not be."""
    arguments = _arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a server of ours is ended
    console = Console(stderr=True)
    peers = [peer for peer in PEERS if not arguments.peers or peer.name in arguments.peers]
    config = _config(arguments)
    work: Path = arguments.work.expanduser().absolute()
    try:
        places = {engine.name: _prepare(engine, config, work, console) for engine in (OURS, *peers)}
        if arguments.prepare:
            return 0
        prompts = choose_prompts(
            arguments.prompts,
            config,
            clients=arguments.clients,
            rounds=arguments.rounds,
            max_tokens=arguments.max_tokens,
        )
        arguments.out.mkdir(parents=True, exist_ok=True)
        _keep_plan(arguments.out / "plan.json", arguments, config, prompts)
        failures = _measure_all(peers, places, prompts, arguments, console)
    except AuroraError as error:
        console.print(f"[red]{error}[/]")
        return 1
    pairs = read_pairs(arguments.out / "pairs.jsonl")
    rows = summarise(pairs)
    machine = {"processor": environments.processor()[0], "cores": len(os.sched_getaffinity(0))}
    installed = {name: environments.versions(name, work) for name in {p.environment for p in peers}}
    report = {
        "machine": machine,
        "installed": installed,
        "overrides": _all_overrides(arguments),
        "rows": rows,
        "commands": {p.name: p.command for p in (OURS, *peers)},
        "failures": failures,
    }
    (arguments.out / "peers.json").write_text(json.dumps(report, indent=2) + "\n")
    report_console().print(table(rows))
    for failure in failures:
        console.print(f"[red]{failure}[/]")
    return int(bool(failures))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", nargs="+", type=Path, default=[], help="JSONL files, taken in turn")
    parser.add_argument("--out", type=Path, default=Path("peers"))
    parser.add_argument(
        "--peers",
        nargs="+",
        choices=[peer.name for peer in PEERS],
        default=[],
        metavar="NAME",
        help=f"of {', '.join(peer.name for peer in PEERS)}; all if left out",
    )
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 4, 8])
    parser.add_argument("--rounds", type=int, default=3, help="prompts a client, on average")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--work", type=Path, default=Path("~/.cache/aurora-lit/peers"), help="environments, GGUF files")
    parser.add_argument("--prepare", action="store_true", help="make the environments only")
    parser.add_argument("--config", type=Path, help="settings of our server")
    parser.add_argument("overrides", nargs="*", help="key=value for our server, after `--`")
    arguments = parser.parse_args()
    if not arguments.prompts and not arguments.prepare:
        parser.error("--prompts names no file; give chat.jsonl and the like, or --prepare")
    if max(arguments.clients) > SLOTS or min(arguments.clients) < 1:
        parser.error(f"--clients {arguments.clients}: the servers are set up for 1 to {SLOTS}")
    return arguments


def _all_overrides(arguments: argparse.Namespace) -> list[str]:
    return [*_OVERRIDES, *arguments.overrides]


def _config(arguments: argparse.Namespace) -> AuroraConfig:
    """Ours: on loopback, with the draft it ships and none that was learnt since."""
    config = load_config(arguments.config, _all_overrides(arguments))
    return dataclasses.replace(
        config,
        server=dataclasses.replace(config.server, host="127.0.0.1", api_key=None),
        checkpoint=dataclasses.replace(config.checkpoint, run="peers-none"),
    )


def _prepare(engine: Engine, config: AuroraConfig, work: Path, console: Console) -> dict[str, str]:
    """What the engine's command names."""
    cores = sorted(os.sched_getaffinity(0))
    with console.status(f"preparing {engine.name}"):
        places = environments.prepare(engine.environment, work)
        model = find_target(config)
        places |= {
            "model": str(model),
            "cache": str(work / "cache"),
            "threads": str(len(cores)),
            "cores": ",".join(map(str, cores)),
        }
        words = " ".join(engine.command)
        if "{config}" in words:
            places["config"] = str(work / "ours.yaml")
            work.mkdir(parents=True, exist_ok=True)
            (work / "ours.yaml").write_text(to_yaml(config))
        if "{gguf}" in words:
            places["gguf"] = str(work / "gguf" / model.name)
            gguf_files.make_files(model, Path(places["gguf"]), quantize=Path(places["bin"]) / "llama-quantize")
        if "{draft}" in words:
            places["draft"] = str(work / "draft")
            shutil.rmtree(places["draft"], ignore_errors=True)
            export(config, out=Path(places["draft"]), version=None)
    return places


def choose_prompts(
    files: Sequence[Path], config: AuroraConfig, *, clients: Sequence[int], rounds: int, max_tokens: int
) -> dict[int, list[str]]:
    """Prompts for every number of clients, none of them twice, one of each file in turn; under 0, those to warm up."""
    tokenizer = load_tokenizer(config)
    room = SLOT_TOKENS - max_tokens
    read = [[p for p in read_prompts(path) if len(encode_prompt(tokenizer, p)) <= room] for path in files]
    turns = (p.messages[0] for turn in itertools.zip_longest(*read) for p in turn if p is not None)
    chosen = {count: list(itertools.islice(turns, rounds * count)) for count in sorted(set(clients))}
    chosen[0] = list(itertools.islice(turns, max(clients)))
    if len(chosen[0]) < max(clients):
        wanted = rounds * sum(set(clients)) + max(clients)
        raise ConfigError(f"--prompts hold too few: {wanted} are needed; name more files or lower --rounds")
    return chosen


def _keep_plan(path: Path, arguments: argparse.Namespace, config: AuroraConfig, prompts: dict[int, list[str]]) -> None:
    """Refuses to go on with a run that measured something else."""
    draft = draft_folder(config)
    plan = {
        "prompts": hashlib.sha256(json.dumps(prompts).encode()).hexdigest(),
        "max_tokens": arguments.max_tokens,
        "overrides": _all_overrides(arguments),
        "draft": None if draft is None else file_sha256(draft / "model.safetensors"),
    }
    if path.exists() and json.loads(path.read_text()) != plan:
        raise ConfigError(f"{path} is of a run with other prompts, settings or draft; name a new folder with --out")
    path.write_text(json.dumps(plan, indent=2) + "\n")


def _measure_all(
    peers: Sequence[Engine],
    places: Mapping[str, Mapping[str, str]],
    prompts: dict[int, list[str]],
    arguments: argparse.Namespace,
    console: Console,
) -> list[str]:
    """Append every pair that is missing; returns what went wrong."""
    results = arguments.out / "pairs.jsonl"
    done = {(pair.repeat, pair.peer) for pair in read_pairs(results)}
    failures = []
    visits = [(repeat, peer) for repeat in range(arguments.repeats) for peer in peers]
    with progress_bar(console) as bar:
        whole = bar.add_task("pairs", total=len(visits), completed=sum((r, p.name) in done for r, p in visits))
        for repeat, peer in visits:
            if (repeat, peer.name) in done:
                continue
            order = (OURS, peer) if repeat % 2 == 0 else (peer, OURS)
            counts = [count for count in sorted(prompts) if 0 < count <= peer.most_clients]
            try:
                visits_of = {
                    engine.name: _measure(
                        engine, {**places[engine.name], "precision": peer.precision}, prompts, counts, arguments, bar
                    )
                    for engine in order
                }
            except (AuroraError, OSError) as error:
                failures.append(f"repeat {repeat}, {peer.name}: {error}")
                continue
            finally:
                bar.advance(whole)
            pair = Pair(repeat=repeat, peer=peer.name, ours=visits_of[OURS.name], theirs=visits_of[peer.name])
            with results.open("a") as file:
                file.write(json.dumps(pair.to_json()) + "\n")
    return failures


def _measure(
    engine: Engine,
    places: Mapping[str, str],
    prompts: dict[int, list[str]],
    counts: Sequence[int],
    arguments: argparse.Namespace,
    bar: Progress,
) -> Visit:
    """One server's life: every number of clients, each after a round of prompts that is not measured."""
    port = free_port()
    command, environ = engine.filled({**places, "port": str(port)})
    loads = {}
    task = bar.add_task(engine.name, total=sum(count + len(prompts[count]) for count in counts))
    advance: Callable[[], object] = lambda: bar.advance(task)  # noqa: E731
    try:
        with running(
            command,
            environ,
            ready_url=f"http://127.0.0.1:{port}{engine.ready}",
            log=arguments.out / "logs" / f"{engine.name}.log",
        ) as server:
            ask(port, served_model(port), prompts[0][0], max_tokens=1)
            first_answer_s = server.age_s()
            for count in counts:
                how = {"clients": count, "max_tokens": arguments.max_tokens}
                run_load(port, prompts[0][:count], **how, on_answer=advance)
                loads[count] = run_load(port, prompts[count], **how, on_answer=advance)
            return Visit(loads=loads, first_answer_s=first_answer_s, memory_mb=server.memory_mb())
    finally:
        bar.remove_task(task)


def read_pairs(path: Path) -> list[Pair]:
    """What was measured so far."""
    if not path.exists():
        return []
    return [Pair.from_json(json.loads(line)) for line in path.read_text().splitlines()]


if __name__ == "__main__":
    sys.exit(main())
