"""Whether the tests notice faults: mutations of the package, each run against the tests of its folder.

    python scripts/faults.py draw --seed 1 --count 150 --out faults.json
    python scripts/faults.py run faults.json --jobs 2 --out results.json

`draw` takes places of the package at random, all with the same probability, and one mutation of each. `run` puts every
fault into a copy of the tracked files and runs the tests of the folder that mirrors the file's, those named after the
file first, until one fails; slow tests and those that need a GPU or a browser are left out. A fault is known by its
function and its statement, not by its line, so `run` finds faults that were drawn from an earlier version again;
those whose statement has gone are reported as gone. A statement of the native code is a line that stands once in its
file; its faults are told apart by whether they compile, and to other code on this processor. Whether a fault that no
test notices is visible at all, a reader must say.
"""

from __future__ import annotations

import argparse
import ast
import concurrent.futures
import importlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "aurora_lit"
TIMEOUT_S = 900
"""For the tests of one folder; a fault that makes them hang is noticed."""

_SWAPPED: dict[type[ast.AST], str] = {
    ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==", ast.Is: "is not",
    ast.IsNot: "is", ast.In: "not in", ast.NotIn: "in", ast.And: "or", ast.Or: "and", ast.Add: "-", ast.Sub: "+",
    ast.Mult: "/", ast.Div: "*", ast.FloorDiv: "*", ast.Mod: "*", ast.LShift: ">>", ast.RShift: "<<",
    ast.BitAnd: "|", ast.BitOr: "&",
}  # fmt: skip


_NATIVE = (".cpp", ".hpp")
_NATIVE_SWAPPED = {
    " < ": " <= ", " <= ": " < ", " > ": " >= ", " >= ": " > ", " == ": " != ", " != ": " == ", " && ": " || ",
    " || ": " && ", " + ": " - ", " - ": " + ", " += ": " -= ", "std::min": "std::max", "std::max": "std::min",
}  # fmt: skip
_NO_NATIVE_STATEMENT = re.compile(r"#|//|template|using|static_assert|namespace|struct|class|return;|break;|continue;")
_NATIVE_EXPRESSION = re.compile(r"(\+\+|--|[\w.\[\]>-]+( [-+*|&^]?= |\())[^{}]*;|[\w.]+(\+\+|--);")
_BUILD = "from aurora_lit.kernels import build; print(build.built_library(build.compiler()))"


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One mutation of one statement."""

    file: str
    function: str
    """The function or class that holds it, such as `Engine.round`; "" at the top of a file."""
    operator: str
    before: str
    """The statement, or the head of a compound one, as ast.unparse writes it."""
    after: str


def faults_of(file: str, source: str) -> Iterator[Fault]:
    """Every fault that the operators make of a file."""
    for function, statement in _statements(ast.parse(source), ""):
        before = _head(statement)
        for operator, after in _mutations(statement):
            if after != before:
                yield Fault(file=file, function=function, operator=operator, before=before, after=after)


def native_faults_of(file: str, source: str) -> Iterator[Fault]:
    """Every fault that the operators make of a file of native code: of lines that stand once in it."""
    lines = Counter(line.strip() for line in source.splitlines())
    for line, count in lines.items():
        if count > 1 or _NO_NATIVE_STATEMENT.match(line):
            continue
        code = line.partition(" //")[0].rstrip()
        mutations = [
            (operator.strip(), code[: at.start()] + changed + code[at.end() :])
            for operator, changed in _NATIVE_SWAPPED.items()
            for at in re.finditer(re.escape(operator), code)
        ]
        for at in re.finditer(r"(?<![\w.])\d+(?![\w.])", code):
            mutations.append(("constant", code[: at.start()] + str(int(at[0]) + 1) + code[at.end() :]))
        if _NATIVE_EXPRESSION.fullmatch(code):
            mutations.append(("remove", ";"))
        for operator, after in mutations:
            yield Fault(file=file, function="", operator=operator, before=line, after=after)


def _statements(node: ast.AST, function: str) -> Iterator[tuple[str, ast.stmt]]:
    """The statements of a tree that compute something, with the function they are in."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield from _statements(child, f"{function}.{child.name}".removeprefix("."))
        elif isinstance(child, ast.stmt):
            skipped = isinstance(child, ast.Import | ast.ImportFrom | ast.Global | ast.Nonlocal | ast.Pass | ast.Assert)
            is_text = isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)
            is_for_types = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            if skipped or is_text or is_for_types or _is_log(child):
                continue
            yield function, child
            yield from _statements(child, function)
        elif isinstance(child, ast.excepthandler | ast.match_case):
            yield from _statements(child, function)


def _is_log(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and ast.unparse(statement).startswith(("_log.", "print("))


def _head(statement: ast.stmt) -> str:
    """A statement without the statements in it."""
    return ast.unparse(_without_body(statement))


def _without_body(statement: ast.stmt) -> ast.stmt:
    copy: Any = ast.parse(ast.unparse(statement)).body[0]
    for name in ("body", "orelse", "finalbody"):
        if getattr(copy, name, None):
            setattr(copy, name, [ast.Pass()] if name == "body" else [])
    if isinstance(copy, ast.Try | ast.Match):
        copy = ast.Pass()
    return copy


def _mutations(statement: ast.stmt) -> Iterator[tuple[str, str]]:
    """(operator, the mutated head) of a statement, one change each."""
    head = _without_body(statement)
    for index, node in enumerate(_expressions(head)):
        for operator, change in _changes(node):
            fresh = _without_body(statement)
            _replace(fresh, list(_expressions(fresh))[index], change)
            yield operator, ast.unparse(ast.fix_missing_locations(fresh))
    if isinstance(head, ast.Return) and head.value is not None and not _is_none(head.value):
        yield "return None", "return None"
    if isinstance(head, ast.Expr | ast.AugAssign | ast.Delete | ast.Raise):
        yield "remove", "pass"
    if isinstance(head, ast.Assign) and all(isinstance(target, ast.Attribute) for target in head.targets):
        yield "remove", "pass"
    if isinstance(head, ast.Break):
        yield "continue", "continue"
    if isinstance(head, ast.Continue):
        yield "break", "break"


def _expressions(head: ast.stmt) -> Iterator[ast.expr]:
    """The expressions of a statement's head but for annotations, raised messages and parts of f-strings."""
    if isinstance(head, ast.Raise):
        return
    pending: list[ast.AST] = [head]
    while pending:
        node = pending.pop(0)
        if isinstance(node, ast.expr):
            yield node
        if isinstance(node, ast.JoinedStr):
            continue
        for name, value in ast.iter_fields(node):
            if name not in ("annotation", "returns", "decorator_list", "ctx"):
                values = value if isinstance(value, list) else [value]
                pending += [each for each in values if isinstance(each, ast.AST)]


def _changes(node: ast.expr) -> Iterator[tuple[str, str]]:
    """(operator, new source) of one expression."""
    text = ast.unparse(node)
    if isinstance(node, ast.Compare) and type(node.ops[0]) in _SWAPPED and len(node.ops) == 1:
        yield "compare", f"{ast.unparse(node.left)} {_SWAPPED[type(node.ops[0])]} {ast.unparse(node.comparators[0])}"
    elif isinstance(node, ast.BoolOp):
        yield "and/or", f" {_SWAPPED[type(node.op)]} ".join(f"({ast.unparse(value)})" for value in node.values)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield "not", ast.unparse(node.operand)
    elif isinstance(node, ast.BinOp) and type(node.op) in _SWAPPED and not isinstance(node.left, ast.JoinedStr):
        if not (isinstance(node.op, ast.Mod) and isinstance(node.left, ast.Constant)):
            yield "arithmetic", f"({ast.unparse(node.left)}) {_SWAPPED[type(node.op)]} ({ast.unparse(node.right)})"
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield "constant", str(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield "constant", repr(node.value + 1) if isinstance(node.value, int) else repr(node.value * 2 + 1)
    elif isinstance(node, ast.IfExp):
        swapped = (ast.unparse(node.orelse), ast.unparse(node.test), ast.unparse(node.body))
        yield "if/else", "({}) if ({}) else ({})".format(*swapped)
    elif isinstance(node, ast.Call) and len(node.args) >= 2 and not any(isinstance(a, ast.Starred) for a in node.args):
        swapped_args = [node.args[1], node.args[0], *node.args[2:]]
        rest = [ast.unparse(each) for each in (*swapped_args, *node.keywords)]
        if text != (after := f"{ast.unparse(node.func)}({', '.join(rest)})"):
            yield "swap arguments", after
    elif isinstance(node, ast.Call) and node.keywords and all(each.arg for each in node.keywords):
        rest = [ast.unparse(each) for each in (*node.args, *node.keywords[:-1])]
        yield "drop argument", f"{ast.unparse(node.func)}({', '.join(rest)})"


def _replace(tree: ast.AST, old: ast.expr, text: str) -> None:
    new = ast.parse(text, mode="eval").body
    for node in ast.walk(tree):
        for name, value in ast.iter_fields(node):
            if value is old:
                setattr(node, name, new)
            elif isinstance(value, list):
                setattr(node, name, [new if each is old else each for each in value])


def _is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def draw(seed: int, count: int) -> list[Fault]:
    """`count` faults of the package, at most one of a statement."""
    pool = [
        fault
        for file in _package_files(ROOT)
        for fault in (native_faults_of if file.endswith(_NATIVE) else faults_of)(file, (ROOT / file).read_text())
    ]
    random.Random(seed).shuffle(pool)
    chosen: dict[tuple[str, str, str], Fault] = {}
    for fault in pool:
        if len(chosen) < count:
            chosen.setdefault((fault.file, fault.function, fault.before), fault)
    return list(chosen.values())


def _package_files(root: Path) -> list[str]:
    kinds = [f"{PACKAGE}/*{suffix}" for suffix in (".py", *_NATIVE)]
    listed = subprocess.run(["git", "ls-files", *kinds], cwd=root, capture_output=True, text=True, check=True)
    return sorted(file for file in listed.stdout.split() if (root / file).exists())


def place_of(fault: Fault, root: Path) -> tuple[str, ast.stmt] | None:
    """The file and the statement that a fault changes today; None: it has gone, or there are several."""
    files = [file for file in _package_files(root) if not file.endswith(_NATIVE)]
    same_file = [fault.file] if fault.file in files else []
    for candidates, same_function in ((same_file, True), (files, True), (same_file, False), (files, False)):
        found = [
            (file, statement)
            for file in candidates
            for function, statement in _statements(ast.parse((root / file).read_text()), "")
            if (function.split(".")[-1] == fault.function.split(".")[-1] or not same_function)
            and _head(statement) == fault.before
        ]
        if found and (len(found) == 1 or same_function):
            return found[0]
    return None


def mutated(source: str, statement: ast.stmt, after: str) -> str:
    """The source of a file with the head of one statement replaced, as ast.unparse writes it."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        for name, value in ast.iter_fields(node):
            for index, each in enumerate(value if isinstance(value, list) else ()):
                same = isinstance(each, ast.stmt) and (each.lineno, each.col_offset) == (
                    statement.lineno, statement.col_offset)  # fmt: skip
                if same and type(each) is type(statement):
                    new: Any = ast.parse(after if _is_whole(each) else _in_loop(after)).body[0]
                    if not _is_whole(each):
                        new = new.body[0]
                    for body in ("body", "orelse", "finalbody"):
                        if hasattr(each, body) and hasattr(new, body):
                            setattr(new, body, getattr(each, body))
                    getattr(node, name)[index] = new
                    return ast.unparse(ast.fix_missing_locations(tree))
    raise AssertionError("the statement was found in this source")


def faulty(fault: Fault, root: Path) -> tuple[str, int, str] | None:
    """The file that a fault changes today, the line, and the file's text with the fault; None: it has gone."""
    if fault.file.endswith(_NATIVE):
        lines = (root / fault.file).read_text().splitlines() if (root / fault.file).exists() else []
        places = [number for number, line in enumerate(lines) if line.strip() == fault.before]
        if len(places) != 1:
            return None
        lines[places[0]] = fault.after
        return fault.file, places[0] + 1, "\n".join([*lines, ""])
    place = place_of(fault, root)
    if place is None:
        return None
    file, statement = place
    return file, statement.lineno, mutated((root / file).read_text(), statement, fault.after)


def _is_whole(statement: ast.stmt) -> bool:
    return not isinstance(statement, ast.Break | ast.Continue)


def _in_loop(text: str) -> str:
    return f"while True:\n    {text}"


def tests_of(file: str, root: Path) -> list[list[str]]:
    """The tests to run for a file of the package, in the order to run them: those with its name, then its folder's."""
    path = Path(file).relative_to(PACKAGE)
    folder = root / "tests" / path.parent
    while not any(folder.glob("test_*.py")):
        folder = folder.parent
    found = sorted(str(each.relative_to(root)) for each in folder.glob("test_*.py"))
    stem = path.stem if path.stem not in ("__init__", "__main__") else path.parent.name
    named = [each for each in found if stem.rstrip("s") in Path(each).stem]
    return [group for group in (named, [each for each in found if each not in named]) if group]


def run_one(fault: Fault, copy: Path) -> dict[str, Any]:
    """Put a fault into a copy of the project, run the tests until one fails, and take it out again."""
    place = faulty(fault, copy)
    if place is None:
        return {**asdict(fault), "outcome": "gone"}
    file, line, text = place
    path, library = copy / file, None
    source = path.read_text()
    started = time.monotonic()
    result: dict[str, Any] = {**asdict(fault), "now_in": file, "line": line, "outcome": "escaped"}
    try:
        original = _library(copy) if file.endswith(_NATIVE) else None
        path.write_text(text)
        if original is not None:
            library = _library(copy)
            if library is None or library.read_bytes() == original.read_bytes():
                return {**result, "outcome": "does not compile" if library is None else "same code"}
        for tests in tests_of(file, copy):
            noticed = _failure(tests, copy)
            if noticed is not None:
                result.update(outcome="caught", by=noticed)
                break
    finally:
        path.write_text(source)
        if library is not None:
            library.unlink()
    return {**result, "seconds": round(time.monotonic() - started, 1)}


def _library(copy: Path) -> Path | None:
    """The native code of a copy, compiled; None: it cannot be."""
    command = [sys.executable, "-c", _BUILD]
    built = subprocess.run(
        command, cwd=copy, env={**os.environ, "PYTHONPATH": str(copy)}, capture_output=True, text=True
    )
    return None if built.returncode else Path(built.stdout.split()[-1])


def _failure(tests: list[str], copy: Path) -> str | None:
    """The first test that fails; None: all pass."""
    output = copy / ".output"
    child = os.fork()
    if child == 0:
        _run_tests(tests, copy, output)
    until = time.monotonic() + TIMEOUT_S
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() > until:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return "timeout"
        time.sleep(0.05)
    code = os.waitstatus_to_exitcode(ended[1])
    if code in (0, 5):  # 5: this folder's tests are all left out
        return None
    lines = [line for line in output.read_text().splitlines() if line.startswith(("FAILED", "ERROR"))]
    return lines[0][:200] if lines else f"pytest ended with {code}"


def _run_tests(tests: list[str], copy: Path, output: Path) -> NoReturn:
    """In a forked process: pytest, and the end of the process."""
    os.setpgid(0, 0)
    os.chdir(copy)
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(PYTHONPATH=str(copy), PYTHONDONTWRITEBYTECODE="1")
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(copy))
    import pytest

    options = ["-n", "0", "-x", "-q", "--no-header", "-p", "no:cacheprovider"]
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # for what is imported already
    code = 1
    try:
        code = int(pytest.main([*options, "-m", "not slow and not gpu and not browser", *tests]))
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


_copy_of_worker: Path


def _prepare(scratch: str) -> None:
    """In a worker process: its copy of the project, and the libraries that nearly all tests import."""
    global _copy_of_worker
    _copy_of_worker = _copy(Path(scratch) / str(os.getpid()))
    os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive")  # as in tests/conftest.py
    for library in ("torch", "transformers"):
        importlib.import_module(library)


def _run_in_worker(fault: Fault) -> dict[str, Any]:
    return run_one(fault, _copy_of_worker)


def run(faults: list[Fault], *, jobs: int, out: Path) -> list[dict[str, Any]]:
    """Run all faults, `jobs` at a time, and write what came of each as soon as it is known."""
    results: list[dict[str, Any]] = json.loads(out.read_text()) if out.exists() else []
    done = {Fault(**{field.name: result[field.name] for field in fields(Fault)}) for result in results}
    pending = [fault for fault in faults if fault not in done]
    forking = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as scratch:
        made = {"max_workers": jobs, "mp_context": forking, "initializer": _prepare, "initargs": (scratch,)}
        with concurrent.futures.ProcessPoolExecutor(**made) as pool:
            for future in concurrent.futures.as_completed([pool.submit(_run_in_worker, fault) for fault in pending]):
                result = future.result()
                results.append(result)
                out.write_text(json.dumps(results, indent=1))
                what = f"{result['outcome']} {result['file']} {result['before'][:60]!r}"
                print(f"{len(results)}/{len(faults)} {what}", flush=True)
    return results


def _copy(folder: Path) -> Path:
    """A copy of the tracked files that is a repository of its own, so that `git ls-files` works in it."""
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for file in files.split("\0"):
        if file and (ROOT / file).exists():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / file, folder / file)
    subprocess.run("git init -q && git add -A", shell=True, cwd=folder, check=True)
    return folder


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    drawing = commands.add_parser("draw", help="draw faults from the package as it is")
    drawing.add_argument("--seed", type=int, required=True)
    drawing.add_argument("--count", type=int, default=150)
    drawing.add_argument("--out", type=Path, required=True)
    running = commands.add_parser("run", help="run faults against the tests of their folders")
    running.add_argument("faults", type=Path)
    running.add_argument("--jobs", type=int, default=2)
    running.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if options.command == "draw":
        faults = draw(options.seed, options.count)
        options.out.write_text(json.dumps([asdict(fault) for fault in faults], indent=1))
        print(f"{len(faults)} faults in {len({fault.file for fault in faults})} files")
        return
    results = run(
        [Fault(**each) for each in json.loads(options.faults.read_text())], jobs=options.jobs, out=options.out
    )
    print(dict(Counter(result["outcome"] for result in results)))


if __name__ == "__main__":
    main()
