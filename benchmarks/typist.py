"""A typist in a real file: how often a completion is there in time, by POST /infill as llama.vim asks.

    python -m benchmarks.typist --url http://127.0.0.1:8000 --out ours.jsonl
    python -m benchmarks.typist --url http://127.0.0.1:8080 --out llama-cpp.jsonl     # llama.cpp's server

Text of the file is typed again where it was taken out, one key at a time; a line break brings the next line's
indentation. Times between keys are drawn from logarithmic normal distributions, of medians 0.16 s within a word, 0.6 s
before a word, and 2 s at a line's end. They depend on --seed alone, so servers get the same requests at the same times.
When no key has come for --debounce seconds a completion is asked for, and when the next key comes before its answer it
is cancelled: the connection is closed.

A request has llama.vim's fields and limits: 256 lines before the cursor's, 64 after it, parts of other files of the
same folder (sent beforehand one by one, with n_predict 0, as its ring does while nobody types), 128 tokens, 250 ms from
the first token to the next line break. The differences: answers are greedy, a key that was foreseen asks again where
llama.vim shows what it knows, and llama.vim lets an answer end before it asks anew.

Times are of whole answers, from the request. The share within 500 ms (1,000) is that of pauses that leave so long or
longer. p50 and p95 are over those that leave 1 s or longer; what was cancelled counts as later than all others.

With --agents, so many clients send chats of about 6,000 tokens meanwhile, each one as soon as its last one is answered.
"""

from __future__ import annotations

import argparse
import inspect
import itertools
import json
import math
import random
import secrets
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

from aurora_lit.bench.load import Answer, Json, ask, chat, sending
from aurora_lit.errors import AuroraError
from aurora_lit.progress import Progress
from benchmarks.infilling import infill, own_fields, preceding_code

_LINES_BEFORE, _LINES_AFTER, _CHUNK_LINES, _TOKENS, _MOST_PREDICT_MS = 256, 64, 32, 128, 250
"""llama.vim's defaults; a chunk is a part of another file."""
_AGENT_CHARACTERS, _AGENT_TOKENS = 22_000, 16
"""Of an agent's prompt, and of its answer."""
_LIMITS_S = (0.5, 1.0)
_MEDIANS_S, _SPREAD = {"in a word": 0.16, "word": 0.6, "line": 2.0}, {"in a word": 0.25, "word": 0.9, "line": 0.6}
_LONGEST_S = 5.0


class Key(NamedTuple):
    """A keystroke."""

    text: str
    """A character, or a line break with the indentation that the editor adds."""
    pause_s: float
    """To the next one."""


class Asked(NamedTuple):
    """A request for a completion."""

    key: int
    left_s: float
    """From the request to the next key."""
    seconds: float | None
    """To its answer; None: it was cancelled."""
    answer: Json


def keys_of(text: str, draws: random.Random) -> Iterator[Key]:
    """The keystrokes that type a text."""
    at = 0
    while at < len(text):
        end = at + 1
        if text[at] == "\n":
            while end < len(text) and text[end] == " ":
                end += 1
        following = text[end : end + 1]
        kind = "line" if following == "\n" else "word" if not text[end - 1].isalnum() else "in a word"
        drawn = draws.lognormvariate(math.log(_MEDIANS_S[kind]), _SPREAD[kind])
        yield Key(text[at:end], min(drawn, _LONGEST_S))
        at = end


def body_at(before: str, after: str, extra: Sequence[Json]) -> Json:
    """llama.vim's request with the cursor between these texts."""
    *lines, line = before.split("\n")
    rest, *following = after.split("\n")
    indent = len(line) - len(line.lstrip(" "))
    if not line.strip() and not rest.strip():
        line = rest = ""  # as it does on a line of blanks
        indent = 0
    return {
        "id_slot": 0,
        "input_prefix": "\n".join(lines[-_LINES_BEFORE:]) + "\n",
        "prompt": line,
        "input_suffix": rest + "\n" + "\n".join(following[:_LINES_AFTER]) + "\n",
        "input_extra": list(extra),
        "n_predict": _TOKENS,
        "n_indent": indent,
        "t_max_prompt_ms": 500,
        "t_max_predict_ms": _MOST_PREDICT_MS,
        "response_fields": ["content", "timings/prompt_n", "timings/predicted_n", "tokens_cached", "truncated"],
    }


def chunks_of(file: Path, number: int, draws: random.Random) -> list[Json]:
    """Parts of the folder's other files."""
    others = sorted(path for path in file.parent.glob(f"*{file.suffix}") if path != file)
    chunks = []
    for path in draws.sample(others, min(number, len(others))):
        lines = path.read_text(errors="replace").splitlines(keepends=True)
        at = draws.randrange(max(1, len(lines) - _CHUNK_LINES))
        chunks.append({"text": "".join(lines[at : at + _CHUNK_LINES]), "filename": path.name})
    return chunks


def type_keys(
    url: str, before: str, keys: Sequence[Key], after: str, extra: Sequence[Json], own: Json, debounce_s: float
) -> list[Asked]:
    """Type, and ask at each pause."""
    asked = []
    now_s = time.monotonic()
    with Progress("typing", len(keys), "keys") as progress:
        for number, key in enumerate(keys):
            before += key.text
            next_s = now_s + key.pause_s
            if key.pause_s > debounce_s:
                time.sleep(max(0.0, now_s + debounce_s - time.monotonic()))
                left_s = key.pause_s - debounce_s
                try:
                    answer, seconds = infill(url, {**own, **body_at(before, after, extra)}, timeout_s=left_s)
                    asked.append(Asked(number, left_s, seconds, answer))
                except TimeoutError:
                    asked.append(Asked(number, left_s, None, {}))
            time.sleep(max(0.0, next_s - time.monotonic()))
            now_s = next_s
            progress.advance()
    return asked


def ask_as_agent(url: str, number: int) -> Answer:
    """Send a long chat, whose prompt begins as no other one does."""
    return ask(url, chat(preceding_code(number, _AGENT_CHARACTERS), stream=True, max_tokens=_AGENT_TOKENS))


def print_report(asked: Sequence[Asked]) -> None:
    """The figures of the file's docstring."""
    answered = [a for a in asked if a.seconds is not None]
    print(f"{len(asked)} completions asked for, {len(answered)} answered, {len(asked) - len(answered)} cancelled")
    for limit_s in _LIMITS_S:
        pauses = [a for a in asked if a.left_s >= limit_s]
        met = sum(a.seconds is not None and a.seconds <= limit_s for a in pauses)
        print(f"within {1e3 * limit_s:.0f} ms: {met} of {len(pauses)} pauses, {met / max(1, len(pauses)):.0%}")
    times_s = sorted(math.inf if a.seconds is None else a.seconds for a in asked if a.left_s >= _LIMITS_S[-1])
    for percent in (50, 95):
        found_s = times_s[math.ceil(percent / 100 * len(times_s)) - 1] if times_s else math.inf
        print(f"p{percent}: " + (f"{1e3 * found_s:.0f} ms" if math.isfinite(found_s) else "cancelled"))
    for name in ("prompt_n", "predicted_n"):
        counts = [a.answer[f"timings/{name}"] for a in answered]
        print(f"mean timings/{name} of an answer: {sum(counts) / max(1, len(counts)):.0f}")


def main() -> int:
    """Type, print, and write what was asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True)
    parser.add_argument(
        "--file", type=Path, default=Path(inspect.__file__), help="what is typed in; default: inspect.py"
    )
    parser.add_argument("--line", type=int, default=215, help="the first line that is typed")
    parser.add_argument("--keys", type=int, default=200)
    parser.add_argument("--chunks", type=int, default=4, help="parts of other files in each request")
    parser.add_argument("--debounce", type=float, default=0.25, help="seconds without a key until a request")
    parser.add_argument("--agents", type=int, default=0, help="clients that send long prompts meanwhile")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plain", action="store_true", help="without speculation, of our server")
    parser.add_argument("--out", type=Path, help="JSON lines: each request")
    options = parser.parse_args()
    lines = options.file.read_text().splitlines(keepends=True)
    before, text = "".join(lines[: options.line - 1]), "".join(lines[options.line - 1 :])
    draws = random.Random(options.seed)
    extra = chunks_of(options.file, options.chunks, draws)
    keys = [key for key, _ in zip(keys_of(text, draws), range(options.keys), strict=False)]
    _, newline, after = text[sum(len(key.text) for key in keys) :].partition("\n")
    try:
        own = own_fields(options.url, plain=options.plain, salt=secrets.token_hex(8))
        for number in range(len(extra) + 1):
            around = body_at("", "", extra[:number]) if number < len(extra) else body_at(before, newline + after, extra)
            infill(options.url, {**own, **around, "n_predict": 0})
        agents = sending(lambda number: ask_as_agent(options.url, number), itertools.count(), clients=options.agents)
        with agents if options.agents else nullcontext():
            asked = type_keys(options.url, before, keys, newline + after, extra, own, options.debounce)
    except AuroraError as error:
        print(error, file=sys.stderr)
        return 1
    if options.out:
        options.out.write_text("".join(json.dumps(a._asdict()) + "\n" for a in asked))
    print_report(asked)
    return 0


if __name__ == "__main__":
    sys.exit(main())
