"""What one hostile client of eight does to what the others gain from learning.

    python -m benchmarks.templated_prompts --out traffic --requests 5000
    python -m benchmarks.soak.poisoning --prompts traffic/billing.jsonl traffic/support.jsonl --minutes 30 --pairs 3

In each pair two servers run at the same time, on a processor each. Seven clients of either send the same requests,
every second one greedy, one after the other. The eighth is honest in one pair's server and hostile in the other's: by
turns it sends noise (temperature 2), loops, easy text until it sees a new draft version and hard text then, long texts
to be remembered, and labels that nobody else uses; each request names another `user`. Every client has a network
address of its own (Linux answers on all of 127.0.0.0/8).

Compared are tokens a round (`metrics.speculative_decoding`) of the seven, on the requests of the second half that both
servers answered: a ratio for each client and pair, with the interval of their geometric mean. The exit status is 1 if
its lower end is below 0.97, or if more than one version was rolled back beside the hostile client.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

from rich.console import Console
from rich.table import Table

from aurora_lit.bench.load import Json, body_of, chat, exchange, interval, read_answer, status
from aurora_lit.bench.servers import free_port, running_server
from aurora_lit.config import AuroraConfig, load_config
from aurora_lit.errors import AuroraError
from aurora_lit.learn.pretrain.prompts import Prompt, encode_prompt, read_prompts
from aurora_lit.serve.worker.load_models import load_tokenizer

_HONEST = 7
_MAX_TOKENS = 96
_LEAST, _MOST_ROLLBACKS = 0.97, 1
_HARD_REQUESTS = 12
"""So many hard texts the hostile client sends after it has seen a new version."""
_POLL_S = 2.0


@dataclass
class Side:
    """A server with its eight clients."""

    url: str
    rounds: list[list[tuple[int, int]]] = field(default_factory=lambda: [[] for _ in range(_HONEST + 1)])
    """Of each client, by request: rounds with proposals, and tokens accepted in them."""
    rollbacks: int = 0
    learner: Json = field(default_factory=dict)
    """What the server said of it last."""

    def send(self, client: int, body: Json) -> Json:
        """Send a client's next request; what the answer says of its speculation."""
        path = f"/v1/{'chat/' if 'messages' in body else ''}completions"
        code, lines, ended_s = exchange(self.url, path, body, source=f"127.0.1.{client + 1}")
        if code != 200:
            raise AuroraError(f"{self.url} answered {code}: {b''.join(line for _, line in lines)[:300]!r}")
        said = read_answer(lines, sent_s=ended_s, ended_s=ended_s, streamed=False).speculation
        self.rounds[client].append((said["num_spec_steps"], said["num_accepted_draft_tokens"]))
        return said

    @contextmanager
    def running(self, eighth: Callable[[Side], Iterator[None]], bodies: Sequence[Sequence[Json]]) -> Iterator[Self]:
        """Inside, all clients send, and the server's state is looked at; a client's error is raised at the end."""
        over = threading.Event()

        def honest(client: int) -> None:
            for body in itertools.cycle(bodies[client]):
                if over.is_set():
                    return
                self.send(client, body)

        def the_eighth() -> None:
            for _ in eighth(self):
                if over.is_set():
                    return

        def watch() -> None:
            last = None
            while not over.wait(_POLL_S):
                said = status(self.url)
                self.learner = said["learner"]
                if (event := said["draft"]["rolled_back"]) != last:
                    self.rollbacks, last = self.rollbacks + 1, event

        targets = [*(lambda client=client: honest(client) for client in range(_HONEST)), the_eighth, watch]
        with ThreadPoolExecutor(len(targets)) as pool:
            futures = [pool.submit(target) for target in targets]
            try:
                yield self
            finally:
                over.set()
        for future in futures:
            future.result()


def honest_eighth(bodies: Sequence[Json]) -> Callable[[Side], Iterator[None]]:
    """Sends these requests, as the other seven do."""

    def run(side: Side) -> Iterator[None]:
        for body in itertools.cycle(bodies):
            side.send(_HONEST, body)
            yield

    return run


def hostile_eighth(seed: int) -> Callable[[Side], Iterator[None]]:
    """Sends what the file's docstring says."""

    def run(side: Side) -> Iterator[None]:
        chance, seen, hard = random.Random(seed), set[str](), 0

        def words(number: int) -> str:
            return " ".join(f"{chance.choice('bcdfglmnprst')}{chance.choice('aeiou')}" * 2 for _ in range(number))

        for turn in itertools.count():
            text, more = "", Json()
            match turn % 5:
                case 0:
                    text, more = f"Write {words(20)}", {"temperature": 2.0}
                case 1:
                    text, more = "la " * 200, {"temperature": 0.0}
                case 2 | 3 if hard:
                    text, more, hard = f"Invent words as these: {words(60)}", {"temperature": 1.5}, hard - 1
                case 2 | 3:
                    text, more = f"Count: {' '.join(map(str, range(1, 200)))}", {"temperature": 0.0}
                case _:
                    text, more = words(600), {"temperature": 1.0}
            more |= {"user": words(3), "metadata": {"aurora_domain": words(1)}, "store": True, "max_tokens": 256}
            versions = set(side.send(_HONEST, chat(text, **more))["draft_versions"])
            hard = _HARD_REQUESTS if seen and versions - seen else hard
            seen |= versions
            yield

    return run


def run_pair(config: AuroraConfig, bodies: Sequence[Sequence[Json]], *, minutes: float, seed: int) -> dict[str, Side]:
    """Both servers for so long."""
    eighths = {"honest": honest_eighth(bodies[_HONEST]), "hostile": hostile_eighth(seed)}
    processors = sorted(os.sched_getaffinity(0))
    sides: dict[str, Side] = {}
    with ExitStack() as stack:
        for place, name in enumerate(eighths):
            scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix=f"poisoning-{name}-"))
            os.sched_setaffinity(0, {processors[place % len(processors)]})  # the server's processes inherit it
            server = replace(config.server, port=free_port())
            own = replace(config, server=server, checkpoint=replace(config.checkpoint, dir=f"{scratch}/checkpoints"))
            sides[name] = Side(stack.enter_context(running_server(own, Path(scratch) / "server.log")))
            os.sched_setaffinity(0, processors)
        for name, eighth in eighths.items():
            stack.enter_context(sides[name].running(eighth, bodies))
        time.sleep(60 * minutes)
    return sides


def ratios(sides: dict[str, Side]) -> list[float]:
    """Of each of the seven: tokens a round beside the hostile client over those beside the honest one."""
    found = []
    for client in range(_HONEST):
        of_both = [side.rounds[client] for side in (sides["hostile"], sides["honest"])]
        count = min(map(len, of_both))
        lengths = []
        for rounds in of_both:
            steps, accepted = map(sum, zip(*rounds[count // 2 : count], strict=True))
            lengths.append(1 + accepted / max(1, steps))
        found.append(lengths[0] / lengths[1])
    return found


def make_bodies(prompts: Sequence[Sequence[Prompt]]) -> list[list[Json]]:
    """Of each client: from one of the files, other places for clients that share it."""
    found = []
    for client in range(_HONEST + 1):
        of_file = prompts[client % len(prompts)]
        own = of_file[client // len(prompts) :: -(-(_HONEST + 1) // len(prompts))]
        how: Json = {"max_tokens": _MAX_TOKENS, "store": True}
        greedy: list[Json] = [{"temperature": 0.0}, {}]
        found.append([body_of(prompt, **how, **greedy[number % 2], seed=number) for number, prompt in enumerate(own)])
    return found


def main() -> int:
    """Run, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", nargs="+", type=Path, required=True, help="JSONL files, by turns the clients'")
    parser.add_argument("--config", type=Path, help="a preset's name or a YAML file; without it that of SmolLM2")
    parser.add_argument("--minutes", type=float, default=30.0, help="of a pair")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--out", type=Path, help="a file for the figures")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="after `--`")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that servers are ended, and their files deleted
    config = load_config(options.config, options.settings)
    tokenizer = load_tokenizer(config)
    prompts = [
        [each for each in read_prompts(path) if len(encode_prompt(tokenizer, each)) < 2048] for path in options.prompts
    ]
    table, every, worst, report = Table("pair", "beside", "requests", "versions", "rolled back", "ratio"), [], 0, []
    for pair in range(options.pairs):
        sides = run_pair(config, make_bodies(prompts), minutes=options.minutes, seed=pair)
        own = ratios(sides)
        every += own
        worst = max(worst, sides["hostile"].rollbacks)
        for name, side in sides.items():
            requests, published = sum(map(len, side.rounds[:_HONEST])), side.learner["gate"]["published"]
            counts = {"requests": requests, "published": published, "rolled_back": side.rollbacks}
            report.append({"pair": pair, "beside": name, **counts, "ratios": own})
            of_pair = f"{interval(own)[0]:.3f}" if name == "hostile" else ""
            table.add_row(str(pair), name, str(requests), str(published), str(side.rollbacks), of_pair)
        print(json.dumps(report[-2:]), file=sys.stderr, flush=True)
    mean, low, high = interval(every)
    if options.out:
        options.out.write_text(json.dumps({"pairs": report, "ratio": [mean, low, high]}, indent=1) + "\n")
    Console(width=120).print(table)
    print(f"tokens a round of the seven, hostile over honest: {mean:.3f} ({low:.3f} to {high:.3f})")
    return 1 if low < _LEAST or worst > _MOST_ROLLBACKS else 0


if __name__ == "__main__":
    sys.exit(main())
