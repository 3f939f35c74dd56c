"""What a server with default settings learns from traffic that changes, and what it brings on prompts it has not seen.

    python -m benchmarks.templated_prompts --out traffic --requests 5000
    python -m benchmarks.live_learning --phases traffic/billing.jsonl traffic/support.jsonl traffic/alerts.jsonl
    python -m benchmarks.live_learning --phases traffic/billing.jsonl --arrivals times.csv --rate 0.7

Traffic is of one file after the other, each for `--seconds`, from `--clients` clients that send a request as soon as
the last one is answered, or at the times of `--arrivals` (a CSV file with a column timestamp_s), scaled to `--rate`
requests a second. A file that is named again goes on where it stopped. Every second request names temperature 0, the
others none. The last prompts of each file are held out. After each phase the draft that is served then is kept in
`--out`, and it is printed what the learner has done, how often it called a shift, with how much processor time, how
long requests took, and tokens a round and a second by the minute in which requests ended.

Then the server ends, and benchmarks/one_process.py compares on the held-out prompts, file by file: the shipped draft,
the draft that was served when its traffic first ended, the last one of all (what was kept of it since),
the learned one with the traffic memory, and plain decoding. Two servers could not be compared so finely.
"""

from __future__ import annotations

import argparse
import csv
import functools
import itertools
import json
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil

from aurora_lit.bench.load import Answer, Json, ask, body_of, send_at, sending, status
from aurora_lit.bench.servers import free_port, running_server
from aurora_lit.config import load_config
from aurora_lit.drafts.store import DraftStore
from aurora_lit.errors import ConfigError
from aurora_lit.learn.pretrain.prompts import Prompt, encode_prompt, read_prompts
from aurora_lit.serve.worker.load_models import load_tokenizer
from benchmarks import one_process

_COUNTERS = ("steps", "positions", "published", "refused", "shifts", "processor_s")
"""What a phase adds to them is reported."""
_NO_MEMORY, _MEMORY = "memory.capacity_mb=0", "memory.capacity_mb=64"


class Sent(NamedTuple):
    """What a phase came to."""

    requests: int
    tokens: int
    """Of their answers."""
    median_s: float
    """That a request took."""
    p95_s: float
    token_ms: float
    """Median over requests of the time that a token took, the prompt's reading included."""
    minutes: list[tuple[int, float, float]]
    """A minute in which requests ended, their tokens of a round with proposals, and tokens a second."""

    @classmethod
    def of(cls, answers: Sequence[Answer]) -> Sent:
        """Sum up requests."""
        tokens, seconds = np.array([(answer.tokens, answer.seconds) for answer in answers]).T
        median_s, p95_s = np.percentile(seconds, (50, 95))
        begin_s = min(answer.sent_s for answer in answers)
        by_minute: dict[int, list[Answer]] = {}
        for answer in sorted(answers, key=lambda answer: answer.ended_s):
            by_minute.setdefault(int((answer.ended_s - begin_s) // 60), []).append(answer)
        minutes = [
            (minute, tokens_a_round(each), sum(answer.tokens for answer in each) / 60)
            for minute, each in by_minute.items()
        ]
        token_ms = float(np.median(1e3 * seconds / tokens))
        return cls(len(answers), int(tokens.sum()), float(median_s), float(p95_s), token_ms, minutes)


def tokens_a_round(answers: Sequence[Answer]) -> float:
    """Of rounds with proposals, the target's own token included; 1 if there was none."""
    rounds = sum(answer.speculation["num_spec_steps"] for answer in answers)
    accepted = sum(answer.speculation["num_accepted_draft_tokens"] for answer in answers)
    return 1.0 + accepted / max(rounds, 1)


def send(url: str, prompts: Iterator[Prompt], *, seconds: float, clients: int, max_tokens: int) -> Sent:
    """Keep `clients` requests running for so long. Raises ConfigError if there are too few prompts."""
    with sending(functools.partial(ask, url), bodies(prompts, max_tokens), clients=clients) as running:
        running.wait(seconds)
    return Sent.of(running.answers)


def bodies(prompts: Iterator[Prompt], max_tokens: int) -> Iterator[Json]:
    """Requests with these prompts, every second one greedy. Raises ConfigError at their end."""
    for number, prompt in enumerate(prompts):
        temperature = 0.0 if number % 2 else None
        how: Json = {"max_tokens": max_tokens, "temperature": temperature, "seed": number}
        yield body_of(prompt, **how, cache_salt="all", store=True)
    raise ConfigError("--phases: a file has fewer prompts than a phase sends; give more, or less --seconds")


def read_arrivals(path: Path, requests: int) -> list[float]:
    """The first arrival times of a CSV file with a column `timestamp_s`, in seconds after the first of them.

    Raises ConfigError if there are fewer than `requests`.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            times = [float(row["timestamp_s"]) for row in itertools.islice(csv.DictReader(file), requests)]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} has no arrival times ({error!r}); give it a column timestamp_s") from error
    if len(times) < requests:
        raise ConfigError(
            f"{path} has {len(times)} arrivals for {requests} requests; send fewer, or give more arrivals"
        )
    return [time_s - times[0] for time_s in times]


def learner_status(url: str) -> Json:
    """What the server says of its learner, with its processor seconds and resident MiB; waits until there is one."""
    while True:
        found: Json = status(url)["learner"]
        if found["state"] == "running":
            break
        time.sleep(0.5)
    process = psutil.Process(found["pid"])
    times = process.cpu_times()
    return {
        **{name: found[name] for name in ("version", "steps", "positions")},
        **{name: found["gate"][name] for name in ("published", "refused", "champion", "challenger")},
        **{name: found["domains"][name] for name in ("shifts", "last_shift", "now")},
        "processor_s": times.user + times.system,
        "resident_mb": process.memory_info().rss >> 20,
    }


def phase_report(before: Json, after: Json, sent: Sent) -> Json:
    """What the learner made of a phase's traffic."""
    added = {name: after[name] - before[name] for name in _COUNTERS}
    return {
        **after,
        **added,
        **sent._asdict(),
        "share_learned": added["positions"] / sent.tokens,
        "ms_a_position": 1000 * added["processor_s"] / added["positions"] if added["positions"] else None,
    }


def arms_of(learned: str | None, last: str | None) -> dict[str, list[str]]:
    """What is compared on a phase's held-out prompts. Drafts are folders; None: the shipped one."""
    own = [] if learned is None else [f"draft.checkpoint={learned}"]
    arms = {"shipped": [_NO_MEMORY], "learned": [_NO_MEMORY, *own], "learned, memory": [_MEMORY, *own]}
    if last is not None and last != learned:
        arms["last"] = [_NO_MEMORY, f"draft.checkpoint={last}"]
    return {**arms, "plain": [_NO_MEMORY, "engine.speculate=false"]}


def main() -> int:
    """Measure and print; exit code 1 if answers differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--phases", nargs="+", type=Path, required=True, help="JSONL files of prompts")
    parser.add_argument("--config", type=Path, help="a preset's name or a YAML file; without it that of SmolLM2")
    parser.add_argument("--seconds", type=float, default=600.0, help="of each phase")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--arrivals", type=Path, help="send at these times instead of in turn")
    parser.add_argument("--rate", type=float, default=0.7, help="mean number of arrivals a second")
    parser.add_argument("--turns", type=int, default=80, help="held-out prompts that count, of each temperature")
    parser.add_argument("--warm-up", type=int, default=30, help="held-out prompts before them, which fill the memories")
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--out", type=Path, default=Path("live-learning"), help="folder for drafts and the report")
    parser.add_argument("overrides", nargs="*", help="key=value, after `--`")
    options = parser.parse_args()
    if (options.out / "versions").exists():
        parser.error(
            f"--out {options.out} has the drafts of an earlier run, with which this one would begin; name another"
        )
    options.out.mkdir(parents=True, exist_ok=True)
    held_out = 2 * (options.turns + options.warm_up)
    prompts = {path: fitting_prompts(path, options) for path in options.phases}
    report: Json = {name: str(getattr(options, name)) for name in ("config", "overrides", "clients")}
    report |= {"phases": [], "rows": []}
    drafts = _serve({path: iter(each[:-held_out]) for path, each in prompts.items()}, options, report)
    first = {path: drafts[options.phases.index(path)] for path in options.phases}
    for path, learned in first.items():
        compared = argparse.Namespace(
            config=options.config,
            prompts=[path],
            skip=len(prompts[path]) - held_out,
            temperatures=[0.0, 1.0],
            clients=1,
            turns=options.turns,
            warm_up=options.warm_up,
            max_tokens=options.max_tokens,
            overrides=options.overrides,
            repeat=False,
        )
        print(f"{path.stem}: held-out prompts, tokens a second over the shipped draft's")
        rows = one_process.measure(arms_of(learned, drafts[-1]), compared)
        report["rows"] += [{"traffic": path.stem, **row} for row in rows]
        _write(options.out, report)
    return int(any(row["unequal"] for row in report["rows"]))


def fitting_prompts(path: Path, options: argparse.Namespace) -> list[Prompt]:
    """The prompts of a file that leave room for an answer, as one_process.py has them."""
    config = load_config(options.config, options.overrides)
    tokenizer, room = load_tokenizer(config), config.engine.max_seq_len - options.max_tokens
    return [prompt for prompt in read_prompts(path) if len(encode_prompt(tokenizer, prompt)) <= room]


def _write(out: Path, report: Json) -> None:
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")


def _serve(traffic: dict[Path, Iterator[Prompt]], options: argparse.Namespace, report: Json) -> list[str | None]:
    """Send all traffic; the folder of the draft that was served at the end of each phase, None: the shipped one."""
    overrides = [f"checkpoint.dir={options.out / 'versions'}", *options.overrides]
    config = load_config(options.config, overrides)
    config = replace(config, server=replace(config.server, port=free_port()))
    store = DraftStore(Path(config.checkpoint.dir) / config.checkpoint.run)
    drafts: list[str | None] = []
    with running_server(config, options.out / "server.log") as url:
        before = learner_status(url)
        for number, path in enumerate(options.phases, start=1):
            fresh, most = traffic[path], options.max_tokens
            if options.arrivals is None:
                sent = send(url, fresh, seconds=options.seconds, clients=options.clients, max_tokens=most)
            else:
                times_s = read_arrivals(options.arrivals, max(1, round(options.rate * options.seconds)))
                scale = options.seconds / times_s[-1] if times_s[-1] else 0.0
                due_s = [scale * time_s for time_s in times_s]
                answers = send_at(functools.partial(ask, url), bodies(fresh, most), due_s)
                sent = Sent.of(answers)
            after = learner_status(url)
            report["phases"].append({"traffic": path.stem, **phase_report(before, after, sent)})
            print(json.dumps(report["phases"][-1]), flush=True)
            _write(options.out, report)
            version, kept = store.current(), options.out / f"after-{number}-{path.stem}"
            if version is not None:
                shutil.copytree(store.folder / version, kept, dirs_exist_ok=True)
            drafts.append(None if version is None else str(kept))
            before = after
    return drafts


if __name__ == "__main__":
    sys.exit(main())
