"""Our server against other engines, on the same prompts through the same HTTP client. In the repository's root:

    python -m benchmarks.peers --prompts chat.jsonl code.jsonl summarize.jsonl --out peers
    python -m benchmarks.peers --prompts ... --out peers --peers vllm llama.cpp --clients 1 -- target.precision=int4

For every repeat and peer, our server and then the peer's (in every second repeat the other way round) is started,
warmed up, measured with 1, 4 and 8 clients, and stopped. Only one server runs at a time. Every number of clients has
its own prompts, so that no server finds a prompt in a cache. Missing environments are made under --work first (about 2
GB; for llama.cpp some minutes of compiling). Every pair is appended to OUT/pairs.jsonl, and a run that was stopped
continues from there. OUT/peers.json holds the ratios and the machine, OUT/logs what the servers printed. `python -m
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
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from aurora_lit.bench.load import ask, chat
from aurora_lit.bench.reporting import report_console
from aurora_lit.bench.servers import free_port, started
from aurora_lit.config import AuroraConfig, draft_folder, load_config, to_yaml
from aurora_lit.drafts.export import export
from aurora_lit.durable import is_as_begun
from aurora_lit.errors import AuroraError, ConfigError
from aurora_lit.learn.pretrain.prompts import encode_prompt, read_prompts
from aurora_lit.models.gguf import gguf_in
from aurora_lit.models.gguf_model import in_safetensors
from aurora_lit.models.package_index import file_sha256
from aurora_lit.models.source import find_target
from aurora_lit.progress import Progress
from aurora_lit.serve.worker.load_models import load_tokenizer

from . import environments
from .client import run_load, served_model
from .engines import OURS, PEERS, SLOT_TOKENS, SLOTS, Engine
from .report import Pair, ServerRun, summarise, table

_OVERRIDES = ("learn.enabled=false", f"engine.max_batch_size={SLOTS}", f"engine.max_seq_len={SLOT_TOKENS}")
"""Settings of our server, which the command line may override. The learner is off, since the peers do not learn."""


def main() -> int:
    """Measure what has not been measured yet; exit code 1 if an engine could not be measured."""
    arguments = _arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a server of ours is ended
    console = Console(stderr=True)
    peers = [peer for peer in PEERS if not arguments.peers or peer.name in arguments.peers]
    config = _config(arguments)
    work: Path = arguments.work.expanduser().absolute()
    try:
        substitutions = {engine.name: _prepare(engine, config, work, console) for engine in (OURS, *peers)}
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
        failures = _measure_all(peers, substitutions, prompts, arguments, console)
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
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
    parser.add_argument("--work", type=Path, default=Path("~/.cache/aurora-lit/peers"), help="environments")
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
    """Settings of our server: on loopback, with the shipped draft and none that was trained since."""
    config = load_config(arguments.config, _all_overrides(arguments))
    return dataclasses.replace(
        config,
        server=dataclasses.replace(config.server, host="127.0.0.1", api_key=None),
        checkpoint=dataclasses.replace(config.checkpoint, run="peers-none"),
    )


def _prepare(engine: Engine, config: AuroraConfig, work: Path, console: Console) -> dict[str, str]:
    """Installs the engine; returns the substitutions for its command."""
    cores = sorted(os.sched_getaffinity(0))
    with console.status(f"preparing {engine.name}"):
        substitutions = environments.prepare(engine.environment, work)
        substitutions |= {
            "cache": str(work / "cache"),
            "threads": str(len(cores)),
            "cores": ",".join(map(str, cores)),
        }
        words = " ".join(engine.command)
        if "{model}" in words:
            substitutions["model"] = str(in_safetensors(find_target(config)))
        if "{config}" in words:
            substitutions["config"] = str(work / "ours.yaml")
            work.mkdir(parents=True, exist_ok=True)
            (work / "ours.yaml").write_text(to_yaml(config))
        if "{gguf}" in words:
            gguf = gguf_in(find_target(config))
            if gguf is None:
                raise ConfigError(f"{engine.name} reads GGUF files; name one with target.source")
            substitutions["gguf"] = str(gguf)
        if "{draft}" in words:
            substitutions["draft"] = str(work / "draft")
            shutil.rmtree(substitutions["draft"], ignore_errors=True)
            export(config, out=Path(substitutions["draft"]), version=None)
    return substitutions


def choose_prompts(
    files: Sequence[Path], config: AuroraConfig, *, clients: Sequence[int], rounds: int, max_tokens: int
) -> dict[int, list[str]]:
    """Prompts by number of clients, without duplicates, from the files in turn; key 0: those for warming up."""
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
    """Write the plan, or raise ConfigError if the folder holds a run with another plan."""
    draft = draft_folder(config)
    plan = {
        "prompts": hashlib.sha256(json.dumps(prompts).encode()).hexdigest(),
        "max_tokens": arguments.max_tokens,
        "temperature": arguments.temperature,
        "overrides": _all_overrides(arguments),
        "draft": None if draft is None else file_sha256(draft / "model.safetensors"),
    }
    if not is_as_begun(path, plan):
        raise ConfigError(f"{path} is of a run with other prompts, settings or draft; name a new folder with --out")


def _measure_all(
    peers: Sequence[Engine],
    substitutions: Mapping[str, Mapping[str, str]],
    prompts: dict[int, list[str]],
    arguments: argparse.Namespace,
    console: Console,
) -> list[str]:
    """Measure every missing pair and append it to the results; returns error messages."""
    results = arguments.out / "pairs.jsonl"
    done = {(pair.repeat, pair.peer) for pair in read_pairs(results)}
    failures = []
    planned = [(repeat, peer) for repeat in range(arguments.repeats) for peer in peers]
    for repeat, peer in planned:
        if (repeat, peer.name) in done:
            continue
        order = (OURS, peer) if repeat % 2 == 0 else (peer, OURS)
        counts = [count for count in sorted(prompts) if 0 < count <= peer.most_clients]
        try:
            runs = {
                engine.name: _measure(
                    engine,
                    substitutions[engine.name],
                    prompts,
                    counts,
                    arguments,
                )
                for engine in order
            }
        except (AuroraError, OSError) as error:
            failures.append(f"repeat {repeat}, {peer.name}: {error}")
            continue
        pair = Pair(repeat=repeat, peer=peer.name, ours=runs[OURS.name], theirs=runs[peer.name])
        with results.open("a") as file:
            file.write(json.dumps(pair.to_json()) + "\n")
    return failures


def _measure(
    engine: Engine,
    substitutions: Mapping[str, str],
    prompts: dict[int, list[str]],
    counts: Sequence[int],
    arguments: argparse.Namespace,
) -> ServerRun:
    """Start a server, measure it with every number of clients, each after an unmeasured warm-up, and stop it."""
    url = f"http://127.0.0.1:{(port := free_port())}"
    command, environ = engine.substituted({**substitutions, "port": str(port)})
    loads = {}
    total = sum(count + len(prompts[count]) for count in counts)
    with (
        Progress(engine.name, total, "answers") as progress,
        started(command, environ, arguments.out / "logs" / f"{engine.name}.log") as server,
    ):
        server.wait_until_ready(f"{url}{engine.ready}")
        ask(url, chat(prompts[0][0], model=served_model(url), max_tokens=1, temperature=0.0, stream=True))
        first_answer_s = server.age_s()
        for count in counts:
            how = {"clients": count, "max_tokens": arguments.max_tokens, "temperature": arguments.temperature}
            run_load(url, prompts[0][:count], **how, on_answer=progress.advance)
            loads[count] = run_load(url, prompts[count], **how, on_answer=progress.advance)
        return ServerRun(loads=loads, first_answer_s=first_answer_s, memory_mb=server.memory_mb())


def read_pairs(path: Path) -> list[Pair]:
    """The pairs measured so far."""
    if not path.exists():
        return []
    return [Pair.from_json(json.loads(line)) for line in path.read_text().splitlines()]


if __name__ == "__main__":
    sys.exit(main())
