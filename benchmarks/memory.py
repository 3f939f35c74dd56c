"""What memory a real server takes, and whether it stays flat, while it answers mixed requests.

    python benchmarks/memory.py --prompts FILE... --requests 500 -- engine.max_seq_len=512

The requests are a fixed mix of chats and text completions: whole, streamed, abandoned, refused, with several choices,
log-probabilities, penalties and seeds. Prints, after each tenth of the requests, each process's proportional share (Pss
in /proc: a page that n processes share counts as 1/n in each), and at the end what the shares consist of.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from aurora_lit.bench.load import chat, exchange, send_all
from aurora_lit.bench.servers import Server, free_port, started_aurora
from aurora_lit.config import load_config
from aurora_lit.learn.pretrain.prompts import read_prompts

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


def request_kinds(url: str, max_tokens: int) -> list[Callable[[str], None]]:
    """A function for each kind of request: it takes the prompt and raises if the answer is not as expected."""

    def post(path: str, *, wanted: int = 200, leave_after: int | None = None, **fields: Any) -> None:
        found, lines, _ = exchange(url, path, {"max_tokens": max_tokens, **fields}, most_lines=leave_after)
        assert found == wanted, b"".join(line for _, line in lines)

    return [
        lambda prompt: post(CHAT, **chat(prompt, temperature=0)),
        lambda prompt: post(CHAT, **chat(prompt), stream=True),
        lambda prompt: post(TEXT, leave_after=3, prompt=prompt, seed=7, stream=True),
        lambda prompt: post(CHAT, **chat(prompt, n=2, logprobs=True, top_logprobs=3, store=False)),
        lambda prompt: post(TEXT, prompt=[prompt, prompt[:20]], echo=True, logprobs=2, temperature=0),
        lambda prompt: post(TEXT, prompt=prompt, repetition_penalty=1.2, top_p=0.9, stop=["\n\n"]),
        lambda prompt: post(CHAT, wanted=400, **chat(prompt, temperature=-1)),
        lambda prompt: post(TEXT, wanted=400, prompt=[10**9]),
    ]


KINDS = ("on huge pages", "heap", "other anonymous", "shared memory", "libraries and files")


def shares_mb(server: Server) -> dict[str, dict[str, float]]:
    """MiB of each process of the server, by role and process id, and by kind (`KINDS`)."""
    roles = {member: server.role(member) for member in server.members()}
    return {f"{role} {each.pid}": _share_mb(each.pid) for each, role in roles.items() if role != "resource tracker"}


def _share_mb(pid: int) -> dict[str, float]:
    share, name = dict.fromkeys(KINDS, 0.0), ""
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        words = line.split(maxsplit=5)
        if "-" in words[0]:  # a mapping: addresses, permissions, offset, device, inode, name
            name = words[5] if len(words) > 5 else ""
            continue
        field, mb = words[0], int(words[1]) / 1024 if words[1].isdigit() else 0.0
        if field == "Pss:":
            kind = "heap" if name == "[heap]" else "other anonymous" if not name or name.startswith("[") else ""
            share[kind or ("shared memory" if name.startswith("/dev/shm") else "libraries and files")] += mb
        elif field == "AnonHugePages:":
            share["on huge pages"] += mb
            share["other anonymous"] -= mb
    return share


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", nargs="+", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("overrides", nargs="*", help="settings, key=value, after --")
    args = parser.parse_args()
    url = f"http://127.0.0.1:{(port := free_port())}"
    with tempfile.TemporaryDirectory() as folder:
        settings = [f"server.port={port}", f"checkpoint.dir={folder}/drafts", *args.overrides]
        room = load_config(None, settings).engine.max_seq_len
        texts = [prompt.messages[0] for path in args.prompts for prompt in read_prompts(path)]
        prompts = [text for text in texts if len(text) < room]  # a token has at least one character
        readings = []
        with started_aurora(settings, Path(folder) / "log") as server:
            server.wait_until_ready(f"{url}/ready")
            kinds_of = request_kinds(url, args.max_tokens)
            for part in range(10):
                numbers = range(part * args.requests // 10, (part + 1) * args.requests // 10)
                send = lambda i: kinds_of[i % len(kinds_of)](prompts[i % len(prompts)])  # noqa: E731
                send_all(send, numbers, clients=args.concurrency)
                readings.append((numbers.stop, shares_mb(server)))
                held = ", ".join(f"{name}: {sum(share.values()):.1f}" for name, share in readings[-1][1].items())
                print(f"{numbers.stop} requests, MiB: {held}", file=sys.stderr, flush=True)
    table, kinds = Table(title="MiB, proportional share"), Table(title="at the end")
    for each, columns in ((table, [f"after {after}" for after, _ in readings]), (kinds, KINDS)):
        each.add_column("process")
        for column in columns:
            each.add_column(column, justify="right")
    for name in readings[-1][1]:
        table.add_row(name, *(f"{sum(held[name].values()):.1f}" if name in held else "-" for _, held in readings))
        kinds.add_row(name, *(f"{readings[-1][1][name][kind]:.1f}" for kind in KINDS))
    table.add_row("all", *(f"{sum(sum(share.values()) for share in held.values()):.1f}" for _, held in readings))
    for each in (table, kinds):
        Console(width=140).print(each)
    return 0


if __name__ == "__main__":
    sys.exit(main())
