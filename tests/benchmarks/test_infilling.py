"""Benchmarks of filled holes: requests as llama.vim divides a file, the keys of the typist, and cancelled requests."""

from __future__ import annotations

import random
import socket
from pathlib import Path

import pytest

from benchmarks.infilling import body_of, infill, preceding_code, warm_up_of
from benchmarks.typist import Asked, body_at, chunks_of, keys_of, print_report

HOLE = {"task_id": "Test/0", "prompt": "def f(x):\n    return", "suffix": " + 1\n"}
CODE = "def f(x):\n    if x:\n        return 1\n\n    return 2\n"


def test_a_hole_is_sent_as_lines_before_it_and_its_line() -> None:
    body = body_of(HOLE, "import os\n")
    assert body["input_prefix"] + body["prompt"] == "import os\ndef f(x):\n    return"
    assert (body["prompt"], body["input_suffix"]) == ("    return", " + 1\n")
    assert warm_up_of(body)["input_prefix"] == "import os\ndef f(x):\n", "its line is not begun yet"
    at_a_line = body_of({**HOLE, "prompt": "def f(x):\n"}, "import os\n")
    assert warm_up_of(at_a_line)["input_prefix"] == "import os\n", "or the line before it is not"


def test_preceding_code_is_whole_lines_that_differ() -> None:
    texts = [preceding_code(number, 3000) for number in range(164)]
    assert len(set(texts)) == len(texts)
    assert all(2800 < len(text) <= 3000 and text.endswith("\n") for text in texts)
    assert preceding_code(0, 0) == ""


def test_keys_type_the_text_and_come_again_with_their_seed() -> None:
    keys = list(keys_of(CODE, random.Random(1)))
    assert "".join(key.text for key in keys) == CODE
    assert [key.text for key in keys if "\n" in key.text] == ["\n    ", "\n        ", "\n", "\n    ", "\n"]
    assert keys == list(keys_of(CODE, random.Random(1)))
    assert keys != list(keys_of(CODE, random.Random(2)))


def test_the_cursor_divides_a_file_as_in_llama_vim() -> None:
    body = body_at("a\n    b = ", "c\nd", [])
    fields = ("input_prefix", "prompt", "input_suffix", "n_indent")
    assert [body[name] for name in fields] == ["a\n", "    b = ", "c\nd\n", 4]
    assert [body_at("a\n    ", "\nd", [])[name] for name in fields] == ["a\n", "", "\nd\n", 0], "a line of blanks"
    long = body_at("x\n" * 900, "\n" + "y\n" * 900, [])
    assert (long["input_prefix"].count("x"), long["input_suffix"].count("y")) == (256, 64)


def test_chunks_are_of_the_folders_other_files(tmp_path: Path) -> None:
    for name in ("a.py", "b.py", "c.py", "d.txt"):
        (tmp_path / name).write_text(f"{name}\n" * 100)
    chunks = chunks_of(tmp_path / "a.py", 4, random.Random(0))
    assert {chunk["filename"] for chunk in chunks} == {"b.py", "c.py"}
    assert {chunk["text"].count("\n") for chunk in chunks} == {32}


def test_what_was_cancelled_counts_as_late(capsys: pytest.CaptureFixture[str]) -> None:
    timings = {"timings/prompt_n": 10, "timings/predicted_n": 20}
    quick, slow = (Asked(0, 2.0, seconds, timings) for seconds in (0.2, 0.7))
    print_report([quick, quick, slow, Asked(0, 0.6, None, {}), Asked(0, 3.0, None, {}), Asked(0, 0.1, None, {})])
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [
        "6 completions asked for, 3 answered, 3 cancelled",
        "within 500 ms: 2 of 5 pauses, 40%",
        "within 1000 ms: 3 of 4 pauses, 75%",
    ]
    assert lines[3:5] == ["p50: 200 ms", "p95: cancelled"]


def test_a_request_that_takes_too_long_is_cancelled() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        with pytest.raises(TimeoutError):
            infill(f"http://127.0.0.1:{server.getsockname()[1]}", {}, timeout_s=0.05)
        connection, _ = server.accept()
        with connection:
            while connection.recv(65536):
                pass  # until the end: it has been closed
