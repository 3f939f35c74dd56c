"""Edits: whole functions rewritten over HTTP, in turn by plain decoding, with lookup, and with a prediction.

    python -m benchmarks.edits --config qwen2.5-coder-0.5b --out edits.json -- draft.checkpoint=null

The functions are --functions of --folder, of 10 to 60 lines: of Python's standard library if no folder is named. Each
comes with one of four instructions in turn: rename a variable, add a parameter, add type hints, repair a mistake that
was put into it. The answer is the whole function, greedy; the prediction is the old one. Each function and way has a
`cache_salt` of its own, and its prompt was read before by a request of one token: seconds are those of the answer.

The texts of the three ways must be equal, and the usage of a prediction must add up to its tokens (POST /tokenize):
otherwise the exit code is 1. The table gives the geometric mean of tokens a second over plain decoding, with its 95 %
interval. Small models often repeat a function as it was; the second part of the table leaves those answers out.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import secrets
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from aurora_lit.bench.load import ask, chat, exchange, interval
from aurora_lit.bench.reporting import report_console
from aurora_lit.bench.servers import free_port, running_server
from aurora_lit.config import load_config

WAYS = ("plain", "lookup", "prediction")
MISTAKES = ((" == ", " != "), (" is None", " is not None"), (" not in ", " in "), (" + 1", " - 1"), (" < ", " > "))
REPLY = "Write the whole changed function in a Python code block, and nothing else."


class Edit(NamedTuple):
    """A function, and what is to be done with it."""

    kind: str
    instruction: str
    code: str

    @property
    def block(self) -> str:
        """The function as a code block."""
        return f"```python\n{self.code}\n```"


def functions_of(folder: Path) -> Iterator[str]:
    """All functions of 10 to 60 lines in the Python files of a folder, without methods."""
    for path in sorted(folder.rglob("*.py")):
        try:
            tree = ast.parse(source := path.read_text())
        except (SyntaxError, ValueError):  # no Python of this version, or no UTF-8
            continue
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and 10 <= (node.end_lineno or 0) - node.lineno < 60:
                yield "\n".join(source.splitlines()[node.lineno - 1 : node.end_lineno])


def edit_of(code: str, kind: str) -> Edit | None:
    """An edit of this kind; None if the function has no place for it."""
    if kind == "rename":
        stored = [n.id for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
        return Edit(kind, f"Rename the variable `{stored[0]}` to `new_{stored[0]}`.", code) if stored else None
    if kind == "parameter":
        return Edit(kind, "Add a parameter `verbose=False`; if it is true, print the function's name first.", code)
    if kind == "hints":
        has_hints = " -> " in code.partition("\n")[0]
        return None if has_hints else Edit(kind, "Add type hints to the parameters and to what is returned.", code)
    right, wrong = next((pair for pair in MISTAKES if pair[0] in code), ("", ""))
    instruction = f"One `{wrong.strip()}` is a mistake and should be `{right.strip()}`: repair it."
    return Edit(kind, instruction, code.replace(right, wrong, 1)) if right else None


def make_edits(folder: Path, count: int) -> list[Edit]:
    """So many edits of different functions, the kinds in turn."""
    functions, edits = list(dict.fromkeys(functions_of(folder))), list[Edit]()
    random.Random(0).shuffle(functions)
    for code in functions:
        edit = edit_of(code, ("rename", "parameter", "hints", "fix")[len(edits) % 4])
        if edit is not None and len(edits) < count:
            edits.append(edit)
    return edits


def answer(url: str, edit: Edit, way: str, *, max_tokens: int) -> dict[str, Any]:
    """One answer, as a record of the report."""
    prompt = f"{edit.block}\n\n{edit.instruction} {REPLY}"
    how = {"temperature": 0.0, "speculate": way != "plain", "cache_salt": secrets.token_hex(8)}
    ask(url, chat(prompt, max_tokens=1, **how))
    predicted = {"prediction": {"type": "content", "content": edit.block}} if way == "prediction" else {}
    got = ask(url, chat(prompt, max_tokens=max_tokens, **how, **predicted))
    used = list(got.usage.get("completion_tokens_details", {}).values())
    rounds = got.tokens - got.speculation["num_accepted_draft_tokens"]  # each has a token of the target's own
    return {"tokens": got.tokens, "rounds": rounds, "seconds": got.seconds, "text": got.text, "used": used}


def rows_of(records: list[dict[str, dict[str, Any]]], group: str) -> Iterator[list[str]]:
    """The table's rows for some functions."""
    for way in WAYS:
        ratio, low, high = interval([each["plain"]["seconds"] / each[way]["seconds"] for each in records])
        tokens, rounds, seconds = (sum(each[way][name] for each in records) for name in ("tokens", "rounds", "seconds"))
        cells = [f"{ratio:.2f}", f"{low:.2f}–{high:.2f}", f"{tokens / seconds:.0f}", f"{tokens / rounds:.2f}"]
        yield [group, way, *cells, str(len(records))]


def main() -> int:
    """Measure and print; exit code 1 if texts differ or the usage of a prediction does not add up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--folder", type=Path, default=Path(os.__file__).parent)
    parser.add_argument("--functions", type=int, default=60)
    parser.add_argument("--max-tokens", type=int, default=1024)
    parser.add_argument("--out", type=Path, help="also write all answers as JSON")
    parser.add_argument("overrides", nargs="*", help="key=value for the server, after `--`")
    options = parser.parse_args()
    edits, records, faults = make_edits(options.folder, options.functions), [], 0
    with tempfile.TemporaryDirectory() as scratch:
        config = load_config(options.config, ["learn.enabled=false", f"checkpoint.dir={scratch}", *options.overrides])
        config = replace(config, server=replace(config.server, port=free_port()))
        with running_server(config, Path(scratch) / "server.log") as url:
            for number, edit in enumerate(edits):
                turns = WAYS[number % 3 :] + WAYS[: number % 3]
                found = {way: answer(url, edit, way, max_tokens=options.max_tokens) for way in turns}
                tokenized = exchange(url, "/tokenize", {"prompt": edit.block, "add_special_tokens": False})[1]
                faults += len({each["text"] for each in found.values()}) > 1
                faults += sum(found["prediction"]["used"]) != json.loads(tokenized[0][1])["count"]
                records.append({**found, "edit": edit._asdict()})
                print(number, edit.kind, *(f"{found[way]['seconds']:.2f}" for way in WAYS), flush=True)
    changed = [record for record in records if record["edit"]["code"] not in record["plain"]["text"]]
    table = Table("functions", "way", "over plain", "95 % interval", "tokens/s", "tokens a round", "answers")
    for group, members in (("all", records), ("changed", changed)):
        for row in rows_of(members, group) if members else ():
            table.add_row(*row)
    report_console().print(table)
    print(f"{faults} faults: answers that differ, or a usage that does not add up")
    if options.out:
        options.out.write_text(json.dumps(records, indent=1) + "\n")
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
