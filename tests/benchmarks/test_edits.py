"""The edits that benchmarks/edits.py asks for: of whole functions, each with a place for its instruction."""

from __future__ import annotations

import ast
from pathlib import Path

from benchmarks.edits import WAYS, make_edits, rows_of

LINES = "".join(f"    total = total + {number}\n" for number in range(10))
MODULE = "".join(
    f"def f{n}(a):\n    if a == {n}:\n        return 0\n    total = 0\n{LINES}    return total\n\n\n" for n in range(8)
)


def test_edits_are_of_different_functions_and_each_instruction_fits(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(MODULE + "def short():\n    pass\n")
    (tmp_path / "no_python.py").write_text("def (")
    edits = make_edits(tmp_path, 8)
    assert [edit.kind for edit in edits] == ["rename", "parameter", "hints", "fix"] * 2
    assert len({edit.code for edit in edits}) == 8
    assert edits == make_edits(tmp_path, 8)
    for edit in edits:
        ast.parse(edit.code)
        assert (edit.code in MODULE) == (edit.kind != "fix"), "a mistake was put in"
    assert edits[0].instruction == "Rename the variable `total` to `new_total`."
    assert "`!=` is a mistake and should be `==`" in edits[3].instruction


def test_rows_compare_with_plain_decoding() -> None:
    took = {"plain": 4.0, "lookup": 2.0, "prediction": 1.0}
    record = {way: {"tokens": 40, "rounds": int(10 * took[way]), "seconds": took[way]} for way in WAYS}
    rows = list(rows_of([record, record], "all"))
    assert [row[2] for row in rows] == ["1.00", "2.00", "4.00"]
    assert [row[4:] for row in rows] == [["10", "1.00", "2"], ["20", "2.00", "2"], ["40", "4.00", "2"]]
