"""A text that must not be found: sent with `"store": false`, then looked for in all that a server writes or tells.

    python -m benchmarks.soak.canary --seed 0

Starts a server that records traces, keeps its memory on disk and learns, and sends it three texts as prompts of every
route and in requests that fail in many ways:

    hidden      in requests with "store": false; must be found nowhere
    salt        as `cache_salt` of requests that may be learned from; the salt must be found nowhere
    consented   in requests that may be kept; must be found in the trace ring and among the recorded traces

The third one shows that what is kept would be found, in the formats in which it is kept. A file with all forms of the
first one is searched too (`planted`). Places are searched for the text and for its token ids: little-endian integers of
16, 32 and 64 bits, and JSON. Live memory of the processes and swap are left out. The exit status is 1 if a text that
must not be found is, or one that must is not.
"""

from __future__ import annotations

import argparse
import json
import mmap
import random
import signal
import struct
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from aurora_lit.bench.load import LOOPBACK, TIMEOUT_S, Json, exchange
from aurora_lit.bench.servers import free_port
from aurora_lit.ipc.process_lifetime import module_command
from aurora_lit.ipc.run_folder import default_parent
from aurora_lit.models.source import cache_root

from .server import Supervised, enter_mounts, supervised

_INNER = 8
"""Token ids in a row that are looked for; a text's first and last tokens depend on what stands beside it."""
_PAGE_EVENTS_S = 3.0
_MUST_FIND = {"planted": "hidden", "run folder": "consented", "recorded traces": "consented"}


class Found(NamedTuple):
    """What a place held."""

    files: int
    size: int
    """Bytes searched."""
    hits: Mapping[str, int]
    """By text and form, such as "hidden as int32"."""


# -- the search --------------------------------------------------------------------------------------------------------


def needles(name: str, text: str, tokens: Sequence[int]) -> dict[str, bytes]:
    """Forms of a text, by name; tokens: its ids."""
    first = max(0, (len(tokens) - _INNER) // 2)
    inner = tokens[first : first + _INNER]
    forms = {"text": text.encode()}
    if len(inner) == _INNER:
        integers = {"int16": "H", "int32": "i", "int64": "q"}
        for kind, code in integers.items():
            if code != "H" or max(inner) < 1 << 16:
                forms[kind] = struct.pack(f"<{_INNER}{code}", *inner)
        forms["JSON"] = ", ".join(map(str, inner)).encode()
        forms["short JSON"] = ",".join(map(str, inner)).encode()
    return {f"{name} as {form}": content for form, content in forms.items()}


def search(what: Mapping[str, bytes], files: Iterable[Path]) -> Found:
    """Look for each of these bytes in each file; files that are gone meanwhile are passed over."""
    number = size = 0
    hits: Counter[str] = Counter()
    for path in files:
        with suppress(OSError, ValueError), path.open("rb") as file:  # ValueError: an empty file
            number += 1
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                size += len(content)
                for name, needle in what.items():
                    hits[name] += _occurrences(content, needle)
    return Found(number, size, +hits)


def _occurrences(content: mmap.mmap, needle: bytes) -> int:
    number, at = 0, content.find(needle)
    while at >= 0:
        number, at = number + 1, content.find(needle, at + 1)
    return number


def files_in(*folders: Path, since: float = 0.0, is_deep: bool = True) -> Iterator[Path]:
    """Regular files in these folders, and below them, changed since a time (seconds since 1970)."""
    for folder in folders:
        for path in folder.glob("**/*" if is_deep else "*"):
            with suppress(OSError):
                if path.is_file() and not path.is_symlink() and path.stat().st_mtime >= since:
                    yield path


# -- what is sent ------------------------------------------------------------------------------------------------------


def new_text(draws: random.Random) -> str:
    """A text that stands nowhere else, of about 40 tokens."""
    return "-".join("".join(draws.choices("bcdfghjklmnpqrstvwxz", k=5)) for _ in range(8))


def requests(text: str, **fields: object) -> list[tuple[str, Json]]:
    """A text in a request of every kind, and in requests that fail while they are read, checked and answered."""
    chat: Json = {"messages": [{"role": "user", "content": f"Repeat: {text} . Now again."}], "max_tokens": 48, **fields}
    plain = {"prompt": f"key = {text} . key =", "max_tokens": 48, "temperature": 0.0, **fields}
    hole = {"input_prefix": f"a = '{text}'\nb = ", "input_suffix": "\n", "n_predict": 16, **fields}

    def schema(content: object) -> Json:
        return {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": content}}}

    tool = {"name": "find", "description": text, "parameters": {"type": "object", "properties": {}}}
    chats: list[Json] = [
        *({}, {"stream": True}, {"stop": [text]}, {"prediction": {"type": "content", "content": text}}),
        *({"user": text}, {"metadata": {"aurora_domain": text}}),
        schema({"type": "object", "properties": {text: {"type": "string"}}, "required": [text]}),
        {"tools": [{"type": "function", "function": tool}]},
        # What fails.
        *({"temperature": text}, {"tool_choice": text}, {"stop": [text, 7]}, {text: text}, {"model": text}),
        *(schema({"type": text}), schema({"$ref": f"#/$defs/{text}"}), {"guided_regex": f"({text}"}),
        *({"guided_regex": f"{text}(.{{900}}){{900}}"}, {"guided_grammar": f"root ::= {text} ["}),
        {"guided_grammar": f'start: "{text}" | /[/'},
        {"messages": [{"role": text, "content": text}]},
        {"messages": [{"role": "tool", "content": [{"type": text}]}]},
    ]
    plains: list[Json] = [
        {},
        {"echo": True, "logprobs": 2},
        {"prompt_logprobs": 1},
        {"suffix": text},
        {"best_of": text},
    ]
    return [
        *(("/v1/chat/completions", {**chat, **each}) for each in chats),
        *(("/v1/completions", {**plain, **each}) for each in plains),
        ("/v1/responses", {"input": text, "max_output_tokens": 16, **fields}),
        *(("/infill", hole), ("/v1/fim/completions", {"prompt": text, "suffix": text, "max_tokens": 8, **fields})),
        *(("/tokenize", {"prompt": text}), (f"/v1/{text}", {})),
    ]


def send_all_kinds(server: Supervised, text: str, **fields: object) -> Counter[int]:
    """Send a text in all requests, one after the other, one of them cut; statuses."""
    statuses: Counter[int] = Counter()
    for path, body in requests(text, **fields):
        with suppress(OSError):
            statuses[exchange(server.url, path, body, key=server.key, timeout_s=120)[0]] += 1
    chat: Json = {"messages": [{"role": "user", "content": text}], "max_tokens": 200, "stream": True, **fields}
    with suppress(OSError):
        exchange(server.url, "/v1/chat/completions", chat, key=server.key, most_lines=4)
    content = b'{"prompt": "' + text.encode() + b'", "max_tokens": 4,'  # is no JSON
    headers = {"Authorization": f"Bearer {server.key}", "Content-Type": "application/json"}
    with suppress(OSError):
        LOOPBACK.open(urllib.request.Request(f"{server.url}/v1/completions", content, headers), timeout=60)
    return statuses


def token_ids(server: Supervised, text: str) -> list[int]:
    """Of a text inside of another one."""
    body = {"prompt": f" {text} ", "add_special_tokens": False}
    _, lines, _ = exchange(server.url, "/tokenize", body, key=server.key)
    found: list[int] = json.loads(b"".join(line for _, line in lines))["tokens"]
    return found


# -- the places --------------------------------------------------------------------------------------------------------


def told(server: Supervised) -> bytes:
    """What a server tells whoever has its key: metrics, status, the page's first events and the description."""
    parts = []
    for path in (
        "/metrics",
        "/v1/aurora/status",
        "/v1/models",
        "/openapi.json",
        "/props",
        "/slots",
        "/v1/aurora/events",
    ):
        request = urllib.request.Request(f"{server.url}{path}", headers={"Authorization": f"Bearer {server.key}"})
        deadline = time.monotonic() + _PAGE_EVENTS_S
        with suppress(OSError), LOOPBACK.open(request, timeout=_PAGE_EVENTS_S) as response:
            while time.monotonic() < deadline and (part := response.read1(1 << 20)):
                parts.append(part)
    return b"".join(parts)


def places(folder: Path, versions: Path, *, since: float) -> dict[str, list[Path]]:
    """Files of each place. folder: the run's, which has the server's own temporary files."""
    temporary = Path(tempfile.gettempdir())
    cores = {path for each in (Path.cwd(), folder, temporary) for path in each.glob("core*")}
    return {
        "stdout, stderr": sorted(folder.glob("server-*.log")),
        "run folder": list(files_in(*default_parent().glob("aurora-lit-run-*"), since=since)),
        "checkpoints": list(files_in(versions)),
        "logs": list(files_in(versions.parent.parent / "logs")),
        "exports": list(files_in(folder / "export")),
        "recorded traces": list(files_in(folder / "traces")),
        "kept memory": list(files_in(folder / "memory")),
        "caches": list(files_in(cache_root(), since=since)),
        "temporary files": [*files_in(folder / "tmp"), *files_in(temporary, since=since, is_deep=False)],
        "core files": [path for path in cores if path.is_file()],
    }


def search_all(
    server: Supervised, folder: Path, versions: Path, what: Mapping[str, bytes], others: bytes, *, since: float
) -> dict[str, Found]:
    """Search every place of a running server. others: what other clients were answered."""
    export = [*module_command("aurora_lit"), "export", "--out", str(folder / "export"), *server.settings]
    subprocess.run(export, capture_output=True, timeout=300)
    texts = folder / "told"
    texts.mkdir(exist_ok=True)
    for name, content in {"metrics, status, events": told(server), "others' answers": others}.items():
        (texts / name).write_bytes(content)
    (texts / "planted").write_bytes(b"\0".join(what.values()))
    found = {name: search(what, files) for name, files in places(folder, versions, since=since).items()}
    return found | {path.name: search(what, [path]) for path in sorted(texts.iterdir())}


def faults(found: Mapping[str, Found]) -> list[str]:
    """What was found where it must not be, or not found where it must."""
    wrong = []
    for place, (_, _, hits) in found.items():
        wanted = _MUST_FIND.get(place)
        if wanted and not any(name.startswith(wanted) for name in hits):
            wrong.append(f"{place}: {wanted} was not found")
        if place != "planted":
            wrong += [f"{place}: {name}, {number} times" for name, number in hits.items() if not _is_allowed(name)]
    return wrong


def _is_allowed(name: str) -> bool:
    return name.startswith("consented")


def report(found: Mapping[str, Found]) -> Table:
    """Places, what was searched, and hits."""
    table = Table("place", "files", "bytes", "hits", "of the consented text", min_width=80)
    for place, (files, size, hits) in found.items():
        hidden = sum(number for name, number in hits.items() if not _is_allowed(name))
        consented = sum(number for name, number in hits.items() if _is_allowed(name))
        table.add_row(place, str(files), f"{size:,}", str(hidden), str(consented))
    total = [each for name, each in found.items() if name != "planted"]
    size = sum(each.size for each in total)
    hidden = sum(number for each in total for name, number in each.hits.items() if not _is_allowed(name))
    table.add_row("all but planted", str(sum(each.files for each in total)), f"{size:,}", str(hidden), "")
    return table


def main() -> int:
    """Run, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="smollm2", help="preset or file of settings")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON: the figures")
    parser.add_argument("settings", nargs="*", metavar="key=value")
    options = parser.parse_args()
    enter_mounts("benchmarks.soak.canary")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server is ended, and its files deleted
    since, draws = time.time(), random.Random(options.seed)
    texts = {name: new_text(draws) for name in ("hidden", "salt", "consented")}
    with tempfile.TemporaryDirectory(prefix="soak-") as scratch:
        folder = Path(scratch)
        versions = folder / "checkpoints" / "soak"
        kept = [f"trace.record={folder / 'traces'}", f"memory.keep={folder / 'memory'}", "learn.publish_every_s=5"]
        where = [f"checkpoint.dir={versions.parent}", "checkpoint.run=soak", "server.page=on", *kept]
        with supervised(["--config", options.config, *where, *options.settings], folder, free_port()) as server:
            server.wait_for_learner(120)
            what: dict[str, bytes] = {"key as text": server.key.encode()}
            for name, text in texts.items():
                what |= needles(name, text, token_ids(server, text))
            statuses = send_all_kinds(server, texts["hidden"], store=False)
            send_all_kinds(server, texts["consented"])
            send_all_kinds(server, texts["consented"], cache_salt=texts["salt"])
            others = []
            for path, body in requests("another-text"):
                with suppress(OSError):
                    _, lines, _ = exchange(server.url, path, body, key=server.key, timeout_s=TIMEOUT_S)
                    others += [line for _, line in lines]
            time.sleep(30.0)  # traces are recorded, and the memory is kept, after a while
            found = search_all(server, folder, versions, what, b"".join(others), since=since)
    Console(width=120).print(report(found))
    print(f"requests with the hidden text, by status: {dict(sorted(statuses.items()))}")
    wrong = faults(found)
    if options.out:
        options.out.write_text(json.dumps({"found": found, "wrong": wrong, "statuses": statuses}, indent=1) + "\n")
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
