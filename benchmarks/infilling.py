"""HumanEval-Infilling's holes by POST /infill: how many a server fills right, and how long a whole completion takes.

    python -m benchmarks.infilling ask --data LIGHT --url URL --out ours.jsonl --max-tokens 512
    python -m benchmarks.infilling ask --data LIGHT --url URL --out plain.jsonl --max-tokens 512 --plain
    python -m benchmarks.infilling ask --data LIGHT --url URL --out quick.jsonl --prompt-tokens 1000
    python -m benchmarks.infilling score --data LIGHT ours.jsonl plain.jsonl llama-cpp.jsonl

LIGHT is data/HumanEval-RandomSpanInfillingLight.jsonl.gz of github.com/openai/human-eval-infilling (MIT): 164 holes.
`ask` sends llama.vim's fields, greedily and one hole at a time, to our server or to llama.cpp's; it appends each answer
to the file, and goes on where it was stopped. It leaves out what ends answers early there (n_indent,
t_max_predict_ms), for a test needs the whole hole. With --prompt-tokens other code stands before the hole, and a
warm-up (n_predict 0) goes first, as when the line of the hole is begun: then all but that line and what is after the
hole is known. --plain is for our server: `speculate: false`. Each run has
a prefix cache and a memory of its own (`cache_salt`).

`score` prints times of whole completions and tokens a second, pass@1 as human_eval.py does, isolated, and how many
texts equal the first file's. Instruction-tuned models write on after a hole; --cut ends an answer where it goes on with
the first line after the hole, as editors do.
"""

from __future__ import annotations

import argparse
import gzip
import json
import secrets
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from aurora_lit.bench.load import TIMEOUT_S, Json, exchange, get, percentile_ms
from aurora_lit.errors import AuroraError
from benchmarks.human_eval import Problem, append_answers, print_results, read_answers

CHARACTERS_OF_TOKEN = 4.7
"""Of Python source, with Qwen's tokenizer; the true lengths are printed."""
_GREEDY = {"top_k": 1, "top_p": 0.9, "samplers": ["top_k", "top_p", "infill"], "stream": False, "cache_prompt": True}
_PRECEDING = argparse.__file__
"""The file whose code stands before holes: 2,600 lines of the standard library."""


def infill(url: str, body: Json, *, timeout_s: float = TIMEOUT_S) -> tuple[Json, float]:
    """The answer of POST /infill, greedy, and the seconds to its last byte.

    Raises AuroraError if the server refuses, TimeoutError if it has not answered in time: then it is cancelled.
    """
    sent_s = time.monotonic()
    status, lines, ended_s = exchange(url, "/infill", {**_GREEDY, **body}, timeout_s=timeout_s)
    text = b"".join(line for _, line in lines)
    if status != 200:
        raise AuroraError(f"{url} answered {status}: {text[:500]!r}")
    answer: Json = json.loads(text)
    return answer, ended_s - sent_s


def own_fields(url: str, *, plain: bool, salt: str) -> Json:
    """Fields that only our server has; none for llama.cpp's. `store: false` is not among them: it leaves no prefix."""
    is_ours = get(url, "/v1/models")["data"][0].get("owned_by") == "aurora-lit"
    if plain and not is_ours:
        raise AuroraError("--plain is for our server; start llama.cpp's with the speculation that is wanted")
    return {"cache_salt": salt, **({"speculate": False} if plain else {})} if is_ours else {}


def read_problems(path: Path) -> list[Problem]:
    """The holes: task_id, entry_point, prompt (what is before the hole), suffix, test."""
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]


def preceding_code(number: int, characters: int) -> str:
    """Whole lines of a real file, at most so many characters; those of each number begin elsewhere."""
    lines = Path(_PRECEDING).read_text().splitlines(keepends=True)
    at = number * 97 % len(lines)
    kept, length = list[str](), 0
    for line in [*lines[at:], *lines[:at]]:
        length += len(line)
        if length > characters:
            break
        kept.append(line)
    return "".join(kept)


def body_of(problem: Problem, before: str) -> Json:
    """llama.vim's division of a hole's surroundings: lines before, the cursor's line up to the cursor, all after it."""
    lines, newline, line = (before + problem["prompt"]).rpartition("\n")
    around = {"input_prefix": lines + newline, "prompt": line, "input_suffix": problem["suffix"], "input_extra": []}
    return {"id_slot": 0, **around}


def warm_up_of(body: Json) -> Json:
    """The same before the cursor's line was begun; if it is empty, before the last line was."""
    prefix = body["input_prefix"]
    if not body["prompt"]:
        prefix = "".join(prefix.splitlines(keepends=True)[:-1])
    return {**body, "input_prefix": prefix, "prompt": "", "n_predict": 0, "response_fields": [""]}


def main() -> int:
    """Ask, or score."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    asking = actions.add_parser("ask", help="let a server fill the holes")
    asking.add_argument("--url", required=True)
    asking.add_argument("--out", type=Path, required=True, help="JSON lines")
    asking.add_argument("--max-tokens", type=int, default=64)
    asking.add_argument("--prompt-tokens", type=int, default=0, help="about so many with other code; 0: the hole alone")
    asking.add_argument("--plain", action="store_true", help="without speculation")
    asking.add_argument("--limit", type=int, default=None, help="the first so many holes only")
    scoring = actions.add_parser("score", help="times, tests and equal texts")
    scoring.add_argument("answers", nargs="+", type=Path)
    scoring.add_argument("--times-only", action="store_true", help="run no tests")
    scoring.add_argument("--cut", action="store_true", help="end answers where they repeat what is after the hole")
    for action in (asking, scoring):
        action.add_argument("--data", type=Path, required=True, help="HumanEval-RandomSpanInfillingLight.jsonl.gz")
    options = parser.parse_args()
    try:
        problems = read_problems(options.data)
        if options.action == "ask":
            _ask(problems[: options.limit], options)
        else:
            _score(problems, options.answers, has_tests=not options.times_only, cuts=options.cut)
    except AuroraError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _ask(problems: Sequence[Problem], options: argparse.Namespace) -> None:
    own = own_fields(options.url, plain=options.plain, salt=secrets.token_hex(8))
    numbers = {problem["task_id"]: number for number, problem in enumerate(problems)}

    def send(problem: Problem) -> Json:
        wanted = int(options.prompt_tokens * CHARACTERS_OF_TOKEN) - len(problem["prompt"]) - len(problem["suffix"])
        body = {**own, **body_of(problem, preceding_code(numbers[problem["task_id"]], wanted))}
        if options.prompt_tokens:
            infill(options.url, warm_up_of(body))
        answer, seconds = infill(options.url, {**body, "n_predict": options.max_tokens})
        return {
            "answer": answer["content"],
            "seconds": seconds,
            "tokens": answer["tokens_predicted"],
            "prompt_tokens": answer["tokens_evaluated"],
            "read_tokens": answer["timings"]["prompt_n"],
            "ended_by": answer["stop_type"],
        }

    infill(options.url, {**own, **body_of(problems[0], "#\n"), "n_predict": 8})  # the first request is not timed
    append_answers(options.out, problems, send, clients=1)


def _score(problems: Sequence[Problem], files: Sequence[Path], *, has_tests: bool, cuts: bool) -> None:
    answers = {str(path): read_answers(path) for path in files}
    common = [problem for problem in problems if all(problem["task_id"] in found for found in answers.values())]
    first = next(iter(answers.values()))
    for name, found in answers.items():
        records = [found[problem["task_id"]] for problem in common]
        seconds = [record["seconds"] for record in records]
        p50_ms, p95_ms = (percentile_ms(seconds, percent) for percent in (50, 95))
        tokens, read, whole = (
            sum(record[key] for record in records) for key in ("tokens", "read_tokens", "prompt_tokens")
        )
        equal = sum(found[problem["task_id"]]["answer"] == first[problem["task_id"]]["answer"] for problem in common)
        limited = sum(record["ended_by"] == "limit" for record in records)
        print(
            f"{name}: whole completions p50 {p50_ms:.0f} ms, p95 {p95_ms:.0f} ms; "
            f"{tokens / sum(seconds):.1f} tokens/s, {tokens / len(common):.1f} tokens, {limited} ended by their limit; "
            f"prompts {whole / len(common):.0f} tokens, {read / len(common):.0f} of them read; "
            f"{equal} of {len(common)} texts equal {files[0]}"
        )
    if has_tests:
        wholes = {
            name: {problem["task_id"]: _whole(problem, found[problem["task_id"]]["answer"], cuts) for problem in common}
            for name, found in answers.items()
        }
        print_results(wholes, common)


def _whole(problem: Problem, answer: str, cuts: bool) -> str:
    """The function with its hole filled."""
    following = next((line for line in problem["suffix"].splitlines() if line.strip()), "")
    if cuts and following:
        answer = answer.partition(following)[0]
    return f"{problem['prompt']}{answer}{problem['suffix']}"


if __name__ == "__main__":
    sys.exit(main())
