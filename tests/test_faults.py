"""Faults that are made to see whether tests notice them (scripts/faults.py)."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from scripts import faults

SOURCE = '''"""A module."""
LIMIT = 3

class Counter:
    def add(self, number: int = 1) -> int:
        """Not a statement."""
        for _ in range(number):
            if self.total < LIMIT and not self.closed:
                self.total += 1
            else:
                continue
        return min(self.total, LIMIT)
'''


def test_every_fault_changes_one_statement_and_nothing_else() -> None:
    made = list(faults.faults_of("file.py", SOURCE))
    assert {fault.operator for fault in made} == {
        "constant", "compare", "and/or", "not", "remove", "break", "return None", "swap arguments",
    }  # fmt: skip
    statements = {(fn, faults._head(each)): each for fn, each in faults._statements(ast.parse(SOURCE), "")}
    whole = ast.unparse(ast.parse(SOURCE)).splitlines()
    for fault in made:
        lines = faults.mutated(SOURCE, statements[fault.function, fault.before], fault.after).splitlines()
        assert len(lines) == len(whole)
        assert sum(a != b for a, b in zip(lines, whole, strict=True)) == 1, fault


def test_a_fault_is_found_again_where_its_function_has_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fault = next(each for each in faults.faults_of("aurora_lit/old.py", SOURCE) if each.before == "self.total += 1")
    (tmp_path / "aurora_lit").mkdir()
    (tmp_path / "aurora_lit" / "new.py").write_text(f"import os\n{SOURCE}")
    monkeypatch.setattr(faults, "_package_files", lambda root: ["aurora_lit/new.py"])
    file, statement = faults.place_of(fault, tmp_path)
    assert (file, ast.unparse(statement)) == ("aurora_lit/new.py", "self.total += 1")
    (tmp_path / "aurora_lit" / "new.py").write_text(SOURCE.replace("+= 1", "+= 2"))
    assert faults.place_of(fault, tmp_path) is None


def test_tests_named_after_a_file_come_before_its_folders(tmp_path: Path) -> None:
    folder = tmp_path / "tests" / "ipc"
    folder.mkdir(parents=True)
    for name in ("test_page.py", "test_ring.py"):
        (folder / name).touch()
    assert faults.tests_of("aurora_lit/ipc/ring.py", tmp_path) == [
        ["tests/ipc/test_ring.py"],
        ["tests/ipc/test_page.py"],
    ]
    assert faults.tests_of("aurora_lit/ipc/inner/new.py", tmp_path) == [
        ["tests/ipc/test_page.py", "tests/ipc/test_ring.py"]
    ]


NATIVE = """#include <algorithm>
// int n = 1;
inline int least(int a, int b) {
  int n = 0;
  while (n < a && n < b) ++n;  // 1 and 2
  total += n;
  push(n, 2);
  return std::min(n, 15);
}
}
"""


def test_faults_of_native_code_change_one_line_that_stands_once(tmp_path: Path) -> None:
    made = list(faults.native_faults_of("aurora_lit/a.hpp", NATIVE))
    assert {fault.operator for fault in made} == {"constant", "<", "&&", "+=", "remove", "std::min"}
    assert {fault.after for fault in made if fault.before.startswith("while")} == {
        "while (n <= a && n < b) ++n;", "while (n < a && n <= b) ++n;", "while (n < a || n < b) ++n;",
    }  # fmt: skip
    assert [fault.before for fault in made if fault.operator == "remove"] == ["total += n;", "push(n, 2);"]
    (tmp_path / "aurora_lit").mkdir()
    (tmp_path / "aurora_lit" / "a.hpp").write_text(f"\n{NATIVE}")
    for fault in made:
        file, line, text = faults.faulty(fault, tmp_path)
        changed = [
            (n, b)
            for n, (a, b) in enumerate(zip(f"\n{NATIVE}".splitlines(), text.splitlines(), strict=True), 1)
            if a != b
        ]
        assert (file, changed) == (fault.file, [(line, fault.after)])
    (tmp_path / "aurora_lit" / "a.hpp").write_text(NATIVE + NATIVE)
    assert faults.faulty(made[0], tmp_path) is None
