"""Requests out of a git repository's history: what people who wrote it would have asked a coding model.

    requests = repository_requests(Path("."), seed=0, most_commits=300)
    train = [each for each in requests if not each.is_held_out]

Oldest commit first. Of each changed source file at most one hole at a place that the commit changes, with the file as
it became before and after it, and one other request: an edit (the old function and the commit's message, answered by a
whole function), a docstring, a question, or an agent's turn with the file in its prompt. Every `held_out_every`-th
commit is held out whole. Which places are taken depends on `seed` and history alone.

Leaves out sending them (load.py) and what is compared (repository.py). Functions of Python are found by its parser,
those of other languages by their braces.
"""

from __future__ import annotations

import ast
import random
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from aurora_lit.errors import ConfigError

Kind = Literal["hole", "edit", "docstring", "question", "agent"]
LANGUAGES = {
    "py": "python", "js": "javascript", "jsx": "jsx", "ts": "typescript", "tsx": "tsx", "go": "go", "rs": "rust",
    "c": "c", "h": "c", "cc": "cpp", "cpp": "cpp", "hpp": "cpp", "java": "java", "kt": "kotlin", "swift": "swift",
    "cs": "csharp", "php": "php", "scala": "scala", "dart": "dart", "zig": "zig",
}  # fmt: skip
"""By suffix, the files that are read."""
_FOREIGN = re.compile(r"(^|/)(vendor|vendored|node_modules|third_party|dist|build|generated|testdata)/|\.min\.|_pb2\.")
_MOST_BYTES = 200_000
_FILES_OF_COMMIT = 2
_HOLE_LINES = 8
"""Longest change of which a hole is made."""
_PREFIX_LINES, _SUFFIX_LINES, _AGENT_LINES = 120, 60, 120
_FUNCTION_LINES = range(4, 61)
_TOKENS: dict[Kind, int] = {"hole": 48, "edit": 256, "docstring": 96, "question": 128, "agent": 160}
_HUNK = re.compile(r"^@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class RepositoryRequest:
    """A request that somebody who made this commit could have sent."""

    commit: str
    path: str
    kind: Kind
    is_held_out: bool
    body: dict[str, Any]
    """Of POST /v1/completions with `suffix` for a hole, of /v1/chat/completions for the others."""


class _Change(NamedTuple):
    """A changed place of a file; lines count from 1."""

    path: str
    old: str
    new: str
    old_line: int
    new_line: int
    added: int


def repository_requests(
    folder: Path, *, seed: int = 0, most_commits: int = 300, held_out_every: int = 5
) -> list[RepositoryRequest]:
    """Requests of the newest commits that are no merges. Raises ConfigError if `folder` has no usable history."""
    commits = _git(folder, "rev-list", "--no-merges", f"--max-count={most_commits}", "HEAD").split()[::-1]
    requests: list[RepositoryRequest] = []
    for place, commit in enumerate(commits):
        choose = random.Random(f"{seed} {commit}")
        message = _git(folder, "log", "-1", "--format=%s", commit).strip()
        is_held_out = place % held_out_every == held_out_every - 1
        for change in _changes(folder, commit, choose):
            for kind, body in _bodies(change, message, choose):
                requests.append(
                    RepositoryRequest(commit=commit, path=change.path, kind=kind, is_held_out=is_held_out, body=body)
                )
    if not any(each.is_held_out for each in requests) or all(each.is_held_out for each in requests):
        raise ConfigError(
            f"{folder} has {len(commits)} commits without merges, of which {len({r.commit for r in requests})} change "
            f"source files that are read (*.{', *.'.join(LANGUAGES)}); name a repository with more history"
        )
    return requests


def _git(folder: Path, *words: str) -> str:
    """What git prints. Raises ConfigError if it fails or is not there."""
    command = ["git", "-C", str(folder), "-c", "core.quotePath=false", *words]
    try:
        done = subprocess.run(command, capture_output=True, check=True)
    except FileNotFoundError as error:
        raise ConfigError("git is not installed; the history of a repository is read by it") from error
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode(errors="replace").strip()
        raise ConfigError(f"{folder}: git {words[0]} failed ({said}); name the folder of a git repository") from error
    return done.stdout.decode(errors="replace")


def _changes(folder: Path, commit: str, choose: random.Random) -> Iterator[_Change]:
    """One changed place of some of the source files that a commit changes."""
    tree = ("diff-tree", "-r", "--no-commit-id", "--diff-filter=M", "--no-renames")
    names = _git(folder, *tree, "--name-only", "-z", commit).split("\0")
    paths = [name for name in names if name.rpartition(".")[2] in LANGUAGES and not _FOREIGN.search(name)]
    for path in sorted(choose.sample(paths, min(len(paths), _FILES_OF_COMMIT))):
        hunks = _HUNK.findall(_git(folder, *tree, "--unified=0", "-p", commit, "--", path))
        if not hunks:  # of a binary file, or of its mode alone
            continue
        old, new = (_git(folder, "show", f"{name}:{path}") for name in (f"{commit}^", commit))
        if max(len(old), len(new)) > _MOST_BYTES or "\0" in new:
            continue
        old_line, _, new_line, added = choose.choice(hunks)
        yield _Change(path, old, new, int(old_line), int(new_line), int(added or 1))


def _bodies(change: _Change, message: str, choose: random.Random) -> Iterator[tuple[Kind, dict[str, Any]]]:
    """The requests of a changed place."""
    lines = change.new.splitlines(keepends=True)
    if 0 < change.added <= _HOLE_LINES:
        first = change.new_line - 1
        line = lines[first]
        indent = line[: len(line) - len(line.lstrip())].rstrip("\n")
        after = lines[first + change.added :][:_SUFFIX_LINES]
        prompt = "".join(lines[max(0, first - _PREFIX_LINES) : first]) + indent
        if prompt.strip() and "".join(lines[first : first + change.added]).strip():
            suffix = "\n" + "".join(after)
            yield "hole", {"prompt": prompt, "suffix": suffix, "max_tokens": _TOKENS["hole"]}
    kind: Kind = choose.choice(get_args(Kind)[1:])
    text, at = (change.old, change.old_line) if kind == "edit" else (change.new, change.new_line)
    language = LANGUAGES[change.path.rpartition(".")[2]]
    if kind == "agent":
        start = max(0, at - 1 - _AGENT_LINES // 2)
        shown = "".join(lines[start : start + _AGENT_LINES])
        system = "You are a coding agent. You get a file and a task. Say which lines to change, then show them."
        user = f"{change.path}, lines {start + 1} on:\n```{language}\n{shown}```\nTask: {message}"
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        yield kind, {"messages": messages, "max_tokens": _TOKENS[kind]}
    elif function := enclosing_function(text, at, language):
        task = {
            "edit": f"{message}\n\nChange this function of {change.path} so. Answer with the whole function only.",
            "docstring": f"Write the documentation comment of this function of {change.path}.",
            "question": f"What does this function of {change.path} do, and with which inputs does it fail?",
        }[kind]
        messages = [{"role": "user", "content": f"{task}\n```{language}\n{function}```"}]
        yield kind, {"messages": messages, "max_tokens": _TOKENS[kind]}


def enclosing_function(text: str, line: int, language: str) -> str:
    """The innermost function around a line, which counts from 1; "" if there is none of 4 to 60 lines."""
    lines = text.splitlines(keepends=True)
    spans = _python_functions(text) if language == "python" else _brace_functions(lines)
    around = [span for span in spans if span[0] <= line <= span[1] and span[1] - span[0] + 1 in _FUNCTION_LINES]
    if not around:
        return ""
    start, end = min(around, key=lambda span: span[1] - span[0])
    return "".join(lines[start - 1 : end]).rstrip("\n") + "\n"


def _python_functions(text: str) -> list[tuple[int, int]]:
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        return []
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    return [(min([n.lineno, *(d.lineno for d in n.decorator_list)]), n.end_lineno or n.lineno) for n in functions]


def _brace_functions(lines: list[str]) -> list[tuple[int, int]]:
    """Blocks that open with a parenthesis before the brace and close on a line as far indented."""
    spans, opened = list[tuple[int, int]](), dict[str, int]()
    for number, line in enumerate(lines, start=1):
        indent = line[: len(line) - len(line.lstrip())]
        bare = line.strip()
        if bare.startswith("}") and indent in opened:
            spans.append((opened.pop(indent), number))
        elif bare.endswith("{") and "(" in bare and not re.match(r"(if|for|while|switch|else|match)\b", bare):
            opened[indent] = number
    return spans
